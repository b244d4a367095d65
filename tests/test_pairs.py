"""Interleaved pairs of samplers whose ratio is known: order, clocks, calls, what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hcf_bench.clocks import CONTENDED, Sample, Usage, read_usage
from hcf_bench.compare import (
    compare_callables,
)
from hcf_bench.pairs import (
    SHORT_CALLS,
    SHORT_MS,
    PairedTimes,
    Subject,
    calls_per_pair,
    compare_subjects,
    explain,
    interleave,
    output_problems,
)
from hcf_bench.results import (
    read_result,
    write_result,
)
from hcf_bench.statistics import Verdict


def sampler(ms: float, noise: float, seed: int) -> Any:
    """Times of pair i: a drift both sides share, and noise of its own."""
    rng = np.random.default_rng(seed)
    return lambda i: float(ms * (1.0 + 0.5 * np.sin(i / 3)) * np.exp(rng.normal(0, noise)))


def waiting(share: float | None) -> Any:
    """A process that, from its second reading on, has waited for so much of its time."""
    readings = 0

    def read() -> Usage | None:
        nonlocal readings
        readings += 1
        if share is None:
            return None
        if readings == 1:
            return Usage(5_000, 7_000)
        return Usage(5_000 + int(1e9 * (1.0 - share)), 7_000 + int(1e9 * share))

    return read


def two_clocks(wall_ms: float, cpu_ms: float | None) -> Any:
    """Samples on both clocks, each a little different from the last."""
    return lambda i: Sample(
        wall_ms * (1.0 + 0.001 * (i % 3)), None if cpu_ms is None else cpu_ms * (1 + 0.001 * i)
    )


def test_a_clear_ratio_is_decided_at_the_first_look() -> None:
    found = interleave(sampler(40.0, 0.02, 0), sampler(1.0, 0.02, 1), pairs=8)
    assert found.verdict is Verdict.FASTER
    assert len(found.baseline) == len(found.candidate) == 8
    assert found.statistics.speedup.value == pytest.approx(40.0, rel=0.05)
    assert found.statistics.speedup.low <= found.statistics.speedup.value


def test_more_pairs_are_taken_until_decided() -> None:
    settings: dict[str, Any] = {"pairs": 8, "threshold": 0.01, "most_pairs": 4000}
    slower = interleave(sampler(1.0, 0.05, 0), sampler(1.05, 0.05, 1), **settings)
    assert slower.verdict is Verdict.SLOWER
    assert 8 < len(slower.baseline) < 4000
    same = interleave(sampler(1.0, 0.02, 2), sampler(1.0, 0.02, 3), **settings)
    assert same.verdict is Verdict.SAME
    assert same.decision_confidence > 0.95


def test_a_spent_budget_leaves_it_undecided() -> None:
    found = interleave(sampler(1.0, 0.3, 0), sampler(1.0, 0.3, 1), pairs=8, most_pairs=12)
    assert found.verdict is Verdict.UNDECIDED
    assert len(found.baseline) == 12
    short = interleave(sampler(9.0, 0.01, 0), sampler(1.0, 0.01, 1), pairs=8, budget_s=0.0)
    assert short.verdict is Verdict.UNDECIDED  # one pair cannot carry an interval
    assert len(short.baseline) == 1


def test_the_same_against_itself_raises_no_false_alarm() -> None:
    verdicts = []
    for i in range(20):
        sides = (sampler(5.0, 0.02, 2 * i), sampler(5.0, 0.02, 2 * i + 1))
        verdicts.append(interleave(*sides, pairs=10, seed=i % 2, most_pairs=40).verdict)
    assert sum(verdict in (Verdict.FASTER, Verdict.SLOWER) for verdict in verdicts) <= 1


def test_pairs_alternate_abba_in_random_order() -> None:
    def orders(seed: int) -> list[str]:
        ran: list[str] = []
        interleave(
            lambda i: ran.append(f"a{i}") or 1.0,
            lambda i: ran.append(f"b{i}") or 1.0,
            pairs=40,
            seed=seed,
            most_pairs=40,
        )
        assert sorted(ran[:2]) == ["a0", "b0"]
        return [ran[2 * i][0] for i in range(40)]

    firsts = orders(0)
    assert all(firsts[i] != firsts[i + 1] for i in range(0, 40, 2))  # within each block
    assert any(a == b for a, b in pairwise(firsts))  # blocks are drawn, not alternating
    assert firsts == orders(0) != orders(1)


# On the wall clock the candidate is as fast, by its work it is slower; and the other way round.
ONE_AND_THE_OTHER = [((10.0, 5.0), (10.0, 7.0)), ((10.0, 5.0), (14.0, 5.0))]
BARELY = 0.001


@pytest.mark.parametrize("sides", ONE_AND_THE_OTHER)
@pytest.mark.parametrize(
    ("share", "clock"),
    [(None, "wall"), (0.0, "wall"), (CONTENDED - BARELY, "wall"), (CONTENDED + BARELY, "cpu"),
     (0.9, "cpu")],
)  # fmt: skip
def test_waiting_alone_decides_on_the_clock(
    sides: tuple[tuple[float, float], ...], share: float | None, clock: str
) -> None:
    samplers = [two_clocks(*side) for side in sides]
    found = interleave(*samplers, pairs=8, usage=(waiting(share),))
    assert found.clock == clock
    assert found.contention == (None if share is None else pytest.approx(share, abs=1e-6))
    ratio = {c: sides[0][n] / sides[1][n] for n, c in enumerate(("wall", "cpu"))}
    assert found.statistics.speedup.value == pytest.approx(ratio[clock], rel=0.01)
    assert found.wall.speedup.value == pytest.approx(ratio["wall"], rel=0.01)
    assert found.verdict is (Verdict.SAME if ratio[clock] == 1.0 else Verdict.SLOWER)


def test_the_busiest_process_counts() -> None:
    samplers = [two_clocks(10.0, 5.0), two_clocks(10.0, 7.0)]
    found = interleave(*samplers, pairs=8, usage=(waiting(0.0), waiting(0.4), waiting(None)))
    assert found.clock == "cpu" and found.contention == pytest.approx(0.4)
    assert interleave(*samplers, pairs=8, usage=()).contention is None


@pytest.mark.parametrize("cpu_ms", [None, 0.0])
def test_a_side_whose_work_is_elsewhere_stays_on_the_wall_clock(cpu_ms: float | None) -> None:
    for samplers in (
        (two_clocks(10.0, 5.0), two_clocks(10.0, cpu_ms)),
        (two_clocks(10.0, cpu_ms), two_clocks(10.0, 5.0)),
    ):
        found = interleave(*samplers, pairs=8, usage=(waiting(0.9),))
        assert found.clock == "wall" and found.contention == pytest.approx(0.9)
        assert found.verdict is Verdict.SAME
    plain = interleave(sampler(10.0, 0.0, 0), sampler(10.0, 0.0, 1), pairs=8, usage=(waiting(0.9),))
    assert plain.clock == "wall"
    assert plain.baseline[0].cpu_ms is None


def test_the_shortest_of_a_pairs_calls_counts_on_each_clock() -> None:
    # of every three calls another one is the shortest on each clock
    walls, cpus = [4.0, 9.0, 6.0], [3.0, 8.0, 2.0]
    ran: list[int] = []

    def disturbed(i: int) -> Sample:
        ran.append(i)
        k = (len(ran) - 1) % 3
        return Sample(walls[k], cpus[k])

    def steady(i: int) -> Sample:
        return Sample(2.0, 1.0)

    for share, ratio in ((0.0, 4.0 / 2.0), (0.9, 2.0 / 1.0)):
        ran.clear()
        found = interleave(
            disturbed, steady, pairs=6, most_pairs=6, calls=3, usage=(waiting(share),)
        )
        assert found.statistics.speedup.value == pytest.approx(ratio)
        assert found.statistics.speedup.low == pytest.approx(ratio)
        assert found.wall.speedup.value == pytest.approx(2.0)
        assert (found.calls, found.statistics.pairs) == (3, 6)
        assert len(found.baseline) == len(found.candidate) == 18  # every call is kept
        assert ran == [i for i in range(6) for _ in range(3)]  # on the pair's own input


def test_calls_of_a_pair_alternate_abba() -> None:
    ran: list[str] = []
    interleave(
        lambda i: ran.append(f"a{i}") or 1.0,
        lambda i: ran.append(f"b{i}") or 1.0,
        pairs=20,
        most_pairs=20,
        calls=2,
    )
    blocks = ["".join(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    expected = [{f"a{i}b{i}b{i}a{i}", f"b{i}a{i}a{i}b{i}"} for i in range(20)]
    assert all(block in either for block, either in zip(blocks, expected, strict=True))
    assert len({block[0] for block in blocks}) == 2  # drawn at random


def test_a_short_call_is_repeated_within_a_pair() -> None:
    assert calls_per_pair(SHORT_MS / 2) == SHORT_CALLS > 1
    assert calls_per_pair(SHORT_MS) == calls_per_pair(100.0) == 1
    with pytest.raises(ValueError, match="at least 1"):
        interleave(sampler(1.0, 0.0, 0), sampler(1.0, 0.0, 1), calls=0)

    def samples(ms: tuple[float, float], **settings: Any) -> int:
        sides = [
            Subject(name, lambda _: torch.ones(1), sample=lambda _, m=m: Sample(m, m))
            for name, m in zip("ab", ms, strict=True)
        ]
        found = compare_subjects(*sides, workload="w", pairs=6, threshold=20.0, **settings)
        assert found.pairs == 6 and found.candidate.latency is not None
        return len(found.candidate.latency.samples_ms)

    short = (SHORT_MS / 5, SHORT_MS / 5)
    assert samples(short) == 6 * SHORT_CALLS
    assert samples((SHORT_MS / 5, SHORT_MS * 2)) == 6  # the longer one says how long a pair takes
    assert samples(short, settle_s=0.001) == 6  # a pause would come before every call
    assert samples(short, calls=2) == 12


@pytest.mark.parametrize(("longer_ms", "warmed"), [(30.0, False), (50.0, True)])
def test_the_much_shorter_side_is_warm_when_it_is_timed(longer_ms: float, warmed: bool) -> None:
    """Idle memory costs the first call after a long one of the other side."""
    order: list[str] = []

    def side(name: str, ms: float) -> Subject:
        def sample(_: int) -> Sample:
            cold = order[-1:] != [name]
            order.append(name)
            return Sample(ms * 3 if cold and name == "short" else ms, ms)

        return Subject(name, lambda _: torch.ones(1), sample=sample)

    found = compare_subjects(side("long", longer_ms), side("short", 3.0), workload="w", pairs=6)
    assert found.baseline.latency is not None and found.candidate.latency is not None
    assert max(found.candidate.latency.samples_ms) == (3.0 if warmed else 9.0)
    assert len(found.candidate.latency.samples_ms) == len(found.baseline.latency.samples_ms)
    assert any("untimed" in note for note in found.notes) == warmed


def contended(share: float | None, cpu: bool = True) -> Any:
    """A comparison of 10 and 14 ms on the wall clock, 5 and 5 ms of work."""
    sides = [
        Subject(
            name,
            lambda _: torch.ones(1),
            sample=two_clocks(wall_ms, 5.0 if cpu else None),
            usage=waiting(share),
        )
        for name, wall_ms in (("a", 10.0), ("b", 14.0))
    ]
    return compare_subjects(*sides, workload="w", pairs=8)


def test_a_comparison_says_which_clock_decided(tmp_path: Path) -> None:
    busy = contended(0.75)
    assert (busy.clock, busy.contention, busy.verdict) == ("cpu", 0.75, Verdict.SAME)
    assert busy.speedup is not None and busy.speedup.value == pytest.approx(1.0, rel=0.01)
    assert busy.speedup_wall is not None
    assert busy.speedup_wall.value == pytest.approx(10 / 14, rel=0.01)
    assert busy.baseline.cpu_p50_ms == pytest.approx(5.0, rel=0.02)
    assert busy.candidate.latency is not None  # which is the wall clock's, whichever decided
    assert busy.candidate.latency.p50_ms == pytest.approx(14.0, rel=0.01)
    assert "of processor time" in busy.reason and "75%" in busy.reason
    assert "processor time" in busy.headline()
    assert read_result(write_result(tmp_path / "busy.json", busy)) == busy


def test_a_quiet_comparison_is_the_wall_clocks() -> None:
    quiet = contended(0.0)
    assert (quiet.clock, quiet.contention, quiet.verdict) == ("wall", 0.0, Verdict.SLOWER)
    assert quiet.speedup == quiet.speedup_wall
    assert quiet.baseline.cpu_p50_ms == pytest.approx(5.0, rel=0.02)  # known, though not used
    assert "processor time" not in quiet.reason and "processor time" not in quiet.headline()
    unknown = contended(None, cpu=False)
    assert (unknown.clock, unknown.contention) == ("wall", None)
    assert unknown.baseline.cpu_p50_ms is None


def test_explain_names_the_clock_and_the_waiting() -> None:
    samplers = [two_clocks(10.0, 5.0), two_clocks(10.0, 7.0)]

    def said(share: float, **settings: Any) -> str:
        found: PairedTimes = interleave(
            *samplers, **{"pairs": 8, **settings}, usage=(waiting(share),)
        )
        return explain(found, 0.01, 0.0)

    assert "processor time" in said(0.6) and "60% of the time" in said(0.6)
    assert "outside the margin of 1.0%" in said(0.6)
    assert "processor time" not in said(0.0) and "inside the margin" in said(0.0)
    assert said(0.6, most_pairs=2).startswith("only 2 pairs fitted")


def test_a_real_call_is_read_on_both_clocks() -> None:
    found = compare_callables(
        lambda: sum(range(20_000)), lambda: sum(range(20_000)), pairs=6, threshold=20.0
    )
    assert found.baseline.cpu_p50_ms is not None and found.baseline.cpu_p50_ms > 0.0
    if read_usage() is not None:
        assert found.contention is not None and 0.0 <= found.contention <= 1.0
        assert (found.clock == "cpu") == (found.contention > CONTENDED)


def test_outputs_are_checked_before_anything_is_timed() -> None:
    ran: list[int] = []

    def broken() -> torch.Tensor:
        ran.append(1)
        return torch.tensor([1.0, float("nan")])

    found = compare_callables(lambda: torch.ones(2), broken, pairs=6)
    assert found.verdict is Verdict.INVALID
    assert "candidate's output is not finite" in found.reason
    assert found.speedup is None and found.baseline.latency is None
    assert len(ran) == 1


def test_doing_less_is_not_faster() -> None:
    found = compare_callables(lambda: torch.ones(4, 3), lambda: torch.ones(1, 3), pairs=6)
    assert found.verdict is Verdict.INVALID
    assert "shapes differ" in found.reason
    assert output_problems({"x": np.ones(3)}, {"x": np.ones(3)}) == []


def test_unequal_threads_are_invalid() -> None:
    sides = [
        Subject(name, lambda _: torch.ones(1), engines=({"component": "unet", "threads": threads},))
        for name, threads in (("a", 1), ("b", 2))
    ]
    found = compare_subjects(*sides, workload="w", threads=1)
    assert found.verdict is Verdict.INVALID
    assert "b runs unet on 2 threads, not 1" in found.reason
