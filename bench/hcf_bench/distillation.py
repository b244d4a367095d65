"""Training speed of distillation: img/s of every method on the architecture of a real model.

    hcf bench training sd15 sdxl --measure --distill dmd2 --dtype bf16 --batch 8 --recompute

Random weights and data, the real objective through the real loop. An image counts once a step of
the optimiser, whatever the teacher or a second network computed for it. What the step was estimated
to take (`hcf.distill.estimate`) stands beside what the device's allocator saw.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hcf.distill.data import DistillationSet
from hcf.distill.estimate import device_memory, estimate, require_fit, shapes_of
from hcf.distill.job import Distillation
from hcf.distill.student import frozen_in, make_student
from hcf.distill.teacher import Guidance, Teacher
from hcf.distill.trainer import loop_config, make_objective
from hcf.settings import DistillConfig
from hcf_bench.presets import PRESETS
from hcf_bench.records import Memory, Row
from hcf_bench.timing import torch_threads

STEPS = 10  # timed, after one that warms up
ROWS = 4  # of data
Log = Callable[[str], None]


def meta_unet(preset: str) -> Any:
    """The preset's U-Net without storage. Raises ValueError for a preset that has none."""
    from diffusers import UNet2DConditionModel

    part = PRESETS[preset].parts.get("unet") if preset in PRESETS else None
    if part is None or part.kind != "unet":
        known = sorted(n for n, p in PRESETS.items() if "unet" in p.parts)
        raise ValueError(f"no preset {preset!r} with a U-Net; there are {', '.join(known)}")
    with torch.device("meta"):
        return UNet2DConditionModel(**dict(part.config))


@torch.no_grad()
def materialised(module: Any, seed: int = 0) -> Any:
    """The module with small random weights and norms at one, on the processor."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.requires_grad_(False).eval()


def make_job(preset: str, config: DistillConfig, log: Log) -> Distillation:
    """A distillation of random weights and data. Raises HcfError where it does not fit."""
    from diffusers import DDIMScheduler

    from taiji.train.plan import unet_inputs

    torch.manual_seed(config.seed)
    denoiser = meta_unet(preset)
    settings = dict(denoiser.config)
    size = int(settings["sample_size"])
    rows = unet_inputs(settings, grid=1, tokens=PRESETS[preset].parts["unet"].tokens, batch=ROWS)
    rows.pop("sample")
    guided = config.guidance_scale != 1
    uncond = {name: torch.zeros_like(v[:1]) for name, v in rows.items()} if guided else None
    device, available = device_memory()
    given: dict[str, Any] = {"guided": guided, "size": (size, size)}
    memory = estimate(denoiser, config, shapes_of(rows), device=device, **given)
    log(str(memory))
    if config.check_memory:
        require_fit(memory, available, denoiser, config, shapes_of(rows), **given)
    denoiser = materialised(denoiser, config.seed)
    if config.student.kind == "lora":
        frozen_in(denoiser, config.precision)  # before it is copied: half the memory at the peak
    student = make_student(denoiser, config)
    for parameter in student.parameters():
        if parameter.requires_grad:  # LoRA's matrices are made in the precision of their base
            parameter.data = parameter.data.float()
    for network in (denoiser, student):
        frozen_in(network, config.precision)
    shape = (int(settings["in_channels"]), size, size)
    numbers = torch.arange(ROWS)
    data = DistillationSet(rows, uncond, numbers, torch.randn(ROWS, *shape), numbers)
    teacher = Teacher(denoiser, uncond)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = SimpleNamespace(scheduler=scheduler)
    return Distillation(
        config, Path(preset), pipe, teacher, student, Guidance.of(config, teacher), data, shape, log
    )


def measure_distillation(
    preset: str, config: DistillConfig, log: Log = print, *, threads: int | None = None,
    steps: int | None = None,
) -> Row:  # fmt: skip
    """img/s of `steps` steps (`STEPS` without it) after a first that warms up, and the peak of
    device memory.

    Raises FloatingPointError where a step was not finite.
    """
    from taiji.train.session import open_session
    from taiji.train.step import take_step

    job = make_job(preset, config, log)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        objective, draw = make_objective(job)
        loop = loop_config(config).model_copy(update={"tensorboard": False})
        session = open_session(objective, draw, loop, Path(folder), log)
        for i in range((steps or STEPS) + 1):
            if not take_step(session):
                raise FloatingPointError(f"step {i} of {config.method} on {preset} is not finite")
            session.progress.step += 1
        speed = session.meter.read(1.0)
        device = session.accelerator.device.type
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    rate = speed["img_per_s"]
    return Row(
        workload=f"distill/{preset}",
        subject=config.method,
        device=device,
        dtype=config.precision,
        batch=config.batch_size,
        p50_ms=config.batch_size / rate * 1e3,
        throughput_per_s=rate,
        tflop=speed["mfu"] / rate * config.batch_size / 1e12,
        memory=Memory(device_peak_mib=peak),
        engine={
            "student": config.student.kind,
            "optimizer": config.optimizer,
            "micro_batches": config.micro_batches,
            "gradient_checkpointing": config.gradient_checkpointing,
        },
    )


def describe(row: Row) -> str:
    """A measured row in words."""
    peak = row.memory.device_peak_mib if row.memory else None
    memory = f", {peak / 1024:.1f} GiB" if peak is not None else ""
    return (
        f"{row.workload} by {row.subject}: {row.throughput_per_s or 0:.3g} img/s, "
        f"{row.p50_ms or 0:,.0f} ms a step of {row.batch} in {row.dtype}, "
        f"{row.engine['student']} student, {row.engine['optimizer']}{memory}"
    )
