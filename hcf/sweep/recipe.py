"""The recipe of a comparison: a teacher, a base `distill:` section and the students that differ.

    name: compare
    model: models/weights/taiji-sd-mini
    distill: {solver_steps: 12, batch_size: 32}
    students:
      - grid: {method: [consistency, trajectory], steps: [1, 2, 4], student.kind: [full, lora]}
        settings: {train_steps: 800}
    draw: {images: 5120, engine: openvino, precision: bf16}
    goals: {4: {fed: {ratio_max: 1.0}}}

Of the base, a student takes what its method has: the sections of other methods are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from hcf.errors import RecipeError
from hcf.recipe import apply_overrides, parse, read_tree
from hcf.settings import (
    METHOD_NAMES,
    BenchConfig,
    Config,
    DistillConfig,
    EngineName,
    Precision,
    Threshold,
)

TEACHER = "teacher"
METHODS: tuple[str, ...] = get_args(DistillConfig.model_fields["method"].annotation)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]*")
Quality = Literal[
    "fed", "clip_zh", "retrieval_r5", "diversity", "colour", "shape", "count", "pair", "position"
]
LOWER_IS_BETTER: tuple[Quality, ...] = ("fed",)


class StudentGrid(Config):
    """One student for every combination of `grid`, whose keys are dotted names of `distill`.

    `settings` hold for all of them; `name` begins their names in place of the method.
    """

    name: str = ""
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}


class DrawConfig(Config):
    """The images that are judged: the same prompts, seeds and engine for teacher and students.

    `images` go over the prompts again and again with new seeds. `engine` "auto" is what
    `hcf.accelerate` finds fastest for the teacher; `device` "auto" is the GPU where torch has one.
    `shown` images a model make up the grid.
    """

    images: int = Field(5120, gt=1)
    batch_size: int = Field(32, gt=0)
    chunk: int = Field(256, gt=0)
    prompts: list[str] | Path | None = None
    engine: EngineName | Literal["auto"] = "auto"
    precision: Precision | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resamples: int = Field(1000, gt=99)
    shown: int = Field(8, ge=0)
    seed: int = 0


class SweepConfig(Config):
    """A whole comparison. `quality` is the metric that is plotted and decides; `goals` are bounds
    by the student's steps, held against intervals: see `hcf.sweep.verdict`."""

    name: str
    model: Path
    seed: int = 0
    threads: int | None = Field(None, gt=0)
    distill: dict[str, Any] = {}
    students: list[StudentGrid] = Field(min_length=1)
    draw: DrawConfig = DrawConfig()
    bench: BenchConfig = BenchConfig()
    quality: Quality = "fed"
    goals: dict[int, dict[Quality, Threshold]] = {}

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        for section in ("distill", "draw", "bench"):
            own = tree.get(section, {})
            if isinstance(own, dict) and "seed" in tree:
                tree[section] = {"seed": tree["seed"], **own}
        bench = tree.get("bench", {})
        if isinstance(bench, dict) and tree.get("threads"):
            tree["bench"] = {"threads": tree["threads"], **bench}
        return tree


@dataclass(frozen=True)
class Student:
    """One row of the comparison before it is trained."""

    name: str
    config: DistillConfig


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, list[Student]]:
    """A recipe, and its grids spread out. RecipeError for anything amiss, equal names too."""
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    config = parse(SweepConfig, tree, str(path))
    return config, students_of(config, str(path))


def students_of(config: SweepConfig, source: str = "recipe") -> list[Student]:
    """The students of every grid, in the order of the recipe."""
    found: list[Student] = []
    for number, entry in enumerate(config.students):
        for chosen in itertools.product(*entry.grid.values()):
            varied = dict(zip(entry.grid, chosen, strict=True))
            found.append(_student(config, entry, varied, source, number))
    names = [student.name for student in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"{source}: two students are called {twice[0]}",
            fix="give one of their entries under `students:` a `name:`",
        )
    return found


def _student(
    config: SweepConfig, entry: StudentGrid, varied: dict[str, Any], source: str, number: int
) -> Student:
    own: dict[str, Any] = {}
    _into(own, entry.settings)
    for dotted, value in varied.items():
        node = own
        *path, last = dotted.split(".")
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{source}: students.{number}.grid: {dotted} is below a value")
        node[last] = value
    method = own.get("method", config.distill.get("method", "consistency"))
    method = METHOD_NAMES.get(str(method).lower(), method)
    foreign = [name for name in METHODS if name != method]
    tree = {name: value for name, value in config.distill.items() if name not in foreign}
    _into(tree, own)
    settings = parse(DistillConfig, tree, source, ("students", str(number)))
    if settings.probe is not None and settings.probe.thresholds:
        raise RecipeError(
            f"{source}: students.{number}: probe.thresholds end a training early",
            fix="leave them out: a comparison trains every student for the cost it states",
        )
    parts = [entry.name or settings.method, str(settings.steps)]
    if settings.student.kind != "full":
        parts.append(settings.student.kind)
    shown = ("method", "steps", "student.kind")
    parts += [f"{k.split('.')[-1]}={v}" for k, v in varied.items() if k not in shown]
    name = "-".join(parts)
    if not NAME.fullmatch(name) or name == TEACHER:
        raise RecipeError(
            f"{source}: {name!r} cannot be the name of a student",
            fix="give the entry a `name:` of letters and digits, and plain values in its grid",
        )
    return Student(name, settings)


def _into(tree: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts `own` into `tree`, mapping by mapping; what is there is replaced, not changed."""
    for key, value in own.items():
        if isinstance(value, dict):
            inner: dict[str, Any] = {}
            _into(inner, tree[key] if isinstance(tree.get(key), dict) else {})
            _into(inner, value)
            tree[key] = inner
        else:
            tree[key] = value
