"""Blocks shared by the Imagen U-Net and the Efficient U-Net (Saharia et al., arXiv 2205.11487).

B batch, C channels, H W, L = H*W image tokens, S text tokens, D context width, T time width,
N heads, K head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


class TextConditioning(nn.Module):
    """text (B, S, Dt), mask (B, S) bool -> context (B, S, D), term of the time embedding (B, T)

    The paper's two ways in: pooled by attention into the time embedding, and as a sequence to
    attend to. Both are normalised by LayerNorm, which it found critical. Masked tokens have no
    part in the pooled vector; a row without any has zero for it.
    """

    def __init__(self, text_width: int, context_width: int, time_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_width, context_width)
        self.score = nn.Linear(text_width, 1)
        self.pooled_norm = nn.LayerNorm(text_width)
        self.pooled_project = nn.Linear(text_width, context_width)
        self.to_time = nn.Sequential(
            nn.LayerNorm(context_width),
            nn.Linear(context_width, time_width),
            nn.SiLU(),
            nn.Linear(time_width, time_width),
        )

    def forward(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.score(text).squeeze(-1)
        if mask is None:
            weights = scores.softmax(-1)
        else:  # finite, so that a row without text is not NaN
            weights = scores.masked_fill(~mask, -1e4).softmax(-1) * mask
        pooled = (weights[..., None] * text).sum(1)
        return self.project(text), self.to_time(self.pooled_project(self.pooled_norm(pooled)))


class Conditioning(nn.Module):
    """Timestep, text and, with `noise_level`, the level of the low-resolution image's noise."""

    def __init__(
        self, width: int, time_width: int, text_width: int, context_width: int, noise_level: bool
    ) -> None:
        super().__init__()
        self.wave = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, time_width)
        self.noise_level = TimestepEmbedding(width, time_width) if noise_level else None
        self.text_width = text_width
        self.text = TextConditioning(text_width, context_width, time_width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text: Tensor,
        mask: Tensor | None,
        noise_level: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """timestep () or (B,), text (B, S, Dt), noise_level (B,) -> time (B, T), context (B, S, D)

        Of `sample` only the batch, device and dtype count. Raises ValueError for a text of another
        width and for a noise level that is missing or not wanted.
        """
        if text.ndim != 3 or text.shape[-1] != self.text_width:
            raise ValueError(
                f"encoder_hidden_states is {tuple(text.shape)}, the U-Net reads texts of width "
                f"{self.text_width}: pass (batch, tokens, {self.text_width}) or build it with "
                f"encoder_hid_dim={text.shape[-1]}"
            )
        time = self.time(self._waves(timestep, sample))
        context, pooled = self.text(text, mask)
        time = time + pooled
        if self.noise_level is None:
            if noise_level is not None:
                raise ValueError(
                    "class_labels is a noise level, and this U-Net has no embedding for it: "
                    "leave it out, or build the U-Net with class_embed_type='timestep'"
                )
            return time, context
        if noise_level is None:
            raise ValueError("class_labels is missing: pass the noise level of the image, (batch,)")
        return time + self.noise_level(self._waves(noise_level, sample)), context

    def _waves(self, step: Tensor | float, sample: Tensor) -> Tensor:
        steps = torch.as_tensor(step, device=sample.device).reshape(-1).expand(sample.shape[0])
        return self.wave(steps).to(sample.dtype)


class ResBlock(nn.Module):
    """x (B, C, H, W), time (B, T) -> (B, C', H, W): norm, conv, norm scaled and shifted, conv.

    The second convolution starts at zero. `always_project` puts a 1x1 convolution on the shortcut
    even where the width stays (figure A.27 of the paper, the Efficient U-Net).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        time_width: int,
        groups: int,
        *,
        dropout: float = 0.0,
        always_project: bool = False,
    ) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, width_in)
        self.conv_in = nn.Conv2d(width_in, width, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * width)
        self.norm_out = nn.GroupNorm(groups, width)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(width, width, 3, padding=1))
        project = always_project or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1) if project else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_in(silu(self.norm_in(x)))
        scale, shift = self.time(silu(time))[..., None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_out(self.dropout(silu(h)))


class TextAttention(nn.Module):
    """x (B, C, H, W), context (B, S, D), mask (B, S) bool -> (B, C, H, W)

    With `self_attention` the keys of the text are appended to those of the image, so one softmax
    weighs both; without it only the text is attended to. A row with no kept token gets nothing
    from the text.
    """

    def __init__(
        self, width: int, context_width: int, head_dim: int, groups: int, self_attention: bool
    ) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.GroupNorm(groups, width)
        self.query = nn.Linear(width, width)
        self.context_norm = nn.LayerNorm(context_width)
        self.text = nn.Linear(context_width, 2 * width)
        self.image_norm = nn.GroupNorm(groups, width) if self_attention else None
        self.image = nn.Linear(width, 2 * width) if self_attention else None
        self.out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        query = self.query(_tokens(self.norm(x)))
        keys = self.text(self.context_norm(context))
        present = None
        if self.image_norm is not None and self.image is not None:
            keys = torch.cat([self.image(_tokens(self.image_norm(x))), keys], dim=1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(mask.shape[0], query.shape[1]), mask], dim=1)
        elif mask is not None:  # softmax over nothing is NaN
            present = mask.any(1)
            mask = mask | ~present[:, None]
        q, k, v = (self._split(part) for part in (query, *keys.chunk(2, dim=-1)))
        if mask is not None:  # a view; ONNX's Attention wants the length of the queries
            mask = mask[:, None, None, :].expand(-1, -1, q.shape[2], -1)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out(y.transpose(1, 2).flatten(2))
        if present is not None:
            y = y * present[:, None, None]
        return x + y.transpose(1, 2).reshape(x.shape)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, N, L, K)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """A residual block and, where there is one, its attention: the unit of checkpointing."""

    _gradient_checkpointing_func: Any  # set with `gradient_checkpointing` by diffusers' ModelMixin

    def __init__(self, resnet: ResBlock, attention: TextAttention | None) -> None:
        super().__init__()
        self.resnet = resnet
        self.attention = attention
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._compute, x, time, context, mask)
        return self._compute(x, time, context, mask)

    def _compute(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.resnet(x, time)
        return x if self.attention is None else self.attention(x, context, mask)


@dataclass(frozen=True)
class LayerSizes:
    """What all layers of one U-Net have in common."""

    time_width: int
    context_width: int
    head_dim: int
    groups: int
    dropout: float
    self_attention: bool = True
    always_project: bool = False

    def layer(self, width_in: int, width: int, attended: bool) -> Layer:
        attention = None
        if attended:
            attention = TextAttention(
                width, self.context_width, self.head_dim, self.groups, self.self_attention
            )
        resnet = ResBlock(
            width_in,
            width,
            self.time_width,
            self.groups,
            dropout=self.dropout,
            always_project=self.always_project,
        )
        return Layer(resnet, attention)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C)"""
    return x.flatten(2).transpose(1, 2)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at zero: a branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
