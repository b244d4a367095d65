"""The sampling loop of a stage: guidance, thresholding and any diffusers scheduler.

B batch, C channels, H W.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taiji.diffusion.condition import Text, text_arguments, uses_text
from taiji.diffusion.guidance import (
    Space,
    ThresholdRule,
    branches,
    check_threshold,
    combine,
    threshold,
)
from taiji.diffusion.schedules import x_0_coefficients
from taiji.diffusion.tiling import tiled

Generators = torch.Generator | list[torch.Generator] | None
OnStep = Callable[[int, Tensor, Tensor], Tensor]  # step, timestep, x_t -> x_t


class Sampling(BaseModel):
    """How a stage is sampled. `noise_level` is of the low-resolution image (see
    `taiji.diffusion.augmentation`); a base stage has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(50, ge=1)
    guidance_scale: float = Field(1.0, ge=0)
    thresholding: ThresholdRule = "none"
    quantile: float = Field(0.995, gt=0, le=1)
    cap: float | None = Field(None, ge=1)
    noise_level: float = Field(0.0, ge=0, le=1)

    def changed(self, **changes: Any) -> "Sampling":
        """A validated copy; None leaves a setting as it is."""
        given = {key: value for key, value in changes.items() if value is not None}
        return Sampling.model_validate({**self.model_dump(), **given})


def guided_output(
    unet: Any,
    x: Tensor,
    timestep: Tensor,
    texts: dict[str, Text],
    guidance_scale: float,
    class_labels: Tensor | None,
) -> Tensor:
    """x (B, C, H, W), texts of "condition" and "null" -> guided output (B, C', H, W)"""
    wanted = branches(guidance_scale)
    if uses_text(unet):
        rows = [texts[branch] for branch in wanted]
    elif guidance_scale != 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} needs a U-Net with text; use 1.0")
    else:
        rows = []
    count = len(wanted)
    labels = None if class_labels is None else class_labels.repeat(count)
    out = unet(
        torch.cat([x] * count), timestep, class_labels=labels, **text_arguments(unet, rows)
    ).sample
    return combine(out.chunk(count), guidance_scale)


def sample(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    texts: dict[str, Text],
    settings: Sampling,
    *,
    space: Space,
    image: Tensor | None = None,
    class_labels: Tensor | None = None,
    tile: int | None = None,
    overlap: int = 0,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """noise (B, C, H, W) of unit variance -> x_0 (B, C, H, W), by `settings`.

    `image` (B, C', H, W) is concatenated to every input. `tile` cells a side bound the memory.
    """
    check_threshold(settings.thresholding, space)
    scheduler.set_timesteps(settings.steps, device=noise.device)
    x_t = noise * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in accepted else {}

    for i, timestep in enumerate(scheduler.timesteps):

        def output(x: Tensor, timestep: Tensor = timestep) -> Tensor:
            return guided_output(unet, x, timestep, texts, settings.guidance_scale, class_labels)

        x = scheduler.scale_model_input(x_t, timestep)
        x = x if image is None else torch.cat([x, image], dim=1)
        out = output(x) if tile is None else tiled(output, x, tile, overlap)
        if settings.thresholding != "none":
            out = _thresholded(scheduler, out, timestep, x_t, settings, space)
        x_t = scheduler.step(out, timestep, x_t, **extra, return_dict=False)[0]
        if on_step is not None:
            x_t = on_step(i, timestep, x_t)
    return x_t


def _thresholded(
    scheduler: Any, out: Tensor, timestep: Tensor, x_t: Tensor, settings: Sampling, space: Space
) -> Tensor:
    """The output (B, C, H, W) that means the thresholded x_0, for any scheduler's step."""
    p, q = x_0_coefficients(scheduler, timestep)
    x_0 = threshold(
        p * x_t.float() + q * out.float(),
        settings.thresholding,
        space=space,
        quantile=settings.quantile,
        cap=settings.cap,
    )
    return ((x_0 - p * x_t.float()) / q).to(out.dtype)
