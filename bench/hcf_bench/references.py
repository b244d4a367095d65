"""Two names into one comparison: folders, stored results, commits, the working tree.

    baseline and candidate   what runs
    folder, folder           two models with the code here, in one process or in two
    commit or ".", likewise  two versions of the code on one model or workload, a process each
    result, folder           the stored times of a model against a model timed now
    result, commit or "."    the same, or a row of a suite's record, against that code timed now

A commit is checked out beside the working tree, which is not touched. A side that dies, hangs or
gives NaN makes the comparison INVALID; it is no error of the one who asked.
"""

from __future__ import annotations

import difflib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hcf.artifact import MANIFEST, read_manifest
from hcf.errors import InvalidArtifact, RecipeError
from hcf.settings import BenchConfig
from hcf_bench.compare import PROMPTS, compare_artifacts
from hcf_bench.environment import Environment, read_environment, same_environment
from hcf_bench.launches import compare_launches
from hcf_bench.pairs import (
    Subject,
    compare_subjects,
    output_distance,
    output_problems,
    unequal_threads,
)
from hcf_bench.records import Record, read_record
from hcf_bench.remote import HUGE_PAGES, Worker, WorkerFailed, WorkerTimeout
from hcf_bench.results import (
    Comparison,
    Latency,
    Measurement,
    Side,
    compare_measurements,
    read_result,
)
from hcf_bench.revisions import (
    CHECKOUT,
    MODEL_FILES,
    Reference,
    checked_out,
    resolve,
    source_roots,
)
from hcf_bench.statistics import Verdict
from hcf_bench.worker import Spec

Log = Callable[[str], None]
SHIPPED_MODEL = CHECKOUT / "models/weights/taiji-sd-mini"
CODE = ("commit", "tree")
ALLOWANCE_S = 300.0  # for a side to start, to load its model and to run the first time
POSSIBLE = (
    "compare two model folders, two commits (or a commit and `.`) on one model or workload, or "
    "either with a stored .json as the baseline"
)


Sides = tuple[Reference, Reference]


@dataclass(frozen=True)
class Plan:
    """What both sides share; `engines` and `precisions` are one for each."""

    config: BenchConfig
    workload: str
    peer: str
    model: Path | None
    engines: tuple[str, str]
    precisions: tuple[str | None, str | None]
    device: str
    allowance_s: float
    environment: Environment
    log: Log

    @property
    def batch(self) -> int:
        """As asked; of a workload by default its own."""
        if not self.workload or "batch" in self.config.model_fields_set:
            return self.config.batch
        from hcf_bench.workloads import find_workload

        return find_workload(self.workload).batch

    @property
    def words(self) -> str:
        """What is timed; stored times are only compared under the same words."""
        what = f"{self.workload} by {self.peer}" if self.workload else "pipeline end to end"
        return f"{what}, batch {self.batch}"

    @property
    def margins(self) -> dict[str, Any]:
        """Of the verdict."""
        return {"threshold": self.config.threshold, "floor_ms": self.config.floor_ms}

    def deadline(self, extra_s: float = 0.0) -> float:
        """`time.monotonic()` by which a side that is asked now must have answered."""
        return time.monotonic() + self.allowance_s + extra_s


def compare_references(
    baseline: str,
    candidate: str,
    config: BenchConfig,
    *,
    root: Path = CHECKOUT,
    workload: str = "",
    peer: str = "eager",
    model: Path | None = None,
    engines: tuple[str, str] = ("auto", "auto"),
    precisions: tuple[str | None, str | None] = (None, None),
    processes: int | None = None,
    device: str = "cpu",
    allowance_s: float = ALLOWANCE_S,
    log: Log = print,
) -> Comparison:
    """Compares what two names mean, see the table above.

    Args:
        baseline, candidate, root: see `resolve`.
        config: pairs, budget, batch, prompts, seed, threads and thresholds.
        workload, peer: what code runs in place of a model; with a record, the row.
        model: folder that code runs, eager unless `engines` say otherwise; the shipped one by
            default, but against stored times it must be named.
        engines, precisions: of each side, see `hcf.load`.
        processes: 1 or 2. Two folders share one by default; code always takes two.
        device: of a workload, "cpu" or "cuda".
        allowance_s: seconds beyond `config.budget_s` after which a side counts as hanging.
        log: progress lines.

    Raises:
        RecipeError: a name means nothing, or the two cannot be compared so.
        MissingDependency: a package that the peer or the engine needs is not here.
        HcfError: a commit cannot be checked out or built.
    """
    sides = (resolve(baseline, root), resolve(candidate, root))
    plan = Plan(
        config, workload, peer, model, engines, precisions, device, allowance_s,
        read_environment(config.threads), log,
    )  # fmt: skip
    _refuse(sides, plan, processes)
    log(f"compare {sides[0].label} with {sides[1].label}")
    if sides[1].kind == "folder" and (sides[0].kind == "result" or processes != 2):
        asked: dict[str, Any] = {"engines": engines, "precisions": precisions, "log": log}
        return compare_artifacts(Path(baseline), Path(candidate), config, **asked)
    compare = _against_stored if sides[0].kind == "result" else _side_by_side
    found = compare(sides, plan, root)
    log(found.headline())
    return found


@contextmanager
def running(
    side: Reference, tree: Path | None, plan: Plan, number: Literal[0, 1]
) -> Iterator[tuple[Worker, Subject]]:
    """A warm worker with the code in `tree`, and the same as a subject whose failures name the
    side.

    Raises:
        WorkerFailed, WorkerTimeout: the message begins with the side's label.
    """
    with tempfile.TemporaryDirectory(prefix="hcf-bench-") as scratch, ExitStack() as stack:
        paths = source_roots(tree) if tree is not None else ()
        with _blaming(side):
            worker = stack.enter_context(
                Worker(_spec(side, plan, number, scratch), deadline=plan.deadline(), paths=paths)
            )
        yield worker, _subject(worker, side)


def _sources(side: Reference, root: Path, plan: Plan, stack: ExitStack) -> Path | None:
    """The side's code as a folder, checked out for as long as the stack; None for a model.

    Raises RecipeError where it is not this toolkit.
    """
    tree = side.path if side.kind == "tree" else None
    if side.kind == "commit":
        plan.log(f"check out {side.label}")
        tree = stack.enter_context(checked_out(side.sha, root))
    if tree is not None and not (tree / "hcf/__init__.py").is_file():
        # the installed one would be imported in its place, and be compared with itself
        raise RecipeError(f"{side.label} holds no sources of hcf", "name a commit that does")
    return tree


def _side_by_side(sides: Sides, plan: Plan, root: Path) -> Comparison:
    """Two workers that take turns, launched several times: two versions of the code, or folders."""
    is_code = sides[0].kind in CODE
    notes: tuple[str, ...] = (f"each side in a process of its own, {HUGE_PAGES}",)
    if is_code:
        notes += tuple(f"{side.label}: sources of {side.sha}" for side in sides)
    if is_code and sides[0].sha == sides[1].sha:
        notes += ("the same sources on both sides: anything but SAME is a false alarm",)
    with ExitStack() as stack:
        trees = (_sources(sides[0], root, plan, stack), _sources(sides[1], root, plan, stack))
        try:
            return compare_launches(
                lambda number: _launch(sides, trees, plan, number, is_code, notes),
                budget_s=plan.config.budget_s,
                seed=plan.config.seed,
                log=plan.log,
                **plan.margins,
            )
        except (WorkerFailed, WorkerTimeout) as error:
            names = (sides[0].label, sides[1].label)
            return _invalid(error.message, names, plan, paired=True, notes=notes)


def _launch(
    sides: Sides,
    trees: tuple[Path | None, Path | None],
    plan: Plan,
    number: int,
    is_code: bool,
    notes: tuple[str, ...],
) -> Comparison:
    """Both sides started anew, the candidate first every other time, and `config.pairs` pairs."""
    order: tuple[Literal[0, 1], ...] = (0, 1) if number % 2 == 0 else (1, 0)
    with ExitStack() as stack:
        started = {i: stack.enter_context(running(sides[i], trees[i], plan, i)) for i in order}
        one, two = started[0], started[1]
        for worker, _ in (one, two):
            worker.deadline = plan.deadline(plan.config.budget_s)
        found = compare_subjects(
            one[1],
            two[1],
            workload=plan.words,
            pairs=plan.config.pairs,
            most_pairs=plan.config.pairs,
            budget_s=plan.config.budget_s,
            seed=plan.config.seed + number,
            warmup=0,  # they are warm when they are ready
            clock="device" if plan.device.startswith("cuda") else "host",
            threads=plan.environment.threads,
            fidelity=output_distance if is_code else None,
            environment=plan.environment,
            notes=notes,
            **plan.margins,
        )
        before = found.baseline.model_copy(update={"stages": one[0].median_stages()})
        after = found.candidate.model_copy(update={"stages": two[0].median_stages()})
        return found.model_copy(update={"baseline": before, "candidate": after})


def _against_stored(sides: Sides, plan: Plan, root: Path) -> Comparison:
    """Code timed now, alone, against stored times: not paired, and only on the same machine."""
    stored = _read_stored(sides[0].path or Path(), plan)
    subject = Side(name=sides[1].label)
    if not same_environment(stored.environment, plan.environment):
        try:
            with ExitStack() as stack:
                tree = _sources(sides[1], root, plan, stack)
                worker, timed = stack.enter_context(running(sides[1], tree, plan, 1))
                subject = _measure(worker, timed, plan)
        except (WorkerFailed, WorkerTimeout) as error:
            names = (stored.subject.name, sides[1].label)
            return _invalid(error.message, names, plan, paired=False)
    measured = Measurement(
        workload=plan.words,
        subject=subject,
        seed=plan.config.seed,
        environment=plan.environment,
    )
    return compare_measurements(stored, measured, **plan.margins)


def _measure(worker: Worker, subject: Subject, plan: Plan) -> Side:
    """`config.pairs` warm samples, fewer where the budget ends before."""
    worker.deadline = plan.deadline(plan.config.budget_s)
    output = subject.run(0)
    problems = unequal_threads([subject], plan.environment.threads)
    if output_problems(output, output):
        problems.append(f"{subject.name}: its output is not finite")
    if problems:
        raise WorkerFailed("; ".join(problems))
    plan.log(f"time {subject.name} alone")
    samples: list[float] = []
    until = time.monotonic() + plan.config.budget_s
    while len(samples) < plan.config.pairs and (not samples or time.monotonic() < until):
        samples.append(worker.sample(len(samples)).wall_ms)
    return Side(
        name=subject.name,
        content_hash=subject.content_hash,
        sampling=dict(subject.sampling),
        engines=subject.engines,
        latency=Latency.of(samples, subject.first_ms),
        stages=worker.median_stages(),
    )


def _read_stored(path: Path, plan: Plan) -> Measurement:
    """The measurement in the file, or the row of the record in it.

    Raises:
        RecipeError: a measurement needs its model named and no workload, a record one it has.
        InvalidArtifact: neither a measurement nor a record.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None  # `read_result` says what is wrong with it
    if isinstance(data, dict) and data.get("kind") == "record":
        return _stored_row(read_record(path), path, plan)
    found = read_result(path)
    if not isinstance(found, Measurement):
        message = f"{path} holds a comparison, not the times of one model"
        raise InvalidArtifact(message, "store one with `hcf bench run`")
    if plan.workload:
        message = f"{path} holds the times of a model, not of {plan.workload}"
        raise RecipeError(message, "name no workload, or give the record of a suite")
    if plan.model is None:
        raise RecipeError(f"{path} holds the times of a model: of which?", "name its folder")
    return found


def _stored_row(record: Record, path: Path, plan: Plan) -> Measurement:
    rows = {
        f"{row.workload} by {row.subject}, batch {row.batch}": row
        for row in record.rows
        if row.latency is not None and row.device == plan.device
    }
    row = rows.get(plan.words) if plan.workload else None
    if row is None:
        wanted = plan.words if plan.workload else "a workload that is not named"
        near = difflib.get_close_matches(wanted, rows, 3) or sorted(rows)
        raise RecipeError(
            f"{path} is the record of a suite, without times of {wanted}, on {plan.device}",
            f"name a row of it: {'; '.join(near) or 'it has none'}",
        )
    subject = Side(
        name=f"{row.subject} in {path.name}",
        engines=(row.engine,) if row.engine else (),
        latency=row.latency,
        stages=row.stages,
    )
    return Measurement(workload=plan.words, subject=subject, seed=0, environment=record.environment)


def _spec(side: Reference, plan: Plan, number: Literal[0, 1], scratch: str) -> Spec:
    shared: dict[str, Any] = {
        "device": plan.device,
        "batch": plan.batch,
        "threads": plan.environment.threads,
        "seed": plan.config.seed,
        "prompts": tuple(plan.config.prompts or PROMPTS),
    }
    if plan.workload:
        asked = {"workload": plan.workload, "peer": plan.peer, "scratch": scratch}
        return Spec(kind="peer", **asked, **shared)
    folder = side.path if side.kind == "folder" else None
    engine = plan.engines[number]
    return Spec(
        kind="artifact",
        model=str((folder or plan.model or SHIPPED_MODEL).resolve()),
        engine="eager" if engine == "auto" and not folder else engine,
        precision=plan.precisions[number],
        **shared,
    )


def _subject(worker: Worker, side: Reference) -> Subject:
    name, content_hash = side.label, ""
    model = Path(worker.spec.model) / MANIFEST
    if worker.spec.kind == "artifact" and model.is_file():
        content_hash = read_manifest(model.parent).content_hash
    if side.kind == "folder":
        steps = (worker.ready.get("sampling") or {}).get("num_inference_steps")
        name += f", {steps} steps" if steps else ""
        for engine in (worker.ready.get("engines") or [])[:1]:
            name += f", {engine['engine']} {engine['precision']}"

    def sample(index: int) -> Any:
        with _blaming(side):
            return worker.sample(index)

    def run(index: int) -> Any:
        with _blaming(side):
            return worker.output(index)

    return replace(worker.subject(name, content_hash), run=run, sample=sample)


def _invalid(reason: str, names: tuple[str, str], plan: Plan, **facts: Any) -> Comparison:
    return Comparison(
        workload=plan.words,
        verdict=Verdict.INVALID,
        reason=reason,
        baseline=Side(name=names[0]),
        candidate=Side(name=names[1]),
        seed=plan.config.seed,
        environment=plan.environment,
        **plan.margins,
        **facts,
    )


def _refuse(sides: Sides, plan: Plan, processes: int | None) -> None:
    """RecipeError for things that are not of one kind, and for options that would go unheard."""
    one, two = sides
    named = f"{one.label} and {two.label}"
    if processes not in (None, 1, 2):
        raise RecipeError(f"a comparison takes 1 process or 2, not {processes}")
    if two.kind == "result":
        raise RecipeError(f"{two.label} is a stored result: only a baseline can be", POSSIBLE)
    if one.kind != "result" and (one.kind in CODE) != (two.kind in CODE):
        raise RecipeError(f"{named}: one is a model, the other is code", POSSIBLE)
    if processes == 1 and one.kind in CODE:
        raise RecipeError(f"{named}: two versions of the code do not fit one process", "ask for 2")
    if processes == 2 and one.kind == "result":
        raise RecipeError(f"{one.label} is a stored result: one process is timed", "ask for 1")
    if two.kind == "folder" and (plan.workload or plan.model):
        asked = plan.workload or str(plan.model)
        raise RecipeError(f"{two.label} is a model: {asked} is not run by it", POSSIBLE)
    if plan.workload and plan.model:
        raise RecipeError(f"{plan.workload} and {plan.model} are both to be run", "name one")
    if plan.workload and (plan.engines, plan.precisions) != (("auto", "auto"), (None, None)):
        raise RecipeError("an engine is a model's; a workload is run by a peer", "name a peer")
    if plan.device != "cpu" and not plan.workload:
        raise RecipeError(f"{plan.device} is for a workload: a model's engine has its own device")
    if plan.workload:
        from hcf_bench.peers import find_peer
        from hcf_bench.workloads import find_workload

        find_workload(plan.workload), find_peer(plan.peer)
    elif plan.model and not any((plan.model / name).is_file() for name in MODEL_FILES):
        message = f"{plan.model} holds no model: it has no {' and no '.join(MODEL_FILES)}"
        raise RecipeError(message, "give a model folder, or a workload")


@contextmanager
def _blaming(side: Reference) -> Iterator[None]:
    """Puts the side's name before what its worker failed with."""
    try:
        yield
    except (WorkerFailed, WorkerTimeout) as error:
        raise type(error)(f"{side.label}: {error.message}", error.fix) from error
