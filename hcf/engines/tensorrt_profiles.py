"""Optimisation profiles: which shapes a plan takes, one bucket of resolutions a profile.

A profile is {input name: [min shape, opt shape, max shape]}. TensorRT tunes its kernels for the opt
shape and refuses what lies outside of min and max, so a plan for several resolutions has several
profiles, and the runtime takes the one whose opt shape is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcf.errors import HcfError, RecipeError

Shapes = Mapping[str, Sequence[int]]
Profile = dict[str, list[list[int]]]
LATENTS = ("sample", "latents")
PIXELS = ("image", "controlnet_cond")


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one profile by input name; with `opt` alone exactly those."""

    min: Shapes = field(default_factory=dict)
    opt: Shapes = field(default_factory=dict)
    max: Shapes = field(default_factory=dict)


def add_profiles(
    builder: Any, network: Any, config: Any, ranges: Sequence[ShapeRange]
) -> list[Profile]:
    """One optimisation profile a range; returns them with every input, the static ones too.

    Raises RecipeError for shapes that are missing, not in order, or not the graph's.
    """
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    declared = {name: [int(size) for size in tensor.shape] for name, tensor in inputs.items()}
    profiles = [resolve(declared, wanted) for wanted in ranges]
    dynamic = [name for name, shape in declared.items() if -1 in shape]
    if not dynamic:
        return profiles[:1]
    for resolved in profiles:
        profile = builder.create_optimization_profile()
        for name in dynamic:
            profile.set_shape(name, *(tuple(row) for row in resolved[name]))
        if config.add_optimization_profile(profile) < 0:
            raise HcfError(
                f"TensorRT refuses the optimisation profile {resolved}",
                fix="check min, opt and max shapes",
            )
    return profiles


def resolve(declared: Shapes, wanted: ShapeRange) -> Profile:
    """(min, opt, max) of every input of a graph whose inputs have the shapes `declared`, -1 free.

    Raises RecipeError as `add_profiles`.
    """
    for given in (wanted.min, wanted.opt, wanted.max):
        if unknown := sorted(set(given) - set(declared)):
            raise RecipeError(
                f"the graph has no input {unknown[0]!r}", fix=f"its inputs: {', '.join(declared)}"
            )
    found: Profile = {}
    for name, shape in declared.items():
        opt = wanted.opt.get(name, None if -1 in shape else shape)
        if opt is None:
            raise RecipeError(
                f"input {name} has the dynamic shape {list(shape)}: it needs opt shapes",
                fix=f"give opt_shapes {name}:" + times("1" if s < 0 else s for s in shape),
            )
        rows = [list(row) for row in (wanted.min.get(name, opt), opt, wanted.max.get(name, opt))]
        fits = all(len(row) == len(shape) for row in rows) and all(
            low <= best <= high and (size == -1 or low == high == size)
            for low, best, high, size in zip(*rows, shape, strict=True)
        )
        if not fits:
            raise RecipeError(
                f"{name}: min, opt and max shapes {rows} are not in order or do not fit the "
                f"graph's {list(shape)} (-1 is free)",
                fix="min <= opt <= max in every axis",
            )
        found[name] = rows
    return found


def span(examples: Sequence[Shapes]) -> ShapeRange:
    """From the smallest to the largest of several sets of shapes, best for the first."""
    names = list(examples[0])
    rows = {name: [list(shapes[name]) for shapes in examples] for name in names}
    return ShapeRange(
        min={n: [min(axis) for axis in zip(*rows[n], strict=True)] for n in names},
        opt={n: rows[n][0] for n in names},
        max={n: [max(axis) for axis in zip(*rows[n], strict=True)] for n in names},
    )


def with_rows(shapes: Shapes, rows: int) -> dict[str, list[int]]:
    """The same shapes with another batch."""
    return {name: [rows, *list(shape)[1:]] for name, shape in shapes.items()}


def pick_profile(
    profiles: Sequence[Profile], shapes: Shapes, plan: str, pixels_per_latent: int | None = None
) -> int:
    """Index of the profile that takes `shapes` and whose opt shapes are nearest in size.

    Raises HcfError that lists the profiles where none does.
    """
    fits = [i for i, profile in enumerate(profiles) if _takes(profile, shapes)]
    if not fits:
        listed = "; ".join(describe(profiles, pixels_per_latent))
        # name what no profile takes; where each input fits somewhere, all of them
        wrong = [n for n, s in shapes.items() if not any(_takes(p, {n: s}) for p in profiles)]
        named = [n for n in wrong or shapes if len(shapes[n]) > 1] or list(shapes)
        asked = ", ".join(_size(name, shapes[name], pixels_per_latent) for name in named)
        raise HcfError(
            f"{plan} takes no input of {asked}. Its profiles: {listed}",
            fix="use a size within a profile, or build with another one: build.profiles "
            "[{resolutions: [[height, width]]}], build.max_shapes",
        )
    return min(fits, key=lambda i: _distance(profiles[i], shapes))


def describe(profiles: Sequence[Profile], pixels_per_latent: int | None = None) -> list[str]:
    """A line a profile: "0: sample 1..2 x 4 x 64..96 x 64..96 (512..768 x 512..768 pixels)"."""
    lines: list[str] = []
    for index, profile in enumerate(profiles):
        parts: list[str] = []
        for name, (low, _, high) in profile.items():
            if len(low) < 2 and len(profile) > 1:
                continue  # a timestep's batch is the sample's
            axes = [_range(a, b) for a, b in zip(low, high, strict=True)]
            parts.append(f"{name} {' x '.join(axes)}{_pixels(name, low, high, pixels_per_latent)}")
        lines.append(f"{index}: {', '.join(parts)}")
    return lines


def times(sizes: Any) -> str:
    """Sizes as TensorRT's tools write them: 1x4x64x64."""
    return "x".join(str(size) for size in sizes)


def _takes(profile: Profile, shapes: Shapes) -> bool:
    return all(
        len(shape) == len(profile[name][0])
        and all(
            low <= size <= high
            for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
        )
        for name, shape in shapes.items()
    )


def _distance(profile: Profile, shapes: Shapes) -> float:
    """How far the opt shapes are from these, in factors of size."""
    return sum(
        abs(math.log(math.prod(shape) / math.prod(profile[name][1])))
        for name, shape in shapes.items()
        if shape
    )


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"


def _pixels(name: str, low: Sequence[int], high: Sequence[int], factor: int | None) -> str:
    if name in LATENTS and factor is not None and len(low) == 4:
        sides = [_range(a * factor, b * factor) for a, b in zip(low[2:], high[2:], strict=True)]
        return f" ({' x '.join(sides)} pixels)"
    return " (pixels)" if name in PIXELS else ""


def _size(name: str, shape: Sequence[int], factor: int | None) -> str:
    return f"{name} {times(shape)}{_pixels(name, shape, shape, factor)}"
