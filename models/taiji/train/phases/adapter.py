"""Adapters of Taiji-SD on the world of characters: an image as tokens, decoupled, or a LoRA.

The base learns to draw characters by their captions and is frozen. An image adapter then learns to
take who from an image and what it does from the text, on pairs of one pack; it is judged on
characters that neither base nor adapter has seen. A LoRA learns one such character from three
images under a rare word.

B batch, C latent channels, h w latent grid, L tokens of an image and Df their width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taiji.adapters.decoupled import (
    adapter_parameters,
    attach,
    image_condition,
    new_ip_adapter,
    save_ip_adapter,
    set_scale,
)
from taiji.adapters.image_tokens import Drops, Features, ImageTokens, image_features, image_prompt
from taiji.adapters.lora import trained_share
from taiji.autoencoder.kl import to_tensor
from taiji.data import characters
from taiji.data.characters import POSES, Character
from taiji.data.shapes import Pixels
from taiji.diffusion.losses import denoising_loss, diffusion_target
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text.fusion import unet_condition
from taiji.train.checkpoint import save_component
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.character_base import (
    FROZEN,
    CharacterPhaseConfig,
    Draw,
    Packs,
    caption_tokens,
    captions,
    draw_images,
    make_packs,
    open_base,
    parts,
    score,
)
from taiji.train.phases.dreambooth import DreamBoothConfig, train_lora
from taiji.train.phases.unet import UNetObjective, size_condition

Parts = dict[str, float]


class ImageConfig(BaseModel):
    """An image adapter: `features` of the image become `tokens` tokens, by a resampler of `width`,
    `depth` and `heads`, or by one projection. The decoupled kind is of four tokens of the pooled
    features. A share `full_captions` of its captions says who is shown; behind the others only the
    image does. It is judged at each of `scales`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(16, gt=0)
    features: Features = "patches"
    width: int = Field(192, gt=0)
    depth: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    drops: Drops = Drops()
    full_captions: float = Field(0.1, ge=0, le=1)
    scales: tuple[float, ...] = Field((0.0, 0.25, 0.5, 1.0), min_length=1)


class Config(CharacterPhaseConfig):
    """`image` is of the kinds "image_tokens" and "decoupled", `dreambooth` of "lora"."""

    phase: Literal["adapter"] = "adapter"
    kind: Literal["image_tokens", "decoupled", "lora"]
    image: ImageConfig = ImageConfig()
    dreambooth: DreamBoothConfig = DreamBoothConfig()


class ImageObjective(UNetObjective):
    """Denoising loss of a frozen U-Net that sees an image: by `projector`, else by the IP-Adapter
    that is in it."""

    def __init__(
        self,
        pipe: TaijiStableDiffusionPipeline,
        size: int,
        drops: Drops,
        projector: ImageTokens | None,
    ) -> None:
        super().__init__(*parts(pipe), size_condition(size), **FROZEN)
        self.projector, self.drops = projector, drops
        if projector is None:
            for parameter in adapter_parameters(self.unet):
                parameter.requires_grad_(True)

    def forward(  # type: ignore[override]  # an image more than a U-Net without adapter
        self,
        latents: Tensor,
        features: Tensor,
        clip_ids: Tensor,
        clip_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """latents (B, C, h, w) scaled; features (B, L, Df) or (B, Df); ids and masks (B, S)"""
        count = len(latents)
        keep_image, keep_text = (k.to(latents.device) for k in self.drops.draw(count, generator))
        context, pooled = self.text(clip_ids, clip_mask, ids, mask, keep_text, keep_text)
        timestep = self.draw_timesteps(count, generator).to(latents.device)
        eps = torch.randn(latents.shape, generator=generator).to(latents.device)
        x_t, target = diffusion_target(self.scheduler, latents, eps, timestep)
        condition = unet_condition(self.unet.config, pooled, self.time_ids.expand(count, -1))
        with self.image(features, keep_image):
            prediction = self.unet(x_t, timestep, context, **condition).sample
        loss = denoising_loss(
            prediction, target, self.alphas_cumprod[timestep], gamma=self.gamma,
            kind=self.scheduler.config.prediction_type,
        )  # fmt: skip
        return loss, {}

    def image(self, features: Tensor, keep: Tensor) -> AbstractContextManager[None]:
        if self.projector is None:
            return image_condition(self.unet, features * keep[:, None])
        return image_prompt(self.unet, self.projector(features), keep=keep)


def train(config: Config, log: Log) -> dict[str, float]:
    pipe, metrics = open_base(config, log)
    seen, unseen = characters.split(config.characters.heldout, config.characters.seed)
    packs = make_packs(seen, config.characters, pipe)
    if config.kind == "lora":
        return metrics | train_lora(config, config.dreambooth, pipe, packs, unseen, log)
    return metrics | train_image(config, pipe, packs, unseen, log)


def train_image(
    config: Config,
    pipe: TaijiStableDiffusionPipeline,
    packs: Packs,
    unseen: Sequence[Character],
    log: Log,
) -> dict[str, float]:
    torch.manual_seed(config.loop.seed)
    projector, kind = None, config.image.features
    if config.kind == "image_tokens":
        projector = new_projector(config.image, pipe)
    else:
        kind = "pooled"
        attach(pipe.unet, new_ip_adapter(pipe.unet, pipe.image_clip.config.projection_dim))
    objective = ImageObjective(pipe, config.characters.size, config.image.drops, projector)
    number, share = trained_share(objective, [p for p in objective.parameters() if p.requires_grad])
    log(f"{config.kind}: {number:,} parameters are trained")
    features = features_of(pipe, packs.images, kind)
    draw = pair_draw(packs, features, pipe, config.image.full_captions)
    metrics = run(objective, draw, config.loop, config.work, log)
    if projector is None:
        save_ip_adapter(pipe.unet, config.model / "ip_adapter")
    else:
        save_component(projector, config.model / "image_tokens")
    metrics |= {"trained_parameters": float(number), "trained_share": share}
    who = unseen[: config.judged]
    return metrics | sweep(config, pipe, make_packs(who, config.characters, pipe), projector)


def new_projector(config: ImageConfig, pipe: TaijiStableDiffusionPipeline) -> ImageTokens:
    clip = pipe.image_clip.config
    patches = config.features == "patches"
    return ImageTokens(
        clip.vision_config.hidden_size if patches else clip.projection_dim,
        pipe.unet.config.cross_attention_dim,
        config.tokens,
        config.features,
        config.width,
        config.depth,
        config.heads,
    )


def features_of(pipe: TaijiStableDiffusionPipeline, images: Pixels, kind: Features) -> Tensor:
    """images (N, H, W, 3) uint8 -> (N, L, Df) or (N, Df)"""
    clip = pipe.image_clip
    pieces = to_tensor(images).to(clip.device).split(64)
    return torch.cat([image_features(clip, piece, kind) for piece in pieces])


def pair_draw(
    packs: Packs, features: Tensor, pipe: TaijiStableDiffusionPipeline, share: float
) -> Draw:
    """Draws of an image with its caption and the features of another one of its pack."""

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = rng.integers(0, len(packs.latents), count)
        other = (index + rng.integers(1, packs.per_pack, count)) % packs.per_pack
        reference = index - index % packs.per_pack + other
        texts = captions(packs, index.tolist(), share, rng)
        return {
            "latents": packs.latents[index],
            "features": features[reference],
            **caption_tokens(pipe, texts),
        }

    return draw


def sweep(
    config: Config,
    pipe: TaijiStableDiffusionPipeline,
    packs: Packs,
    projector: ImageTokens | None,
) -> dict[str, float]:
    """Each character in every pose, by an image of it and the action word: what is read right, and
    the cosine of ImageCLIP to the image, at each scale; at the last one without a suffix too."""
    pipe.to(pipe.unet.device)
    first = np.arange(len(packs.who)) * packs.per_pack
    shown = first + np.arange(len(packs.who)) % packs.per_pack  # not all in one pose
    wanted = [(who, pose) for who in packs.who for pose in POSES]
    texts = [characters.caption(None, pose) for _, pose in wanted]
    pooled = features_of(pipe, packs.images[shown], "pooled").repeat_interleave(len(POSES), 0)
    found: dict[str, float] = {}
    for scale in config.image.scales:
        if projector is None:
            set_scale(pipe.unet, scale)
            image: AbstractContextManager[None] = image_condition(pipe.unet, pooled)
        elif scale:
            shown_features = features_of(pipe, packs.images[shown], projector.config["features"])
            with torch.no_grad():
                tokens = projector.eval()(shown_features).repeat_interleave(len(POSES), 0)
            image = image_prompt(pipe.unet, tokens, scale)
        else:
            image = nullcontext()
        with image:
            images = draw_images(pipe, texts, config)
        read = score(images, wanted)
        read["clip_i"] = float((features_of(pipe, images, "pooled") * pooled).sum(1).mean())
        found |= {f"{name}_at_{scale}": value for name, value in read.items()}
    return found | read
