"""Training speed: our loop against diffusers' own way of training, and img/s and MFU of a preset.

    hcf bench training                                    our loop against the peer's, one U-Net
    hcf bench training --measure A-300M --device cuda     img/s and MFU with random data
    hcf bench training --measure sd15 --distill dmd2      img/s of a distillation

The peer is a loop built as diffusers' examples/text_to_image/train_text_to_image.py is: accelerate
around model, AdamW and a constant schedule, every parameter's gradient clipped, one U-Net forward
and an MSE loss a step, `EMAModel` on top, the loss gathered and read every step. Both sides have
the same weights, the same batch of latents and text, the same precision and threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.errors import InvalidComparison
from hcf.settings import DistillConfig
from hcf_bench.distillation import describe as describe_distillation
from hcf_bench.distillation import measure_distillation
from hcf_bench.environment import read_environment
from hcf_bench.pairs import SETTLE_S, Subject, compare_subjects
from hcf_bench.records import Memory, Record, Row
from hcf_bench.results import STRICT, Comparison
from hcf_bench.statistics import Verdict
from hcf_bench.suite import source_commit
from hcf_bench.timing import torch_threads

Precision = Literal["fp32", "bf16"]
Step = Callable[[int], Tensor]
Log = Callable[[str], None]
LEARNING_RATE = 1e-4
STEPS = 10  # timed by --measure, after one that warms up
PEER, OURS = "diffusers' train_text_to_image loop", "taiji.train.loop"


class TrainingConfig(BaseModel):
    """What `hcf bench training` is asked for; `pieces`, `recompute` and `distill`, the methods of
    which a distillation is measured, are for `measure`."""

    model_config = STRICT

    presets: tuple[str, ...]
    measure: bool = False
    batch: int = Field(16, gt=0)
    pieces: int = Field(1, gt=0)
    recompute: bool = False
    distill: tuple[str, ...] = ()
    student: Literal["full", "lora"] = "full"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    dtype: Precision = "fp32"
    budget_s: float = Field(120.0, gt=0)
    threads: int | None = None


class RandomDenoising(nn.Module):
    """eps-prediction of a preset's U-Net; channels beyond its output's are a given condition."""

    def __init__(self, unet: nn.Module, channels: int) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.unet, self.channels = unet, channels
        self.flops_per_sample: float | None = None
        self.scheduler = DDPMScheduler()

    def forward(
        self, sample: Tensor, generator: torch.Generator, **condition: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """sample (B, C, H, W) -> loss, no parts"""
        from taiji.train.plan import call_unet

        x_0, given = sample[:, : self.channels], sample[:, self.channels :]
        eps = torch.randn(x_0.shape, generator=generator).to(sample.device)
        timestep = torch.randint(1000, (len(sample),), generator=generator).to(sample.device)
        x_t = torch.cat([self.scheduler.add_noise(x_0, eps, timestep), given], dim=1)
        prediction = call_unet(self.unet, timestep, {"sample": x_t, **condition})
        return F.mse_loss(prediction.float(), eps), {}


def make_objective(preset: str, seed: int = 0) -> tuple[RandomDenoising, dict[str, Any]]:
    from taiji.train.plan import build, find_preset

    _, config = find_preset(preset)
    torch.manual_seed(seed)
    return RandomDenoising(build(config).train(), int(config["out_channels"])), config


def make_batch(preset: str, batch: int, seed: int = 0) -> dict[str, Tensor]:
    from taiji.train.plan import (
        context_tokens,
        find_preset,
        latent_factor,
        training_resolution,
        unet_inputs,
    )

    name, config = find_preset(preset)
    torch.manual_seed(seed)
    grid = training_resolution(name, config) // latent_factor(name)
    return unet_inputs(config, grid=grid, tokens=context_tokens(name), batch=batch)


def our_step(preset: str, batch: dict[str, Tensor], precision: Precision, folder: Path) -> Step:
    """One step of `taiji.train.loop` as it runs inside `run`."""
    from taiji.train.session import open_session
    from taiji.train.settings import LoopConfig
    from taiji.train.step import take_step

    objective, _ = make_objective(preset)
    config = LoopConfig(
        steps=1_000_000, batch_size=len(batch["sample"]), learning_rate=LEARNING_RATE,
        warmup_steps=0, ema_decay=0.9999, precision=precision, tensorboard=False,
    )  # fmt: skip
    session = open_session(objective, lambda rng, count: batch, config, folder, lambda line: None)

    def step(index: int) -> Tensor:
        take_step(session)
        session.progress.step += 1
        return torch.tensor(session.progress.pending["loss"][-1])

    return step


def peer_step(preset: str, batch: dict[str, Tensor], precision: Precision) -> Step:
    """One step as diffusers' example takes it, on latents and text that are encoded already."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    from taiji.train.plan import call_unet

    objective, _ = make_objective(preset)
    scheduler, unet = objective.scheduler, objective.unet
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    ema = EMAModel(unet.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, rate = accelerator.prepare(unet, optimizer, rate)
    ema.to(accelerator.device)
    condition = {k: v.to(accelerator.device) for k, v in batch.items() if k != "sample"}
    latents = batch["sample"][:, : objective.channels].to(accelerator.device)
    given = batch["sample"][:, objective.channels :].to(accelerator.device)

    def step(index: int) -> Tensor:
        with accelerator.accumulate(unet):
            noise = torch.randn_like(latents)
            timestep = torch.randint(0, 1000, (len(latents),), device=latents.device).long()
            noisy = torch.cat([scheduler.add_noise(latents, noise, timestep), given], dim=1)
            prediction = call_unet(unet, timestep, {"sample": noisy, **condition})
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
            average = accelerator.gather(loss.repeat(len(latents))).mean()
            number = average.item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
            accelerator.log({"train_loss": number})
        return torch.tensor(number)

    return step


def compare_training(preset: str, config: TrainingConfig) -> Comparison:
    """Interleaved training steps of the peer (baseline) and ours (candidate).

    Raises InvalidComparison when a side does not train.
    """
    data = make_batch(preset, config.batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, torch_threads(config.threads) as used:
        sides = {
            PEER: peer_step(preset, data, config.dtype),
            OURS: our_step(preset, data, config.dtype, Path(folder)),
        }
        for name, step in sides.items():
            if not loss_falls(step):
                raise InvalidComparison(f"{name}: the loss of {preset} does not fall")
        return compare_subjects(
            *(Subject(name, step) for name, step in sides.items()),
            workload=f"training step {preset} batch {config.batch} {config.dtype}",
            budget_s=config.budget_s,
            warmup=1,
            settle_s=SETTLE_S,
            device=device,
            threads=used,
        )


def loss_falls(step: Step, steps: int = 8) -> bool:
    """Whether a loop trains at all: the mean of its last losses is below that of its first."""
    losses = [float(step(i)) for i in range(steps)]
    return bool(np.mean(losses[steps // 2 :]) < np.mean(losses[: steps // 2]))


def comparison_rows(found: Comparison, preset: str, config: TrainingConfig) -> list[Row]:
    """Both sides of a comparison as rows of a record."""
    rows = []
    for side in (found.baseline, found.candidate):
        ours = side is found.candidate
        latency = side.latency
        rows.append(
            Row(
                workload=f"train/{preset}",
                subject=side.name,
                dtype=config.dtype,
                batch=config.batch,
                latency=latency,
                p50_ms=latency.p50_ms if latency else None,
                throughput_per_s=config.batch * 1e3 / latency.p50_ms if latency else None,
                baseline=found.baseline.name if ours else "",
                speedup=found.speedup if ours else None,
                pairs=found.pairs if ours else 0,
                verdict=Verdict(found.verdict) if ours else None,
                clock=found.clock,
            )
        )
    return rows


def measure_training(preset: str, config: TrainingConfig, log: Log = print) -> Row:
    """img/s and MFU of ten steps after a first that warms up, on random data.

    `fraction_of_peak` is MFU: of the data sheet's peak on a GPU that is known, else of a measured
    product. `tflop` is of a whole batch, forward and backward, nothing counted twice that is
    recomputed.
    """
    from taiji.train.loop import LoopConfig, run
    from taiji.train.plan import plan
    from taiji.train.throughput import peak_flops

    objective, _ = make_objective(preset)
    objective.flops_per_sample = plan(preset).tflop_per_sample * 1e12
    piece = make_batch(preset, config.batch // config.pieces)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop = LoopConfig(
        steps=STEPS + 1, batch_size=config.batch, micro_batches=config.pieces,
        precision=config.dtype, learning_rate=LEARNING_RATE, log_every=STEPS + 1,
        checkpoint_every=10**9, gradient_checkpointing=config.recompute, tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch_threads(config.threads):
        metrics = run(objective, lambda rng, count: piece, loop, Path(folder), log)
        peak, source = peak_flops(device, config.dtype)
    rate = metrics["img_per_s"]
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return Row(
        workload=f"train/{preset}",
        subject=OURS,
        device=device.type,
        dtype=config.dtype,
        batch=config.batch,
        p50_ms=config.batch / rate * 1e3,
        throughput_per_s=rate,
        tflop=metrics["mfu"] * peak * config.batch / rate / 1e12,
        fraction_of_peak=metrics["mfu"],
        memory=Memory(device_peak_mib=memory),
        engine={
            "peak": f"{peak / 1e12:.4g} TFLOP/s, {source}",
            "micro_batches": config.pieces,
            "gradient_checkpointing": config.recompute,
        },
    )


def run_training(
    config: TrainingConfig, command: str, log: Log = print
) -> tuple[Record, list[str]]:
    """A record, and a line on each preset. Raises ValueError for a preset that is not known."""
    rows: list[Row] = []
    lines: list[str] = []
    for preset in config.presets:
        if config.distill:
            found_rows = measure_methods(preset, config, log)
            rows += found_rows
            lines += [describe_distillation(row) for row in found_rows]
        elif config.measure:
            rows.append(measure_training(preset, config, log))
            lines.append(describe(rows[-1]))
        else:
            found = compare_training(preset, config)
            rows += comparison_rows(found, preset, config)
            lines.append(found.headline())
    now = datetime.now(UTC)
    record = Record(
        name="training",
        date=now.date(),
        time_utc=now.strftime("%H:%M:%S"),
        commit=source_commit(),
        command=command,
        environment=read_environment(config.threads),
        rows=tuple(rows),
    )
    return record, lines


def measure_methods(preset: str, config: TrainingConfig, log: Log = print) -> list[Row]:
    """A row a method of distillation."""
    return [
        measure_distillation(
            preset,
            DistillConfig.model_validate(
                {
                    "method": method,
                    "batch_size": config.batch,
                    "micro_batches": config.pieces,
                    "gradient_checkpointing": config.recompute,
                    "precision": config.dtype,
                    "student": {"kind": config.student},
                    "optimizer": config.optimizer,
                    # random latents and few points: the speed of a step does not depend on them
                    **({"trajectory": {"count": config.batch}, "solver_steps": 4}
                       if method == "trajectory" else {}),
                }
            ),
            log,
            threads=config.threads,
        )
        for method in config.distill
    ]  # fmt: skip


def describe(row: Row, gpus: int = 32) -> str:
    """A measured row in words; the rate of many devices is an extrapolation and says so."""
    rate, mfu = row.throughput_per_s or 0.0, row.fraction_of_peak or 0.0
    peak = row.memory.device_peak_mib if row.memory else None
    memory = f", {peak / 1024:.1f} GiB" if peak is not None else ""
    return (
        f"{row.workload}: {rate:,.1f} img/s, MFU {mfu:.1%} of {row.engine['peak']}, batch "
        f"{row.batch} {row.dtype}{memory}; {gpus} of them, extrapolated linearly, not measured: "
        f"{gpus * rate:,.0f} img/s"
    )
