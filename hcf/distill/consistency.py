"""Consistency distillation with guidance folded in or told, for a fixed number of steps.

The student starts from the teacher. Its N steps cut the teacher's probability-flow ODE into N
phases; within a phase it learns to jump from any solver point t straight to the phase's end s
(phased consistency: Wang et al., "Phased Consistency Models", arXiv 2405.18407; N = 1 is latent
consistency distillation, Luo et al., arXiv 2310.04378). `skip` guided DDIM steps of the teacher,
t -> u, give

    loss = d(f(x_t, t -> s), sg f(x_u, u -> s)),   f(x_u, u -> s) = x_u at u = s,

so guidance costs nothing at sampling, and sampling is N plain DDIM steps: the student is an
ordinary diffusers pipeline with a DDIM scheduler. With `skip` a whole phase the target is the
teacher's own solution, exact and dear; with 1 it is mostly the student's, cheap and slow to settle.

B batch, C channels, H W latent size. alpha is the cumulative alpha of the noise schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcf.distill.solver import SolverGrid, angle, column, noised, pseudo_huber
from hcf.distill.teacher import Guidance, Teacher
from hcf.errors import RecipeError
from hcf.settings import ConsistencyConfig
from hcf.trace import call_denoiser


class ConsistencyObjective(nn.Module):
    """Holds student and frozen teacher; `forward` is the loss of one batch of clean latents.

    Raises RecipeError for a `skip` that does not divide a phase.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        grid: SolverGrid,
        guidance: Guidance,
        config: ConsistencyConfig,
    ) -> None:
        super().__init__()
        if grid.phase % config.skip:
            raise RecipeError(
                f"distill.consistency.skip={config.skip} does not divide the {grid.phase} solver "
                "steps of a phase",
                fix=f"use skip=1 or skip={grid.phase}",
            )
        self.student, self.teacher, self.grid = student, teacher, grid
        self.guidance, self.skip, self.huber_c = guidance, config.skip, config.huber_c

    def forward(
        self, latents: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W), cond (B, ...) each -> scalar loss, parts"""
        grid, count, device = self.grid, len(latents), latents.device
        # Half of the draws sit where sampling evaluates the student: on the phases' first points.
        index = torch.randint(grid.points, (count,), generator=generator)
        first = torch.rand(count, generator=generator) < 0.5
        index = torch.where(first, index // grid.phase * grid.phase, index // self.skip * self.skip)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        scale, index = self.guidance.draw(count, generator).to(device), index.to(device)
        told = {**cond, **self.guidance.told(scale)}
        edge, ahead = grid.edge[index], index + self.skip
        x_t = noised(latents, eps, grid.alpha[index])
        with torch.no_grad():
            target = x_t
            for at in (index + i for i in range(self.skip)):
                guided = self.teacher.guided(target, grid.timesteps[at], cond, scale)
                target = grid.step(guided, target, at, at + 1)
            rest = ahead < edge  # rows whose phase goes on after u
            if rest.any():
                own = {k: v[rest] for k, v in told.items()}
                x_u, at = target[rest], ahead[rest]
                prediction = call_denoiser(self.student, x_u, grid.timesteps[at], own).float()
                target[rest] = grid.step(prediction, x_u, at, edge[rest])
        prediction = call_denoiser(self.student, x_t, grid.timesteps[index], told).float()
        reached = grid.step(prediction, x_t, index, edge)
        # In units of the network's output: a late short jump counts as much as an early long one.
        moved = angle(grid.alpha[index], grid.alpha[edge])
        error = (reached - target) / column(moved.clamp_min(0.05))
        return pseudo_huber(error, self.huber_c), {"mse": error.detach().square().mean().item()}
