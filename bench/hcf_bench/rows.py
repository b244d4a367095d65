"""From a warm worker to a row: output checked, timed alone or in pairs, set against the roof."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hcf.engines import FORMATS
from hcf.errors import HcfError, MissingDependency
from hcf_bench.environment import usable_cores
from hcf_bench.pairs import Subject, compare_subjects, output_distance, output_problems
from hcf_bench.records import REFERENCE, Row, Status
from hcf_bench.remote import Worker, WorkerTimeout
from hcf_bench.results import Latency
from hcf_bench.roofline import floor_ms, fraction_of_peak, fraction_of_roofline
from hcf_bench.statistics import Verdict
from hcf_bench.suite_recipe import Part, SuiteConfig
from hcf_bench.worker import Spec

Log = Callable[[str], None]
Emit = Callable[[str, Any], None]
LEAST_SAMPLES = 5


@dataclass(frozen=True)
class PartRun:
    """A part at work: `emit(kind, item)` puts a row on disk, `done` is what earlier runs left."""

    suite: SuiteConfig
    part: Part
    deadline: float
    ceilings: Mapping[str, float]
    done: frozenset[tuple[str, str, int]]
    emit: Emit
    log: Log

    @property
    def threads(self) -> int:
        """CPU threads of every subject."""
        return self.suite.threads or usable_cores()

    def subject_deadline(self) -> float:
        """`time.monotonic()` by which a subject that starts now must be done."""
        return min(self.deadline, time.monotonic() + self.part.subject_s)

    def over(self) -> bool:
        """Whether the time box is spent."""
        return time.monotonic() >= self.deadline

    def spec(self, peer: str, batch: int | None, scratch: str) -> Spec:
        """A worker of this part's workload."""
        return Spec(
            kind="peer",
            workload=self.part.workload,
            peer=peer,
            device=self.suite.device,
            batch=batch,
            threads=self.threads,
            seed=self.suite.seed,
            steps=self.part.steps,
            scratch=scratch,
        )


def reference_output(run: PartRun, batch: int, scratch: str) -> Any:
    """The output of eager fp32; None, with a note, where it cannot be had."""
    try:
        with Worker(
            run.spec(REFERENCE, batch, scratch), deadline=run.subject_deadline(), pause=False
        ) as worker:
            return worker.output()
    except HcfError as error:
        run.emit("notes", f"{run.part.name}: no fp32 reference: {error.message}")
        return None


def check_output(worker: Worker, peer: str, wanted: Any) -> dict[str, float]:
    """Distance of the worker's output to the reference.

    Raises:
        HcfError: not finite, another shape, or further away than the peer's bound.
    """
    from hcf_bench.peers import find_peer

    found = worker.output()
    problems = output_problems(found if wanted is None else wanted, found)
    if problems:
        raise InvalidOutput("; ".join(problems).replace("candidate", peer))
    if wanted is None:
        return {}
    distance = output_distance(wanted, found)
    bound = find_peer(peer).min_sqnr_db
    if distance["sqnr_db"] < bound:
        raise InvalidOutput(
            f"its output is {distance['sqnr_db']:.1f} dB from eager fp32, at least {bound:g} wanted"
        )
    return distance


class InvalidOutput(HcfError):
    """An output that forbids timing."""


def pair_row(
    run: PartRun,
    baseline: Worker,
    baseline_name: str,
    worker: Worker,
    name: str,
    batch: int,
    wanted: Any,
) -> Row:
    """Interleaved pairs of two warm workers as a row of the second."""
    distance = check_output(worker, name, wanted)
    left = min(run.deadline, worker.deadline) - time.monotonic()
    found = compare_subjects(
        _without_output(baseline.subject(baseline_name)),
        _without_output(worker.subject(name)),
        workload=run.part.workload,
        pairs=run.part.pairs,
        budget_s=max(1.0, min(run.part.pairs_s, left - 2.0)),
        seed=run.suite.seed,
        threshold=run.part.threshold,
        warmup=0,
        device="cpu",  # the workers keep the device's clock
        threads=run.threads,
        # a kernel's sample is already the median of several calls
        calls=1 if run.part.workload.startswith("kernel/") else None,
    )
    status: Status = "invalid" if found.verdict is Verdict.INVALID else "ok"
    row = make_row(run, name, batch, status, found.reason if status == "invalid" else "", worker)
    update: dict[str, Any] = {
        "latency": found.candidate.latency,
        "stages": worker.median_stages(),
        "baseline": baseline_name,
        "speedup": found.speedup,
        "pairs": found.pairs,
        "verdict": found.verdict,
        "clock": "device" if run.suite.device != "cpu" else found.clock,
        "fidelity": distance,
    }
    return _rated(run, row.model_copy(update=update))


def measured_row(run: PartRun, worker: Worker, name: str, batch: int, wanted: Any) -> Row:
    """One warm worker alone."""
    distance = check_output(worker, name, wanted)
    samples: list[float] = []
    until = min(run.deadline, time.monotonic() + run.part.pairs_s / 2) - 1.0
    while len(samples) < LEAST_SAMPLES or (time.monotonic() < until and len(samples) < 200):
        samples.append(worker.sample(len(samples)).wall_ms)
        if time.monotonic() >= run.deadline - 1.0:
            break
    row = make_row(run, name, batch, "ok", "", worker)
    update = {
        "latency": Latency.of(samples, worker.ready.get("first_ms")),
        "stages": worker.median_stages(),
        "fidelity": distance,
    }
    return _rated(run, row.model_copy(update=update))


def _rated(run: PartRun, row: Row) -> Row:
    """The row with throughput, and with its fractions where ceilings of its dtype are known."""
    if row.latency is None:
        return row
    p50_ms = row.latency.p50_ms
    update: dict[str, Any] = {"throughput_per_s": row.batch * 1e3 / p50_ms}
    # a peer that skips work by design would be rated by operations it does not do
    if run.part.kind != "artifacts" and not _skips_work(row.subject):
        ops = _ops(row.workload, row.batch, _case_dtype(row.subject))
        tflop = sum(op.flops for op in ops) / 1e12
        update |= {"tflop": tflop, "gbyte": sum(op.bytes for op in ops) / 1e9}
        dtype = FORMATS.get(row.dtype, row.dtype)
        if "copy" in run.ceilings and f"gemm-{dtype}" in run.ceilings:
            floor = floor_ms(ops, run.ceilings, dtype)
            update |= {
                "roofline_ms": floor,
                "fraction_of_peak": fraction_of_peak(tflop, p50_ms, run.ceilings, dtype),
                "fraction_of_roofline": fraction_of_roofline(floor, p50_ms),
            }
    return row.model_copy(update=update)


def make_row(
    run: PartRun,
    name: str,
    batch: int,
    status: Status,
    reason: str,
    worker: Worker | None = None,
) -> Row:
    report = dict(worker.ready.get("report") or {}) if worker else {}
    engines = worker.ready.get("engines") if worker else None
    if engines:
        report = {"engines": engines}
        dtype = str(engines[0]["precision"])
    elif run.part.kind == "artifacts":
        dtype = "fp32"
    else:
        dtype = str(report.get("precision") or _case_dtype(name))
    return Row(
        workload=run.part.workload or "pipeline end to end",
        subject=name,
        device=run.suite.device,
        dtype=dtype,
        batch=batch,
        status=status,
        reason=reason,
        memory=worker.memory if worker else None,
        engine=report,
    )


def status_of(error: HcfError) -> Status:
    if isinstance(error, MissingDependency):
        return "missing"
    if isinstance(error, InvalidOutput):
        return "invalid"
    return "timed_out" if isinstance(error, WorkerTimeout) else "failed"


def _without_output(subject: Subject) -> Subject:
    """The same side for a comparison whose outputs were compared before, over the pipe."""
    return Subject(
        subject.name,
        lambda _: np.zeros(1),
        sampling=subject.sampling,
        engines=subject.engines,
        sample=subject.sample,
        usage=subject.usage,
        first_ms=subject.first_ms,
    )


def row_line(row: Row) -> str:
    if row.status != "ok" or row.latency is None:
        return f"{row.subject}: {row.status}: {row.reason.splitlines()[0] if row.reason else ''}"
    text = f"{row.subject} b{row.batch}: p50 {row.latency.p50_ms:.4g} ms"
    if row.speedup is not None:
        s = row.speedup
        text += f", {s.value:.3g}x [{s.low:.3g}, {s.high:.3g}] {row.verdict}, {row.pairs} pairs"
    return text


def default_batch(workload: str) -> int:
    from hcf_bench.workloads import find_workload

    return find_workload(workload).batch


def _case_dtype(peer: str) -> str:
    from hcf_bench.peers import find_peer

    return find_peer(peer).dtype


def _skips_work(peer: str) -> bool:
    from hcf_bench.peers import find_peer

    return find_peer(peer).min_sqnr_db == -math.inf


@lru_cache(maxsize=16)
def _ops(workload: str, batch: int, dtype: str) -> tuple[Any, ...]:
    from hcf_bench.opcount import count_workload
    from hcf_bench.workloads import find_workload

    return tuple(count_workload(find_workload(workload), batch, dtype))
