"""Noise-conditioning augmentation of cascades (Ho et al., arXiv 2106.15282; Imagen, 2205.11487).

A super-resolution model is trained on low-resolution images with noise of a random level and is
told the level, so that it forgives what the stage before did wrong. The level is a share of the
1000-step linear schedule: 0 adds nothing at all, 0.02 is SD-x4's default of step 20.

B batch, C channels, H W.
"""

import torch
from torch import Tensor

from taiji.diffusion.schedules import STEPS, alphas_cumprod, stratified

ALPHAS_CUMPROD = alphas_cumprod("linear")


def noise_augment(image: Tensor, level: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """image, eps (B, C, H, W), level (B,) in [0, 1] -> noised image, class labels (B,) int64

    Raises ValueError for a level outside [0, 1].
    """
    if float(level.min()) < 0 or float(level.max()) > 1:
        raise ValueError(f"noise level {level.tolist()} must lie in [0, 1]")
    labels = (level * STEPS).round().long().clamp(max=STEPS - 1).to(image.device)
    a = ALPHAS_CUMPROD.to(image.device)[labels]
    a = torch.where(labels == 0, torch.ones_like(a), a).to(image.dtype)[:, None, None, None]
    return a.sqrt() * image + (1 - a).sqrt() * eps, labels


def signal_share(level: float) -> float:
    """The share of a noised image's variance that is the image's, 1 at level 0"""
    label = min(round(level * STEPS), STEPS - 1)
    return float(ALPHAS_CUMPROD[label]) if label else 1.0


def draw_levels(
    count: int, maximum: float, generator: torch.Generator, clean_share: float = 0.0
) -> Tensor:
    """(count,) levels for training: 0 in `clean_share` of them, else uniform in [0, maximum)"""
    u = stratified(count, generator)
    return ((u - clean_share) / (1 - clean_share)).clamp_min(0) * maximum
