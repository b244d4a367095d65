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
from typing import TYPE_CHECKING, Any

import numpy as np

from hcf_bench.environment import Environment, read_environment
from hcf_bench.results import Bounds, Comparison, Latency, Side
from hcf_bench.statistics import (
    CONFIDENCE,
    FEWEST_PAIRS,
    PairStatistics,
    Verdict,
    decide,
    look_confidence,
    pair_statistics,
)
from hcf_bench.timing import Clock, collection_paused, time_once

if TYPE_CHECKING:
    from torch import Tensor

# Worker threads of a runtime spin for some milliseconds after their last task and would take the
# cores from the other side; each sample waits this long for them to sleep.
SETTLE_S = 0.05
GROWTH = 1.5  # pairs at the next look, relative to this one
MOST_PAIRS = 10_000

Log = Callable[[str], None]
Sampler = Callable[[int], float]


@dataclass(frozen=True)
class PairedTimes:
    """What the interleaved loop measured; entry i of both sides is one pair, milliseconds."""

    baseline_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    statistics: PairStatistics
    verdict: Verdict
    decision_confidence: float
    spent_s: float


@dataclass(frozen=True)
class Subject:
    """One side before it is timed: `run(i)` does the work of pair i and returns its output."""

    name: str
    run: Callable[[int], Any]
    content_hash: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    engines: tuple[dict[str, Any], ...] = ()


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
) -> PairedTimes:
    """Takes pairs until the verdict is decided, the budget is spent or `most_pairs` are taken.

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
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")
    times: tuple[list[float], list[float]] = ([], [])
    samplers = (baseline, candidate)
    orders = _abba(seed)
    look, next_look = 1, max(pairs, FEWEST_PAIRS)
    with collection_paused():
        started = time.perf_counter()
        while True:
            index = len(times[0])
            for side in next(orders):
                if settle_s > 0.0:
                    time.sleep(settle_s)
                times[side].append(samplers[side](index))
            spent = time.perf_counter() - started
            taken = index + 1
            over = spent >= budget_s or taken >= most_pairs
            if taken < next_look and not over:
                continue
            confidence = look_confidence(look)
            seen = pair_statistics(times[0], times[1], seed=seed, confidence=confidence)
            verdict = decide(seen, threshold=threshold, floor_ms=floor_ms)
            if over or verdict is not Verdict.UNDECIDED:
                break
            look, next_look = look + 1, int(np.ceil(next_look * GROWTH))
    return PairedTimes(
        tuple(times[0]),
        tuple(times[1]),
        pair_statistics(times[0], times[1], seed=seed, confidence=CONFIDENCE),
        verdict,
        confidence,
        spent,
    )


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
    sample: Callable[[Subject, int], float] | None = None,
    fidelity: Callable[[Any, Any], dict[str, float]] | None = None,
    environment: Environment | None = None,
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Checks both outputs, warms both sides up, interleaves them, decides.

    Args:
        baseline, candidate: the two sides.
        workload: what is timed, in words; stored results are only compared under the same words.
        pairs, budget_s, seed, threshold, floor_ms, settle_s: see `interleave`.
        warmup: calls of each side after the first that do not count.
        device, clock: see `time_once`.
        threads: that both sides were given; written into the fingerprint.
        sample: times one call in milliseconds where that is not simply the time of `run`.
        fidelity: distances between the two first outputs, kept with the result.
        environment: fingerprint read before; read here by default.
        notes: sentences kept with the result.
    """
    env = environment or read_environment(threads)

    def timed(subject: Subject, index: int) -> float:
        if sample is not None:
            return sample(subject, index)
        return time_once(lambda: subject.run(index), device, clock)

    def comparison(verdict: Verdict, reason: str, found: PairedTimes | None) -> Comparison:
        sides = []
        for number, subject in enumerate((baseline, candidate)):
            times = (found.baseline_ms, found.candidate_ms)[number] if found else ()
            sides.append(
                Side(
                    name=subject.name,
                    content_hash=subject.content_hash,
                    sampling=dict(subject.sampling),
                    engines=subject.engines,
                    latency=Latency.of(times, first_ms[number]) if times else None,
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
        first_ms.append(time_once(partial(_keep, kept, subject), device))
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
    found = interleave(
        lambda i: timed(baseline, i),
        lambda i: timed(candidate, i),
        pairs=pairs,
        budget_s=budget_s,
        seed=seed,
        threshold=threshold,
        floor_ms=floor_ms,
        settle_s=settle_s,
    )
    return comparison(found.verdict, explain(found, threshold, floor_ms), found)


def _keep(kept: list[Any], subject: Subject) -> None:
    kept.append(subject.run(0))


def explain(found: PairedTimes, threshold: float, floor_ms: float) -> str:
    """Why the verdict is what it is, in one sentence."""
    s, taken = found.statistics.speedup, found.statistics.pairs
    margin = f"{threshold:.1%}" + (f" and {floor_ms:g} ms" if floor_ms else "")
    interval = f"[{s.low:.4g}, {s.high:.4g}] over {taken} interleaved pairs"
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
