"""What the phases of a cascade share: a U-Net trained on text, and on a smaller image if there is
one, with the text encoder frozen or trained beside it.

B batch, C channels, H W pixels of the target, h w of the low-resolution image, S text tokens.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from taiji.autoencoder.kl import latents
from taiji.data.corpus import Corpus
from taiji.diffusion.augmentation import draw_levels, noise_augment
from taiji.diffusion.condition import Text, encode, text_arguments
from taiji.diffusion.losses import process_loss
from taiji.diffusion.schedules import Prediction, Schedule
from taiji.pipelines.super_resolution import Upscaler, condition_image
from taiji.text import SandwichTextEncoder
from taiji.text.tokenizer import build_tokenizer, tokens
from taiji.train.checkpoint import save_component, write_text
from taiji.train.phases.config import CorpusPhaseConfig

Parts = dict[str, float]


class DenoiserConfig(CorpusPhaseConfig):
    """`text` is a folder with tokenizer/ and text_encoder/ to start from, else both are new.
    `drop_text` of the captions are empty, for guidance. An encoder that is not frozen learns at
    `encoder_lr_scale` of the rate, and each layer below the top at `layer_decay` of the one above.
    """

    text: Path | None = None
    text_length: int = Field(24, gt=1)
    freeze_encoder: bool = True
    encoder_lr_scale: float = Field(0.1, gt=0)
    layer_decay: float = Field(0.9, gt=0, le=1)
    drop_text: float = Field(0.1, ge=0, le=1)
    schedule: Schedule | Literal["edm"] = "cosine"
    prediction_type: Prediction = "epsilon"
    min_snr_gamma: float | None = 5.0


class DenoiserObjective(nn.Module):
    """Loss of a U-Net that draws images, or enlarges them when there is an `upscaler`."""

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: SandwichTextEncoder,
        scheduler: Any,
        null: tuple[Tensor, Tensor],
        config: DenoiserConfig,
        *,
        upscaler: Upscaler | None = None,
        max_noise_level: float = 1.0,
        clean_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.null_ids: Tensor
        self.null_mask: Tensor
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(not config.freeze_encoder)
        self.vae = upscaler.vae if upscaler else None
        if self.vae is not None:
            self.vae.requires_grad_(False)
        self.scheduler, self.config = scheduler, config
        self.upscaler, self.max_noise_level = upscaler, max_noise_level
        self.clean_share = clean_share
        self.register_buffer("null_ids", null[0], persistent=False)
        self.register_buffer("null_mask", null[1], persistent=False)

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W) in [-1, 1], ids and mask (B, S), low (B, 3, h, w) -> loss, parts"""
        text = self.text(ids, mask, generator)
        image, labels = self.low_resolution(low, generator)

        def denoise(x: Tensor, timestep: Tensor) -> Tensor:
            x = x if image is None else torch.cat([x, image], dim=1)
            arguments = text_arguments(self.unet, [text])
            return self.unet(x, timestep, class_labels=labels, **arguments).sample

        loss, mse = process_loss(
            denoise,
            self.scheduler,
            self.target(images),
            generator,
            gamma=self.config.min_snr_gamma,
        )
        return loss, {"mse": mse}

    def text(self, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Text:
        """ids, mask (B, S) -> Text, a share `drop_text` of the rows empty"""
        dropped = torch.rand(len(ids), 1, generator=generator) < self.config.drop_text
        dropped = dropped.to(ids.device)
        ids = torch.where(dropped, self.null_ids, ids)
        return encode(self.text_encoder, ids, torch.where(dropped, self.null_mask, mask))

    def target(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> what is diffused: themselves, or scaled latents (B, C, gh, gw)"""
        if self.vae is None:
            return images
        with torch.no_grad():
            return latents(self.vae, images) * self.vae.config.scaling_factor

    def low_resolution(
        self, low: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """low (B, 3, h, w) -> noised image (B, C, gh, gw), class labels (B,)"""
        if self.upscaler is None or low is None:
            return None, None
        image = condition_image(low, self.upscaler.scale, self.upscaler.factor)
        level = draw_levels(len(low), self.max_noise_level, generator, self.clean_share)
        eps = torch.randn(image.shape, generator=generator).to(image)
        return noise_augment(image, level, eps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.unet.parameters()), "lr_scale": 1.0}]
        if self.config.freeze_encoder:
            return groups
        scale, decay = self.config.encoder_lr_scale, self.config.layer_decay
        return groups + encoder_groups(self.text_encoder, scale, decay)


def encoder_groups(
    encoder: SandwichTextEncoder, scale: float, layer_decay: float
) -> list[dict[str, Any]]:
    """A group a layer: `scale` at the top, `layer_decay` of it one layer below, and so on down to
    the embeddings."""
    layers = encoder.config.layers
    members: dict[int, list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        members.setdefault(encoder.layer_of(name), []).append(parameter)
    return [
        {"params": members[layer], "lr_scale": scale * layer_decay ** (layers - layer)}
        for layer in sorted(members)
    ]


def load_text(
    config: DenoiserConfig, corpus: Corpus, encoder: dict[str, Any]
) -> tuple[PreTrainedTokenizerFast, SandwichTextEncoder]:
    """From `config.text`, or new for the corpus with the preset `encoder`.

    Raises ValueError for a folder without them.
    """
    if config.text is None:
        tokenizer = build_tokenizer(corpus.texts(), max_length=config.text_length)
        vocabulary = {"vocab_size": max(len(tokenizer), encoder.get("vocab_size", 0))}
        return tokenizer, SandwichTextEncoder(**{**encoder, **vocabulary})
    for part in ("tokenizer", "text_encoder"):
        if not (config.text / part).is_dir():
            raise ValueError(
                f"text={config.text} has no {part}/; give a pipeline's folder, such as the one "
                "`hcf train recipes/train/tiny_imagen.yaml` makes, or leave text out"
            )
    return (
        PreTrainedTokenizerFast.from_pretrained(config.text / "tokenizer"),
        SandwichTextEncoder.from_pretrained(config.text / "text_encoder"),
    )


def null_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """ids, mask (1, S) of the empty text"""
    return tokens(tokenizer, [""], tokenizer.model_max_length)


def caption_tokens(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> Callable[[Any, np.random.Generator], dict[str, Tensor]]:
    """index, rng -> "ids" and "mask" (B, S) of a caption each"""

    def draw(index: Any, rng: np.random.Generator) -> dict[str, Tensor]:
        words = Random(int(rng.integers(2**62)))
        texts = [corpus.caption(i, words) for i in index]
        ids, mask = tokens(tokenizer, texts, tokenizer.model_max_length)
        return {"ids": ids, "mask": mask}

    return draw


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Each component written beside and renamed, the index last."""
    for name, component in pipe.components.items():
        if component is not None:
            save_component(component, folder / name)
    write_text(folder / "model_index.json", pipe.to_json_string())
