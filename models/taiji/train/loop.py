"""One training loop for every phase: accelerate underneath, EMA, bf16 where asked, exact resume."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from taiji.train.checkpoint import load_checkpoint, save_checkpoint

Batch = dict[str, Tensor]
Log = Callable[[str], None]


class LoopConfig(BaseModel):
    """Settings of a run. The learning rate warms up, stays, then falls linearly to zero over the
    last `decay_share` of the steps (WSD), so that a run can be prolonged before its decay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.2, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    log_every: int = Field(50, gt=0)
    checkpoint_every: int = Field(1000, gt=0)


def learning_rate_scale(step: int, config: LoopConfig) -> float:
    """Factor on the base rate at `step` (0-based): warm-up, stable, linear decay."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay_steps = max(int(config.steps * config.decay_share), 1)
    return min(warmup, (config.steps - step) / decay_steps)


def step_generators(seed: int, step: int, rank: int) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one step on one process, independent of every other step's."""
    sequence = np.random.SeedSequence([seed, step, rank])
    numpy_seed, torch_seed = sequence.generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(torch_seed >> np.uint64(1)))
    return np.random.default_rng(numpy_seed), generator


def run(
    objective: nn.Module,
    draw: Callable[[np.random.Generator, int], Batch],
    config: LoopConfig,
    folder: Path,
    log: Log = print,
) -> dict[str, float]:
    """Minimises `objective(**batch, generator=g) -> (loss, parts)`; leaves EMA weights in it.

    `draw(rng, batch_size)` gives one process's batch. State goes to `folder`/checkpoint and metrics
    to `folder`/log.jsonl; a run that finds a checkpoint there goes on from it. Returns the last
    averaged metrics. Raises FloatingPointError when the loss is not finite.
    """
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
        betas=(0.9, 0.99),
    )
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=3 / 4)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, start, spent = folder / "checkpoint", 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(
            checkpoint, model=objective, shadow=ema.shadow_params, optimizer=optimizer
        )
        start, spent = state["step"], state["seconds"]
        ema.optimization_step = start
        log(f"resumed at step {start}")
    model, optimizer = accelerator.prepare(objective, optimizer)
    averaged: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    begun = time.monotonic()

    def save(step: int) -> None:
        if accelerator.is_main_process:
            save_checkpoint(
                checkpoint,
                model=objective,
                shadow=ema.shadow_params,
                optimizer=optimizer.optimizer,
                step=step,
                extra={"seconds": spent + time.monotonic() - begun},
            )

    for step in range(start, config.steps):
        rng, generator = step_generators(config.seed, step, accelerator.process_index)
        batch = {k: v.to(accelerator.device) for k, v in draw(rng, config.batch_size).items()}
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_scale(step, config)
        with accelerator.autocast():
            loss, parts = model(**batch, generator=generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; lower learning_rate")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        for key, value in {"loss": loss.item(), **parts}.items():
            averaged.setdefault(key, []).append(value)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            metrics = {k: float(np.mean(v)) for k, v in averaged.items()}
            averaged.clear()
            seconds = spent + time.monotonic() - begun
            shown = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            log(f"step {step + 1}/{config.steps} {seconds:.0f} s {shown}")
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step + 1, "seconds": seconds, **metrics}) + "\n")
        if (step + 1) % config.checkpoint_every == 0:
            save(step + 1)
    save(config.steps)
    ema.copy_to(parameters)
    return {**metrics, "seconds": spent + time.monotonic() - begun}
