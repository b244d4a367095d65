"""A run under way: what it computes with, and how far it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from taiji.train.objective import enable_gradient_checkpointing, parameter_groups, turns_of
from taiji.train.parallel import make_accelerator, shard
from taiji.train.settings import LoopConfig
from taiji.train.stability import SpikeDetector
from taiji.train.throughput import FlopCounter, Meter, given_flops

Batch = dict[str, Tensor]
Log = Callable[[str], None]
Draw = Callable[[np.random.Generator, int], Batch]


class Progress(BaseModel):
    """The JSON part of a checkpoint. `pending` are the values since the last line of the log."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    seconds: float = 0.0
    ema_step: int = 0
    skipped: int = 0
    rollbacks: int = 0
    spikes: int = 0
    detector: SpikeDetector = SpikeDetector()
    pending: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    loop: dict[str, Any] = {}
    data: dict[str, str] = {}


@dataclass
class Session:
    """A run under way: `model` is what is called, `module` what is in it."""

    config: LoopConfig
    folder: Path
    log: Log
    draw: Draw
    accelerator: Accelerator
    turns: tuple[str, ...]
    model: nn.Module
    module: nn.Module
    optimizers: list[Optimizer]
    averaged: list[nn.Parameter]  # what the EMA is over
    ema: EMAModel
    meter: Meter
    progress: Progress
    begun: float
    data: dict[str, str]
    counter: FlopCounter | None = None

    @property
    def has_engine(self) -> bool:
        """DeepSpeed steps inside the backward pass: a bad step cannot be skipped, only undone."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def most_skips(self) -> int:
        return 1 if self.has_engine else self.config.max_skips

    def seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.begun


def open_session(
    objective: nn.Module,
    draw: Draw,
    config: LoopConfig,
    folder: Path,
    log: Log,
    data: dict[str, str] | None = None,
) -> Session:
    turns = turns_of(objective)
    for turn in turns:
        parameter_groups(objective, turn)  # its errors come before any process waits for another
    accelerator = make_accelerator(
        config.parallel,
        precision=config.precision,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        turns=len(turns),
        max_grad_norm=config.max_grad_norm,
        tensorboard=config.tensorboard,
        folder=folder,
    )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(objective)
    several = accelerator.num_processes > 1
    if several and config.parallel.mode == "fsdp2":
        model = module = shard(objective, config.parallel, accelerator.device)
        optimizers = [_optimizer(module, turn, config) for turn in turns]
    else:
        module = objective.to(accelerator.device)
        optimizers = [_optimizer(module, turn, config) for turn in turns]
        model, *_ = accelerator.prepare(module, *optimizers)
    averaged = trained_by(module, turns[0])
    ema = EMAModel(
        averaged,
        decay=config.ema_decay,
        use_ema_warmup=True,
        power=3 / 4,
        foreach=accelerator.device.type == "cuda",
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Session(
        config=config,
        folder=folder,
        log=log if accelerator.is_main_process else lambda line: None,
        draw=draw,
        accelerator=accelerator,
        turns=turns,
        model=model,
        module=module,
        optimizers=optimizers,
        averaged=averaged,
        ema=ema,
        meter=Meter(config.batch_size, given_flops(objective)),
        progress=Progress(loop=config.relevant(), data=data or {}),
        begun=time.monotonic(),
        data=data or {},
    )


def _optimizer(objective: nn.Module, turn: str, config: LoopConfig) -> Optimizer:
    """Raises ImportError where the 8-bit form's package is missing."""
    groups = parameter_groups(objective, turn)
    given: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "betas": (0.9, 0.99),
    }
    if config.optimizer == "adamw":
        return AdamW(groups, fused=True, **given)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "optimizer=adamw8bit needs torchao: pip install torchao, or use optimizer=adamw"
        ) from error
    eight_bit: Optimizer = AdamW8bit(groups, **given)
    return eight_bit


def trained_by(module: nn.Module, turn: str) -> list[nn.Parameter]:
    return [p for group in parameter_groups(module, turn) for p in group["params"]]
