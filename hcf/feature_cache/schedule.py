"""Which steps are full: the schedule, a clock that reads it off timesteps, and what steps keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hcf.errors import HcfError
from hcf.settings import FeatureCacheConfig

POWER_STEP = 0.02
MOST_CALLS_A_STEP = 16


def full_steps(config: FeatureCacheConfig, steps: int) -> tuple[int, ...]:
    """Indices of the full ones among `steps` steps, ascending from 0: ceil(steps / interval).

    "power" is the paper's section 3.3: l_i evenly spaced between (-c)^(1/p) and (T - c)^(1/p),
    signed roots, step i = l_i^p + c. Where two fall on one step, p is lowered until none do.
    """
    uniform = tuple(range(0, steps, config.interval))
    if config.schedule == "uniform" or len(uniform) < 2:
        return uniform
    center, power = config.center * steps, config.power
    while power > 1:
        first, last = (_signed_power(end, 1 / power) for end in (-center, steps - center))
        found = {0}
        for i in range(1, len(uniform)):
            root = first + (last - first) * i / len(uniform)
            found.add(min(steps - 1, max(0, math.floor(_signed_power(root, power) + center))))
        if len(found) == len(uniform):
            return tuple(sorted(found))
        power -= POWER_STEP
    return uniform


def _signed_power(value: float, power: float) -> float:
    return math.copysign(abs(value) ** power, value)


@dataclass
class StepClock:
    """Which step of which image a call belongs to, told by its timestep alone.

    Calls at one timestep are one step, however many (second-order schedulers, guidance in separate
    calls). `restart` begins an image; so does a timestep that is not among those still to come.
    """

    config: FeatureCacheConfig
    timesteps: list[float] = field(default_factory=list)
    last: float | None = None
    step: int = 0
    call: int = 0
    _where: int = -1
    _plan: frozenset[int] = frozenset()

    def restart(self, timesteps: Iterable[float] = ()) -> None:
        """A new image; `timesteps` of all its steps in order, where they are known."""
        rounded = [_as_float32(t) for t in timesteps]
        self.timesteps = [t for i, t in enumerate(rounded) if i == 0 or t != rounded[i - 1]]
        self.last = None

    def tick(self, timestep: float) -> bool:
        """Counts a call at `timestep`; whether its step is a full one."""
        timestep = _as_float32(timestep)
        if self.last is not None and timestep == self.last:
            self.call += 1
        elif self.last is None or not self._advance(timestep):
            self._begin(timestep)
        self.last = timestep
        if self.config.schedule == "uniform":
            return self.step % self.config.interval == 0
        return self.step in self._plan

    @property
    def steps(self) -> int:
        """Steps of this image; img2img starts late. 0 where the timesteps are not known."""
        return len(self.timesteps) - self._where + self.step if self._where >= 0 else 0

    def _begin(self, timestep: float) -> None:
        self.step = self.call = 0
        known = timestep in self.timesteps
        self._where = self.timesteps.index(timestep) if known else -1
        if self.config.schedule == "power":
            if not known:
                raise HcfError(
                    f"the full steps of schedule 'power' depend on all timesteps, and {timestep:g} "
                    "is not among those that are known",
                    fix="restart(scheduler.timesteps) before each image, or use 'uniform'",
                )
            self._plan = frozenset(full_steps(self.config, self.steps))

    def _advance(self, timestep: float) -> bool:
        """Moves to the step of `timestep`; False where it is not one that follows."""
        assert self.last is not None
        moved = 1
        if self._where >= 0:
            ahead = self.timesteps[self._where + 1 :]
            if timestep not in ahead:
                return False
            moved += ahead.index(timestep)
            self._where += moved
        elif timestep > self.last:
            return False
        self.step, self.call = self.step + moved, 0
        return True


def _as_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()  # as graphs get them


@dataclass
class FeatureMemory:
    """What the calls of the last full step kept, by their order within the step.

    A call whose batch, size, type or device is another than that of the kept one is a full one.
    """

    clock: StepClock
    full_calls: int = 0
    shallow_calls: int = 0
    _kept: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    def restart(self, timesteps: Iterable[float] = ()) -> None:
        self.clock.restart(timesteps)
        self._kept.clear()

    def recall(self, timestep: float, sample: Tensor) -> Tensor | None:
        """The features to start from, or None for a full call, whose features are to be kept."""
        full = self.clock.tick(timestep)
        if self.clock.call == 0 and full:
            self._kept.clear()  # before the step needs the memory
        like, features = self._kept.get(self.clock.call, (None, None))
        if full or like != _kind(sample):
            self.full_calls += 1
            return None
        self.shallow_calls += 1
        return features

    def keep(self, sample: Tensor, features: Tensor) -> None:
        if self.clock.call >= MOST_CALLS_A_STEP:
            raise HcfError(
                f"{self.clock.call + 1} calls at timestep {self.clock.last}",
                fix="restart() the feature cache before each image",
            )
        self._kept[self.clock.call] = _kind(sample), features.detach()


def _kind(sample: Tensor) -> Any:
    return sample.shape, sample.dtype, sample.device
