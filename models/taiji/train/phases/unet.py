"""The U-Net of Taiji-SD with the Sandwich encoder and the fusion beside it, ImageCLIP frozen."""

import os
import shutil
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from transformers import ChineseCLIPModel, PreTrainedTokenizerFast

from taiji import presets
from taiji.autoencoder.kl import encode_images
from taiji.data.corpus import load, sampler
from taiji.diffusion.losses import denoising_loss, diffusion_target
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.conditioner import TextConditioner
from taiji.text.tokenizer import tokens
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.config import CorpusPhaseConfig

Parts = dict[str, float]


class Config(CorpusPhaseConfig):
    phase: Literal["unet"] = "unet"
    min_snr_gamma: float | None = 5.0
    high_noise_share: float = Field(0.0, ge=0, lt=1)


class UNetObjective(nn.Module):
    """Denoising loss of the U-Net with Sandwich and fusion trained beside it, ImageCLIP frozen.

    Condition dropout for guidance: both encoders absent in `drop_both` of the rows, one absent in
    `drop_one` each.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: TextConditioner,
        scheduler: DDIMScheduler,
        time_ids: Tensor,
        *,
        gamma: float | None = 5.0,
        drop_both: float = 0.1,
        drop_one: float = 0.05,
        high_noise_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.time_ids: Tensor
        self.alphas_cumprod: Tensor
        self.unet = unet
        self.text = text
        self.text.image_clip.requires_grad_(False)
        self.scheduler = scheduler
        self.register_buffer("time_ids", time_ids, persistent=False)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)
        self.gamma, self.drop_both, self.drop_one = gamma, drop_both, drop_one
        self.high_noise_share = high_noise_share

    def forward(
        self,
        latents: Tensor,
        clip_ids: Tensor,
        clip_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """latents (B, C, H, W) scaled; ids and masks (B, S1), (B, S2) -> loss, parts"""
        count = len(latents)
        u = torch.rand(count, generator=generator).to(latents.device)
        keep_clip = u >= self.drop_both + self.drop_one
        keep_sandwich = (u >= self.drop_both) & (u <= 1 - self.drop_one)
        context, pooled = self.text(clip_ids, clip_mask, ids, mask, keep_clip, keep_sandwich)
        timestep = self.draw_timesteps(count, generator).to(latents.device)
        eps = torch.randn(latents.shape, generator=generator).to(latents.device)
        x_t, target = diffusion_target(self.scheduler, latents, eps, timestep)
        condition = {"text_embeds": pooled, "time_ids": self.time_ids.expand(count, -1)}
        prediction = self.unet(x_t, timestep, context, added_cond_kwargs=condition).sample
        kind = self.scheduler.config.prediction_type
        loss = denoising_loss(
            prediction, target, self.alphas_cumprod[timestep], gamma=self.gamma, kind=kind
        )
        mse = (prediction.detach().float() - target).square().mean().item()
        return loss, {"mse": mse}

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64, one per equal slice of the schedule so that a batch's loss varies less.

        A share `high_noise_share` is spread over the noisiest two fifths alone. The slices are
        shuffled: a batch's rows are in the order of their kinds.
        """
        high = round(count * self.high_noise_share)
        slices = torch.cat([torch.arange(n) / n for n in (count - high, high) if n])
        widths = torch.cat([torch.full((n,), 1 / n) for n in (count - high, high) if n])
        u = slices + widths * torch.rand(count, generator=generator)
        u[count - high :] = 0.6 + 0.4 * u[count - high :]
        u = u[torch.randperm(count, generator=generator)]
        return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = load(config.data)
    log(f"{config.phase}: {len(corpus.rows)} emoji images, {len(corpus.scenes)} scenes")
    vae = AutoencoderKL.from_pretrained(config.model / "vae").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model / "tokenizer")
    clip = ChineseCLIPModel.from_pretrained(config.model / "image_clip").eval()
    torch.manual_seed(config.loop.seed)
    text_encoder = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.MINI_SANDWICH)
    fusion = TextFusion(**presets.MINI_FUSION)
    model = UNet2DConditionModel(**presets.MINI_UNET)
    scheduler = DDIMScheduler(**presets.MINI_SCHEDULER)
    latents = encode_images(vae, corpus.images)
    pick = sampler(corpus, config.emoji_share)
    size = presets.MINI_IMAGE_SIZE

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        texts = [corpus.caption(i, words) for i in index]
        clip_ids, clip_mask = tokens(tokenizer, texts, presets.MINI_CLIP_TOKENS)
        ids, mask = tokens(tokenizer, texts, presets.MINI_SANDWICH_TOKENS)
        return {
            "latents": latents[index].float(),
            "clip_ids": clip_ids,
            "clip_mask": clip_mask,
            "ids": ids,
            "mask": mask,
        }

    objective = UNetObjective(
        model,
        TextConditioner(clip, text_encoder, fusion),
        scheduler,
        torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32),
        gamma=config.min_snr_gamma,
        high_noise_share=config.high_noise_share,
    )
    metrics = run(objective, draw, config.loop, config.work, log)
    pipe = TaijiStableDiffusionPipeline(
        tokenizer,
        clip,
        text_encoder,
        fusion,
        model,
        vae,
        scheduler,
        default_guidance_scale=presets.MINI_GUIDANCE,
    )
    save_pipeline(pipe, config.model)
    return metrics


def save_pipeline(pipe: TaijiStableDiffusionPipeline, folder: Path) -> None:
    """Components in float16, each written beside and renamed. diffusers loads them as float32;
    transformers would keep float16, so ImageCLIP stays float32 on disk."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    halved = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.fusion)
    for module in halved:
        module.half()
    pipe.save_pretrained(staging)
    for module in halved:
        module.float()
    for item in staging.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    staging.rmdir()
