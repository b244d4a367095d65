"""Which sizes a U-Net may have: checked before it is built, with the widths that would fit.

Group norm needs every width to divide by its groups, and attention every attended width by its
head. diffusers builds the others as well: 1248 channels and a head of 64 become 19 heads over 1216.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def check_unet(config: Mapping[str, Any]) -> None:
    """For the configuration of a U-Net: ours, which have `attention_levels`, or one of diffusers.

    Raises ValueError naming what does not fit: for a width the level and the nearest that do.
    """
    widths = list(config["block_out_channels"])
    groups = config.get("norm_num_groups", 32)
    heads = config.get("attention_head_dim", 8)
    # The size of a head, or in diffusers' CrossAttn blocks the number of heads: a divisor in both.
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if "attention_levels" in config:
        _check_own(config, len(widths))
        attended = list(config["attention_levels"])
    else:
        blocks = config.get("down_block_types", (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"))
        attended = ["Attn" in block for block in blocks]
    if "self_attention" in config:  # Efficient: up blocks end at the width of the level above
        check_widths([widths[0], *widths[:-1]], attended, groups, heads)
    elif config.get("mid_block_type", "UNetMidBlock2DCrossAttn"):
        attended[-1] = True
    check_widths(widths, attended, groups, heads)


def check_widths(
    widths: Sequence[int], attended: Sequence[bool], groups: int, head_dims: Sequence[int]
) -> None:
    """Level by level: `widths` by `groups`, and where `attended` by `head_dims`.

    Raises ValueError naming the level and the nearest widths that fit.
    """
    if not len(widths) == len(attended) == len(head_dims):
        raise ValueError(
            f"{len(widths)} widths, {len(attended)} attention levels and {len(head_dims)} head "
            "sizes: give one of each a level"
        )
    for level, (width, has_attention, head) in enumerate(
        zip(widths, attended, head_dims, strict=True)
    ):
        if width % groups:
            raise ValueError(
                f"width {width} of level {level} does not divide by the {groups} groups of group "
                f"norm: use {_nearest(width, groups)}"
            )
        if has_attention and width % head:
            raise ValueError(
                f"width {width} of level {level} is attended and does not divide by "
                f"attention_head_dim={head}: use {_nearest(width, head)}"
            )


def _nearest(width: int, unit: int) -> str:
    below = width // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _check_own(config: Mapping[str, Any], levels: int) -> None:
    layers, embedding = config["layers_per_block"], config.get("class_embed_type")
    if len(layers) != levels or min(layers) < 1:
        raise ValueError(
            f"layers_per_block={tuple(layers)} for {levels} levels: give each level at least one"
        )
    if embedding not in (None, "timestep"):
        raise ValueError(
            f"class_embed_type={embedding!r} is not known: None, or 'timestep' for the noise "
            "level of a low-resolution image"
        )


def check_size(shape: Sequence[int], levels: int) -> None:
    """Raises ValueError for a height and width that so many levels cannot halve."""
    height, width = shape[-2:]
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"height={height} and width={width} must be multiples of {factor}: the U-Net halves "
            f"them {levels - 1} times"
        )
