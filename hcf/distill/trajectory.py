"""Regression on kept trajectories of the teacher: prompts alone, no images.

The teacher's guided ODE is solved once from noise for each of `count` captions, and its points at
the ends of the student's phases are kept. The student learns each phase's jump from them (Luhman
and Luhman, "Knowledge Distillation in Iterative Generative Models", arXiv 2101.02388, for one
step; in phases it is what Wang et al., arXiv 2405.18407, solve as they train). After that a step
needs no teacher at all, and the same file serves the next student.

M trajectories, N phases, B batch, C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hcf.distill.solver import SolverGrid, angle, column, pseudo_huber
from hcf.distill.teacher import Guidance, Teacher
from hcf.trace import call_denoiser

Log = Callable[[str], None]


class TrajectoryObjective(nn.Module):
    def __init__(
        self, student: nn.Module, grid: SolverGrid, guidance: Guidance, huber_c: float
    ) -> None:
        super().__init__()
        self.student, self.grid, self.guidance, self.huber_c = student, grid, guidance, huber_c

    def forward(
        self, points: Tensor, scale: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """points (B, N + 1, C, H, W), scale (B,), cond (B, ...) each -> scalar loss, parts"""
        grid, rows = self.grid, torch.arange(len(points))
        phase = torch.randint(points.shape[1] - 1, (len(points),), generator=generator)
        x_t, target = points[rows, phase].float(), points[rows, phase + 1].float()
        index = (phase * grid.phase).to(points.device)
        edge = grid.edge[index]
        told = {**cond, **self.guidance.told(scale)}
        prediction = call_denoiser(self.student, x_t, grid.timesteps[index], told).float()
        reached = grid.step(prediction, x_t, index, edge)
        moved = angle(grid.alpha[index], grid.alpha[edge])
        error = (reached - target) / column(moved.clamp_min(0.05))
        return pseudo_huber(error, self.huber_c), {"mse": error.detach().square().mean().item()}


@torch.no_grad()
def solve(
    teacher: Teacher,
    grid: SolverGrid,
    guidance: Guidance,
    rows: Mapping[str, Tensor],
    captions: Tensor,
    shape: tuple[int, ...],
    count: int,
    *,
    seed: int,
    batch_size: int,
    log: Log,
) -> tuple[dict[str, Tensor], Tensor]:
    """Trajectories of the teacher from noise, for `captions` (K,), rows of conditioning, in
    random order, and again where there are fewer.

    Returns {"points" (M, N + 1, C, H, W) float16, "scale" (M,)} and the rows (M,) they are of.
    `shape` (C, H, W). Noise and scale of a trajectory depend on `seed` and its number alone.
    """
    from taiji.train.settings import step_generators

    device = grid.alpha.device
    order = torch.Generator().manual_seed(seed)
    rounds = range(-(-count // len(captions)))
    caption = torch.cat([captions[torch.randperm(len(captions), generator=order)] for _ in rounds])
    caption = caption[:count]
    points = torch.empty(count, grid.points // grid.phase + 1, *shape, dtype=torch.float16)
    scales = torch.empty(count)
    for start in range(0, count, batch_size):
        chosen = range(start, min(start + batch_size, count))
        noise, scale = [], []
        for i in chosen:
            # not that of seed + i, from which pipelines draw the images that a student is judged by
            _, generator = step_generators(seed, i, 0)
            noise.append(torch.randn(shape, generator=generator).half().float())  # as it is kept
            scale.append(guidance.draw(1, generator))
        x, w = torch.stack(noise).to(device), torch.cat(scale).to(device)
        cond = {k: v[caption[start : start + len(x)]].to(device) for k, v in rows.items()}
        own = slice(start, start + len(x))
        scales[own], points[own, 0] = w.cpu(), x.half().cpu()
        for i in range(grid.points):
            at = torch.full((len(x),), i, device=device)
            x = grid.step(teacher.guided(x, grid.timesteps[at], cond, w), x, at, at + 1)
            if (i + 1) % grid.phase == 0:
                points[own, (i + 1) // grid.phase] = x.half().cpu()
        if start // batch_size % 8 == 0:
            log(f"{own.stop} of {count} teacher trajectories")
    return {"points": points, "scale": scales}, caption
