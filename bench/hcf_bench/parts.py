"""What a suite is made of: each kind of part measures one thing and hands over rows as it goes.

Everything that is timed runs in workers, but for the self-test, which is about timing in one
process; the process of the suite itself never touches the device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hcf.errors import HcfError, MissingDependency
from hcf.recipe import Config
from hcf_bench.environment import usable_cores
from hcf_bench.pairs import (
    Subject,
    compare_subjects,
    output_distance,
    output_problems,
)
from hcf_bench.records import Ceiling, Profile, Row, Status
from hcf_bench.remote import Worker, WorkerTimeout, ask_once
from hcf_bench.results import Latency
from hcf_bench.roofline import floor_ms, fraction_of_peak, fraction_of_roofline
from hcf_bench.statistics import Verdict
from hcf_bench.worker import Spec

Log = Callable[[str], None]
Emit = Callable[[str, Any], None]
PartKind = Literal["ceilings", "peers", "batches", "profile", "artifacts", "selftest"]
REFERENCE = "eager"  # fp32: what every output is held against
LEAST_SAMPLES = 5


class Part(Config):
    """One part of a suite. Only the keys of its `kind` count.

    ceilings: `dtypes`. peers: `workload` by `baseline` and each of `peers`, as interleaved pairs.
    batches: `workload` by each of `peers` at each of `batches`. profile: the layers of `workload`
    in `dtypes`. artifacts: the folder `baseline` against each of `peers` (folders), prompt to
    pixels. selftest: `comparisons` of each kind.

    `box_s` bounds the part, `subject_s` each subject in it; it is not begun with less than
    `least_s` left.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    kind: PartKind
    workload: str = ""
    baseline: str = ""
    peers: list[str] = []
    batch: int | None = Field(None, gt=0)
    batches: list[int] = []
    steps: int | None = Field(None, gt=0)
    dtypes: list[str] = []
    pairs: int = Field(8, gt=0)
    pairs_s: float = Field(20.0, gt=0)
    threshold: float = Field(0.01, gt=0)
    comparisons: int = Field(10, gt=0)
    load: int = Field(4, ge=0)
    box_s: float = Field(120.0, gt=0)
    subject_s: float = Field(120.0, gt=0)
    least_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Names are looked up when the recipe is read, not after half the suite has run."""
        if self.kind in ("peers", "batches", "profile"):
            from hcf_bench.workloads import find_workload

            find_workload(self.workload)
        if self.kind in ("peers", "batches"):
            from hcf_bench.peers import find_peer

            for name in (*([self.baseline] if self.kind == "peers" else []), *self.peers):
                find_peer(name)
        needed = {"profile": "dtypes", "ceilings": "dtypes", "batches": "batches",
                  "artifacts": "baseline"}.get(self.kind)  # fmt: skip
        if needed and not getattr(self, needed):
            raise ValueError(f"a part of kind {self.kind} needs {needed}")
        return self


class SuiteConfig(Config):
    """A suite: parts in order of value, on one device with one number of threads."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    device: str = "cpu"
    threads: int | None = Field(None, gt=0)
    seed: int = 0
    parts: list[Part] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two parts are called {', '.join(twice)}")
        return self


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
    scratch: list[Path] = field(default_factory=list)

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


def run_ceilings(run: PartRun) -> None:
    """Copy bandwidth and GEMM rate per dtype, in a worker of their own."""
    answer = ask_once(
        Spec(
            kind="ceilings",
            device=run.suite.device,
            dtypes=tuple(run.part.dtypes),
            threads=run.threads,
            budget_s=run.part.box_s / 2,
        ),
        deadline=run.deadline,
    )
    for item in answer["ceilings"]:
        ceiling = Ceiling.model_validate(item)
        run.log(f"  {ceiling.name}: {ceiling.value:.4g} {ceiling.unit}")
        run.emit("ceilings", ceiling)
    for note in answer.get("left_out", ()):
        run.emit("notes", note)


def run_profile(run: PartRun) -> None:
    """The ten layers furthest above their floor, for each dtype."""
    for dtype in run.part.dtypes:
        if run.over():
            return
        if f"gemm-{dtype}" not in run.ceilings:
            run.emit("notes", f"{run.part.name}: no ceiling for {dtype}, so no profile")
            continue
        spec = run.spec("eager", run.part.batch, "").model_copy(
            update={"kind": "profile", "dtype": dtype, "ceilings": dict(run.ceilings)}
        )
        answer = ask_once(spec, deadline=run.subject_deadline())
        profile = Profile.model_validate(answer["profile"])
        run.log(f"  {dtype}: {profile.total_ms:.1f} ms, floor {profile.floor_ms:.1f} ms")
        run.emit("profiles", profile)


def run_peers(run: PartRun) -> None:
    """The baseline, then each peer against it as interleaved pairs; outputs are checked first."""
    part = run.part
    batch = part.batch or _default_batch(part.workload)
    with tempfile.TemporaryDirectory(prefix="hcf-bench-") as scratch:
        wanted = _reference(run, batch, scratch)
        baseline = Worker(run.spec(part.baseline, batch, scratch), deadline=run.subject_deadline())
        try:
            try:
                baseline.start()
                _check_output(baseline, part.baseline, wanted)
            except HcfError as error:
                row = _row(run, part.baseline, batch, _status(error), error.message)
                run.emit("rows", row)
                run.log(f"  {_line(row)}")
                if row.status == "missing":
                    return
                raise HcfError(
                    f"the baseline {part.baseline} cannot run: {error.message}", error.fix
                ) from error
            baseline.deadline = run.deadline
            if (part.workload, part.baseline, batch) not in run.done:
                run.emit("rows", _measure(run, baseline, part.baseline, batch, wanted))
            for peer in part.peers:
                if (part.workload, peer, batch) in run.done:
                    continue
                if run.over():
                    return
                if not baseline.alive:
                    run.emit("notes", f"{part.name}: {part.baseline} died and was started again")
                    baseline.close()
                    baseline = Worker(baseline.spec, deadline=run.deadline)
                    baseline.start()
                row = _against(run, baseline, peer, batch, scratch, wanted)
                run.emit("rows", row)
                run.log(f"  {_line(row)}")
        finally:
            baseline.close()


def run_batches(run: PartRun) -> None:
    """Throughput of each peer by batch."""
    with tempfile.TemporaryDirectory(prefix="hcf-bench-") as scratch:
        for batch in run.part.batches:
            for peer in run.part.peers:
                if (run.part.workload, peer, batch) in run.done or run.over():
                    continue
                try:
                    spec = run.spec(peer, batch, scratch)
                    with Worker(spec, deadline=run.subject_deadline(), pause=False) as worker:
                        row = _measure(run, worker, peer, batch, None)
                except HcfError as error:
                    row = _row(run, peer, batch, _status(error), error.message)
                run.emit("rows", row)
                run.log(f"  {_line(row)}")


def run_artifacts(run: PartRun) -> None:
    """Artefact folders from prompt to pixels: the first against each of the others.

    A folder may be followed by `@engine-precision`, as in `out/quickstart@openvino-int8`.
    """
    part, batch = run.part, run.part.batch or 1
    with Worker(_artifact_spec(run, part.baseline, batch), deadline=run.deadline) as baseline:
        name = _artifact_name(part.baseline, baseline)
        run.emit("rows", _measure(run, baseline, name, batch, None))
        for folder in part.peers:
            if run.over():
                return
            try:
                spec = _artifact_spec(run, folder, batch)
                with Worker(spec, deadline=run.subject_deadline()) as worker:
                    candidate = _artifact_name(folder, worker)
                    row = _pair(run, baseline, name, worker, candidate, batch, None)
            except HcfError as error:
                row = _row(run, folder, batch, _status(error), error.message)
            run.emit("rows", row)
            run.log(f"  {_line(row)}")


def run_selftest_part(run: PartRun) -> None:
    """Comparisons whose truth is known."""
    from hcf_bench.selftest import BUDGET_S, SelfTestConfig, run_selftest

    # a comparison that is out of its budget is undecided: the part ends within its box
    each_s = (run.deadline - time.monotonic()) / (2 * run.part.comparisons)
    config = SelfTestConfig(
        comparisons=run.part.comparisons,
        load=run.part.load,
        budget_s=min(each_s, BUDGET_S),
        seed=run.suite.seed,
    )
    for test in run_selftest(config, run.log):
        run.emit("selftests", test)


PARTS: dict[str, Callable[[PartRun], None]] = {
    "ceilings": run_ceilings,
    "peers": run_peers,
    "batches": run_batches,
    "profile": run_profile,
    "artifacts": run_artifacts,
    "selftest": run_selftest_part,
}


def _reference(run: PartRun, batch: int, scratch: str) -> Any:
    """The output of eager fp32; None, with a note, where it cannot be had."""
    try:
        with Worker(
            run.spec(REFERENCE, batch, scratch), deadline=run.subject_deadline(), pause=False
        ) as worker:
            return worker.output()
    except HcfError as error:
        run.emit("notes", f"{run.part.name}: no fp32 reference: {error.message}")
        return None


def _check_output(worker: Worker, peer: str, wanted: Any) -> dict[str, float]:
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


def _against(
    run: PartRun, baseline: Worker, peer: str, batch: int, scratch: str, wanted: Any
) -> Row:
    try:
        spec = run.spec(peer, batch, scratch)
        with Worker(spec, deadline=run.subject_deadline()) as worker:
            return _pair(run, baseline, run.part.baseline, worker, peer, batch, wanted)
    except HcfError as error:
        return _row(run, peer, batch, _status(error), error.message)


def _pair(
    run: PartRun,
    baseline: Worker,
    baseline_name: str,
    worker: Worker,
    name: str,
    batch: int,
    wanted: Any,
) -> Row:
    """Interleaved pairs of two warm workers as a row of the second."""
    is_peer = worker.spec.kind == "peer"
    distance = _check_output(worker, name, wanted) if is_peer else {}
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
    row = _row(run, name, batch, status, found.reason if status == "invalid" else "", worker)
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


def _measure(run: PartRun, worker: Worker, name: str, batch: int, wanted: Any) -> Row:
    """One warm worker alone."""
    distance = _check_output(worker, name, wanted) if wanted is not None else {}
    samples: list[float] = []
    until = min(run.deadline, time.monotonic() + run.part.pairs_s / 2) - 1.0
    while len(samples) < LEAST_SAMPLES or (time.monotonic() < until and len(samples) < 200):
        samples.append(worker.sample(len(samples)).wall_ms)
        if time.monotonic() >= run.deadline - 1.0:
            break
    row = _row(run, name, batch, "ok", "", worker)
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
    if run.part.kind != "artifacts":
        ops = _ops(row.workload, row.batch, _case_dtype(row.subject))
        tflop = sum(op.flops for op in ops) / 1e12
        update |= {"tflop": tflop, "gbyte": sum(op.bytes for op in ops) / 1e9}
        if "copy" in run.ceilings and f"gemm-{row.dtype}" in run.ceilings:
            floor = floor_ms(ops, run.ceilings, row.dtype)
            update |= {
                "roofline_ms": floor,
                "fraction_of_peak": fraction_of_peak(tflop, p50_ms, run.ceilings, row.dtype),
                "fraction_of_roofline": fraction_of_roofline(floor, p50_ms),
            }
    return row.model_copy(update=update)


def _row(
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


def _status(error: HcfError) -> Status:
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


def _line(row: Row) -> str:
    if row.status != "ok" or row.latency is None:
        return f"{row.subject}: {row.status}: {row.reason.splitlines()[0] if row.reason else ''}"
    text = f"{row.subject} b{row.batch}: p50 {row.latency.p50_ms:.4g} ms"
    if row.speedup is not None:
        s = row.speedup
        text += f", {s.value:.3g}x [{s.low:.3g}, {s.high:.3g}] {row.verdict}, {row.pairs} pairs"
    return text


def _artifact_spec(run: PartRun, text: str, batch: int) -> Spec:
    folder, _, asked = text.partition("@")
    engine, _, precision = asked.partition("-")
    return Spec(
        kind="artifact",
        model=folder,
        engine=engine or "auto",
        precision=precision or None,
        batch=batch,
        device=run.suite.device,
        threads=run.threads,
        seed=run.suite.seed,
        steps=run.part.steps,
    )


def _artifact_name(text: str, worker: Worker) -> str:
    sampling, engines = worker.ready.get("sampling") or {}, worker.ready.get("engines") or []
    steps = f", {sampling['num_inference_steps']} steps" if sampling else ""
    running = f", {engines[0]['engine']} {engines[0]['precision']}" if engines else ""
    return f"{Path(text.partition('@')[0]).name}{steps}{running}"


def _default_batch(workload: str) -> int:
    from hcf_bench.workloads import find_workload

    return find_workload(workload).batch


def _case_dtype(peer: str) -> str:
    from hcf_bench.peers import find_peer

    return find_peer(peer).dtype


@lru_cache(maxsize=16)
def _ops(workload: str, batch: int, dtype: str) -> tuple[Any, ...]:
    from hcf_bench.opcount import count_workload
    from hcf_bench.workloads import find_workload

    return tuple(count_workload(find_workload(workload), batch, dtype))
