"""A U-Net cut at a skip connection: full and shallow steps, their cost, and both as graphs.

A full step also returns what flows into the up layer that takes skip `branch`, before that skip is
put to it: the features (B, C', H', W'). A shallow step runs the down layers that make skips
0..branch and the up layers that take them, on features of an earlier step. Skip 0 is the input
convolution's. The embeddings of timestep and text, and ControlNet residuals of those skips, are new
in every step.

B batch (guidance doubles it), C channels, H W latent size, S text tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from hcf.errors import HcfError, RecipeError
from hcf.feature_cache.schedule import full_steps
from hcf.settings import FeatureCacheConfig

RESIDUALS = "down_block_additional_residuals"
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class CacheCost:
    """Operations (FLOP, two a multiply-add) of one full and one shallow step of a U-Net."""

    full_flop: int
    shallow_flop: int

    @property
    def shallow_ratio(self) -> float:
        """A shallow step's share of a full one's operations."""
        return self.shallow_flop / self.full_flop

    def speedup(self, config: FeatureCacheConfig, steps: int) -> float:
        """Operations without the cache over those with it, for one image: an upper bound."""
        full = len(full_steps(config, steps))
        return steps / (full + (steps - full) * self.shallow_ratio)


def step_cost(
    unet: Any, branch: int = 0, height: int = 0, width: int = 0, text_length: int = 77
) -> CacheCost:
    """Counted with torch's FLOP counter on a copy without memory, at batch 1.

    `height`, `width` are of the latents; 0 is the U-Net's own sample size.
    """
    from torch.utils.flop_counter import FlopCounterMode

    require_cuttable(unet, branch)
    config = unet.config
    own = config.sample_size if isinstance(config.sample_size, int | list | tuple) else 64
    sides = (own, own) if isinstance(own, int) else tuple(own)
    with torch.device("meta"), torch.no_grad():
        twin = UNet2DConditionModel.from_config(config).eval()
        sample = torch.empty(1, config.in_channels, height or sides[0], width or sides[1])
        arguments = (sample, torch.ones(1), *_meta_conditioning(config, text_length))
        found: list[int] = []
        features = None
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                _, features = run_unet(twin, *arguments, branch=branch, features=features)
            found.append(counter.get_total_flops())
    return CacheCost(*found)


def _meta_conditioning(config: Any, length: int) -> tuple[Any, ...]:
    """encoder_hidden_states to added_cond_kwargs in order, on the meta device, for `config`."""
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    cond = torch.empty(1, config.time_cond_proj_dim) if config.time_cond_proj_dim else None
    labels = None
    if config.class_embed_type == "projection":
        labels = torch.empty(1, config.projection_class_embeddings_input_dim)
    elif config.class_embed_type or config.num_class_embeds:
        labels = torch.zeros(1, dtype=torch.long)
    return torch.empty(1, length, width), labels, cond, None, None, added


def require_cuttable(unet: Any, branch: int) -> None:
    """Raises HcfError or RecipeError for a U-Net that cannot be cut at skip `branch`."""
    if not isinstance(unet, UNet2DConditionModel):
        raise HcfError(
            f"DeepCache needs a UNet2DConditionModel, not a {type(unet).__name__}",
            fix="cache first, then compile"
            if hasattr(unet, "_orig_mod")
            else "leave the cache out: transformers have no skip connections to cut at",
        )
    for block in (*unet.down_blocks, *unet.up_blocks):
        if type(block).__name__ not in BLOCKS:
            raise HcfError(
                f"DeepCache cannot cut {type(block).__name__}; it knows {', '.join(BLOCKS)}",
                fix="leave the cache out",
            )
    if unet.config.addition_embed_type == "image_hint":
        raise HcfError("DeepCache does not know U-Nets with an image hint", "leave the cache out")
    skips = _skips(unet)
    if branch >= skips or (branch == skips - 1 and unet.mid_block is None):
        raise RecipeError(
            f"cache.branch={branch}: this U-Net has {skips} skip connections, 0 to {skips - 1}"
            + ("" if branch >= skips else ", and inside the last there is nothing to leave out"),
            fix="use a lower branch; 0 saves most",
        )


def _skips(unet: Any) -> int:
    return sum(len(block.resnets) for block in unet.up_blocks)


@apply_lora_scale("cross_attention_kwargs")
def run_unet(
    unet: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Any,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
    down_block_additional_residuals: Sequence[Tensor] | None = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    *,
    branch: int = 0,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of `unet`: full without `features`, else shallow on them -> (out_sample, features).

    sample (B, C, H, W), timestep () or (B,), the rest as UNet2DConditionModel.forward, whose order
    of operations this is. Raises HcfError for arguments that it cannot be right with.
    """
    controlled = mid_block_additional_residual is not None
    _refuse(
        down_intrablock_additional_residuals is not None
        or controlled != (down_block_additional_residuals is not None),
        "a T2I-Adapter, whose residuals change the layers inside the cut",
    )
    _refuse("gligen" in (cross_attention_kwargs or {}), "GLIGEN's grounding")
    size = sample.shape[-2:]
    odd_size = any(side % 2**unet.num_upsamplers for side in size)
    if attention_mask is not None:
        attention_mask = ((1 - attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
    if encoder_attention_mask is not None:
        encoder_attention_mask = (1 - encoder_attention_mask.to(sample.dtype)) * -10000.0
        encoder_attention_mask = encoder_attention_mask.unsqueeze(1)
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0

    emb = _embedding(
        unet, sample, timestep, encoder_hidden_states, class_labels, timestep_cond,
        added_cond_kwargs or {},
    )  # fmt: skip
    cross = {
        "encoder_hidden_states": unet.process_encoder_hidden_states(
            encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        ),
        "cross_attention_kwargs": cross_attention_kwargs,
        "attention_mask": attention_mask,
        "encoder_attention_mask": encoder_attention_mask,
    }

    shallow, total = features is not None, _skips(unet)
    sample, skips = _down(unet, sample, emb, cross, branch + 1 if shallow else total)
    if down_block_additional_residuals is not None:
        pairs = zip(skips, down_block_additional_residuals, strict=False)
        skips = [skip + residual for skip, residual in pairs]
    if not shallow:
        if unet.mid_block is not None:
            sample = unet.mid_block(sample, emb, **(cross if _crosses(unet.mid_block) else {}))
        if mid_block_additional_residual is not None:
            sample = sample + mid_block_additional_residual
    cut = total - 1 - branch  # this up layer takes skip `branch`; a shallow step starts with it
    first = 0
    for block in unet.up_blocks:
        layers = len(block.resnets)
        left_out = max(0, min(layers, cut - first)) if shallow else 0
        if left_out < layers:
            own = skips[left_out - layers :]
            del skips[left_out - layers :]
            upsample_size = skips[-1].shape[2:] if odd_size and skips else None
            if first <= cut < first + layers:
                for i in range(left_out, layers):
                    if first + i == cut:
                        features = sample = sample if features is None else features
                    sample = _up_layer(block, i, sample, own.pop(), emb, cross)
                for upsampler in block.upsamplers or ():
                    sample = upsampler(sample, upsample_size)
            else:
                sample = block(
                    hidden_states=sample,
                    temb=emb,
                    res_hidden_states_tuple=tuple(own),
                    upsample_size=upsample_size,
                    **(cross if _crosses(block) else {}),
                )
        first += layers
    if unet.conv_norm_out is not None:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    assert features is not None
    return unet.conv_out(sample), features


def _embedding(
    unet: Any,
    sample: Tensor,
    timestep: Tensor | float | int,
    states: Any,
    class_labels: Tensor | None,
    timestep_cond: Tensor | None,
    added: dict[str, Any],
) -> Tensor:
    """The embedding (B, D) of timestep, class and whatever else a block gets as one vector."""
    time = unet.get_time_embed(sample=sample, timestep=timestep)
    emb: Tensor = unet.time_embedding(time, timestep_cond)
    labels = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if labels is not None:
        concatenated = unet.config.class_embeddings_concat
        emb = torch.cat([emb, labels], dim=-1) if concatenated else emb + labels
    more = unet.get_aug_embed(emb=emb, encoder_hidden_states=states, added_cond_kwargs=added)
    emb = emb if more is None else emb + more
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def _down(
    unet: Any, sample: Tensor, emb: Tensor, cross: Mapping[str, Any], count: int
) -> tuple[Tensor, list[Tensor]]:
    """sample (B, C, H, W) -> what leaves the layer of the last skip, the first `count` skips"""
    sample = unet.conv_in(sample)
    skips = [sample]
    for block in unet.down_blocks:
        layers = len(block.resnets)
        wanted = count - len(skips)
        if wanted >= layers + bool(block.downsamplers):
            arguments = cross if _crosses(block) else {}
            sample, found = block(hidden_states=sample, temb=emb, **arguments)
            skips += found
        else:
            for i in range(wanted):
                sample = _layer(block, i, sample, emb, cross)
                skips.append(sample)
    return sample, skips


def _up_layer(
    block: Any, i: int, sample: Tensor, skip: Tensor, emb: Tensor, cross: Mapping[str, Any]
) -> Tensor:
    scaled = block.resolution_idx in (0, 1) and getattr(block, "s1", None)
    _refuse(bool(scaled), "FreeU in the block that is cut (pipe.disable_freeu())")
    return _layer(block, i, torch.cat([sample, skip], dim=1), emb, cross)


def _layer(block: Any, i: int, sample: Tensor, emb: Tensor, cross: Mapping[str, Any]) -> Tensor:
    sample = block.resnets[i](sample, emb)
    if _crosses(block):
        sample = block.attentions[i](sample, **cross, return_dict=False)[0]
    return sample


def _crosses(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _refuse(found: bool, what: str) -> None:
    if found:
        raise HcfError(
            f"the feature cache cannot be right with {what}",
            fix="hcf.feature_cache.remove(pipe)",
        )


class FullStep(nn.Module):
    """A full step as a graph of tensors; `names` are those of its conditioning, in order.

    Nested arguments go by their own names, ControlNet residuals by
    down_block_additional_residuals_0.. and mid_block_additional_residual.
    """

    def __init__(
        self, unet: nn.Module, branch: int = 0, names: Sequence[str] = ("encoder_hidden_states",)
    ) -> None:
        super().__init__()
        require_cuttable(unet, branch)
        self.unet = unet
        self.branch = branch
        self.names = tuple(names)

    def forward(
        self, sample: Tensor, timestep: Tensor, *conditioning: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sample (B, C, H, W), timestep (B,), each (B, ...) -> out_sample, features (B, C', ...)"""
        arguments = _arguments(self.names, conditioning)
        out: tuple[Tensor, Tensor] = run_unet(
            self.unet, sample, timestep, **arguments, branch=self.branch
        )
        return out


class ShallowStep(FullStep):
    """A shallow step as a graph. It has the whole U-Net's weights, and uses the outer ones."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, features: Tensor, *conditioning: Tensor
    ) -> Tensor:
        """sample (B, C, H, W), timestep (B,), features (B, C', H', W') -> out_sample"""
        arguments = _arguments(self.names, conditioning)
        out: Tensor = run_unet(
            self.unet, sample, timestep, **arguments, branch=self.branch, features=features
        )[0]
        return out


def _arguments(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Flat conditioning as the keyword arguments of `run_unet`."""
    known = inspect.signature(run_unet).parameters
    arguments: dict[str, Any] = {}
    residuals: dict[int, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, tensor in zip(names, tensors, strict=True):
        base, _, index = name.rpartition("_")
        if base == RESIDUALS and index.isdigit():
            residuals[int(index)] = tensor
        elif name in known:
            arguments[name] = tensor
        else:
            added[name] = tensor
    if residuals:
        arguments[RESIDUALS] = tuple(residuals[i] for i in sorted(residuals))
    if added:
        arguments["added_cond_kwargs"] = added
    return arguments
