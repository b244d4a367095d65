"""Diversity: how far apart the images of one prompt lie that were drawn from different seeds.

    D = mean over prompts p of   2 / (n_p (n_p - 1))  sum_{i < j} (1 - cos(f_i, f_j))

with f the features of frozen EfficientNet-Lite0 (`hcf.quality.features`). DMD2 reports the same
mean over pairs of one prompt with LPIPS as the distance (Yin et al., arXiv 2405.14867); no package
brings LPIPS weights, so the distance is the cosine's and values compare only with each other.
Noise and broken images are far apart too: read it beside FED and CLIP-zh, never alone.
N images, F features, P prompts, n_p images of prompt p.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hcf.errors import HcfError

Doubles = npt.NDArray[np.float64]


def pair_distances(features: npt.NDArray[np.float32], group: npt.NDArray[np.int64]) -> Doubles:
    """features (N, F), group (N,) in [0, P) -> mean distance of a prompt's pairs (P,).

    NaN for a prompt of fewer than two images. The sum over pairs needs no pair:
    |sum_i u_i|^2 = n + 2 sum_{i < j} u_i u_j of unit vectors u. Raises HcfError for features that
    are not finite or are zero, which have no direction.
    """
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if x.ndim != 2 or not np.isfinite(length).all() or (length == 0).any():
        raise HcfError(f"features of shape {x.shape} must be (N, F), finite and not zero")
    count = np.bincount(group).astype(np.float64)
    total = np.zeros((len(count), x.shape[1]))
    np.add.at(total, group, x / length)
    pairs = np.where(count > 1, count * (count - 1), np.nan)
    distances = 1 - ((total**2).sum(1) - count) / pairs
    return np.asarray(np.where(np.isnan(distances), np.nan, np.maximum(distances, 0.0)))


def diversity(each: Doubles) -> float:
    """`pair_distances` (P,) -> mean over the prompts that have one. Raises HcfError for none."""
    if np.isnan(each).all():
        raise HcfError(
            "no prompt has two images, so nothing is known of diversity",
            fix="draw several of each: check.images_per_prompt=4",
        )
    return float(np.nanmean(each))
