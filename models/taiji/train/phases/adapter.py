"""Adapters of Taiji-SD on the world of characters: an image as tokens, decoupled, or a LoRA.

The base learns to draw characters by their captions and is frozen. An image adapter then learns to
take who from an image and what it does from the text, on pairs of one pack; it is judged on
characters that neither base nor adapter has seen. A LoRA learns one such character from three
images under a rare word.

Before it meets the U-Net the image's projection may be aligned with the text: its tokens regress on
the states that the text side has for words saying the same, as AlignerNet's do (Kosmos-G: Pan et
al., arXiv 2310.02992, section 2.2). The denoising loss then starts from an image that reads like
words, and needs no U-Net to find out what tells characters apart.

B batch, C latent channels, h w latent grid, L tokens of the image tower and Df their width, T image
tokens, D context width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from taiji.adapters.decoupled import (
    adapter_parameters,
    attach,
    image_condition,
    image_projection,
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
from taiji.train.loop import Batch, Log, LoopConfig, run
from taiji.train.phases.character_base import (
    FROZEN,
    CharacterPhaseConfig,
    Draw,
    Names,
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
    `depth` and `heads`, or by one projection. For the decoupled kind diffusers fixes the number of
    pooled tokens, and depth and heads. `align` trains the projection on the text's states first. A
    share `full_captions` of its captions says who is shown; behind the others only the image does.
    It is judged at each of `scales`, `draws` times a character and action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(16, gt=0)
    features: Features = "patches"
    width: int = Field(192, gt=0)
    depth: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    drops: Drops = Drops()
    full_captions: float = Field(0.1, ge=0, le=1)
    align: LoopConfig | None = None
    scales: tuple[float, ...] = Field((0.0, 0.25, 0.5, 1.0), min_length=1)
    draws: int = Field(1, gt=0)


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
            rows = keep.view(-1, *[1] * (features.ndim - 1))
            return image_condition(self.unet, features * rows)
        return image_prompt(self.unet, self.projector(features), keep=keep)


class AlignObjective(nn.Module):
    """Squared error of an image's tokens to the text's states for who it shows."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(
        self, features: Tensor, words: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Parts]:
        """features (B, L, Df) or (B, Df), words (B, T, D)"""
        return mse_loss(self.projection(features).float(), words), {}


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
    said, kind = config.image, config.image.features
    shown = make_packs(unseen[: config.judged], config.characters, pipe)
    plain = draw_images(pipe, asked(shown, config)[1], config)
    projector: ImageTokens | None = None
    if config.kind == "image_tokens":
        projector = new_projector(said, pipe)
        projection: nn.Module = projector
    else:
        sizes = (pipe.image_clip.config.projection_dim, 0, 0)
        if kind == "patches":
            sizes = (pipe.image_clip.config.vision_config.hidden_size, said.tokens, said.width)
        attach(pipe.unet, new_ip_adapter(pipe.unet, *sizes))
        projection = image_projection(pipe.unet)
    features = features_of(pipe, packs.images, kind)
    metrics: dict[str, float] = {}
    if said.align is not None:
        words = words_of(pipe, packs.who, len(projection(features[:1])[0]))
        draw = align_draw(packs, features, words)
        aligned = run(AlignObjective(projection), draw, said.align, config.work / "align", log)
        metrics = {"align_loss": aligned["loss"], "align_seconds": aligned["seconds"]}
    objective = ImageObjective(pipe, config.characters.size, said.drops, projector)
    number, share = trained_share(objective, [p for p in objective.parameters() if p.requires_grad])
    log(f"{config.kind}: {number:,} parameters are trained")
    draw = pair_draw(packs, features, pipe, said.full_captions)
    metrics |= run(objective, draw, config.loop, config.work, log)
    if projector is None:
        save_ip_adapter(pipe.unet, config.model / "ip_adapter")
    else:
        save_component(projector, config.model / "image_tokens")
    metrics |= {"trained_parameters": float(number), "trained_share": share}
    return metrics | sweep(config, pipe, shown, projector, plain)


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


@torch.no_grad()
def words_of(pipe: TaijiStableDiffusionPipeline, who: Sequence[Character], count: int) -> Tensor:
    """Characters -> (N, T, D): the first T = `count` states of the context of a character's
    caption, the mean over its actions. Raises ValueError when the context is shorter."""
    texts = [characters.caption(one, pose) for one in who for pose in POSES]
    pieces = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    context = torch.cat([pipe.encode_prompt(piece)[0] for piece in pieces])
    if count > context.shape[1]:
        raise ValueError(f"{count} image tokens, {context.shape[1]} of the text to align them with")
    return context[:, :count].unflatten(0, (len(who), len(POSES))).mean(1).float()


def align_draw(packs: Packs, features: Tensor, words: Tensor) -> Draw:
    """Draws of an image's features with the words for who it shows."""

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = rng.integers(0, len(features), count)
        return {"features": features[index], "words": words[index // packs.per_pack]}

    return draw


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


def asked(packs: Packs, config: Config) -> tuple[Names, list[str]]:
    """Every character in every pose, `draws` times: who and what, and the text of the action."""
    wanted = [(who, pose) for who in packs.who for pose in POSES for _ in range(config.image.draws)]
    return wanted, [characters.caption(None, pose) for _, pose in wanted]


def sweep(
    config: Config,
    pipe: TaijiStableDiffusionPipeline,
    packs: Packs,
    projector: ImageTokens | None,
    plain: Pixels,
) -> dict[str, float]:
    """Each character in every pose, by an image of it and the action word: what is read right, and
    the cosine of ImageCLIP to the image, at each scale; at the last one without a suffix too.

    `identity_error` is half of the 95 % interval of `identity`, over characters. `as_base` says
    whether scale 0 draws `plain`, the base's images, bit for bit.
    """
    pipe.to(pipe.unet.device)
    first = np.arange(len(packs.who)) * packs.per_pack
    shown = packs.images[first + np.arange(len(packs.who)) % packs.per_pack]  # not all in one pose
    wanted, texts = asked(packs, config)
    each = len(wanted) // len(packs.who)
    pooled = features_of(pipe, shown, "pooled").repeat_interleave(each, 0)
    features = features_of(pipe, shown, config.image.features).repeat_interleave(each, 0)
    found: dict[str, float] = {}
    for scale in config.image.scales:
        if projector is None:
            set_scale(pipe.unet, scale)
            image = image_condition(pipe.unet, features)
        else:
            with torch.no_grad():
                image = image_prompt(pipe.unet, projector.eval()(features), scale)
        with image:
            images = draw_images(pipe, texts, config)
        read = score(images, wanted)
        rows = [score(images[i : i + each], wanted[i : i + each])["identity"]
                for i in range(0, len(wanted), each)]  # fmt: skip
        read["identity_error"] = 1.96 * float(np.std(rows) / max(len(rows) - 1, 1) ** 0.5)
        read["clip_i"] = float((features_of(pipe, images, "pooled") * pooled).sum(1).mean())
        if scale == 0:
            read["as_base"] = float(np.array_equal(images, plain))
        found |= {f"{name}_at_{scale}": value for name, value in read.items()}
    return found | read
