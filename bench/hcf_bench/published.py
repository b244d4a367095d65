"""Latencies that others published, and floors for machines that are not here.

`bench/results/published.yaml` holds the figures as their sources print them; this file checks them
and turns them into rows in milliseconds. Floors are computed from counted operations and the best
rates measured on that machine, so they are bounds from below, never predictions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from hcf.errors import InvalidArtifact
from hcf_bench.records import Row
from hcf_bench.results import STRICT

if TYPE_CHECKING:
    from hcf_bench.opcount import OpCost

PUBLISHED: Final = "published.yaml"
Unit = Literal["s", "ms", "it/s", "img/s"]
How = Literal["R", "D", "T", "G"]
HOW: Final[dict[str, str]] = {
    "R": "read in the repository file named",
    "D": "read in a document or blog page",
    "T": "a paper's table read in a transcription",
    "G": "read off a chart",
}
# What a floor in 16-bit arithmetic is a floor of; int8 and fp32 figures have another one.
HALF: Final = ("fp16", "bf16")


class Figure(BaseModel):
    """One latency as printed: `value` in `unit`, for `batch` images, or forwards of a module.

    `guided`: two forwards a step (classifier-free guidance). `forwards`: how many forwards of the
    module `value` covers.
    """

    model_config = STRICT

    gpu: Literal["A100", "H100"]
    machine: str = Field(min_length=1)
    workload: str = Field(pattern=r"^[a-z0-9-]+/[a-z0-9_]+$")
    subject: str = Field(min_length=1)
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"]
    batch: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)
    guided: bool = True
    forwards: int = Field(1, gt=0)
    value: float = Field(gt=0)
    unit: Unit
    note: str = ""

    @model_validator(mode="after")
    def _unit_fits_workload(self) -> Figure:
        if self.unit == "it/s" and not self.workload.endswith("/unet"):
            raise ValueError(f"it/s is a rate of U-Net forwards, not of {self.workload}")
        if self.forwards > 1 and self.workload.endswith("/pipeline"):
            raise ValueError("forwards divides the time of a module, not of a pipeline")
        return self

    @property
    def p50_ms(self) -> float:
        """Milliseconds of one forward (module) or one batch (pipeline)."""
        return milliseconds(self.value, self.unit, batch=self.batch, forwards=self.forwards)


class Source(BaseModel):
    """One document and the figures taken from it."""

    model_config = STRICT

    source: str = Field(min_length=1)
    how: How
    figures: tuple[Figure, ...] = Field(min_length=1)


class Published(BaseModel):
    """The whole file."""

    model_config = STRICT

    schema_version: Literal[1]
    sources: tuple[Source, ...]

    def figures(self, gpu: str) -> list[Figure]:
        """Of one chip, in the order of the file."""
        return [f for source in self.sources for f in source.figures if f.gpu == gpu]


def milliseconds(value: float, unit: Unit, *, batch: int = 1, forwards: int = 1) -> float:
    """A published value as milliseconds of one forward or one batch.

    Args:
        value, unit: as printed; "it/s" counts forwards, "img/s" images.
        batch: images a call makes, for "img/s".
        forwards: that a time ("s", "ms") covers.
    """
    if unit == "it/s":
        return 1e3 / value
    if unit == "img/s":
        return 1e3 * batch / value
    return (1e3 * value if unit == "s" else value) / forwards


def read_published(path: Path) -> Published:
    """Reads `published.yaml`.

    Raises:
        InvalidArtifact: missing, not YAML, or a field missing, unknown or out of range.
    """
    fix = f"correct {path.name}; every figure needs its source and how it was obtained"
    try:
        return Published.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidArtifact(f"cannot read {path}: {error.strerror}", fix) from error
    except yaml.YAMLError as error:
        raise InvalidArtifact(f"{path} is not YAML: {error}", fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidArtifact(f"{path}: {where}: {first['msg']}", fix) from error


def published_rows(published: Published, gpu: str) -> list[Row]:
    """The figures of one chip ("A100", "H100") as rows."""
    return [
        _published_row(figure, source)
        for source in published.sources
        for figure in source.figures
        if figure.gpu == gpu
    ]


def estimated_rows(machine: str, figures: Sequence[Figure] = ()) -> list[Row]:
    """Floors on `machine` ("A100", "H100") in 16-bit arithmetic; the formula is in `source`.

    Args:
        machine: as `hcf_bench.roofline` knows its published ceilings.
        figures: the shapes to estimate; by default one guided U-Net step, one decode and one
            guided image of 50 steps of each preset that has published figures.
    """
    shapes = dict.fromkeys(_shape(figure) for figure in figures) if figures else DEFAULT_SHAPES
    return [
        _estimated_row(machine, *shape)
        for shape in shapes
        if not (shape[0].endswith("/pipeline") and shape[2] is None)
    ]


def with_floors(rows: Sequence[Row], estimates: Sequence[Row]) -> list[Row]:
    """Published 16-bit rows with the floor of their shape and the fraction of it they reach."""
    floors = {_row_shape(row): row.p50_ms for row in estimates}
    found = []
    for row in rows:
        floor = floors.get(_row_shape(row)) if row.dtype in HALF else None
        if floor and row.p50_ms:
            fraction = {"roofline_ms": floor, "fraction_of_roofline": floor / row.p50_ms}
            row = row.model_copy(update=fraction)
        found.append(row)
    return found


# (workload, batch, steps, guided); steps only tell pipelines apart.
Shape = tuple[str, int, int | None, bool]
DEFAULT_SHAPES: Final[tuple[Shape, ...]] = tuple(
    shape
    for preset in ("sd15", "sd21", "sdxl", "kolors")
    for shape in (
        (f"{preset}/unet", 2, None, True),
        (f"{preset}/vae_decoder", 1, None, True),
        (f"{preset}/pipeline", 1, 50, True),
    )
)


def _shape(figure: Figure) -> Shape:
    if figure.workload.endswith("/pipeline"):
        return figure.workload, figure.batch, figure.steps, figure.guided
    return figure.workload, figure.batch, None, True


def _row_shape(row: Row) -> Shape:
    if row.workload.endswith("/pipeline"):
        return row.workload, row.batch, row.engine.get("steps"), row.engine.get("guided", True)
    return row.workload, row.batch, None, True


def _published_row(figure: Figure, source: Source) -> Row:
    engine: dict[str, Any] = {
        "machine": figure.machine,
        "published": f"{figure.value:g} {figure.unit}",
        "how": source.how,
    }
    if figure.steps is not None:
        engine["steps"] = figure.steps
    if figure.workload.endswith("/pipeline"):
        engine["guided"] = figure.guided
    if figure.note:
        engine["note"] = figure.note
    return Row(
        workload=figure.workload,
        subject=figure.subject,
        device="cuda",
        dtype=figure.dtype,
        batch=figure.batch,
        provenance="published",
        source=source.source,
        p50_ms=figure.p50_ms,
        throughput_per_s=1e3 * figure.batch / figure.p50_ms,
        engine=engine,
    )


def _estimated_row(machine: str, workload: str, batch: int, steps: int | None, guided: bool) -> Row:
    preset, component = workload.split("/")
    engine: dict[str, Any] = {"machine": machine}
    if component == "pipeline" and steps is not None:
        unet = _floor(machine, f"{preset}/unet", batch * (2 if guided else 1))
        decode = _floor(machine, f"{preset}/vae_decoder", batch)
        floor_ms, tflop = steps * unet[0] + decode[0], steps * unet[1] + decode[1]
        formula = f"steps x one U-Net forward (batch doubled by guidance) + one decode, {unet[2]}"
        engine |= {"steps": steps, "guided": guided}
    else:
        floor_ms, tflop, formula = _floor(machine, workload, batch)
    return Row(
        workload=workload,
        subject="floor",
        device="cuda",
        dtype="bf16",
        batch=batch,
        provenance="estimated",
        source=f"{formula}; a floor, not a latency",
        p50_ms=floor_ms,
        roofline_ms=floor_ms,
        tflop=tflop,
        engine=engine,
    )


@lru_cache(maxsize=64)
def _counted(workload: str, batch: int) -> tuple[OpCost, ...]:
    from hcf_bench.opcount import count_workload
    from hcf_bench.workloads import find_workload

    return tuple(count_workload(find_workload(workload), batch, "bf16"))


def _floor(machine: str, workload: str, batch: int) -> tuple[float, float, str]:
    """Milliseconds and TFLOP of one forward, and the formula."""
    from hcf_bench.roofline import estimate_floor

    ops = _counted(workload, batch)
    floor_ms, formula = estimate_floor(machine, ops, "bf16")
    # one formula for every workload of a machine: the number of ops is no part of it
    formula = re.sub(r"over \d+ ops", "over ops", formula)
    return floor_ms, sum(op.flops for op in ops) / 1e12, formula
