"""What a comparison leaves: one strict JSON, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcf.artifact import save_text
from hcf.errors import InvalidArtifact
from hcf.quality.intervals import Interval, Paired

SCHEMA_VERSION: Final = 1
State = Literal["met", "within", "missed"]
Clock = Literal["wall", "processor"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Goal(_Data):
    """A bound of the recipe. "met" by the estimate; "within": the estimate misses it, its interval
    does not; "missed" by the whole interval, or not to be computed. `reaches_past`: the interval
    holds values that miss it."""

    metric: str
    bound: str
    state: State
    found: str
    reaches_past: bool = False


class Cost(_Data):
    """Of training (None for the teacher) and of one image.

    train_s: seconds in the training loop, those before an interruption too; the teacher's
    trajectories are solved before it. train_images: rows times optimiser steps. trained_share: of
    the parameters. denoiser_calls, denoiser_rows: of one image, guidance has two rows a call.
    gflop: of the denoiser in all of them, 2 a multiply-accumulate.
    """

    train_s: float | None = None
    train_steps: int | None = None
    train_images: int | None = None
    trained_share: float | None = None
    denoiser_calls: int
    denoiser_rows: int
    gflop: float


class Cell(_Data):
    """One model: what it is, what it is worth, how fast, for what cost.

    `metrics` hold the model's value as `candidate` and the teacher's as `baseline`. `speedup` is
    over the teacher from interleaved pairs, None for the teacher and where they are invalid;
    `timing` says why, or names the verdict. `clock`: what it was decided on, "processor" where
    other work kept the threads waiting. `latency_ms` is the teacher's divided by the speed-up.
    """

    name: str
    method: str
    kind: str
    steps: int
    guidance_scale: float | None
    scheduler: str = ""
    content_hash: str
    metrics: dict[str, Paired]
    missing: dict[str, str] = {}
    latency_ms: float | None
    speedup: Interval | None
    clock: Clock | None = None
    timing: str
    cost: Cost
    goals: tuple[Goal, ...] = ()
    on_front: bool = False


class Winner(_Data):
    """Who wins of the students of `steps`; `tied` miss as few goals and are not told apart."""

    steps: int
    name: str
    tied: tuple[str, ...]
    text: str


class Sample(_Data):
    """How many images, of how many distinct prompts, a metric is computed from."""

    images: int
    prompts: int


class SweepRecord(_Data):
    """comparison.json. `samples` by metric; `reference_images`: FED's; `failed`: students without a
    row, and why."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["comparison of students"] = "comparison of students"
    name: str
    date: str
    command: str
    model: str
    images: int
    prompts: int
    samples: dict[str, Sample] = {}
    reference_images: int | None = None
    seed: int
    resamples: int
    quality: str
    engine: str
    precision: str
    cells: tuple[Cell, ...]
    winners: tuple[Winner, ...]
    failed: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    judge: dict[str, Any] = {}
    environment: dict[str, Any]
    machine: str
    recipe: dict[str, Any]


def write_record(path: Path, record: SweepRecord) -> None:
    text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False)
    save_text(path, text + "\n")


def read_record(path: Path) -> SweepRecord:
    """Raises InvalidArtifact for a file that is missing, damaged or of another schema."""
    try:
        return SweepRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise InvalidArtifact(f"{path} is no comparison: {error}", "run hcf sweep again") from error
