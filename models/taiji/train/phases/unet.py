"""The U-Net of Taiji-SD, with as much of the text side beside it as `train_text` says.

From new weights all is trained at once. On from trained ones (`start: model`, after phase `text`)
it is the joint phase: the encoder at a tenth of the learning rate, less in its deeper layers.
ImageCLIP is frozen throughout: it is trained by its own objective.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from transformers import ChineseCLIPModel, PreTrainedTokenizerFast

from taiji import presets
from taiji.data.buckets import BucketConfig
from taiji.data.corpus import Corpus, load, sampler
from taiji.diffusion.losses import denoising_loss, diffusion_target
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.captions import CaptionConfig, drop_conditions, only_chinese, prepare
from taiji.text.conditioner import TextConditioner
from taiji.text.fusion import unet_condition
from taiji.text.tokenizer import open_tokenizer, overlong, tokens
from taiji.train.checkpoint import forget_origin
from taiji.train.latents import Latents, corpus_latents
from taiji.train.loop import Batch, Log, LoopConfig, run
from taiji.train.parallel import rank
from taiji.train.phases.config import LatentPhaseConfig

Parts = dict[str, float]
TrainText = Literal["none", "fusion", "all"]


class Config(LatentPhaseConfig):
    """`start`: new weights, or those of the pipeline in the model folder. `encoder_lr_scale` and
    `encoder_layer_decay` are factors on the learning rate of the Sandwich encoder and of each of
    its layers below the last: 0.1 and 0.9 for an encoder that is trained already."""

    phase: Literal["unet"] = "unet"
    min_snr_gamma: float | None = 5.0
    high_noise_share: float = Field(0.0, ge=0, lt=1)
    captions: CaptionConfig = CaptionConfig()
    start: Literal["new", "model"] = "new"
    train_text: TrainText = "all"
    encoder_lr_scale: float = Field(1.0, gt=0, le=1)
    encoder_layer_decay: float = Field(1.0, gt=0, le=1)


class UNetObjective(nn.Module):
    """Denoising loss through the text side and the U-Net; ImageCLIP is frozen.

    `train_unet` and `train_text` say whose weights move. `captions` holds the shares of rows that
    lose an encoder, for guidance.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: TextConditioner,
        scheduler: DDIMScheduler,
        time_ids: Tensor,
        *,
        gamma: float | None = 5.0,
        captions: CaptionConfig | None = None,
        high_noise_share: float = 0.0,
        train_unet: bool = True,
        train_text: TrainText = "all",
        encoder_lr_scale: float = 1.0,
        encoder_layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.time_ids: Tensor
        self.alphas_cumprod: Tensor
        self.unet = unet.requires_grad_(train_unet)
        self.text = text
        self.text.image_clip.requires_grad_(False)
        used = text.fusion.config["encoders"] != "image_clip"
        self.text.text_encoder.requires_grad_(train_text == "all" and used)
        self.text.fusion.requires_grad_(train_text != "none")
        self.scheduler = scheduler
        self.register_buffer("time_ids", time_ids, persistent=False)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)
        self.gamma, self.captions = gamma, captions or CaptionConfig()
        self.high_noise_share = high_noise_share
        self.encoder_lr_scale, self.encoder_layer_decay = encoder_lr_scale, encoder_layer_decay

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by their factor on the learning rate: the encoder's deeper layers
        hold what carries over from its own training, and move least."""
        groups: dict[float, list[nn.Parameter]] = {}
        encoder = self.text.text_encoder
        depth = {
            id(p): encoder.config["layers"] - encoder.layer_of(name)
            for name, p in encoder.named_parameters()
        }
        for p in self.parameters():
            if p.requires_grad:
                below = depth.get(id(p))
                scale = 1.0
                if below is not None:
                    scale = self.encoder_lr_scale * self.encoder_layer_decay**below
                groups.setdefault(scale, []).append(p)
        return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]

    def forward(
        self,
        latents: Tensor,
        clip_ids: Tensor,
        clip_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """latents (B, C, H, W) scaled; ids and masks (B, S1), (B, S2) -> loss, parts

        `time_ids` (B, 6): size, crop and target of images that were not all cut alike.
        """
        count = len(latents)
        keep = drop_conditions(count, self.captions, generator)
        keep_clip, keep_sandwich = (k.to(latents.device) for k in keep)
        context, pooled = self.text(clip_ids, clip_mask, ids, mask, keep_clip, keep_sandwich)
        timestep = self.draw_timesteps(count, generator).to(latents.device)
        eps = torch.randn(latents.shape, generator=generator).to(latents.device)
        x_t, target = diffusion_target(self.scheduler, latents, eps, timestep)
        size = self.time_ids.expand(count, -1) if time_ids is None else time_ids
        condition = unet_condition(self.unet.config, pooled, size)
        prediction = self.unet(x_t, timestep, context, **condition).sample
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


def caption_draw(
    corpus: Corpus,
    latents: Latents,
    tokenizer: PreTrainedTokenizerFast,
    fusion: TextFusion,
    emoji_share: float,
    captions: CaptionConfig,
    log: Log,
) -> Callable[[np.random.Generator, int], Batch]:
    """Draws of latents (N, C, H, W) with a caption each, and where images were cut how; logs how
    many captions are too long."""
    pick = sampler(corpus, emoji_share)
    s1, s2 = fusion.config.clip_tokens, fusion.config.sandwich_tokens
    probe, words = np.random.default_rng(0).integers(0, len(corpus), 512), Random(0)
    texts = [prepare(corpus.caption(i, words), words, captions) for i in probe]
    log(
        f"of {len(texts)} captions {overlong(tokenizer, texts, s1)} are cut at the {s1} tokens of "
        f"ImageCLIP, {overlong(tokenizer, texts, s2)} at the {s2} of Sandwich"
    )

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        texts = [prepare(corpus.caption(i, words), words, captions) for i in index]
        clip_ids, clip_mask = tokens(tokenizer, texts, s1)
        ids, mask = tokens(tokenizer, texts, s2)
        batch = {
            "latents": latents[index].float(),
            "clip_ids": clip_ids,
            "clip_mask": clip_mask,
            "ids": ids,
            "mask": mask,
        }
        time_ids = corpus.time_ids(index)
        return batch if time_ids is None else {**batch, "time_ids": torch.from_numpy(time_ids)}

    return draw


def open_corpus(config: LatentPhaseConfig, floor: float, log: Log) -> Corpus:
    corpus, skipped = only_chinese(load(config.data, config.work, log), floor)
    log(str(corpus))
    log(f"{skipped} images left out: their captions are not Chinese")
    return corpus


def checkpoint_activations(pipe: TaijiStableDiffusionPipeline, loop: LoopConfig) -> LoopConfig:
    """Turned on here where the recipe asks for it: the loop would leave out a U-Net that is frozen,
    through which the text side's gradient passes, and ask the fusion, which has nothing to save."""
    if loop.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.text_encoder.enable_gradient_checkpointing()
    return loop.model_copy(update={"gradient_checkpointing": False})


def size_condition(size: int) -> Tensor:
    """time_ids (1, 6) of a square image that was not cut."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)


def new_pipeline(config: Config) -> TaijiStableDiffusionPipeline:
    """New U-Net, encoder and fusion beside the trained components of the model folder."""
    vae = AutoencoderKL.from_pretrained(config.model / "vae").eval()
    tokenizer = open_tokenizer(config.model / "tokenizer")
    clip = ChineseCLIPModel.from_pretrained(config.model / "image_clip").eval()
    torch.manual_seed(config.loop.seed)
    return TaijiStableDiffusionPipeline(
        tokenizer,
        clip,
        SandwichTextEncoder(vocab_size=len(tokenizer), **presets.MINI_SANDWICH),
        TextFusion(**presets.MINI_FUSION),
        UNet2DConditionModel(**presets.MINI_UNET),
        vae,
        DDIMScheduler(**presets.MINI_SCHEDULER),
        default_guidance_scale=presets.MINI_GUIDANCE,
    )


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = open_corpus(config, config.captions.min_chinese, log)
    if config.start == "new":
        pipe = new_pipeline(config)
    else:
        pipe = TaijiStableDiffusionPipeline.from_pretrained(config.model)
    objective = make_objective(
        pipe,
        config,
        train_text=config.train_text,
        encoder_lr_scale=config.encoder_lr_scale,
        encoder_layer_decay=config.encoder_layer_decay,
    )
    metrics = run_on_captions(objective, pipe, corpus, config, log)
    save_pipeline(pipe, config.model)
    return metrics


def make_objective(
    pipe: TaijiStableDiffusionPipeline, config: Any, **trained: Any
) -> UNetObjective:
    """The pipeline's parts by a recipe of this phase or of `text`; `trained`: which of them."""
    return UNetObjective(
        pipe.unet,
        TextConditioner(pipe.image_clip, pipe.text_encoder, pipe.fusion),
        pipe.scheduler,
        size_condition(config.data.size),
        gamma=config.min_snr_gamma,
        captions=config.captions,
        high_noise_share=config.high_noise_share,
        **trained,
    )


def run_on_captions(
    objective: UNetObjective,
    pipe: TaijiStableDiffusionPipeline,
    corpus: Corpus,
    config: Any,
    log: Log,
) -> dict[str, float]:
    """The loop over the corpus's latents and captions, drawn as the recipe says."""
    if config.data.buckets:
        check_buckets(config.data.buckets, pipe.vae)
    latents = corpus_latents(config.latents, config.work / "latents", pipe.vae, corpus, log)
    draw = caption_draw(
        corpus, latents, pipe.tokenizer, pipe.fusion, config.emoji_share, config.captions, log
    )
    loop = checkpoint_activations(pipe, config.loop)
    return run(objective, draw, loop, config.work, log, corpus.source)


def check_buckets(buckets: BucketConfig, vae: AutoencoderKL) -> None:
    """Raises ValueError where the first stage would cut a bucket again."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    odd = [f"{h}x{w}" for h, w in buckets.chosen() if h % factor or w % factor]
    if odd:
        raise ValueError(
            f"buckets {', '.join(odd)} are no multiples of {factor}, by which the first stage "
            "divides: set buckets.base and buckets.step to such"
        )


def save_pipeline(pipe: TaijiStableDiffusionPipeline, folder: Path) -> None:
    """Components in float16, each written beside and renamed, by the first process only. diffusers
    loads them as float32; transformers would keep float16, so ImageCLIP stays float32 on disk."""
    if rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    halved = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.fusion)
    for module in halved:
        module.half()
    pipe.save_pretrained(staging)
    forget_origin(staging)
    for module in halved:
        module.float()
    for item in staging.iterdir():
        target = folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    staging.rmdir()
