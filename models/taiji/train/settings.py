"""Settings of a run: its learning rate at every step, the randomness of each piece of a step."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji.train.parallel import ParallelConfig
from taiji.train.precision import TrainingPrecision


class LoopConfig(BaseModel):
    """Settings of a run. The learning rate warms up, stays, then falls linearly to zero over the
    last `decay_share` of the steps (WSD), so that a run can be prolonged before its decay.

    `batch_size` is of all processes together, in `micro_batches` equal pieces. `precision` is fp32,
    bf16, or auto, which is read as bf16 where the device has it, as fp32 where it does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    micro_batches: int = Field(1, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.2, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    precision: TrainingPrecision = "fp32"
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    seed: int = 0
    parallel: ParallelConfig = ParallelConfig()
    log_every: int = Field(50, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    max_skips: int = Field(5, gt=0)
    max_rollbacks: int = Field(3, ge=0)
    spike_sigma: float = Field(8.0, gt=0)
    tensorboard: bool | None = None  # None: where it is installed
    accept_changes: tuple[str, ...] = ()  # dotted keys in which a resumed run may differ

    @model_validator(mode="after")
    def _divides(self) -> "LoopConfig":
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batches {self.micro_batches}"
            )
        return self

    def relevant(self) -> dict[str, Any]:
        """What a checkpoint must agree on: all that a step depends on, but its number."""
        free = {"steps", "parallel", "log_every", "checkpoint_every", "keep_checkpoints",
                "tensorboard", "spike_sigma", "accept_changes"}  # fmt: skip
        return self.model_dump(mode="json", exclude=free)


def learning_rate_scale(step: int, config: LoopConfig) -> float:
    """Factor on the base rate at `step` (0-based): warm-up, stable, linear decay."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay_steps = max(int(config.steps * config.decay_share), 1)
    return min(warmup, (config.steps - step) / decay_steps)


def step_generators(
    seed: int, step: int, piece: int, rollbacks: int = 0
) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one piece of one step, independent of every other's."""
    again = [rollbacks] if rollbacks else []
    sequence = np.random.SeedSequence([seed, step, piece, *again])
    numpy_seed, torch_seed = sequence.generate_state(2, np.uint64)
    generator = torch.Generator().manual_seed(int(torch_seed >> np.uint64(1)))
    return np.random.default_rng(numpy_seed), generator
