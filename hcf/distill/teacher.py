"""The frozen teacher with classifier-free guidance, and how a student is told the guidance scale.

B batch, C channels, H W latent size, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hcf.errors import RecipeError
from hcf.settings import DistillConfig
from hcf.trace import call_denoiser


class Teacher(nn.Module):
    """The frozen denoiser. `uncond` are the flat arguments of the unconditional branch, one row
    each, None for a pipeline that does not guide."""

    def __init__(self, denoiser: nn.Module, uncond: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.names = tuple(uncond or ())
        for name, row in (uncond or {}).items():
            self.register_buffer(f"uncond_{name}", row, persistent=False)

    @torch.no_grad()
    def guided(
        self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor], scale: Tensor
    ) -> Tensor:
        """x_t (B, C, H, W), timestep and scale (B,) -> u + scale (c - u), (B, C, H, W) float32

        Both branches in one call; the conditional one alone where every scale is 1.
        """
        if not self.names or bool((scale == 1).all()):
            return call_denoiser(self.denoiser, x_t, timestep, cond).float()
        both = {
            name: torch.cat([getattr(self, f"uncond_{name}").expand(len(x_t), *v.shape[1:]), v])
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
