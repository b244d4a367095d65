"""95 % intervals of a set of images, and of what two sets differ by: a bootstrap over prompts.

Prompts are resampled, with all their images (Efron and Tibshirani 1993, chapter 8): images of one
prompt are no independent draws. Sets of the same prompts and seed get the same resamples, so that
the ratio of two sets has an interval of its own, far narrower than either's: what makes a prompt
hard is hard for both. R resamples, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
RESAMPLES = 500
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate between the bounds of `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One metric of a candidate and its baseline, and what lies between them.

    `ratio` is candidate over baseline, None where the baseline's interval reaches 0; `difference`
    is candidate minus baseline.
    """

    baseline: Interval
    candidate: Interval
    ratio: Interval | None
    difference: Interval


def resample(prompts: int, *, seed: int, resamples: int = RESAMPLES) -> Doubles:
    """How often each prompt is in each resample (R, P); a row sums to P."""
    rng = np.random.default_rng([seed, prompts])
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples).astype(np.float64)


def mean_draws(each: Doubles, group: npt.NDArray[np.int64], weights: Doubles) -> Doubles:
    """Values (N,) of images or prompts, group (N,) in [0, P), weights (R, P) -> means (R,).

    A value that is NaN was not asked for; a resample without any is NaN.
    """
    asked = ~np.isnan(each)
    prompts = weights.shape[1]
    total = np.bincount(group[asked], each[asked], prompts)
    count = np.bincount(group[asked], minlength=prompts).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights @ total) / (weights @ count))


def interval(value: float, draws: Doubles) -> Interval | None:
    """The percentile interval of the draws (R,); None where most of them are undefined."""
    known = draws[np.isfinite(draws)]
    if 2 * len(known) < len(draws) or not len(known):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def pair(
    baseline: Mapping[str, float],
    candidate: Mapping[str, float],
    baseline_draws: Mapping[str, Doubles],
    candidate_draws: Mapping[str, Doubles],
) -> dict[str, Paired]:
    """Values and draws by metric of two sets over the same prompts -> {metric: Paired}."""
    found: dict[str, Paired] = {}
    for name in baseline_draws.keys() & candidate_draws.keys():
        a, b = baseline_draws[name], candidate_draws[name]
        before, after = interval(baseline[name], a), interval(candidate[name], b)
        between = interval(candidate[name] - baseline[name], b - a)
        if before is None or after is None or between is None:
            continue
        ratio = None
        if before.value > 0 and before.low > 0:
            positive = np.where(a > 0, a, np.nan)
            ratio = interval(candidate[name] / baseline[name], b / positive)
        found[name] = Paired(before, after, ratio, between)
    return found
