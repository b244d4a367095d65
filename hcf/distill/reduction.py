"""A smaller U-Net from a teacher's: layers, stages and channels left out, all weights taken over.

Depth is block removal (BK-SDM: Kim et al., arXiv 2305.15798, section 3.1). Of n layers (a residual
block with its attention) of a down or up block the kept ones are spread evenly, the first of a down
block and the first and the last of an up block among them; an up block has one more than its down
block, as everywhere in diffusers. The middle block goes, and stages from the innermost outwards.

Width is a factor on the channels of each stage. The time embedding stays as wide as it was
(`time_embedding_dim`). All of it is a configuration that plain diffusers builds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from hcf.distill.takeover import per_stage, taken_over
from hcf.errors import RecipeError
from hcf.settings import StructureConfig

BLOCKS = frozenset(
    {"DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D",
     "UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"}
)  # fmt: skip
PER_STAGE = ("layers_per_block", "attention_head_dim", "cross_attention_dim",
             "transformer_layers_per_block", "only_cross_attention")  # fmt: skip


def reduced(denoiser: Any, spec: StructureConfig) -> nn.Module:
    """The student of `spec`, with the teacher's weights. Raises RecipeError for a denoiser that is
    no such U-Net, more depth than it has, and widths that do not divide."""
    config = reduced_config(denoiser, spec)
    student: nn.Module = type(denoiser)(**config)
    student.load_state_dict(taken_over(denoiser, student))
    return student.train(denoiser.training)


def reduced_config(denoiser: Any, spec: StructureConfig) -> dict[str, Any]:
    """The student's configuration, one that plain diffusers builds."""
    _check_kind(denoiser)
    config = {k: v for k, v in denoiser.config.items() if not k.startswith("_")}
    count = len(config["block_out_channels"])
    stages = spec.stages or count - (spec.variant == "tiny")
    if stages < 1:
        raise RecipeError("variant tiny takes away the one stage there is", fix="use variant=small")
    if stages > count:
        raise _too_deep("stages", stages, count)
    middle = config["mid_block_type"]
    if spec.middle is False or spec.middle is None and spec.variant in ("small", "tiny"):
        middle = None
    if stages < count and spec.middle:
        raise RecipeError(
            f"distill.structure.stages={stages} takes the innermost of {count} stages away, and "
            "the middle block with it",
            fix="leave distill.structure.middle out",
        )
    if stages < count:
        middle = None
    found = {name: per_stage(config[name], count)[:stages] for name in PER_STAGE}
    wanted = 1 if spec.layers is None and spec.variant else spec.layers
    layers = _depths("layers", wanted, found["layers_per_block"])
    depths = _depths(
        "transformer_layers", spec.transformer_layers, found["transformer_layers_per_block"]
    )
    found |= {"layers_per_block": layers, "transformer_layers_per_block": depths}
    down, up = config["down_block_types"][:stages], config["up_block_types"][count - stages :]
    widths = list(config["block_out_channels"])
    narrower = _widths(widths[:stages], per_stage(spec.width, stages), config["norm_num_groups"])
    found["attention_head_dim"] = [
        _heads(heads, wide, narrow, (down[i], up[stages - 1 - i], middle if i == count - 1 else ""))
        for i, (heads, wide, narrow) in enumerate(
            zip(found["attention_head_dim"], widths, narrower, strict=False)
        )
    ]
    changes = {
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": middle,
        "block_out_channels": tuple(narrower),
        **{name: _folded(values, config[name]) for name, values in found.items()},
    }
    if narrower[0] != widths[0]:
        changes["time_embedding_dim"] = denoiser.time_embedding.linear_1.out_features
    return {**config, **changes}


def _folded(values: list[Any], as_was: Any) -> Any:
    """One for all again where it was and they still agree."""
    return tuple(values) if isinstance(as_was, (list, tuple)) or len(set(values)) > 1 else values[0]


def _check_kind(denoiser: Any) -> None:
    if not isinstance(denoiser, UNet2DConditionModel):
        raise RecipeError(
            f"{type(denoiser).__name__} cannot be reduced: structure distillation knows diffusers' "
            "UNet2DConditionModel",
            fix="use a method that keeps the network, or a teacher with such a U-Net",
        )
    config: Mapping[str, Any] = denoiser.config
    types = (*config["down_block_types"], *config["up_block_types"])
    foreign = next((t for t in types if t not in BLOCKS), None)
    nested = not all(isinstance(d, int) for d in per_stage(config[PER_STAGE[3]], 1))
    if foreign or nested or config["reverse_transformer_layers_per_block"] is not None:
        what = f"{foreign} blocks" if foreign else "transformers of unequal depth in its blocks"
        raise RecipeError(
            f"a U-Net with {what} cannot be reduced", fix=f"known are {', '.join(sorted(BLOCKS))}"
        )


def _depths(name: str, wanted: int | Sequence[int] | None, found: list[int]) -> list[int]:
    if wanted is None:
        return found
    values = per_stage(wanted, len(found))
    if len(values) != len(found):
        raise RecipeError(
            f"distill.structure.{name} has {len(values)} values for {len(found)} stages",
            fix="give one value a stage, outermost first, or one for all",
        )
    for value, most in zip(values, found, strict=True):
        if value > most:
            raise _too_deep(name, values if len(values) > 1 else value, found)
    return values


def _too_deep(name: str, wanted: Any, found: Any) -> RecipeError:
    return RecipeError(
        f"distill.structure.{name}={wanted} is more than the teacher has: {found}",
        fix="structure distillation takes layers away; ask for at most as many",
    )


def _widths(widths: Sequence[int], factors: Sequence[float], groups: int | None) -> list[int]:
    if len(factors) != len(widths):
        raise RecipeError(
            f"distill.structure.width has {len(factors)} factors for {len(widths)} stages",
            fix="give one factor a stage, outermost first, or one for all",
        )
    found = []
    for wide, factor in zip(widths, factors, strict=True):
        narrow = wide * factor / (groups or 1)
        if abs(narrow - round(narrow)) > 1e-6 or not round(narrow):
            near = max(1, round(narrow)) * (groups or 1)
            raise RecipeError(
                f"distill.structure.width={factor:g} leaves {wide * factor:g} of {wide} channels, "
                f"no multiple of the {groups} groups of its norms",
                fix=f"use {near / wide:g}, {near} channels; a list gives each stage its own",
            )
        found.append(round(narrow) * (groups or 1))
    for i in range(1, len(widths)):
        if (widths[i] == widths[i - 1]) != (found[i] == found[i - 1]):
            raise RecipeError(
                f"stages {i - 1} and {i} have {widths[i - 1]} and {widths[i]} channels and would "
                f"have {found[i - 1]} and {found[i]}: stages of equal width stay so, others differ",
                fix="change their factors in distill.structure.width",
            )
    return found


def _heads(heads: int, wide: int, narrow: int, types: Iterable[str | None]) -> int:
    """`attention_head_dim` of a stage: the number of heads, of "simple" blocks a head's width."""
    attending = [t for t in types if t and "CrossAttn" in t]
    if not attending or wide == narrow:
        return heads
    simple = {"Simple" in t for t in attending}
    fewer = heads * narrow / wide
    number = narrow / heads if True in simple else heads
    if False in simple and fewer == int(fewer) and fewer >= 1:
        return int(fewer)
    if len(simple) > 1 or number != int(number) or narrow % int(number):
        raise RecipeError(
            f"{narrow} channels do not divide into attention heads: {wide} had {heads}"
            + (" channels in each" if True in simple else ""),
            fix="use another factor in distill.structure.width",
        )
    return heads
