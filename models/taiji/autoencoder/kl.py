"""KL first stage: diffusers' AutoencoderKL and its reconstruction objective.

The published recipe adds LPIPS and a patch discriminator. Here the loss is L1 on pixels and on
their finite differences, which is what flat art with hard edges needs and asks for no pretrained
network.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import l1_loss

Parts = dict[str, float]


def edge_l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences; x, y (B, 3, H, W)."""
    across = l1_loss(x.diff(dim=-1), y.diff(dim=-1))
    return across + l1_loss(x.diff(dim=-2), y.diff(dim=-2))


class FirstStageObjective(nn.Module):
    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-5, edge_weight: float = 1.0):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight
        self.edge_weight = edge_weight

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W) in [-1, 1] -> scalar loss and its parts"""
        posterior = self.vae.encode(images).latent_dist
        output = self.vae.decode(posterior.sample(generator=generator)).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1, edge = l1_loss(output, images), edge_l1(output, images)
        mse = (output.detach().clamp(-1, 1) - images).square().mean((1, 2, 3))
        psnr = (10 * torch.log10(4 / mse.clamp_min(1e-8))).mean()
        parts = {"l1": l1.item(), "edge": edge.item(), "kl": kl.item(), "psnr": psnr.item()}
        return l1 + self.edge_weight * edge + self.kl_weight * kl, parts


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the latents of `images` (B, 3, H, W): measured, never inherited."""
    return 1.0 / float(vae.encode(images).latent_dist.mean.std())


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """uint8 (N, H, W, 3) -> scaled latents (N, C, h, w) float16"""
    factor = vae.config.scaling_factor
    parts = [
        (vae.encode(to_tensor(images[i : i + batch_size])).latent_dist.mean * factor).half()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).contiguous()
