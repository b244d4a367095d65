"""VQ-GAN (Esser et al., arXiv 2012.09841) on diffusers' VQModel, and its adversarial objective,
which KL first stages share. `losses` has the formulas, `codebook` the quantisation.

B batch, C latent channels, H W pixels, h w latent grid, K codes.
"""

import torch
from diffusers import VQModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from taiji.autoencoder import codebook as vq
from taiji.autoencoder.discriminator import PatchDiscriminator
from taiji.autoencoder.kl import KlFirstStage
from taiji.autoencoder.losses import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    psnr,
)
from taiji.autoencoder.perceptual import PerceptualLoss

Parts = dict[str, float]


class AdversarialConfig(BaseModel):
    """The published VQ-f4 by default. The discriminator works from the step `disc_start` on, at
    `disc_lr_scale` of the recipe's learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perceptual_weight: float = Field(1.0, ge=0)
    gan_weight: float = Field(0.75, ge=0)
    disc_start: int = Field(0, ge=0)
    disc_lr_scale: float = Field(1.0, gt=0)
    disc_width: int = Field(64, gt=0)
    disc_layers: int = Field(3, gt=0)


class VqFirstStage(nn.Module):
    """A VQModel in training. Its codebook is brought up to date by each forward with gradients."""

    sums = False

    def __init__(self, model: VQModel, config: vq.CodebookConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.upkeep = vq.CodebookUpkeep(model.config.num_vq_embeddings, config)

    def last_layer(self) -> Tensor:
        return self.model.decoder.conv_out.weight

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Parts]:
        """images (B, 3, H, W) in [-1, 1] -> output (B, 3, H, W), weighted loss of the codebook"""
        z = self.model.encode(images).latents.float()
        book = self.model.quantize.embedding.weight
        codes = vq.nearest_codes(z.detach(), book.detach())
        e = vq.look_up(codes, book)
        loss = vq.codebook_loss(z, e, self.config)
        output = self.model.decode(vq.straight_through(z, e), force_not_quantize=True).sample
        counts = vq.code_counts(codes, len(book))
        if torch.is_grad_enabled():
            counts = self.upkeep.update(book, z.detach(), codes, generator)
        parts = {
            "codebook": loss.item(),
            "perplexity": vq.perplexity(counts),
            "usage": vq.usage(counts),
        }
        return output, self.config.weight * loss, parts


class AdversarialObjective(nn.Module):
    """Two turns a step: the autoencoder against L1, features and the discriminator; then the
    discriminator, on what the autoencoder now makes of the same images."""

    turns = ("autoencoder", "discriminator")

    def __init__(
        self,
        first_stage: VqFirstStage | KlFirstStage,
        config: AdversarialConfig,
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        super().__init__()
        self.first_stage, self.config, self.perceptual = first_stage, config, perceptual
        self.discriminator = PatchDiscriminator(3, config.disc_width, config.disc_layers)
        self.lr_scales = {"discriminator": config.disc_lr_scale}
        if perceptual is None and config.perceptual_weight:
            raise ValueError(
                f"perceptual_weight is {config.perceptual_weight} without a perceptual loss: give "
                "a feature network, or set it to 0"
            )

    def parameters_of(self, turn: str) -> list[nn.Parameter]:
        part = self.discriminator if turn == "discriminator" else self.first_stage
        return list(part.parameters())

    def forward(
        self, images: Tensor, generator: torch.Generator, turn: str = "autoencoder", step: int = 0
    ) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W) in [-1, 1] -> the turn's scalar loss and its parts"""
        adversarial = step >= self.config.disc_start
        if turn == "discriminator":
            return self._discriminate(images, generator, adversarial)
        return self._reconstruct(images, generator, adversarial)

    def _reconstruct(
        self, images: Tensor, generator: torch.Generator, adversarial: bool
    ) -> tuple[Tensor, Parts]:
        output, regulariser, parts = self.first_stage(images, generator)
        output = output.float()
        l1 = l1_loss(output, images)
        parts |= {"l1": l1.item(), "psnr": psnr(output, images).mean().item()}
        reconstruction = l1
        if self.perceptual is not None:
            distance = self.perceptual(output, images).mean()
            reconstruction = l1 + self.config.perceptual_weight * distance
            parts["perceptual"] = distance.item()
        # in the published units for the clamp of the adaptive weight, then a mean over pixels
        unit = images[0].numel() if self.first_stage.sums else 1
        reconstruction = unit * reconstruction
        loss = reconstruction + regulariser
        if adversarial:
            fool = hinge_generator(self.discriminator(output).float())
            weight = adaptive_weight(reconstruction, fool, self.first_stage.last_layer())
            loss = loss + self.config.gan_weight * weight * fool
            parts |= {"generator": fool.item(), "adaptive": weight.item()}
        return loss / unit, parts

    def _discriminate(
        self, images: Tensor, generator: torch.Generator, adversarial: bool
    ) -> tuple[Tensor, Parts]:
        if not adversarial:  # zero, but reaching every parameter: each turn takes a step
            still = [0 * p.sum() for p in self.discriminator.parameters()]
            return torch.stack(still).sum(), {}
        with torch.no_grad():
            output, _, _ = self.first_stage(images, generator)
        real = self.discriminator(images).float()
        fake = self.discriminator(output.float()).float()
        share = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return hinge_discriminator(real, fake), {"told_apart": share.item()}
