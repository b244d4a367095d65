"""The students of a comparison: which to make, and where; one at a time, each used again."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from hcf.artifact import check_model_folder
from hcf.errors import HcfError, MissingDependency, RecipeError, StorageError
from hcf.run import Step, input_hash, is_finished, run_step, step_key
from hcf.run_stages import run_distill
from hcf.sweep.recipe import Student, SweepConfig

Log = Callable[[str], None]


def chosen_students(students: Sequence[Student], only: Sequence[str]) -> list[Student]:
    """Those whose names match; RecipeError for a pattern that matches none."""
    names = [student.name for student in students]
    for pattern in only:
        if not any(fnmatch(name, pattern) for name in names):
            raise RecipeError(
                f"--only {pattern}: no student is called so", f"there are {', '.join(names)}"
            )
    return [s for s in students if not only or any(fnmatch(s.name, p) for p in only)]


def show_plan(
    config: SweepConfig, students: Sequence[Student], output: Path, only: Sequence[str], log: Log
) -> dict[str, bool]:
    """{student: whether it is there}, logged; nothing is written."""
    check_model_folder(config.model)
    work = output.with_name(output.name + ".work")
    teacher = input_hash(config.model)
    found = {}
    for student in chosen_students(students, only):
        _, folder = _student_step(student, teacher, work)
        found[student.name] = is_finished(folder)
        state = "there" if found[student.name] else f"{student.config.train_steps} steps to train"
        log(f"{student.name}: {state}")
    log(f"then {config.draw.images} images of each and of the teacher, and a table in {output}")
    return found


def train_students(
    config: SweepConfig,
    students: Sequence[Student],
    work: Path,
    failed: dict[str, str],
    log: Log,
) -> dict[str, Path]:
    """{student: its step's folder}; those that are there are used again, failures noted."""
    found: dict[str, Path] = {}
    teacher = input_hash(config.model)
    for number, student in enumerate(students, 1):
        step, folder = _student_step(student, teacher, work)
        label = f"[{number}/{len(students)}] {student.name}"

        def say(line: str, name: str = student.name) -> None:
            log(f"{name}: {line}")

        with turn(folder, student.name, log):
            if is_finished(folder):
                log(f"{label}: trained before, used again")
            else:
                log(f"{label}: started")
                try:
                    run_step(config.name, step, folder, {"model": config.model}, run_distill, say)
                except (StorageError, MissingDependency):
                    raise  # the next student would meet it too
                except HcfError as error:
                    leave_out(student.name, error, failed, log)
                    continue
        found[student.name] = folder
    return found


def leave_out(name: str, error: HcfError, failed: dict[str, str], log: Log) -> None:
    """Notes why a student has no row; what to do about it is for who runs the sweep."""
    failed[name] = " ".join(error.message.split())
    log(f"{name}: left out, {' '.join(str(error).split())}")


def _student_step(student: Student, teacher: str, work: Path) -> tuple[Step, Path]:
    step = Step(0, "distill", student.name, student.config, ("model",), True)
    return step, work / "students" / f"{student.name}-{step_key(step, {'model': teacher})[:12]}"


@contextmanager
def turn(target: Path, name: str, log: Log) -> Iterator[None]:
    """Holds the lock of what lies at `target`, waiting for another sweep that has it."""
    path = target.with_name(f".lock-{target.name}")
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{name}: waiting for another sweep that is at it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
