"""Fusion of two text encoders into one context, with a pooled vector for the U-Net.

Each encoder passes its own LayerNorm + MLP to the context width; masked positions are replaced by a
learned padding vector per position (HunyuanDiT's practice). The form "tokens" concatenates the two
sequences (SD-A, A3, A4, C), "channels" their channels, position by position, for which both must
read the same tokens (SD-B). Pooled = [ImageCLIP projected CLS ; attention-pooled Sandwich].

B batch, S1/S2 tokens of ImageCLIP and Sandwich, D context width, P1 ImageCLIP projection width,
D2 Sandwich width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

Form = Literal["tokens", "channels"]
Encoders = Literal["both", "image_clip", "sandwich"]


def _project(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width_in), nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width)
    )


class AttentionPool(nn.Module):
    """x (B, S, D), keep (B, S) bool -> (B, D): one learned query over the kept tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        # A row with no kept token has equal scores of -1e4: finite, and masked by the caller.
        scores = self.score(x).squeeze(-1).masked_fill(~keep, -1e4)
        weights = scores.softmax(dim=-1)
        return self.out((weights[..., None] * x).sum(dim=1))


class TextFusion(ModelMixin, ConfigMixin):
    """Both encoders' states -> context, pooled.

    For ablations `encoders` leaves one encoder out and `use_pooled=False` the pooled vector. The
    left-out encoder has no tokens; in the form "channels" its half of the width stays, as padding.
    A pooled half that is left out is zero, so that one U-Net fits every choice.

    `modulate_pooled`: ImageCLIP's CLS tells of the beginning of a long text alone, and a frozen
    U-Net believes it. Pooled Sandwich, which has read it all, scales and shifts it (FiLM, Perez et
    al., arXiv 1709.07871, with one scale); new weights are zero and change nothing.
    """

    @register_to_config
    def __init__(
        self,
        clip_width: int = 1024,
        clip_projection: int = 1024,
        clip_tokens: int = 52,
        sandwich_width: int = 1024,
        sandwich_tokens: int = 128,
        context_width: int = 1024,
        form: Form = "tokens",
        encoders: Encoders = "both",
        use_pooled: bool = True,
        modulate_pooled: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("form", form, Form), ("encoders", encoders, Encoders)):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r} is not known: one of {get_args(known)}")
        if form == "channels" and clip_tokens != sandwich_tokens:
            raise ValueError(
                f"form='channels' joins the encoders position by position, and they read "
                f"{clip_tokens} and {sandwich_tokens} tokens: give both one tokenizer and one "
                "length, or use form='tokens'"
            )
        clip, sandwich = encoders != "sandwich", encoders != "image_clip"
        self.clip_proj = _project(clip_width, context_width) if clip else None
        self.sandwich_proj = _project(sandwich_width, context_width) if sandwich else None
        self.pool = AttentionPool(sandwich_width) if sandwich and use_pooled else None
        self.modulate = None
        if self.pool is not None and modulate_pooled:
            self.modulate = nn.Linear(sandwich_width, 1 + clip_projection)
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)
        self.shares = [clip * clip_tokens, sandwich * sandwich_tokens]
        shape = (sum(self.shares), context_width)
        if form == "channels":
            shape = (clip_tokens, 2 * context_width)
        self.padding = nn.Parameter(torch.randn(shape) * 0.02)

    def forward(
        self,
        clip_hidden: Tensor,
        clip_pooled: Tensor,
        clip_mask: Tensor,
        sandwich_hidden: Tensor,
        sandwich_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Context (B, S1+S2, D) or (B, S, 2D) and pooled (B, P1+D2), of states and masks (B, S).

        An encoder whose mask is all zero in a row is absent there: its part of the context is
        padding and its half of the pooled vector is zero, but for the shift of a modulated one.
        Both absent is the null condition of guidance.
        """
        clip_mask, sandwich_mask = clip_mask.bool(), sandwich_mask.bool()
        if self.config["form"] == "channels":
            axis, paddings = 2, self.padding.chunk(2, dim=1)
        else:
            axis, paddings = 1, self.padding.split(self.shares)
        context = torch.cat(
            [
                _padded(self.clip_proj, clip_hidden, clip_mask, paddings[0]),
                _padded(self.sandwich_proj, sandwich_hidden, sandwich_mask, paddings[1]),
            ],
            dim=axis,
        )
        return context, self._pooled(clip_pooled, clip_mask, sandwich_hidden, sandwich_mask)

    def lengthened(self, sandwich_tokens: int, *, modulate_pooled: bool = False) -> "TextFusion":
        """The same fusion for `sandwich_tokens` tokens of Sandwich, their padding vectors repeated;
        `modulate_pooled` is added to one that has none.

        Raises ValueError for a length below its own, and for the form "channels", where ImageCLIP
        would have to read as many.
        """
        held = self.config["sandwich_tokens"]
        if sandwich_tokens < held:
            raise ValueError(f"sandwich_tokens={sandwich_tokens} is below the fusion's {held}")
        if self.config["form"] == "channels":
            raise ValueError(
                "form='channels' joins the encoders position by position: Sandwich alone cannot "
                "read more tokens; use form='tokens'"
            )
        modulate = modulate_pooled or self.config["modulate_pooled"]
        settings = {k: v for k, v in self.config.items() if not k.startswith("_")}
        settings |= {"sandwich_tokens": sandwich_tokens, "modulate_pooled": modulate}
        fusion = type(self)(**settings)
        padding, share = self.padding.detach(), self.shares[0]
        index = torch.arange(fusion.shares[1]) % held
        padding = torch.cat([padding[:share], padding[share:][index]])
        fusion.load_state_dict({**fusion.state_dict(), **self.state_dict(), "padding": padding})
        return fusion.to(padding).train(self.training)

    def _pooled(
        self, clip_pooled: Tensor, clip_mask: Tensor, sandwich: Tensor, sandwich_mask: Tensor
    ) -> Tensor:
        """clip_pooled (B, P1), sandwich (B, S2, D2), masks (B, S) -> (B, P1+D2)"""
        if self.config["use_pooled"] and self.clip_proj is not None:
            clip = clip_pooled * clip_mask.any(1, keepdim=True).to(clip_pooled.dtype)
        else:
            clip = torch.zeros_like(clip_pooled)
        if self.pool is None:
            return torch.cat([clip, torch.zeros_like(sandwich[:, 0])], dim=1)
        pooled = self.pool(sandwich, sandwich_mask)
        there = sandwich_mask.any(1, keepdim=True).to(pooled.dtype)
        if self.modulate is not None:
            scale, shift = (self.modulate(pooled) * there).split([1, clip.shape[1]], dim=1)
            clip = clip * (1 + scale) + shift
        return torch.cat([clip, pooled * there], dim=1)


def _padded(project: nn.Module | None, hidden: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
    """hidden (B, S, D'), mask (B, S) bool, padding (S, D) -> (B, S, D); all padding without
    `project`"""
    if project is None:
        return padding.to(hidden.dtype).expand(hidden.shape[0], *padding.shape)
    states = project(hidden)
    return torch.where(mask[..., None], states, padding.to(states.dtype))


@contextmanager
def left_out(
    fusion: TextFusion, *, encoders: Encoders = "both", use_pooled: bool = True
) -> Iterator[None]:
    """Inside, `fusion` answers as without an encoder or the pooled text: the ablations of a model
    that has both. Absence is what it was trained with, by `drop_conditions`: padding and zeros."""

    def masks(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, pooled, clip_mask, sandwich, mask = inputs
        clip_mask = clip_mask * (encoders != "sandwich")
        return hidden, pooled, clip_mask, sandwich, mask * (encoders != "image_clip")

    def pooled(
        _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return output[0], output[1] * use_pooled

    hooks = fusion.register_forward_pre_hook(masks), fusion.register_forward_hook(pooled)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unet_condition(config: Mapping[str, Any], pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    """How a U-Net of `config` is given the pooled text (B, P) and the size condition (B, 6).

    The keyword arguments beside the context: for SD-A, B and C `added_cond_kwargs`, for SD-A3
    `class_labels`, for SD-A4, which pools the context itself, none.
    """
    if config["addition_embed_type"] == "text_time":
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    return {"class_labels": pooled} if config["class_embed_type"] == "projection" else {}
