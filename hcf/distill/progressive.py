"""Progressive distillation: a student whose step is two of its teacher's, again and again.

Salimans and Ho, arXiv 2202.00512. From x_t the teacher makes two DDIM steps, to x_u and x_s; the
student's one step must end there too, which asks for the clean image (equation 8 of appendix G)

    x~ = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

in the paper's alpha and sigma, our square roots of alpha and 1 - alpha. The loss is max(SNR, 1)
times the square error of x_0 (section 4, "truncated SNR"). Guidance is folded in by the first
stage (Meng et al., arXiv 2210.03142, does it in a stage of its own); later teachers are students.

B batch, C channels, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcf.distill.solver import SolverGrid, column, noised, x0_eps
from hcf.distill.teacher import Guidance, Teacher
from hcf.trace import call_denoiser


class ProgressiveObjective(nn.Module):
    """One stage: `grid` has two points of the teacher's in each phase, a step of the student's.

    `told`: the teacher is the student of an earlier stage, which is told its guidance scale.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        grid: SolverGrid,
        guidance: Guidance,
        *,
        teacher_is_student: bool,
    ) -> None:
        super().__init__()
        if grid.phase != 2:
            raise ValueError(f"a phase of progressive distillation has 2 points, not {grid.phase}")
        self.student, self.teacher, self.grid, self.guidance = student, teacher, grid, guidance
        self.teacher_is_student = teacher_is_student

    def forward(
        self, latents: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W), cond (B, ...) each -> scalar loss, parts"""
        grid, count, device = self.grid, len(latents), latents.device
        index = (torch.randint(grid.points // 2, (count,), generator=generator) * 2).to(device)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        scale = self.guidance.draw(count, generator).to(device)
        told = {**cond, **self.guidance.told(scale)}
        x_t = noised(latents, eps, grid.alpha[index])
        with torch.no_grad():
            x_s = x_t
            for at in (index, index + 1):
                prediction = self._teach(x_s, grid.timesteps[at], cond, told, scale)
                x_s = grid.step(prediction, x_s, at, at + 1)
            target = _clean_image(x_t, x_s, grid.alpha[index], grid.alpha[index + 2])
        prediction = call_denoiser(self.student, x_t, grid.timesteps[index], told).float()
        alpha = grid.alpha[index]
        x_0, _ = x0_eps(prediction, x_t, alpha, grid.kind)
        per_sample = (x_0 - target).square().mean((1, 2, 3))
        weight = (alpha / (1 - alpha)).clamp_min(1.0)
        return torch.mean(weight * per_sample), {"mse": per_sample.detach().mean().item()}

    def _teach(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: dict[str, Tensor],
        told: dict[str, Tensor],
        scale: Tensor,
    ) -> Tensor:
        if self.teacher_is_student:
            return call_denoiser(self.teacher.denoiser, x, timestep, told).float()
        return self.teacher.guided(x, timestep, cond, scale)


def _clean_image(x_t: Tensor, x_s: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """The x_0 (B, C, H, W) with which one DDIM step goes from x_t to x_s."""
    ratio = column(((1 - alpha_s) / (1 - alpha_t)).sqrt())
    return (x_s - ratio * x_t) / (column(alpha_s.sqrt()) - ratio * column(alpha_t.sqrt()))
