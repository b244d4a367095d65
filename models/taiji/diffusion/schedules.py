"""Noise schedules: diffusers scheduler configurations, and the EDM process.

Discrete: alphas_cumprod over 1000 steps, cosine (Nichol and Dhariwal, arXiv 2102.09672, equation
17), linear (Ho et al., arXiv 2006.11239, section 4) or scaled linear (latent diffusion, arXiv
2112.10752). EDM: Karras et al., arXiv 2206.00364, table 1: D(x, sigma) = c_skip x + c_out
F(c_in x, c_noise), ln sigma ~ N(P_mean, P_std^2) in training.

B batch.
"""

from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

Schedule = Literal["cosine", "linear", "scaled_linear"]
Prediction = Literal["epsilon", "v_prediction"]

STEPS = 1000
BETAS: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
SIGMA_DATA, P_MEAN, P_STD = 0.5, -1.2, 1.2


def scheduler_config(schedule: Schedule, prediction_type: Prediction) -> dict[str, Any]:
    """Arguments of DDPMScheduler and DDIMScheduler alike.

    No clipping: thresholding is the sampler's. eps starts at the "leading" step, because at the
    very last one x_0 = (x_t - sqrt(1-a) eps) / sqrt(a) divides by almost zero; v starts there.
    """
    if schedule not in BETAS:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(BETAS)}")
    return {
        "num_train_timesteps": STEPS,
        **BETAS[schedule],
        "prediction_type": prediction_type,
        "clip_sample": False,
        "timestep_spacing": "trailing" if prediction_type == "v_prediction" else "leading",
    }


def make_scheduler(
    schedule: Schedule | Literal["edm"], prediction_type: Prediction
) -> DDIMScheduler | EDMEulerScheduler:
    """The scheduler that a model of this process is trained with and first sampled by."""
    if schedule == "edm":
        return EDMEulerScheduler(sigma_data=SIGMA_DATA, prediction_type=prediction_type)
    return DDIMScheduler(**scheduler_config(schedule, prediction_type))


def edm_sigma(n: Tensor, p_mean: float = P_MEAN, p_std: float = P_STD) -> Tensor:
    """n (B,) standard normal -> sigma (B,) as training draws it"""
    return (p_mean + p_std * n).exp()


def edm_preconditioning(
    sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma (B,) -> c_skip, c_out, c_in, c_noise (B,)"""
    total = sigma**2 + sigma_data**2
    return (
        sigma_data**2 / total,
        sigma * sigma_data / total.sqrt(),
        1 / total.sqrt(),
        sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """sigma (B,) -> weight (B,) of the error of D; times c_out^2 it is 1 at every sigma"""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def x_0_coefficients(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """(p, q) with x_0 = p x_t + q output, at a step of a sampling run.

    Raises:
        ValueError: a scheduler whose samples are neither variance preserving nor EDM's, or another
            prediction type.
    """
    kind = scheduler.config.prediction_type
    if hasattr(scheduler, "precondition_outputs"):
        index = scheduler.step_index
        sigma = scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index]
        c_skip, c_out, _, _ = edm_preconditioning(sigma.double(), scheduler.config.sigma_data)
        return float(c_skip), float(-c_out if kind == "v_prediction" else c_out)
    if not hasattr(scheduler, "alphas_cumprod") or float(scheduler.init_noise_sigma) != 1.0:
        name = type(scheduler).__name__
        raise ValueError(
            f"{name} gives no x_0 to threshold; use DDPM, DDIM, DPM-Solver, UniPC or EDM Euler, "
            "or thresholding='none'"
        )
    a = float(scheduler.alphas_cumprod[int(timestep)])
    if kind == "v_prediction":
        return a**0.5, -((1 - a) ** 0.5)
    if kind == "epsilon":
        return a**-0.5, -((1 / a - 1) ** 0.5)
    raise ValueError(f"unsupported prediction_type {kind!r}; use v_prediction or epsilon")


def alphas_cumprod(schedule: Schedule) -> Tensor:
    """(1000,) float32"""
    table: Tensor = DDIMScheduler(**scheduler_config(schedule, "epsilon")).alphas_cumprod
    return table


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """(count,) in [0, 1), one in each equal slice, shuffled: a batch's loss varies less."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return u[torch.randperm(count, generator=generator)]
