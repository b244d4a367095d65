"""A suite: parts in order of value, each in its time box, each on disk as soon as it is done.

    hcf bench suite recipes/bench/cpu.yaml -o out/bench
    hcf bench gpu -o out/gpu --budget 540         (recipes/bench/gpu.yaml)

A part leaves `parts/<number>-<name>.json` after every row, so what was finished survives whatever
ends the run. Started again on the same code and machine it goes on where it stopped; rows that
failed are tried again. The merged record lies beside them, the table is printed last.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hcf import __version__
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.recipe import apply_overrides, parse, read_tree
from hcf_bench.environment import Environment, read_environment, same_environment
from hcf_bench.gpu_state import read_gpu_state, require_exclusive, throttled
from hcf_bench.parts import PARTS
from hcf_bench.records import Record, Row, SelfTest, read_record, record_path
from hcf_bench.remote import HUGE_PAGES
from hcf_bench.report import terminal_table, write_text
from hcf_bench.rows import PartRun
from hcf_bench.suite_recipe import Part, SuiteConfig

Log = Callable[[str], None]
LEAST_S = 15.0  # a part is not begun with less time than this
SOURCES = ("hcf", "kernels", "models/taiji", "bench/hcf_bench")


def load_suite(path: Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Reads a suite recipe. RecipeError names an unknown key, workload or peer with its nearest."""
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return parse(SuiteConfig, tree, str(path))


def recipe_path(name: str) -> Path:
    """A recipe of this checkout. RecipeError where only the packages are here."""
    path = Path(__file__).parents[2] / "recipes" / "bench" / name
    if not path.is_file():
        raise RecipeError(
            f"{name} is not beside these packages",
            "run it in a checkout, or `hcf bench suite FILE`",
        )
    return path


def run_suite(
    suite: SuiteConfig,
    out: Path,
    *,
    budget_s: float,
    parts_folder: Path | None = None,
    resume: bool = True,
    only: Sequence[str] = (),
    command: str = "",
    log: Log = print,
) -> Record:
    """Runs what is not done yet and returns the merged record, which is also written to `out`.

    Args:
        suite: parts, most valuable first.
        out: folder of the record and the table.
        budget_s: seconds in all; a part that does not fit any more is left for the next run.
        parts_folder: where parts are kept, by default `out/parts`; elsewhere if `out` is emptied
            between runs.
        resume: use finished parts of the same code and machine.
        only: names of parts to run; all by default.
        command: what was typed, kept in the record.
        log: progress lines.

    Raises:
        RecipeError: `only` names no part.
        MissingDependency: no device, or another process uses the GPU.
    """
    unknown = set(only) - {part.name for part in suite.parts}
    if unknown:
        known = ", ".join(part.name for part in suite.parts)
        raise RecipeError(f"the suite has no part {', '.join(sorted(unknown))}", f"use {known}")
    folder = parts_folder or out / "parts"
    started = time.monotonic()
    if suite.device.startswith("cuda"):
        require_device(suite.device)
        if require_exclusive(suite.device) is None:
            log("the state of the GPU cannot be read: not checked that nothing else uses it")
    environment = read_environment(suite.threads)
    commit = source_commit()
    records: list[Record] = []
    left: list[str] = []
    for number, part in enumerate(suite.parts):
        path = folder / f"{number:02d}-{part.name}.json"
        earlier = _earlier(path, environment, commit, part_hash(suite, part)) if resume else None
        if earlier is not None and earlier.finished and not _failed(earlier.rows):
            log(f"[{part.name}] done before")
            records.append(earlier)
            continue
        remaining = budget_s - (time.monotonic() - started)
        if (only and part.name not in only) or remaining < max(LEAST_S, part.least_s):
            left.append(part.name)
            if earlier is not None:
                records.append(earlier)
            continue
        log(f"[{part.name}] {part.kind}, at most {min(part.box_s, remaining):.0f} s")
        found = _run_part(
            suite, part, path, environment, commit, remaining, records, earlier, command, log
        )
        records.append(found)
        _write_merged(suite, out, records, environment, commit, command, left, started)
    merged = _write_merged(suite, out, records, environment, commit, command, left, started)
    table = terminal_table(merged, str(out / f"{suite.name}.json"))
    write_text(out / "table.txt", table + "\n")
    if left:
        log(f"left for another run: {', '.join(left)}")
    return merged


def failures(record: Record) -> list[str]:
    """Rows that failed, were killed or are invalid, in words; a missing peer is none."""
    return [f"{r.workload} {r.subject}: {r.status}: {r.reason}" for r in _failed(record.rows)]


def store_record(record: Record, results: Path) -> Path:
    """Writes a record under `results/<machine>/<date>-<commit>-<name>.json`."""
    path = record_path(results, record)
    write_record(path, record)
    return path


def selftest_record(tests: Sequence[SelfTest], threads: int, command: str) -> Record:
    """A record that holds nothing but a self-test."""
    now = datetime.now(UTC)
    return Record(
        name="selftest",
        date=now.date(),
        time_utc=now.strftime("%H:%M:%S"),
        commit=source_commit(),
        command=command,
        environment=read_environment(threads),
        selftests=tuple(tests),
    )


def write_record(path: Path, record: Record) -> None:
    """Writes the JSON to a temporary name and renames it; StorageError where it cannot."""
    write_text(path, record.model_dump_json(indent=1) + "\n")


def source_commit(root: Path | None = None) -> str:
    """The commit of the sources, with "-dirty" and their hash where they differ from it.

    Without git it is their hash, and of installed packages the version.
    """
    root = root or Path(__file__).parents[2]
    if not any((root / source).is_dir() for source in SOURCES):
        return f"hcf-{__version__}"
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *SOURCES],
            capture_output=True, text=True, check=True, timeout=30,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return _source_hash(root)
    return f"{head[:12]}-dirty-{_source_hash(root)}" if changed else head


def require_device(device: str) -> None:
    """Raises MissingDependency where torch finds no such GPU."""
    from hcf.errors import MissingDependency

    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError as error:
        raise MissingDependency(f"torch is missing: {error}", "pip install torch") from error
    if not found:
        raise MissingDependency(
            f"the suite wants {device}, and torch {torch.__version__} finds no CUDA device",
            "run it on a GPU host, or rehearse it here: make gpu-rehearsal",
        )


def _run_part(
    suite: SuiteConfig,
    part: Part,
    path: Path,
    environment: Environment,
    commit: str,
    remaining: float,
    before: Sequence[Record],
    earlier: Record | None,
    command: str,
    log: Log,
) -> Record:
    """One part, written after every row. Whatever it raises becomes a row, not the suite's end."""
    now = datetime.now(UTC)
    began = time.monotonic()
    resumable = earlier is not None and part.kind in ("peers", "batches")
    kept = [row for row in earlier.rows if row.status == "ok"] if earlier and resumable else []
    state: dict[str, list[Any]] = {
        "ceilings": [], "rows": kept, "profiles": [], "selftests": [], "notes": [],
    }  # fmt: skip

    def record(finished: bool) -> Record:
        return Record(
            name=part.name,
            date=now.date(),
            time_utc=now.strftime("%H:%M:%S"),
            commit=commit,
            command=command,
            environment=environment,
            finished=finished,
            recipe=part_hash(suite, part),
            spent_s=round(time.monotonic() - began + (earlier.spent_s if earlier else 0.0), 1),
            **{key: tuple(value) for key, value in state.items()},
        )

    def emit(kind: str, item: BaseModel | str) -> None:
        state[kind].append(item)
        write_record(path, record(finished=False))

    run = PartRun(
        suite=suite,
        part=part,
        deadline=began + min(part.box_s, remaining),
        ceilings={c.name: c.value for r in before for c in r.ceilings},
        done=frozenset((row.workload, row.subject, row.batch) for row in kept),
        emit=emit,
        log=log,
    )
    gpu = read_gpu_state(suite.device)
    finished = True
    try:
        PARTS[part.kind](run)
    except Exception as error:  # one part must not cost the others
        finished = False
        reason = (
            error.message if isinstance(error, HcfError) else f"{type(error).__name__}: {error}"
        )
        failed = Row(
            workload=part.workload or part.kind,
            subject=part.name,
            device=suite.device,
            status="failed",
            reason=reason,
        )
        emit("rows", failed)
        log(f"[{part.name}] failed: {reason}")
    for reason in throttled(gpu, read_gpu_state(suite.device)):
        emit("notes", f"{part.name}: {reason}")
    if time.monotonic() >= run.deadline:
        emit("notes", f"{part.name}: cut at its time box")
        finished = False
    done = record(finished)
    write_record(path, done)
    return done


def part_hash(suite: SuiteConfig, part: Part) -> str:
    """Of everything a part's rows depend on that the recipe says; time boxes are not among it."""
    asked = part.model_dump(mode="json", exclude={"box_s", "subject_s", "least_s"})
    text = json.dumps([suite.device, suite.threads, suite.seed, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _earlier(path: Path, environment: Environment, commit: str, recipe: str) -> Record | None:
    """What an earlier run of the same part by the same code on the same machine left."""
    if not path.is_file():
        return None
    try:
        found = read_record(path)
    except InvalidArtifact:
        return None
    if found.commit != commit or found.recipe != recipe:
        return None
    if same_environment(found.environment, environment):
        return None
    return found


def _failed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status in ("failed", "timed_out", "invalid")]


def _write_merged(
    suite: SuiteConfig,
    out: Path,
    records: Sequence[Record],
    environment: Environment,
    commit: str,
    command: str,
    left: Sequence[str],
    started: float,
) -> Record:
    now = datetime.now(UTC)
    notes = [note for r in records for note in r.notes]
    if suite.device == "cpu":
        notes.insert(0, f"workers run with GLIBC_TUNABLES={HUGE_PAGES}")
    if left:
        notes.append(f"not run: {', '.join(left)}")
    merged = Record(
        name=suite.name,
        date=now.date(),
        time_utc=now.strftime("%H:%M:%S"),
        commit=commit,
        command=command,
        environment=environment,
        finished=not left and all(r.finished for r in records),
        spent_s=round(sum(r.spent_s for r in records), 1),
        ceilings=tuple(c for r in records for c in r.ceilings),
        rows=tuple(row for r in records for row in r.rows),
        profiles=tuple(p for r in records for p in r.profiles),
        selftests=tuple(s for r in records for s in r.selftests),
        notes=tuple(notes),
    )
    write_record(out / f"{suite.name}.json", merged)
    return merged


def _source_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((root / source).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return f"src{digest.hexdigest()[:9]}"
