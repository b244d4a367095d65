"""The statistic behind every speed printed: a median log ratio over pairs with its interval.

Two runs that were timed next to each other share whatever the machine was doing at that moment, so
their *ratio* is far steadier than either time (duet benchmarking, arXiv 2001.05811). The
estimate is the median of the per-pair log ratios; its interval is a percentile bootstrap over
pairs, never over single iterations, which are not independent.

A verdict is taken on the bounds of the interval against a margin and may be UNDECIDED: forcing a
noisy measurement into "faster" or "slower" is how false alarms are made. When more pairs are added
until a decision falls, every look at the data is a chance to be fooled, so look k only spends
alpha / (k (k + 1)) of the error allowed; the sum over any number of looks is below alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
# All looks of a comparison together may raise a false alarm this often. It is ten times stricter
# than the interval that is printed, because a gate runs every day and an alarm costs somebody's;
# "the same" keeps the interval's 5 %: to be wrong it takes a change that lies outside the margin.
ALARM_ALPHA = 0.005
# The range of n values misses the median with probability 2 ** (1 - n): below six pairs no
# bootstrap of the median can reach 95 %, whatever the values are.
FEWEST_PAIRS = 6


class Verdict(StrEnum):
    """What a comparison says about the candidate."""

    FASTER = "FASTER"
    SAME = "SAME"
    SLOWER = "SLOWER"
    UNDECIDED = "UNDECIDED"
    INVALID = "INVALID"


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds that hold it with the given confidence."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class PairStatistics:
    """`speedup` = baseline / candidate (above 1 is faster); `saved_ms` = baseline - candidate."""

    speedup: Interval
    saved_ms: Interval
    pairs: int


def pair_statistics(
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> PairStatistics:
    """Median log ratio and median difference of pairs, each with a percentile bootstrap interval.

    Args:
        baseline_ms: times of the baseline, milliseconds, in the order of the pairs.
        candidate_ms: times of the candidate; entry i was measured next to baseline entry i.
        seed: of the resampling; the same times and seed give the same interval.
        resamples: bootstrap samples of the pairs.
        confidence: of both intervals, in (0, 1).

    Raises:
        ValueError: no pairs, unequal lengths, a time that is not positive and finite.
    """
    baseline, candidate = _as_times(baseline_ms), _as_times(candidate_ms)
    if len(baseline) != len(candidate):
        raise ValueError(
            f"{len(baseline)} baseline and {len(candidate)} candidate times: not pairs"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    log_ratio = np.log(baseline) - np.log(candidate)
    saved = baseline - candidate
    tails = [(1.0 - confidence) / 2.0, 1.0 - (1.0 - confidence) / 2.0]
    ratio_low, ratio_high = np.quantile(_bootstrap_medians(log_ratio, resamples, seed), tails)
    saved_low, saved_high = np.quantile(_bootstrap_medians(saved, resamples, seed), tails)
    return PairStatistics(
        speedup=Interval(
            math.exp(float(np.median(log_ratio))),
            math.exp(float(ratio_low)),
            math.exp(float(ratio_high)),
            confidence,
        ),
        saved_ms=Interval(float(np.median(saved)), float(saved_low), float(saved_high), confidence),
        pairs=len(baseline),
    )


def unpaired_statistics(
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> PairStatistics:
    """As `pair_statistics` for two runs that were not interleaved: each side is resampled alone.

    The interval covers the noise inside each run but not the drift between them, so it is weaker.
    """
    baseline, candidate = _as_times(baseline_ms), _as_times(candidate_ms)
    base = _bootstrap_medians(baseline, resamples, seed)
    cand = _bootstrap_medians(candidate, resamples, seed + 1)
    tails = [(1.0 - confidence) / 2.0, 1.0 - (1.0 - confidence) / 2.0]
    ratio_low, ratio_high = np.quantile(base / cand, tails)
    saved_low, saved_high = np.quantile(base - cand, tails)
    mid_base, mid_cand = float(np.median(baseline)), float(np.median(candidate))
    return PairStatistics(
        speedup=Interval(mid_base / mid_cand, float(ratio_low), float(ratio_high), confidence),
        saved_ms=Interval(mid_base - mid_cand, float(saved_low), float(saved_high), confidence),
        pairs=min(len(baseline), len(candidate)),
    )


def decide(statistics: PairStatistics, *, threshold: float, floor_ms: float) -> Verdict:
    """The verdict on the bounds of the intervals: a change counts when it passes both thresholds.

    Args:
        statistics: of the pairs.
        threshold: relative change that matters, a fraction (0.01 is one percent).
        floor_ms: absolute change that matters, milliseconds; below it everything is SAME.
    """
    if threshold < 0.0 or floor_ms < 0.0:
        raise ValueError("threshold and floor_ms must not be negative")
    if statistics.pairs < FEWEST_PAIRS:
        return Verdict.UNDECIDED
    margin = 1.0 + threshold
    speedup, saved = statistics.speedup, statistics.saved_ms
    if speedup.low > margin and saved.low > floor_ms:
        return Verdict.FASTER
    if speedup.high < 1.0 / margin and saved.high < -floor_ms:
        return Verdict.SLOWER
    if 1.0 / margin <= speedup.low and speedup.high <= margin:
        return Verdict.SAME
    if -floor_ms <= saved.low and saved.high <= floor_ms:
        return Verdict.SAME
    return Verdict.UNDECIDED


def decide_at(
    look: int,
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    *,
    seed: int,
    threshold: float,
    floor_ms: float,
) -> tuple[Verdict, float]:
    """The verdict at look 1, 2, ... and the confidence it is taken at.

    FASTER and SLOWER need the interval that spends `ALARM_ALPHA` over all looks, SAME the one that
    spends 1 - `CONFIDENCE`.
    """
    for alpha, verdicts in (
        (ALARM_ALPHA, (Verdict.FASTER, Verdict.SLOWER)),
        (1.0 - CONFIDENCE, (Verdict.SAME,)),
    ):
        confidence = look_confidence(look, alpha)
        seen = pair_statistics(baseline_ms, candidate_ms, seed=seed, confidence=confidence)
        verdict = decide(seen, threshold=threshold, floor_ms=floor_ms)
        if verdict in verdicts:
            return verdict, confidence
    return Verdict.UNDECIDED, look_confidence(look, ALARM_ALPHA)


def look_confidence(look: int, alpha: float = 1.0 - CONFIDENCE) -> float:
    """Confidence to demand at look 1, 2, ... so that all looks together err below alpha."""
    if look < 1:
        raise ValueError(f"looks are counted from 1, not {look}")
    return 1.0 - alpha / (look * (look + 1))


def percentile(samples_ms: Sequence[float], q: float) -> float:
    """The q-th percentile (0-100) of the samples, linear between neighbours."""
    return float(np.percentile(_as_times(samples_ms), q))


def _as_times(samples_ms: Sequence[float]) -> NDArray[np.float64]:
    times = np.asarray(samples_ms, dtype=np.float64)
    if times.size == 0:
        raise ValueError("no times to summarise")
    if not np.all(np.isfinite(times)) or np.any(times <= 0.0):
        raise ValueError("times must be positive and finite milliseconds")
    return times


def _bootstrap_medians(
    values: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """values (n,) -> (resamples,): medians of as many resamples, values drawn with replacement."""
    ordered = np.sort(values)
    low, high = _middle_ranks(len(values), resamples, seed)
    return np.asarray(0.5 * (ordered[low] + ordered[high]))


@lru_cache(maxsize=64)
def _middle_ranks(n: int, resamples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of the two middle values of each resample of n values.

    Sorting keeps order, so a resample's median is known from the ranks that were drawn, and the
    middle ranks need not be drawn with all the others: rank = floor(n U) for U uniform, and the
    k-th smallest of n uniforms is Beta(k, n - k + 1); the next one is the smallest of the n - k
    left, uniform above it. Exact, and no dearer for a thousand pairs than for ten, which matters
    where the statistic competes with what it judges for a busy core.
    """
    rng = np.random.default_rng(seed)
    k = (n + 1) // 2
    lower = rng.beta(k, n - k + 1, resamples)
    low = np.minimum((n * lower).astype(np.int64), n - 1)
    if n % 2 == 1:
        return low, low
    upper = 1.0 - (1.0 - lower) * rng.random(resamples) ** (1.0 / (n - k))
    return low, np.minimum((n * upper).astype(np.int64), n - 1)
