"""The statistic, its interval and its verdicts, on times whose true ratio is known."""

from __future__ import annotations

import numpy as np
import pytest

from hcf_bench.statistics import (
    FEWEST_PAIRS,
    Verdict,
    decide,
    look_confidence,
    pair_statistics,
    percentile,
    unpaired_statistics,
)


def synthetic_pairs(ratio: float, pairs: int, seed: int, noise: float = 0.02, drift: float = 0.5):
    """Baseline is `ratio` times the candidate; both share a drift far larger than the noise."""
    rng = np.random.default_rng(seed)
    shared = np.exp(drift * np.cumsum(rng.normal(0, 0.3, pairs)))
    candidate = 10.0 * shared * np.exp(rng.normal(0, noise, pairs))
    baseline = 10.0 * ratio * shared * np.exp(rng.normal(0, noise, pairs))
    return baseline.tolist(), candidate.tolist()


@pytest.mark.parametrize("ratio", [0.5, 1.0, 5.3, 40.0])
def test_known_ratio_is_found_under_drift(ratio: float) -> None:
    baseline, candidate = synthetic_pairs(ratio, 60, seed=1)
    found = pair_statistics(baseline, candidate, seed=0)
    assert found.speedup.value == pytest.approx(ratio, rel=0.02)
    assert found.speedup.low < found.speedup.value < found.speedup.high
    assert found.pairs == 60


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    trials = 300
    covered = 0
    for trial in range(trials):
        baseline, candidate = synthetic_pairs(2.0, 25, seed=trial)
        speedup = pair_statistics(baseline, candidate, seed=trial, resamples=1000).speedup
        covered += speedup.low <= 2.0 <= speedup.high
    # 95 % nominal; 300 trials have a standard error of 1.3 points
    assert covered / trials >= 0.91


def test_same_seed_same_interval() -> None:
    baseline, candidate = synthetic_pairs(1.5, 20, seed=3)
    assert pair_statistics(baseline, candidate, seed=4) == pair_statistics(
        baseline, candidate, seed=4
    )


def test_swapping_the_sides_inverts_the_ratio() -> None:
    baseline, candidate = synthetic_pairs(1.5, 21, seed=3)
    forward = pair_statistics(baseline, candidate, seed=0).speedup
    backward = pair_statistics(candidate, baseline, seed=0).speedup
    assert forward.value == pytest.approx(1 / backward.value)


def test_pairing_is_tighter_than_no_pairing() -> None:
    baseline, candidate = synthetic_pairs(1.2, 40, seed=5)
    paired = pair_statistics(baseline, candidate, seed=0).speedup
    unpaired = unpaired_statistics(baseline, candidate, seed=0).speedup
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(1.05, Verdict.FASTER), (0.95, Verdict.SLOWER), (1.0, Verdict.SAME)],
)
def test_verdicts(ratio: float, verdict: Verdict) -> None:
    baseline, candidate = synthetic_pairs(ratio, 200, seed=7, noise=0.01)
    found = pair_statistics(baseline, candidate, seed=0)
    assert decide(found, threshold=0.02, floor_ms=0.0) is verdict


def test_noise_wider_than_the_margin_is_undecided() -> None:
    baseline, candidate = synthetic_pairs(1.0, 8, seed=7, noise=0.2)
    found = pair_statistics(baseline, candidate, seed=0)
    assert decide(found, threshold=0.01, floor_ms=0.0) is Verdict.UNDECIDED


def test_few_pairs_carry_no_verdict() -> None:
    baseline, candidate = synthetic_pairs(10.0, FEWEST_PAIRS - 1, seed=7)
    found = pair_statistics(baseline, candidate, seed=0)
    assert decide(found, threshold=0.01, floor_ms=0.0) is Verdict.UNDECIDED


def test_a_change_below_the_absolute_floor_is_the_same() -> None:
    rng = np.random.default_rng(0)
    candidate = 0.010 * np.exp(rng.normal(0, 0.01, 50))  # ten microseconds
    found = pair_statistics((1.5 * candidate).tolist(), candidate.tolist(), seed=0)
    assert decide(found, threshold=0.01, floor_ms=0.0) is Verdict.FASTER
    assert decide(found, threshold=0.01, floor_ms=0.02) is Verdict.SAME


def test_all_looks_together_spend_less_than_alpha() -> None:
    spent = sum(1.0 - look_confidence(look) for look in range(1, 10_000))
    assert 0.0499 < spent < 0.05


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([], []), ([1.0, 2.0], [1.0]), ([0.0], [1.0]), ([float("nan")], [1.0]), ([-1.0], [1.0])],
)
def test_times_that_cannot_be_are_refused(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError):
        pair_statistics(baseline, candidate, seed=0)


def test_percentile_is_linear_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == pytest.approx(2.5)
