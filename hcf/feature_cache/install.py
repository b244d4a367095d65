"""The cache in a pipeline: in torch, and in front of a pair of engines.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from hcf.errors import HcfError, RecipeError
from hcf.feature_cache.cut import CacheCost, run_unet, step_cost
from hcf.feature_cache.schedule import FeatureMemory, StepClock, full_steps
from hcf.settings import FeatureCacheConfig

if TYPE_CHECKING:
    from hcf.engines import Engine, EngineReport

CACHE = "_hcf_feature_cache"  # on the U-Net: its FeatureCache
LEAST_SAVED = 0.05  # of a step's operations; a cut that saves less costs more than it gives
FEATURES = "features"

Restart = Callable[[Tensor | None], None]


@dataclass(frozen=True)
class CacheReport:
    """What a cache leaves out of `steps` steps. `speedup` is the ratio of the U-Net's operations
    without it to those with it: a bound on the time it can save, not a measurement."""

    interval: int
    branch: int
    schedule: str
    steps: int
    full_steps: int
    shallow_ratio: float
    speedup: float


class SchedulerFollower:
    """Calls `restart(timesteps)` whenever a scheduler of the followed pipelines starts an image.

    That is when `set_timesteps` is called, which every pipeline does first. A scheduler that was
    exchanged meanwhile is found at the next call of the U-Net.
    """

    def __init__(self, restart: Restart) -> None:
        self._restart = weakref.WeakMethod(restart)
        self.pipes: list[weakref.ref[Any]] = []
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()

    def follow(self, pipe: Any) -> None:
        """Raises HcfError for a pipeline without a scheduler that can be followed."""
        self._watch(pipe.scheduler)
        if all(known() is not pipe for known in self.pipes):
            self.pipes.append(weakref.ref(pipe))

    def check(self) -> None:
        """Follows schedulers that were exchanged since the last call; they start an image."""
        for known in self.pipes:
            pipe = known()
            if pipe is not None and pipe.scheduler not in self._watched:
                self._watch(pipe.scheduler)
                self._start(pipe.scheduler)

    def release(self) -> None:
        """Every scheduler as it was."""
        for scheduler in self._watched:
            scheduler.__dict__.pop("set_timesteps", None)
        self._watched.clear()
        self.pipes.clear()

    def _start(self, scheduler: Any) -> None:
        if (restart := self._restart()) is not None:
            restart(scheduler.timesteps)

    def _watch(self, scheduler: Any) -> None:
        if scheduler in self._watched:
            return
        if not hasattr(scheduler, "set_timesteps"):
            raise HcfError(f"{type(scheduler).__name__} has no set_timesteps to follow")
        if "set_timesteps" in scheduler.__dict__:
            raise HcfError(
                f"set_timesteps of this {type(scheduler).__name__} is replaced already",
                fix="give each pipeline a scheduler of its own, or remove the other cache first",
            )
        original = type(scheduler).set_timesteps

        @functools.wraps(original)  # pipelines read its signature
        def set_timesteps(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(this, *args, **kwargs)
            self._start(this)
            return result

        # bound, so that a deep copy of the scheduler has its own
        scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
        self._watched.add(scheduler)


class FeatureCache:
    """The cache of one U-Net in torch. `memory` counts full and shallow calls."""

    def __init__(self, config: FeatureCacheConfig, cost: CacheCost) -> None:
        self.config, self.cost = config, cost
        self.memory = FeatureMemory(StepClock(config))
        self.follower = SchedulerFollower(self.restart)
        self._table: Tensor | None = None
        self._version = -1
        self._values: list[float] = []
        self._warned: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        """For a copy of the U-Net: empty, and following no pipeline."""
        return FeatureCache(self.config, self.cost)

    def restart(self, timesteps: Tensor | None = None) -> None:
        """A new image, of these timesteps (T,) where they are known."""
        version = -1 if timesteps is None else timesteps._version
        if timesteps is not self._table or version != self._version:
            self._table, self._version = timesteps, version
            self._values = [] if timesteps is None else timesteps.tolist()
        self.memory.restart(self._values)

    def report(self, steps: int) -> CacheReport:
        """What is left out of an image of `steps` steps."""
        return CacheReport(
            interval=self.config.interval,
            branch=self.config.branch,
            schedule=self.config.schedule,
            steps=steps,
            full_steps=len(full_steps(self.config, steps)),
            shallow_ratio=self.cost.shallow_ratio,
            speedup=self.cost.speedup(self.config, steps),
        )

    def run(self, unet: Any, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments of UNet2DConditionModel.forward -> prediction (B, C, H, W)"""
        self.follower.check()
        features = self.memory.recall(self._value(timestep), sample)
        self._warn_of_few_steps()
        out, new = run_unet(
            unet, sample, timestep, *args, **kwargs, branch=self.config.branch, features=features
        )
        if features is None:
            self.memory.keep(sample, new)
        prediction: Tensor = out
        return prediction

    def _value(self, timestep: Any) -> float:
        """The timestep as a number; an entry of the scheduler's own table by its place in it, which
        needs no waiting for the device."""
        table = self._table
        if (
            table is not None
            and isinstance(timestep, Tensor)
            and timestep.dtype == table.dtype
            and (timestep.numel() == 1 or not any(timestep.stride()))
            and timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
        ):
            place = (timestep.storage_offset() - table.storage_offset()) // table.stride(0)
            if 0 <= place < len(self._values):
                return self._values[place]
        return timestep_value(timestep)

    def _warn_of_few_steps(self) -> None:
        clock, interval = self.memory.clock, self.config.interval
        steps = clock.steps if self.follower.pipes else 0
        if clock.step or clock.call or not 0 < steps <= 2 * interval or interval == 1:
            return
        if steps not in self._warned:
            self._warned.add(steps)
            found = self.report(steps)
            warnings.warn(
                f"feature cache: {found.full_steps} of {steps} steps are full at interval "
                f"{interval}: the U-Net is {found.speedup:.2f}x as fast at most, and between so "
                "few steps features change much (`hcf check` says what that does to images)",
                stacklevel=2,
            )


def timestep_value(timestep: Tensor | float | int) -> float:
    """timestep () or (B,) -> the one number. Raises HcfError where a batch mixes timesteps."""
    values = torch.as_tensor(timestep).reshape(-1).tolist()
    if len(set(values)) != 1:
        raise HcfError(
            f"a batch at timesteps {sorted(set(values))[:4]}: the feature cache needs one",
            fix="hcf.feature_cache.remove(pipe)",
        )
    return float(values[0])


def attach(unet: Any, config: FeatureCacheConfig) -> FeatureCache:
    """Puts a cache into `unet`: call its `restart` before each image. Replaces an earlier one.

    Raises HcfError for a U-Net that cannot be cut or is behind something else, RecipeError for a
    branch that saves nothing.
    """
    cost = step_cost(unet, config.branch)
    if cost.shallow_ratio > 1 - LEAST_SAVED:
        raise RecipeError(
            f"cache.branch={config.branch}: a shallow step would still be "
            f"{cost.shallow_ratio:.0%} of a full one",
            fix="use a lower branch; 0 saves most",
        )
    detach(unet)
    own: Any = unet.__dict__.get("forward", unet.forward)  # removed hooks leave the class's here
    if unet._compiled_call_impl is not None or getattr(own, "__func__", 0) != type(unet).forward:
        raise HcfError(
            "something is in front of this U-Net already: an engine, torch.compile or offloading; "
            "shallow steps would run past it",
            fix="cache first, then compile or offload; two engines alternate in CachedDenoiser",
        )
    cache = FeatureCache(config, cost)
    # bound, so that a deep copy of the U-Net runs its own layers
    unet.__dict__["forward"] = types.MethodType(_caching_forward(type(unet).forward), unet)
    unet.__dict__[CACHE] = cache
    return cache


def _caching_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    # a compiler leaves the choice of the step to Python, and compiles both steps
    @torch.compiler.disable(recursive=False)
    def forward(self: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        out = self.__dict__[CACHE].run(self, *args, **kwargs)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    # tracing and pipelines read the signature
    return functools.wraps(original)(forward)


def detach(unet: Any) -> None:
    """`unet` as it was; nothing to do for one without a cache."""
    cache: FeatureCache | None = unet.__dict__.get(CACHE)
    if cache is None:
        return
    own: Any = unet.__dict__.get("forward")
    if getattr(own, "__self__", None) is not unet:
        raise HcfError(
            "something was put in front of the cached U-Net",
            fix="take off engines and offloading (pipe.remove_all_hooks()) first",
        )
    cache.follower.release()
    del unet.__dict__["forward"], unet.__dict__[CACHE]


def cache_of(pipe: Any) -> FeatureCache | None:
    """The cache in `pipe`'s U-Net, if there is one."""
    found: FeatureCache | None = getattr(_unet(pipe), "__dict__", {}).get(CACHE)
    return found


def install(pipe: Any, config: FeatureCacheConfig, steps: int | None = None) -> FeatureCache:
    """Puts a cache into `pipe.unet`; every call of the pipeline starts afresh.

    A pipeline that shares the U-Net shares the cache: install it there too. Raises HcfError for a
    U-Net that cannot be cut or is behind something else, RecipeError where `steps` leaves nothing
    out.
    """
    unet: Any = getattr(pipe, "unet", None)
    if unet is None or getattr(pipe, "scheduler", None) is None:
        raise HcfError(
            f"DeepCache needs a U-Net and a scheduler; {type(pipe).__name__} lacks one",
            fix="leave the cache out",
        )
    if steps is not None and config.interval > 1 and len(full_steps(config, steps)) == steps:
        raise RecipeError(
            f"a feature cache leaves nothing out of {steps} steps", fix="leave the cache out"
        )
    known = cache_of(pipe)
    cache = known if known is not None and known.config == config else attach(unet, config)
    try:
        cache.follower.follow(pipe)
    except HcfError:
        if known is None:
            detach(unet)
        raise
    return cache


def remove(pipe: Any) -> None:
    """`pipe` as it was before `install`, bit for bit; nothing to do for one without a cache."""
    if cache_of(pipe) is not None:
        detach(_unet(pipe))


def _unet(pipe: Any) -> Any:
    unet = getattr(pipe, "unet", None)
    return getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper


class CachedDenoiser:
    """An engine made of two: `full` returns out_sample and features, `shallow` takes features.

    They are those of `FullStep` and `ShallowStep`. `follow(pipe)` once, or `restart` before each
    image. Raises HcfError for engines that do not fit together.
    """

    def __init__(self, full: Engine, shallow: Engine, config: FeatureCacheConfig) -> None:
        self.full, self.shallow, self.config = full, shallow, config
        self.memory = FeatureMemory(StepClock(config))
        self.follower = SchedulerFollower(self.restart)

    @property
    def report(self) -> EngineReport:
        """The full engine's; the shallow one's is `shallow.report`."""
        return self.full.report

    def follow(self, pipe: Any) -> None:
        """From now on each image of `pipe` starts afresh; `follower.release()` ends it."""
        self.follower.follow(pipe)

    def restart(self, timesteps: Tensor | None = None) -> None:
        """A new image, of these timesteps (T,) where they are known."""
        self.memory.restart([] if timesteps is None else timesteps.tolist())

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sample (B, C, H, W), timestep (B,), conditioning -> out_sample (B, C, H, W)"""
        self.follower.check()
        sample = inputs["sample"]
        features = self.memory.recall(timestep_value(inputs["timestep"]), sample)
        if features is not None:
            return self.shallow({**inputs, FEATURES: features})
        found = dict(self.full(inputs))
        if FEATURES not in found:
            raise HcfError(
                f"the full engine returns {', '.join(found)}, no {FEATURES}",
                fix="export hcf.feature_cache.FullStep for it",
            )
        # an engine may write its next output over this one
        self.memory.keep(sample, found.pop(FEATURES).clone())
        return found
