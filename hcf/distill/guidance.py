"""Guidance distillation: one forward pass a step instead of two, as many steps as before.

The student learns the teacher's guided prediction at every timestep, for one guidance scale or for
a range of them that it is told (Meng et al., "On Distillation of Guided Diffusion Models", arXiv
2210.03142, stage one, equation 2; there in x_0, here in the network's own prediction).

B batch, C channels, H W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hcf.distill.solver import noise_schedule, noised
from hcf.distill.teacher import Guidance, Teacher
from hcf.trace import call_denoiser


class GuidanceObjective(nn.Module):
    alpha: Tensor

    def __init__(
        self, student: nn.Module, teacher: Teacher, scheduler: Any, guidance: Guidance
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.guidance = student, teacher, guidance
        self.register_buffer("alpha", noise_schedule(scheduler)[0].float(), persistent=False)

    def forward(
        self, latents: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W), cond (B, ...) each -> scalar loss, parts"""
        count, device, total = len(latents), latents.device, len(self.alpha)
        timestep = torch.randint(total, (count,), generator=generator).to(device)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        scale = self.guidance.draw(count, generator).to(device)
        x_t = noised(latents, eps, self.alpha[timestep])
        target = self.teacher.guided(x_t, timestep, cond, scale)
        told = {**cond, **self.guidance.told(scale)}
        prediction = call_denoiser(self.student, x_t, timestep, told).float()
        # large scales make large targets: each row counts by the size of its own
        size = target.square().mean((1, 2, 3)).clamp_min(1.0)
        per_sample = (prediction - target).square().mean((1, 2, 3))
        return torch.mean(per_sample / size), {"mse": per_sample.detach().mean().item()}
