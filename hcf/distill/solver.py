"""Points of the teacher's probability-flow ODE and steps between them.

alpha is the cumulative alpha of the noise schedule: x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) eps.
B batch, C channels, H W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import RecipeError

PREDICTIONS = ("v_prediction", "epsilon", "sample")


class SolverGrid(nn.Module):
    """A trailing grid of S points, noisiest first, cut into phases: a student's steps.

    `timesteps` (S,) int64; `alpha` (S+1,), the last 1 (clean data); `edge` (S,) is the index where
    each point's phase ends. Raises RecipeError where the phases do not divide the grid, and where
    the teacher predicts eps at zero terminal SNR, which leaves x_0 undefined at the first point.
    """

    timesteps: Tensor
    alpha: Tensor
    edge: Tensor

    def __init__(self, scheduler: Any, points: int, phases: int) -> None:
        super().__init__()
        if points % phases:
            raise RecipeError(
                f"distill.solver_steps={points} is no multiple of distill.steps={phases}",
                fix=f"use solver_steps={phases * max(1, round(points / phases))}",
            )
        cumulative, kind = noise_schedule(scheduler)
        total = len(cumulative)
        at = (total - torch.arange(points) * total / points).round().long() - 1
        alpha = torch.cat([cumulative[at], torch.ones(1, dtype=torch.double)])
        if kind == "epsilon" and float(alpha[0]) < 1e-8:
            raise RecipeError(
                "the teacher predicts epsilon at zero terminal SNR: its first step is undefined",
                fix="use a v_prediction teacher, or rescale_betas_zero_snr=False",
            )
        self.kind, self.points, self.phase = kind, points, points // phases
        edge = (torch.arange(points) // self.phase + 1) * self.phase
        self.register_buffer("timesteps", at, persistent=False)
        self.register_buffer("alpha", alpha.float(), persistent=False)
        self.register_buffer("edge", edge, persistent=False)

    def step(self, prediction: Tensor, x: Tensor, index: Tensor, to: Tensor) -> Tensor:
        """DDIM from grid points `index` (B,) to `to` (B,): x (B, C, H, W) -> (B, C, H, W)"""
        return jump(prediction, x, self.alpha[index], self.alpha[to], self.kind)


def noise_schedule(scheduler: Any) -> tuple[Tensor, str]:
    """Cumulative alphas (T,) float64 and the prediction type of a scheduler.

    Raises RecipeError for a scheduler without them (flow matching, EDM).
    """
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    kind = getattr(scheduler.config, "prediction_type", None)
    if cumulative is None or kind not in PREDICTIONS:
        raise RecipeError(
            f"{type(scheduler).__name__} with prediction_type={kind!r} has no noise schedule that "
            "distillation knows",
            fix=f"give the teacher a DDIMScheduler; prediction types: {', '.join(PREDICTIONS)}",
        )
    return cumulative.double(), kind


def column(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def noised(x_0: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """x_0, eps (B, C, H, W), alpha (B,) -> x_t (B, C, H, W)"""
    return column(alpha.sqrt()) * x_0 + column((1 - alpha).sqrt()) * eps


def x0_eps(prediction: Tensor, x_t: Tensor, alpha: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What a prediction of `kind` says of x_t (B, C, H, W) at alpha (B,): x_0, eps"""
    a, b = column(alpha.sqrt()), column((1 - alpha).sqrt())
    if kind == "v_prediction":
        return a * x_t - b * prediction, a * prediction + b * x_t
    if kind == "epsilon":
        return (x_t - b * prediction) / a, prediction
    if kind == "sample":
        return prediction, (x_t - a * prediction) / b
    raise RecipeError(f"unknown prediction_type {kind!r}; {', '.join(PREDICTIONS)}")


def prediction_target(x_0: Tensor, eps: Tensor, alpha: Tensor, kind: str) -> Tensor:
    """What a network of prediction type `kind` should say of x_0 and eps (B, C, H, W)."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    return column(alpha.sqrt()) * eps - column((1 - alpha).sqrt()) * x_0


def jump(prediction: Tensor, x_t: Tensor, alpha_t: Tensor, alpha_s: Tensor, kind: str) -> Tensor:
    """DDIM from alpha_t to alpha_s (B,): prediction, x_t (B, C, H, W) -> x_s (B, C, H, W)

    Song et al., arXiv 2010.02502, equation 12 without noise.
    """
    x_0, eps = x0_eps(prediction, x_t, alpha_t, kind)
    return noised(x_0, eps, alpha_s)


def angle(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """sin of the angle between two noise levels (B,): how far x_s moves per unit of v."""
    return (alpha_s.sqrt() * (1 - alpha_t).sqrt() - alpha_t.sqrt() * (1 - alpha_s).sqrt()).abs()


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """error (B, C, H, W) -> scalar: sqrt(mean square + c^2) - c a sample (arXiv 2310.14189, 3.3)"""
    return torch.mean((error.square().mean((1, 2, 3)) + c**2).sqrt() - c)
