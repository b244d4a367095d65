"""The student as a pipeline folder: its weights, the scheduler and the steps it is made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import nn

from hcf.artifact import (
    MANIFEST,
    Sampling,
    default_sampling,
    read_manifest,
    save_text,
    write_manifest,
)
from hcf.distill.job import Distillation
from hcf.distill.student import merged
from hcf.settings import DistillConfig, DistributionMatchingConfig
from hcf.trace import denoiser_name


def student_scheduler(config: DistillConfig, scheduler: Any) -> Any:
    """The scheduler that steps as the training did; the teacher's where its steps stay."""
    if config.method in ("guidance", "structure"):
        return scheduler
    section = config.distribution_matching or DistributionMatchingConfig()
    if config.method == "distribution_matching" and section.sampler == "lcm":
        return LCMScheduler.from_config(
            scheduler.config,
            original_inference_steps=scheduler.config.num_train_timesteps,
            clip_sample=False,
            thresholding=False,
        )
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
    )


def teacher_sampling(model: Path) -> Sampling:
    """Steps and guidance scale that the model in folder `model` is sampled with."""
    noted = read_manifest(model).sampling if (model / MANIFEST).is_file() else Sampling()
    return default_sampling(model) if noted == Sampling() else noted


def student_sampling(job: Distillation) -> Sampling:
    """Steps and guidance scale that the student is made for."""
    config = job.config
    if config.method == "structure":
        return teacher_sampling(job.model)
    guidance_alone = config.method == "guidance"
    steps = teacher_sampling(job.model).steps if guidance_alone else config.steps
    told = config.guidance_scale if config.guidance_embedding else 1.0
    return Sampling(steps=steps, guidance_scale=told)


def save_student(
    job: Distillation, student: nn.Module, folder: Path, metrics: dict[str, float]
) -> None:
    """Student weights, its scheduler and its defaults into the staged folder; lineage noted."""
    config, name = job.config, denoiser_name(job.pipe)
    plain = merged(student, config.student, folder / "lora")
    shutil.rmtree(folder / name)
    plain.to(torch.float16).save_pretrained(folder / name)  # type: ignore[operator]
    manifest = read_manifest(folder)
    if config.method != "structure":  # which is sampled as its teacher is
        manifest.sampling = student_sampling(job)
        _note_sampling(job, folder, manifest.sampling)
    manifest.distillation = {**config.model_dump(mode="json", exclude_none=True), **metrics}
    write_manifest(folder, manifest)


def _note_sampling(job: Distillation, folder: Path, sampling: Sampling) -> None:
    """The scheduler and the defaults of the pipeline in the staged folder."""
    scheduler = student_scheduler(job.config, job.pipe.scheduler)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if index.get("settings"):  # what a Taiji cascade or upscaler is sampled with, base first
        first = index["settings"][0] if isinstance(index["settings"], list) else index["settings"]
        first |= sampling.model_dump(exclude_none=True)
        first |= {} if job.config.method == "guidance" else {"thresholding": "none"}
    if "default_steps" in index:
        index["default_guidance_scale"] = sampling.guidance_scale
        index["default_steps"] = sampling.steps or index["default_steps"]
    save_text(index_path, json.dumps(index, indent=2))
