"""A look at the student while it trains: grids of its images, and the recipe's thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hcf.distill.data import FOLDER
from hcf.distill.job import Distillation, Log
from hcf.distill.save import student_sampling, student_scheduler
from hcf.distill.student import in_float32
from hcf.quality.features import Images
from hcf.settings import CheckConfig, DistillConfig
from hcf.trace import denoiser_name

Sampler = Callable[[list[str], list[int]], Images]  # N prompts, N seeds -> (N, H, W, 3) uint8


def make_look(
    config: DistillConfig, model: Path, folder: Path, student: Sampler, teacher: Sampler, log: Log
) -> Callable[[int], bool]:
    """Grids of images as the student is, and whether it passes the recipe's thresholds yet."""
    from PIL import Image

    from hcf.quality.gate import check, check_prompts

    probe = config.probe
    assert probe is not None
    check_config = CheckConfig(
        name="training", images=max(probe.images, probe.prompts), thresholds=probe.thresholds,
        seed=config.seed,
    )  # fmt: skip
    data_folder = model / FOLDER
    prompts = check_prompts(check_config, data_folder)
    if not probe.thresholds:
        prompts = prompts[: probe.prompts]
    texts, seeds = [p.text for p in prompts], [config.seed + i for i in range(len(prompts))]
    baseline: list[Any] = []

    def look(step: int) -> bool:
        images = student(texts, seeds)
        folder.mkdir(parents=True, exist_ok=True)
        row = np.concatenate(list(images[: probe.prompts]), axis=1)
        Image.fromarray(row).save(folder / f"step-{step:06d}.png")
        if not probe.thresholds:
            return False
        if not baseline:
            baseline.append(teacher(texts, seeds))
        return check(baseline[0], images, prompts, check_config, data_folder, log).passed

    return look


def samplers(job: Distillation) -> tuple[Sampler, Sampler]:
    """Images of the student and of the teacher."""
    from hcf.quality.sampling import generate_images

    def student(texts: list[str], seeds: list[int]) -> Images:
        with in_float32(job.student), sampled_by(job, job.student):
            return generate_images(job.pipe, texts, seeds, sampling=student_sampling(job))

    def teacher(texts: list[str], seeds: list[int]) -> Images:
        with in_float32(job.teacher.denoiser), moved(job.pipe, job.student):
            return generate_images(job.pipe, texts, seeds)

    return student, teacher


@contextmanager
def moved(pipe: Any, student: nn.Module) -> Iterator[None]:
    """The pipeline's other networks where the student is, inside; then back in host memory."""
    device = next(student.parameters()).device
    others = [m for m in pipe.components.values() if isinstance(m, nn.Module) and m is not student]
    others = [m for m in others if any(p.device != device for p in m.parameters())]
    for module in others:
        module.to(device)
    try:
        yield
    finally:
        for module in others:
            module.to("cpu")


@contextmanager
def sampled_by(job: Distillation, student: nn.Module) -> Iterator[None]:
    """The pipeline with the student and its scheduler in it, inside."""
    pipe, name = job.pipe, denoiser_name(job.pipe)
    before = getattr(pipe, name), pipe.scheduler
    setattr(pipe, name, student.eval())
    pipe.scheduler = student_scheduler(job.config, pipe.scheduler)
    try:
        with moved(pipe, student):
            yield
    finally:
        setattr(pipe, name, before[0])
        pipe.scheduler = before[1]
        student.train()
