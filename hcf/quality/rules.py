"""Rule accuracy: does an image of the shapes world show the colour, shape, count and position asked
for? Exact, without a learned part. N images, H W pixels.

Colour, shape and count are asked of scenes with one group of equal objects. In a scene of two
objects the question is which attribute belongs to which: `pair` (both objects are as asked) and
`position` (they stand as asked) are counted there, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hcf.errors import HcfError
from hcf.quality.features import Images, check_images

ASPECTS = ("colour", "shape", "count", "pair", "position")


def rule_hits(
    images: Images, truths: Sequence[Mapping[str, Any]]
) -> dict[str, npt.NDArray[np.float64]]:
    """images (N, H, W, 3), N scenes -> {aspect: (N,) 1 right, 0 wrong, NaN where not asked for}.

    Raises HcfError for a truth that is no scene of the shapes world.
    """
    from taiji.data import rule_judge

    check_images(images)
    if len(images) != len(truths):
        raise HcfError(f"{len(images)} images but {len(truths)} truths", fix="give one truth each")
    hits = {aspect: np.full(len(images), np.nan) for aspect in ASPECTS}
    for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
        try:
            scores = rule_judge.judge(image, dict(truth))
        except ValueError as error:
            raise HcfError(f"truth {i} is no scene: {error}", "see `Scene.truth`") from error
        if truth["relation"] is None:
            for aspect in ("colour", "shape", "count"):
                hits[aspect][i] = float(bool(scores[aspect]))
        else:
            hits["pair"][i] = float(bool(scores["colour"] and scores["shape"]))
            hits["position"][i] = float(bool(scores["position"]))
    return hits


def rule_accuracy(images: Images, truths: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """images (N, H, W, 3), N scenes -> share of right images for each aspect that was asked for."""
    hits = rule_hits(images, truths)
    return {
        aspect: float(np.nanmean(values))
        for aspect, values in hits.items()
        if not np.isnan(values).all()
    }
