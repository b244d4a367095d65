"""Two programs compared over several launches of both.

Pairs inside one launch share where its memory lies, what was loaded first and how its threads were
placed; none of that can be seen from inside, and it differs from launch to launch by more than the
pairs' own interval. So the unit of the statistic is the launch: its value is the median ratio of
its pairs, and verdict and interval are over launches, whose order of starting alternates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from hcf_bench.results import Bounds, Comparison, Latency, Side
from hcf_bench.statistics import FEWEST_PAIRS, Verdict, decide_at, pair_statistics

Log = Callable[[str], None]
GROWTH = 1.5  # launches at the next look, relative to this one


def compare_launches(
    launch: Callable[[int], Comparison],
    *,
    budget_s: float,
    seed: int,
    threshold: float,
    floor_ms: float,
    log: Log = print,
) -> Comparison:
    """Launches both sides until the verdict is decided or the next launch would not fit.

    Args:
        launch: starts both sides anew, compares them over a fixed number of pairs, and ends them;
            it gets the number of the launch. Its own verdict does not count, unless INVALID.
        budget_s: seconds for all launches, starting included.
        seed: of the bootstrap.
        threshold, floor_ms: changes that matter, see `statistics.decide`.
        log: a line a launch.
    """
    found: list[Comparison] = []
    started = time.monotonic()
    look, next_look = 1, FEWEST_PAIRS
    while True:
        one = launch(len(found))
        if one.verdict is Verdict.INVALID or one.speedup is None:
            return one
        found.append(one)
        spent = time.monotonic() - started
        log(f"launch {len(found)}: {one.speedup.value:.4f} over {one.pairs} pairs, {spent:.0f} s")
        over = spent + spent / len(found) > budget_s
        if len(found) < next_look and not over:
            continue
        baseline_ms, candidate_ms = _values(found)
        verdict, confidence = decide_at(
            look, baseline_ms, candidate_ms, seed=seed, threshold=threshold, floor_ms=floor_ms
        )
        if over or verdict is not Verdict.UNDECIDED:
            break
        look, next_look = look + 1, int(np.ceil(next_look * GROWTH))
    return _combined(found, verdict, confidence, seed, spent)


def _values(found: Sequence[Comparison]) -> tuple[list[float], list[float]]:
    """One value a launch and side, milliseconds, whose ratio is the launch's."""
    pairs = [
        (one.baseline.latency.p50_ms, one.speedup.value)
        for one in found
        if one.baseline.latency is not None and one.speedup is not None
    ]
    return [ms for ms, _ in pairs], [ms / ratio for ms, ratio in pairs]


def _combined(
    found: Sequence[Comparison], verdict: Verdict, confidence: float, seed: int, spent_s: float
) -> Comparison:
    last = found[-1]
    statistics = pair_statistics(*_values(found), seed=seed)
    walls = [one.speedup_wall.value for one in found if one.speedup_wall is not None]
    wall = pair_statistics(walls, [1.0] * len(walls), seed=seed) if walls else None
    waits = [one.contention for one in found if one.contention is not None]
    pairs = sum(one.pairs for one in found)
    s = statistics.speedup
    interval = f"[{s.low:.4g}, {s.high:.4g}] over {len(found)} launches of both sides"
    if len(found) < FEWEST_PAIRS:
        reason = f"only {len(found)} launches fitted the budget; a verdict needs {FEWEST_PAIRS}"
    elif verdict is Verdict.UNDECIDED:
        reason = f"the interval {interval} reaches over the margin of {last.threshold:.1%}"
    else:
        side = "inside" if verdict is Verdict.SAME else "outside"
        reason = f"the interval {interval} lies {side} the margin of {last.threshold:.1%}"
    return last.model_copy(
        update={
            "verdict": verdict,
            "reason": reason,
            "baseline": _side([one.baseline for one in found]),
            "candidate": _side([one.candidate for one in found]),
            "speedup": Bounds.of(s),
            "saved_ms": Bounds.of(statistics.saved_ms),
            "speedup_wall": Bounds.of(wall.speedup) if wall else None,
            "pairs": pairs,
            "launches": len(found),
            "decision_confidence": confidence,
            "clock": "cpu" if any(one.clock == "cpu" for one in found) else last.clock,
            "contention": max(waits, default=None),
            "fidelity": found[0].fidelity,
            "spent_s": round(spent_s, 3),
        }
    )


def _side(sides: Sequence[Side]) -> Side:
    """The samples of all launches as one side; the cold call is the median of theirs."""
    kept = [side.latency for side in sides if side.latency is not None]
    cold = [latency.first_ms for latency in kept if latency.first_ms is not None]
    used = [side.cpu_p50_ms for side in sides if side.cpu_p50_ms is not None]
    samples = [ms for latency in kept for ms in latency.samples_ms]
    return sides[-1].model_copy(
        update={
            "latency": Latency.of(samples, float(np.median(cold)) if cold else None),
            "cpu_p50_ms": float(np.median(used)) if used else None,
        }
    )
