"""The frozen teacher with classifier-free guidance, and how a student is told the guidance scale.

B batch, C channels, H W latent size, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcf.distill.solver import column, noise_schedule, x0_eps
from hcf.errors import RecipeError
from hcf.settings import DistillConfig
from hcf.trace import call_denoiser


class Bounds(nn.Module):
    """Thresholding of x_0 to [-1, 1] as a pixel pipeline samples (Imagen, arXiv 2205.11487, section
    2.3): part of the teacher's ODE, so the student learns it and needs none itself."""

    alpha: Tensor

    def __init__(self, scheduler: Any, rule: Any, quantile: float, cap: float | None) -> None:
        super().__init__()
        schedule, self.kind = noise_schedule(scheduler)
        self.rule, self.quantile, self.cap = rule, quantile, cap
        self.register_buffer("alpha", schedule.float(), persistent=False)

    @classmethod
    def of(cls, pipe: Any) -> Bounds | None:
        """As the scheduler's configuration says, or the base's settings of a cascade; None where
        neither thresholds."""
        scheduler = pipe.scheduler.config
        if scheduler.get("thresholding"):
            ratio, cap = scheduler["dynamic_thresholding_ratio"], scheduler["sample_max_value"]
            return cls(pipe.scheduler, "dynamic", ratio, cap)
        stages = pipe.config.get("settings")
        stage = stages[0] if isinstance(stages, list) else stages
        if not stage or stage.get("thresholding", "none") == "none":
            return None
        return cls(pipe.scheduler, stage["thresholding"], stage["quantile"], stage["cap"])

    def forward(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """prediction, x_t (B, C, H, W), timestep (B,) -> what means the thresholded x_0"""
        from taiji.diffusion.guidance import threshold

        alpha = self.alpha[timestep]
        x_0, _ = x0_eps(prediction, x_t, alpha, self.kind)
        x_0 = threshold(x_0, self.rule, space="pixel", quantile=self.quantile, cap=self.cap)
        a, b = column(alpha.sqrt()), column((1 - alpha).sqrt())
        if self.kind == "sample":
            return x_0
        if self.kind == "epsilon":
            return (x_t - a * x_0) / b
        return (a * x_t - x_0) / b


class Teacher(nn.Module):
    """The frozen denoiser. `uncond` are the flat arguments of the unconditional branch, one row
    each, None for a pipeline that does not guide; `bounds` those of x_0 in pixel space."""

    def __init__(
        self,
        denoiser: nn.Module,
        uncond: Mapping[str, Tensor] | None,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        self.bounds = bounds
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.names = tuple(uncond or ())
        for name, row in (uncond or {}).items():
            self.register_buffer(f"uncond_{name}", row, persistent=False)

    @torch.no_grad()
    def guided(
        self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor], scale: Tensor
    ) -> Tensor:
        """x_t (B, C, H, W), timestep and scale (B,) -> u + scale (c - u), (B, C, H, W) float32

        Both branches in one call; the conditional one alone where every scale is 1. Within its
        bounds, where it has some.
        """
        out = self._guided(x_t, timestep, cond, scale)
        return out if self.bounds is None else self.bounds(out, x_t, timestep)

    def _guided(
        self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor], scale: Tensor
    ) -> Tensor:
        if not self.names or bool((scale == 1).all()):
            return call_denoiser(self.denoiser, x_t, timestep, cond).float()
        # an image that is given, its noise level: the same for both branches
        both = {
            name: torch.cat(
                [getattr(self, f"uncond_{name}").expand(len(x_t), *v.shape[1:]), v]
                if name in self.names
                else [v, v]
            )
            for name, v in cond.items()
        }
        out = call_denoiser(self.denoiser, torch.cat([x_t, x_t]), timestep.repeat(2), both).float()
        uncond, conditional = out.chunk(2)
        return uncond + scale[:, None, None, None] * (conditional - uncond)


class Guidance:
    """The guidance scales of training: one number folded in, or a range that the student is told.

    Told through `time_cond_proj_dim` of the U-Net (Meng et al., arXiv 2210.03142, section 3), the
    embedding that diffusers' pipelines give such a U-Net (of w - 1).
    """

    def __init__(self, low: float, high: float, width: int | None) -> None:
        self.low, self.high, self.width = low, high, width

    @classmethod
    def of(cls, config: DistillConfig, teacher: Teacher) -> Guidance:
        """Raises RecipeError for a guidance scale where the pipeline has no unconditional branch"""
        embedding = config.guidance_embedding
        low, high = (
            (config.guidance_scale, config.guidance_scale)
            if embedding is None
            else (embedding.low, embedding.high)
        )
        if high != 1 and not teacher.names:
            raise RecipeError(
                f"distill.guidance_scale={high:g}, but this pipeline does not guide: it calls its "
                "denoiser once a step",
                fix="use guidance_scale=1; its guidance is folded in already",
            )
        return cls(low, high, None if embedding is None else embedding.width)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) scales on the CPU, uniform in the range"""
        if self.low == self.high:
            return torch.full((count,), self.low)
        return self.low + (self.high - self.low) * torch.rand(count, generator=generator)

    def told(self, scale: Tensor) -> dict[str, Tensor]:
        """scale (B,) -> the student's argument `timestep_cond` (B, D), nothing where it is fixed"""
        from taiji.diffusion.guidance import guidance_embedding

        return (
            {} if self.width is None else {"timestep_cond": guidance_embedding(scale, self.width)}
        )
