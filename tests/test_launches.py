"""Verdicts over launches whose ratios are known: what pairs inside one launch cannot see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hcf_bench.environment import Environment, read_environment
from hcf_bench.launches import compare_launches
from hcf_bench.results import Bounds, Comparison, Latency, Side
from hcf_bench.statistics import Verdict


@functools.cache
def environment() -> Environment:
    return read_environment(threads=1)


def launches(ratio: float, spread: float, seed: int = 0) -> Callable[[int], Comparison]:
    """Launch i has its own true ratio; inside it, pairs agree to a thousandth."""
    rng = np.random.default_rng(seed)

    def launch(number: int) -> Comparison:
        mine = float(ratio * np.exp(rng.normal(0.0, spread)))
        return Comparison(
            workload="w",
            verdict=Verdict.FASTER,  # of one launch: must not count
            reason="",
            paired=True,
            baseline=Side(name="a", latency=Latency.of([10.0, 10.1], 30.0 + number)),
            candidate=Side(name="b", latency=Latency.of([10.0 / mine], 30.0)),
            speedup=Bounds(value=mine, low=mine * 0.999, high=mine * 1.001),
            speedup_wall=Bounds(value=mine, low=mine, high=mine),
            pairs=16,
            threshold=0.01,
            floor_ms=0.0,
            seed=number,
            environment=environment(),
        )

    return launch


def compared(launch: Callable[[int], Comparison], **settings: Any) -> Comparison:
    asked = {"budget_s": 2.0, "seed": 0, "threshold": 0.01, "floor_ms": 0.0, **settings}
    return compare_launches(launch, log=lambda line: None, **asked)


def test_launches_that_differ_more_than_their_pairs_raise_no_alarm() -> None:
    verdicts = [compared(launches(1.0, 0.025, seed), budget_s=0.3).verdict for seed in range(20)]
    assert all(verdict in (Verdict.SAME, Verdict.UNDECIDED) for verdict in verdicts), verdicts


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.2, Verdict.FASTER), (0.8, Verdict.SLOWER), (1.0, Verdict.SAME)]
)
def test_a_clear_ratio_is_decided(ratio: float, verdict: Verdict) -> None:
    found = compared(launches(ratio, 0.004))
    assert found.verdict is verdict, found.reason
    assert found.launches >= 6 and found.pairs == 16 * found.launches
    assert found.speedup is not None and found.speedup.low <= ratio * 1.01
    assert found.baseline.latency is not None
    assert len(found.baseline.latency.samples_ms) == 2 * found.launches
    assert f"{found.launches} launches" in found.reason
    assert "launches" in found.headline()


def test_a_budget_for_one_launch_carries_no_verdict() -> None:
    found = compared(launches(2.0, 0.0), budget_s=0.0)
    assert found.verdict is Verdict.UNDECIDED and found.launches == 1
    assert "only 1 launches" in found.reason


def test_an_invalid_launch_ends_it() -> None:
    def launch(number: int) -> Comparison:
        verdict = Verdict.INVALID if number == 2 else Verdict.SAME
        return launches(1.0, 0.0)(number).model_copy(update={"verdict": verdict})

    assert compared(launch).verdict is Verdict.INVALID
