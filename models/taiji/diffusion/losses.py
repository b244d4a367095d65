"""Denoising losses. x_0 latents, eps noise, v = sqrt(a) eps - sqrt(1-a) x_0 (Salimans and Ho,
arXiv 2202.00512); min-SNR weighting (Hang et al., arXiv 2303.09556).

B batch, C channels, H W.
"""

import torch
from diffusers import DDIMScheduler
from torch import Tensor


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
