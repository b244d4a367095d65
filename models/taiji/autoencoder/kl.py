"""KL first stage: diffusers' AutoencoderKL, its objectives, and latents of either first stage.

`KlFirstStage` is the published one for `vqgan.AdversarialObjective`. `FirstStageObjective` is L1 on
pixels and on their finite differences, which is what flat art with hard edges needs and asks for
no pretrained network. B batch, C latent channels, H W pixels, h w latent grid.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from taiji.autoencoder.losses import psnr

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
        db = psnr(output, images).mean()
        parts = {"l1": l1.item(), "edge": edge.item(), "kl": kl.item(), "psnr": db.item()}
        return l1 + self.edge_weight * edge + self.kl_weight * kl, parts


class KlFirstStage(nn.Module):
    """An AutoencoderKL in training, with the regulariser of Rombach et al. (arXiv 2112.10752):
    the divergence from a unit Gaussian in nats an image.

    `sums`: it stands beside errors that are summed over an image's pixels, not averaged.
    """

    sums = True

    def __init__(self, model: AutoencoderKL, kl_weight: float = 1e-6) -> None:
        super().__init__()
        self.model, self.kl_weight = model, kl_weight

    def last_layer(self) -> Tensor:
        return self.model.decoder.conv_out.weight

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Parts]:
        """images (B, 3, H, W) in [-1, 1] -> output (B, 3, H, W), weighted divergence"""
        posterior = self.model.encode(images).latent_dist
        kl = posterior.kl().mean()
        output = self.model.decode(posterior.sample(generator=generator)).sample
        return output, self.kl_weight * kl, {"kl": kl.item()}


def latents(model: AutoencoderKL | VQModel, images: Tensor) -> Tensor:
    """images (B, 3, H, W) -> (B, C, h, w), unscaled: the mean, or what a VQ will quantise"""
    encoded = model.encode(images.to(model.device))
    return encoded.latents if isinstance(model, VQModel) else encoded.latent_dist.mean


@torch.no_grad()
def measure_scaling_factor(
    model: AutoencoderKL | VQModel, images: Tensor, batch_size: int = 512
) -> float:
    """1 / standard deviation of the latents of `images` (B, 3, H, W): measured, never inherited."""
    return 1.0 / float(torch.cat([latents(model, x) for x in images.split(batch_size)]).std())


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL | VQModel, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """uint8 (N, H, W, 3) -> scaled latents (N, C, h, w) float16"""
    factor = vae.config.scaling_factor
    parts = [
        (latents(vae, to_tensor(images[i : i + batch_size])) * factor).half().cpu()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts).contiguous()
