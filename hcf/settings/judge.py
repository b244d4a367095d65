"""Sections of judging and telling: check, bench, report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hcf.settings.base import Config, Threshold


class CheckConfig(Config):
    """Candidate against baseline on `images` fixed seeds; a threshold on a missing metric fails.

    `baseline` and `candidate` name artefacts of the run: the given model, the distilled student,
    the built result. `prompts` is a list or a file like check_prompts.json; each is drawn
    `images_per_prompt` times, which the metric `diversity` needs. `steps` and `guidance_scale` are
    for both sides; without them each is sampled as its folder says.
    """

    name: str = "quality"
    baseline: Literal["teacher", "student"] = "teacher"
    candidate: Literal["student", "result"] = "result"
    images: int = Field(256, gt=0)
    images_per_prompt: int = Field(1, gt=0)
    batch_size: int = Field(16, gt=0)
    prompts: list[str] | Path | None = None
    steps: int | None = Field(None, gt=0)
    guidance_scale: float | None = Field(None, ge=1)
    thresholds: dict[str, Threshold] = {}
    threads: int | None = Field(None, gt=0)
    seed: int = 0


class BenchConfig(Config):
    """Interleaved pairs of teacher and result until decided, within `budget_s` seconds.

    A ratio within `threshold` of 1 or a difference below `floor_ms` counts as the same speed.
    `min_speedup`: the lower bound of the end-to-end interval must reach it; `min_denoiser_speedup`
    likewise for the denoiser alone, over eager fp32. Pairs are taken until that is decided.
    """

    pairs: int = Field(10, gt=0)
    budget_s: float = Field(60.0, gt=0)
    batch: int = Field(1, gt=0)
    prompts: list[str] = []
    threads: int | None = Field(None, gt=0)
    threshold: float = Field(0.01, ge=0)
    floor_ms: float = Field(0.0, ge=0)
    min_speedup: float | None = Field(None, gt=0)
    min_denoiser_speedup: float | None = Field(None, gt=0)
    seed: int = 0


class ReportConfig(Config):
    """The page, the card and the grid: teacher, student and result side by side.

    `prompts` (without it the first `images` of the model's check prompts) from seeds `seed` on.
    `licence` (SPDX, lower case) goes into the model card; `name` is the recipe's unless given.
    """

    name: str = ""
    title: str = ""
    prompts: list[str] = []
    images: int = Field(12, gt=0)
    licence: str = ""
    threads: int | None = Field(None, gt=0)
    seed: int = 0
