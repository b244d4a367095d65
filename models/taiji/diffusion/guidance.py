"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and thresholding of x_0 (Imagen,
arXiv 2205.11487, section 2.3).

B batch, C channels, H W.
"""

from typing import Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

ThresholdRule = Literal["none", "static", "dynamic"]
Space = Literal["pixel", "latent"]
Branch = Literal["null", "condition"]


def branches(guidance_scale: float) -> tuple[Branch, ...]:
    """What has to be computed: at scale 1 the condition alone and at 0 the null branch alone."""
    if guidance_scale == 1.0:
        return ("condition",)
    return ("null",) if guidance_scale == 0.0 else ("null", "condition")


def combine(outputs: tuple[Tensor, ...], guidance_scale: float) -> Tensor:
    """Outputs (B, C, H, W) of `branches(guidance_scale)`, in that order -> guided (B, C, H, W)"""
    if len(outputs) == 1:
        return outputs[0]
    null, condition = outputs
    return null + guidance_scale * (condition - null)


def static_threshold(x_0: Tensor) -> Tensor:
    """x_0 (B, C, H, W) -> clamped to [-1, 1]"""
    return x_0.clamp(-1, 1)


def dynamic_threshold(x_0: Tensor, quantile: float = 0.995, cap: float | None = None) -> Tensor:
    """x_0 (B, C, H, W) -> in [-1, 1]: clamped to [-s, s] and divided by s, s a sample's own.

    s is the `quantile` of |x_0|, at least 1 and at most `cap`. The paper has no cap and 0.995;
    DeepFloyd-IF caps at 1.5 with 0.95, and at 1, which is clamping, in super-resolution.
    """
    s = torch.quantile(x_0.flatten(1).abs().float(), quantile, dim=1).clamp(1.0, cap)
    s = s.to(x_0.dtype)[:, None, None, None]
    return torch.maximum(torch.minimum(x_0, s), -s) / s


def check_threshold(rule: ThresholdRule, space: Space) -> None:
    """Raises ValueError for latents, which have no bounds to keep."""
    if rule != "none" and space != "pixel":
        raise ValueError(
            f"{rule} thresholding is for pixels in [-1, 1], not for latents; use 'none'"
        )


def threshold(
    x_0: Tensor,
    rule: ThresholdRule,
    *,
    space: Space,
    quantile: float = 0.995,
    cap: float | None = None,
) -> Tensor:
    """x_0 (B, C, H, W) -> thresholded by `rule`. Raises what `check_threshold` raises."""
    check_threshold(rule, space)
    if rule == "none":
        return x_0
    return static_threshold(x_0) if rule == "static" else dynamic_threshold(x_0, quantile, cap)


def guidance_embedding(guidance_scale: Tensor, width: int) -> Tensor:
    """guidance_scale (B,) -> (B, width): what a U-Net with `time_cond_proj_dim` is told of it

    Sinusoids of 1000 (w - 1), as diffusers' pipelines embed it for students whose guidance was
    distilled.
    """
    return get_timestep_embedding(1000 * (guidance_scale - 1), width, downscale_freq_shift=1)
