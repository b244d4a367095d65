"""Two things timed against each other: interleaved pairs, more of them until decided, one verdict.

Pairs alternate their order (ABBA blocks, which of the two comes first drawn at random), so that a
machine that slows down over the run, or a cache the first of a pair warms, favours neither side.
Before anything is timed both outputs are checked: finite, and of one shape. A comparison that fails
this, or whose sides do not have equal threads, is INVALID and carries no ratio.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hcf_bench.clocks import CONTENDED, Sample, Usage, contention, read_usage, sample_call
from hcf_bench.environment import Environment, read_environment
from hcf_bench.results import Bounds, Comparison, Latency, Side
from hcf_bench.statistics import (
    CONFIDENCE,
    FEWEST_PAIRS,
    PairStatistics,
    Verdict,
    decide_at,
    pair_statistics,
    percentile,
)
from hcf_bench.timing import Clock, collection_paused

if TYPE_CHECKING:
    from torch import Tensor

# Worker threads of a runtime spin for some milliseconds after their last task and would take the
# cores from the other side; each sample waits this long for them to sleep.
SETTLE_S = 0.05
GROWTH = 1.5  # pairs at the next look, relative to this one
MOST_PAIRS = 10_000
# A short call either ran undisturbed or was interrupted, and interruptions only add time: of a few
# such calls the shortest is what the code costs (Chen and Revels, arXiv 1608.04295). Longer calls
# are all interrupted alike, and one of each makes a pair.
SHORT_MS = 2.0
SHORT_CALLS = 4
# While the longer side of such a pair runs, the shorter one's memory goes cold, and hosts take idle
# memory away: its first call afterwards is not what it costs in use.
UNEVEN = 4.0

Log = Callable[[str], None]
Sampler = Callable[[int], float | Sample]
UsageReader = Callable[[], Usage | None]


@dataclass(frozen=True)
class PairedTimes:
    """What the interleaved loop measured: every call of both sides, in order.

    `calls` of each side make one pair, whose value is the shortest of them.
    `statistics` are on the clock that decided, "wall" or "cpu"; `wall` are those of the wall clock,
    whichever decided.
    """

    baseline: tuple[Sample, ...]
    candidate: tuple[Sample, ...]
    statistics: PairStatistics
    wall: PairStatistics
    verdict: Verdict
    decision_confidence: float
    clock: Literal["wall", "cpu"]
    contention: float | None
    spent_s: float
    calls: int = 1


@dataclass(frozen=True)
class Subject:
    """One side before it is timed: `run(i)` does the work of pair i and returns its output.

    `sample(i)` times pair i where that is not simply the time of `run`; `usage` reads the process
    the work is done in, where that is not this one; `first_ms` is the cold call, if it was timed.
    """

    name: str
    run: Callable[[int], Any]
    content_hash: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    engines: tuple[dict[str, Any], ...] = ()
    sample: Sampler | None = None
    usage: UsageReader = read_usage
    first_ms: float | None = None


def interleave(
    baseline: Sampler,
    candidate: Sampler,
    *,
    pairs: int = 10,
    budget_s: float = 60.0,
    seed: int = 0,
    threshold: float = 0.01,
    floor_ms: float = 0.0,
    most_pairs: int = MOST_PAIRS,
    settle_s: float = 0.0,
    usage: tuple[UsageReader, ...] = (read_usage,),
    calls: int = 1,
) -> PairedTimes:
    """Takes pairs until the verdict is decided, the budget is spent or `most_pairs` are taken.

    Decides on the wall clock, or on processor time where the samples carry it and more than
    `CONTENDED` of the time went to waiting for a processor. The choice looks at the waiting alone,
    never at the ratios.

    Args:
        baseline: times pair i of the baseline and returns milliseconds.
        candidate: the same for the candidate, on the same input for the same i.
        pairs: taken before the first look at the data; no fewer than six carry a verdict.
        budget_s: seconds; the pair that is running when it ends is finished.
        seed: of the order inside the pairs and of the bootstrap.
        threshold: relative change that matters, a fraction.
        floor_ms: absolute change that matters, milliseconds.
        most_pairs: upper bound of pairs.
        settle_s: pause before each sample.
        usage: readers of the processes that do the work.
        calls: of each side in a pair, see `calls_per_pair`.
    """
    if pairs < 1 or calls < 1:
        raise ValueError(f"pairs and calls must be at least 1, not {pairs} and {calls}")
    times: tuple[list[Sample], list[Sample]] = ([], [])
    samplers = (baseline, candidate)
    orders = _abba(seed)
    look, next_look = 1, max(pairs, FEWEST_PAIRS)
    with collection_paused():
        before = [read() for read in usage]
        started = time.perf_counter()
        while True:
            index = len(times[0]) // calls
            for _ in range(calls):
                for side in next(orders):
                    if settle_s > 0.0:
                        time.sleep(settle_s)
                    found = samplers[side](index)
                    times[side].append(found if isinstance(found, Sample) else Sample(float(found)))
            spent = time.perf_counter() - started
            taken = index + 1
            over = spent >= budget_s or taken >= most_pairs
            if taken < next_look and not over:
                continue
            waiting = _contention(before, [read() for read in usage])
            clock = _deciding_clock(times, waiting)
            verdict, confidence = decide_at(
                look, *_on(clock, times, calls), seed=seed, threshold=threshold, floor_ms=floor_ms
            )
            if over or verdict is not Verdict.UNDECIDED:
                break
            look, next_look = look + 1, int(np.ceil(next_look * GROWTH))
    statistics = pair_statistics(*_on(clock, times, calls), seed=seed)
    return PairedTimes(
        baseline=tuple(times[0]),
        candidate=tuple(times[1]),
        statistics=statistics,
        wall=statistics
        if clock == "wall"
        else pair_statistics(*_on("wall", times, calls), seed=seed),
        verdict=verdict,
        decision_confidence=confidence,
        clock=clock,
        contention=waiting,
        spent_s=spent,
        calls=calls,
    )


def calls_per_pair(typical_ms: float) -> int:
    """Calls of each side that make a pair, from how long one takes."""
    return SHORT_CALLS if typical_ms < SHORT_MS else 1


def _contention(before: Sequence[Usage | None], after: Sequence[Usage | None]) -> float | None:
    """The largest share of waiting of any process; None where none could be read."""
    shares = [contention(a, b) for a, b in zip(before, after, strict=True)]
    return max((share for share in shares if share is not None), default=None)


def _deciding_clock(
    times: tuple[list[Sample], list[Sample]], waiting: float | None
) -> Literal["wall", "cpu"]:
    if waiting is None or waiting <= CONTENDED:
        return "wall"
    # a side whose work is done elsewhere (a GPU, another process) uses next to no time of its own
    both = all(s.cpu_ms and s.cpu_ms > 0.0 for side in times for s in side)
    return "cpu" if both else "wall"


def _on(
    clock: Literal["wall", "cpu"], times: tuple[list[Sample], list[Sample]], calls: int
) -> tuple[list[float], list[float]]:
    """Both sides' pairs on one clock, milliseconds: the shortest of each pair's calls."""
    sides = []
    for side in times:
        values = [s.wall_ms if clock == "wall" else s.cpu_ms or 0.0 for s in side]
        sides.append([min(values[i : i + calls]) for i in range(0, len(values), calls)])
    return sides[0], sides[1]


def compare_subjects(
    baseline: Subject,
    candidate: Subject,
    *,
    workload: str,
    pairs: int = 10,
    budget_s: float = 60.0,
    seed: int = 0,
    threshold: float = 0.01,
    floor_ms: float = 0.0,
    warmup: int = 1,
    settle_s: float = 0.0,
    device: str = "cpu",
    clock: Clock = "host",
    threads: int | None = None,
    fidelity: Callable[[Any, Any], dict[str, float]] | None = None,
    environment: Environment | None = None,
    notes: tuple[str, ...] = (),
    calls: int | None = None,
    most_pairs: int = MOST_PAIRS,
) -> Comparison:
    """Checks both outputs, warms both sides up, interleaves them, decides.

    Args:
        baseline, candidate: the two sides.
        workload: what is timed, in words; stored results are only compared under the same words.
        pairs, budget_s, seed, threshold, floor_ms, settle_s, most_pairs: see `interleave`.
        warmup: calls of each side after the first that do not count.
        device, clock: see `time_once`.
        threads: that both sides were given; written into the fingerprint.
        fidelity: distances between the two first outputs, kept with the result.
        environment: fingerprint read before; read here by default.
        notes: sentences kept with the result.
        calls: of each side in a pair; by default from how long one takes (`calls_per_pair`).

    Of two sides that differ by more than `UNEVEN` times the shorter runs untimed before each of its
    samples, which the notes say.
    """
    env = environment or read_environment(threads)

    def timed(subject: Subject, index: int) -> float | Sample:
        if subject.sample is not None:
            return subject.sample(index)
        return sample_call(lambda: subject.run(index), device, clock)

    def comparison(verdict: Verdict, reason: str, found: PairedTimes | None) -> Comparison:
        waiting = found.contention if found else None
        sides = []
        for number, subject in enumerate((baseline, candidate)):
            times = (found.baseline, found.candidate)[number] if found else ()
            used = [s.cpu_ms for s in times if s.cpu_ms is not None]
            sides.append(
                Side(
                    name=subject.name,
                    content_hash=subject.content_hash,
                    sampling=dict(subject.sampling),
                    engines=subject.engines,
                    latency=Latency.of([s.wall_ms for s in times], first_ms[number])
                    if times
                    else None,
                    cpu_p50_ms=percentile(used, 50) if used and min(used) > 0.0 else None,
                )
            )
        return Comparison(
            workload=workload,
            verdict=verdict,
            reason=reason,
            paired=True,
            baseline=sides[0],
            candidate=sides[1],
            speedup=Bounds.of(found.statistics.speedup) if found else None,
            saved_ms=Bounds.of(found.statistics.saved_ms) if found else None,
            pairs=found.statistics.pairs if found else 0,
            decision_confidence=found.decision_confidence if found else CONFIDENCE,
            clock="device" if clock == "device" else found.clock if found else "wall",
            contention=None if waiting is None else round(waiting, 4),
            speedup_wall=Bounds.of(found.wall.speedup) if found else None,
            threshold=threshold,
            floor_ms=floor_ms,
            fidelity=distances,
            notes=notes,
            seed=seed,
            spent_s=round(found.spent_s, 3) if found else 0.0,
            environment=env,
        )

    distances: dict[str, float] = {}
    first_ms: list[float] = []
    outputs: list[Any] = []
    for subject in (baseline, candidate):
        kept: list[Any] = []
        cold = sample_call(partial(_keep, kept, subject), device).wall_ms
        first_ms.append(cold if subject.first_ms is None else subject.first_ms)
        outputs.append(kept[0])
    problems = output_problems(outputs[0], outputs[1])
    problems += unequal_threads((baseline, candidate), threads)
    if problems:
        return comparison(Verdict.INVALID, "; ".join(problems), None)
    if fidelity is not None:
        distances = fidelity(outputs[0], outputs[1])
    outputs.clear()
    for _ in range(warmup):
        baseline.run(0)
        candidate.run(0)
    shorter: Subject | None = None
    if calls is None:
        typical_ms = [_wall_ms(timed(side, 0)) for side in (baseline, candidate)]
        calls = calls_per_pair(max(typical_ms)) if settle_s == 0.0 else 1
        if max(typical_ms) > UNEVEN * min(typical_ms):
            shorter = (baseline, candidate)[typical_ms.index(min(typical_ms))]
            notes = (*notes, f"{shorter.name} runs once untimed before each of its samples")

    def warmed(subject: Subject, index: int) -> float | Sample:
        if subject is shorter:
            timed(subject, index)
        return timed(subject, index)

    found = interleave(
        lambda i: warmed(baseline, i),
        lambda i: warmed(candidate, i),
        pairs=pairs,
        budget_s=budget_s,
        seed=seed,
        threshold=threshold,
        floor_ms=floor_ms,
        most_pairs=most_pairs,
        settle_s=settle_s,
        usage=tuple(dict.fromkeys((baseline.usage, candidate.usage))),
        calls=calls,
    )
    return comparison(found.verdict, explain(found, threshold, floor_ms), found)


def _wall_ms(found: float | Sample) -> float:
    return found.wall_ms if isinstance(found, Sample) else float(found)


def _keep(kept: list[Any], subject: Subject) -> None:
    kept.append(subject.run(0))


def explain(found: PairedTimes, threshold: float, floor_ms: float) -> str:
    """Why the verdict is what it is, in one sentence."""
    s, taken = found.statistics.speedup, found.statistics.pairs
    margin = f"{threshold:.1%}" + (f" and {floor_ms:g} ms" if floor_ms else "")
    interval = f"[{s.low:.4g}, {s.high:.4g}] over {taken} interleaved pairs"
    if found.clock == "cpu":
        interval += (
            f" of processor time (other work kept the threads waiting "
            f"{found.contention or 0.0:.0%} of the time)"
        )
    if found.verdict is Verdict.UNDECIDED:
        if taken < FEWEST_PAIRS:
            return f"only {taken} pairs fitted the budget; a 95 % interval needs {FEWEST_PAIRS}"
        return f"the interval {interval} reaches over the margin of {margin} when the budget ended"
    side = "inside" if found.verdict is Verdict.SAME else "outside"
    return f"the interval {interval} lies {side} the margin of {margin}"


def output_problems(baseline: Any, candidate: Any) -> list[str]:
    """What forbids timing: outputs that are not finite, or whose shapes differ."""
    sides = {"baseline": list(_arrays(baseline)), "candidate": list(_arrays(candidate))}
    problems = [
        f"the {name}'s output is not finite"
        for name, arrays in sides.items()
        if any(not np.isfinite(array).all() for array in arrays)
    ]
    shapes = {name: [array.shape for array in arrays] for name, arrays in sides.items()}
    if shapes["baseline"] != shapes["candidate"]:
        problems.append(f"output shapes differ: {shapes['baseline']} and {shapes['candidate']}")
    return problems


def unequal_threads(subjects: Sequence[Subject], threads: int | None) -> list[str]:
    """Sides whose engines report another number of threads than the comparison asked for."""
    if threads is None:
        return []
    return [
        f"{subject.name} runs {engine.get('component', 'its engine')} "
        f"on {engine['threads']} threads, not {threads}"
        for subject in subjects
        for engine in subject.engines
        if isinstance(engine.get("threads"), int) and engine["threads"] not in (0, threads)
    ]


def output_distance(baseline: Any, candidate: Any) -> dict[str, float]:
    """Signal to error of the candidate against the baseline in dB, and the largest difference."""
    a = np.concatenate([x.ravel() for x in _arrays(baseline)]).astype(np.float64)
    b = np.concatenate([x.ravel() for x in _arrays(candidate)]).astype(np.float64)
    error = float(np.mean((a - b) ** 2))
    signal = float(np.mean(a**2))
    sqnr = 10.0 * float(np.log10(signal / error)) if error > 0.0 and signal > 0.0 else 999.0
    return {"sqnr_db": round(sqnr, 3), "max_abs_error": float(np.abs(a - b).max())}


def _abba(seed: int) -> Iterator[tuple[int, int]]:
    """Orders of the pairs: blocks AB BA or BA AB, drawn at random (0 is the baseline)."""
    rng = random.Random(seed)
    while True:
        first = rng.randrange(2)
        yield (first, 1 - first)
        yield (1 - first, first)


def _arrays(output: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The arrays inside an output: tensors, arrays and numbers, through sequences and mappings."""
    if output is None or isinstance(output, (str, bytes)):
        return
    if isinstance(output, Mapping):
        for value in output.values():
            yield from _arrays(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _arrays(value)
    elif hasattr(output, "detach"):
        tensor: Tensor = output
        yield tensor.detach().float().cpu().numpy()
    elif isinstance(output, (np.ndarray, np.generic, int, float)):
        yield np.asarray(output, dtype=np.float64)
