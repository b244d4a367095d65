"""Aspect buckets: images of nearly one shape make a batch, resized and cut as little as possible.

The rule is that of IndexKits (Tencent/HunyuanDiT): from base x base one side grows by `step` while
the other shrinks, until twice and half of base; an image goes to the bucket of the nearest ratio,
is resized to cover it and cut to it. Original size, cut and bucket are the U-Net's micro-conditions
(SDXL, arXiv 2307.01952, section 2.2).

N images, B batch of one process. Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = tuple[int, int]
Index = npt.NDArray[np.int64]
CHUNK = 1 << 20  # images whose bucket is looked for at a time


def bucket_sizes(base: int, step: int = 64) -> tuple[Size, ...]:
    """From widest to tallest. Raises ValueError when no bucket but the square fits."""
    if step < 1 or step > base // 2:
        raise ValueError(f"step={step} must lie in 1..{base // 2}, half of base={base}")
    sizes = {(base, base)}
    for i in range(1, math.ceil(base / step) + 1):
        long, short = min(base + i * step, 2 * base), max(base - i * step, base // 2)
        sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


class BucketConfig(BaseModel):
    """The rule's buckets around `base` x `base`, or only those of them in `sizes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: int = Field(gt=1)
    step: int = Field(64, gt=0)
    sizes: tuple[Size, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _sizes_of_the_rule(self) -> "BucketConfig":
        rule = bucket_sizes(self.base, self.step)
        odd = [size for size in self.sizes or () if size not in rule]
        if odd:
            raise ValueError(
                f"buckets of base {self.base} and step {self.step} have no {odd[0][0]}x{odd[0][1]}"
                f": choose sizes from {', '.join(f'{h}x{w}' for h, w in rule)}"
            )
        return self

    def chosen(self) -> tuple[Size, ...]:
        """From widest to tallest."""
        rule = bucket_sizes(self.base, self.step)
        return tuple(size for size in rule if self.sizes is None or size in self.sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Position of the bucket whose ratio is nearest to that of `size`.

    Nearest in the logarithm, so that an image and the same image turned go to turned buckets.
    """
    if min(size) < 1:
        raise ValueError(f"an image of size {size} has no ratio")
    ratio = math.log(size[0] / size[1])
    return min(
        range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio)
    )


def nearest_buckets(sizes: npt.ArrayLike, buckets: Sequence[Size]) -> Index:
    """`nearest_bucket` of all sizes (N, 2) -> (N,)"""
    sides = np.asarray(sizes)
    if len(sides) and sides.min() < 1:
        raise ValueError(f"an image of size {tuple(sides.min(axis=0).tolist())} has no ratio")
    ratios = np.log([h / w for h, w in buckets])
    found = [
        np.abs(np.log(part[:, :1] / part[:, 1:]) - ratios).argmin(axis=1)
        for part in (sides[i : i + CHUNK] for i in range(0, len(sides), CHUNK))
    ]
    return np.concatenate([np.empty(0, np.int64), *found])


def assign(sizes: npt.ArrayLike, buckets: Sequence[Size], least: int = 1) -> Index:
    """Bucket (N,) of every image, sizes (N, 2).

    Raises ValueError naming the buckets that got fewer than `least` images: the model would never
    learn these shapes. `least` is the batch of all processes for `epoch_batches`.
    """
    chosen = nearest_buckets(sizes, buckets)
    counts = np.bincount(chosen, minlength=len(buckets))
    poor = [f"{h}x{w} ({counts[i]})" for i, (h, w) in enumerate(buckets) if counts[i] < least]
    if poor:
        raise ValueError(
            f"buckets with fewer than {least} images: {', '.join(poor)}; leave them out of the "
            "buckets (their images go to the nearest), take a larger step, or add such images"
        )
    return chosen


@dataclass(frozen=True)
class Placement:
    """How an image gets to its bucket: resized as a whole, then cut at (top, left)."""

    original: Size
    resized: Size
    top: int
    left: int
    target: Size

    def time_ids(self) -> tuple[float, ...]:
        """The six micro-conditions: original size, cut, target size."""
        return tuple(float(v) for v in (*self.original, self.top, self.left, *self.target))


def place(size: Size, bucket: Size, rng: np.random.Generator | None = None) -> Placement:
    """Covers `bucket` with an image of `size`; cut in the middle, or anywhere with `rng`."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height, width = (max(b, round(s * scale)) for s, b in zip(size, bucket, strict=True))
    spare = (height - bucket[0], width - bucket[1])
    if rng is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = (int(rng.integers(0, s + 1)) for s in spare)
    return Placement(size, (height, width), top, left, bucket)


def cut(image: Image.Image, placement: Placement) -> Image.Image:
    height, width = placement.target
    resized = image.resize(placement.resized[::-1], Image.Resampling.LANCZOS)
    top, left = placement.top, placement.left
    return resized.crop((left, top, left + width, top + height))


def epoch_batches(
    assignment: Index, batch_size: int, *, seed: int, epoch: int, rank: int = 0, processes: int = 1
) -> Iterator[tuple[int, Index]]:
    """(bucket, images (B,)) of one process, for every step of an epoch.

    Every process draws the same order from (seed, epoch) and takes its part of each step's images,
    so all have the same bucket at a step and no image twice. What does not fill a step is left out;
    it is another part of the images in the next epoch.
    """
    if not 0 <= rank < processes:
        raise ValueError(f"rank={rank} must lie in 0..{processes - 1}")
    rng = np.random.default_rng([seed, epoch])
    total = batch_size * processes
    steps: list[tuple[int, Index]] = []
    for bucket in np.unique(assignment):
        images = rng.permutation(np.flatnonzero(assignment == bucket))
        full = len(images) // total * total
        steps += [(int(bucket), part) for part in images[:full].reshape(-1, total)]
    for i in rng.permutation(len(steps)):
        bucket, images = steps[i]
        yield bucket, images[rank * batch_size : (rank + 1) * batch_size]


def sampler(
    assignment: Index, weight: npt.NDArray[np.float64] | None = None
) -> Callable[[np.random.Generator, int], tuple[int, Index]]:
    """Draws for the training loop, which seeds every piece of a step: a bucket as likely as it has
    images, then `count` of its images. With weights (N,) a bucket is as likely as its images weigh,
    and an image by its weight, each time anew."""
    buckets, sizes = np.unique(assignment, return_counts=True)
    members: list[Any] = [np.flatnonzero(assignment == bucket) for bucket in buckets]
    sums = [np.cumsum(weight[rows]) for rows in members] if weight is not None else []
    mass = np.array([total[-1] for total in sums]) if sums else sizes

    def draw(rng: np.random.Generator, count: int) -> tuple[int, Index]:
        i = int(rng.choice(len(buckets), p=mass / mass.sum()))
        if sums:
            places = np.searchsorted(sums[i], rng.random(count) * sums[i][-1], "right")
            return int(buckets[i]), members[i][places]
        return int(buckets[i]), rng.choice(members[i], count, replace=count > len(members[i]))

    return draw
