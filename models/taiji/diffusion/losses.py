"""Denoising losses. x_0 latents, eps noise, v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans and Ho,
arXiv 2202.00512); min-SNR weighting (Hang et al., arXiv 2303.09556); EDM (Karras et al., arXiv
2206.00364).

B batch, C channels, H W.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

from taiji.diffusion.schedules import edm_preconditioning, edm_sigma, stratified

Denoiser = Callable[[Tensor, Tensor], Tensor]  # input (B, C, H, W), timestep (B,) -> output


def min_snr_weight(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """alphas_cumprod (B,) -> loss weight (B,): min(SNR, gamma)/SNR for eps, /(SNR+1) for v."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clipped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    if prediction_type == "epsilon":
        return clipped / snr
    raise ValueError(f"no min-SNR weight for prediction_type={prediction_type!r}")


def diffusion_target(
    scheduler: DDIMScheduler, x_0: Tensor, eps: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    """x_0, eps (B, C, H, W), timestep (B,) -> x_t, target of the prediction type"""
    x_t = scheduler.add_noise(x_0, eps, timestep)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return x_t, scheduler.get_velocity(x_0, eps, timestep)
    if kind == "epsilon":
        return x_t, eps
    raise ValueError(f"unsupported prediction_type {kind!r}; use v_prediction or epsilon")


def denoising_loss(
    prediction: Tensor, target: Tensor, alphas_cumprod: Tensor, *, gamma: float | None, kind: str
) -> Tensor:
    """prediction, target (B, C, H, W), alphas_cumprod (B,) -> scalar weighted mean square error.

    `gamma` None weighs every step alike. Else a v weight of zero at zero SNR would leave the first
    sampling step untrained, so the weight of the noisiest steps is floored.
    """
    per_sample = (prediction.float() - target.float()).square().mean((1, 2, 3))
    if gamma is None:
        return per_sample.mean()
    weight = min_snr_weight(alphas_cumprod, gamma, kind).clamp_min(0.1)
    return torch.mean(weight * per_sample)


def process_loss(
    denoise: Denoiser,
    scheduler: DDIMScheduler | EDMEulerScheduler,
    x_0: Tensor,
    generator: torch.Generator,
    *,
    gamma: float | None = 5.0,
) -> tuple[Tensor, float]:
    """x_0 (B, C, H, W) -> scalar loss of the scheduler's process, unweighted mean square error

    `gamma` is min-SNR's, for the discrete schedules alone. The draws are made on the CPU, so they
    do not depend on the device.
    """
    if isinstance(scheduler, EDMEulerScheduler):
        return edm_loss(denoise, x_0, generator, scheduler.config.sigma_data)
    table = scheduler.alphas_cumprod.to(x_0.device)
    timestep = (stratified(len(x_0), generator) * len(table)).long().to(x_0.device)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    x_t, target = diffusion_target(scheduler, x_0, eps, timestep)
    prediction = denoise(x_t, timestep)
    kind = scheduler.config.prediction_type
    loss = denoising_loss(prediction, target, table[timestep], gamma=gamma, kind=kind)
    return loss, (prediction.detach().float() - target).square().mean().item()


def edm_loss(
    denoise: Denoiser, x_0: Tensor, generator: torch.Generator, sigma_data: float
) -> tuple[Tensor, float]:
    """x_0 (B, C, H, W) -> scalar loss, mean square error of D

    lambda(sigma) |D - x_0|^2 with lambda = 1 / c_out^2, written as the network's own error.
    """
    n = torch.randn(len(x_0), generator=generator)
    sigma = edm_sigma(n).to(x_0)
    c_skip, c_out, c_in, c_noise = (
        c[:, None, None, None] for c in edm_preconditioning(sigma, sigma_data)
    )
    x = x_0 + sigma[:, None, None, None] * torch.randn(x_0.shape, generator=generator).to(x_0)
    prediction = denoise(c_in * x, c_noise.flatten()).float()
    loss = (prediction - (x_0 - c_skip * x) / c_out).square().mean()
    error = c_skip * x + c_out * prediction.detach() - x_0
    return loss, error.square().mean().item()
