"""Super-resolution, in the latents of a first stage or in pixels."""

from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ModelMixin, UNet2DConditionModel, VQModel
from pydantic import Field
from torch import Tensor

from taiji import presets
from taiji.autoencoder.kl import measure_scaling_factor, to_tensor
from taiji.autoencoder.losses import psnr
from taiji.data.corpus import Corpus, load, sampler
from taiji.data.degradation import DegradationConfig, Kernel, degrade, reduce
from taiji.diffusion.condition import uses_text
from taiji.diffusion.guidance import Space
from taiji.diffusion.sampling import Sampling
from taiji.diffusion.schedules import Prediction, Schedule, make_scheduler
from taiji.diffusion.tiling import tile_starts
from taiji.pipelines.super_resolution import (
    TaijiSuperResolutionPipeline,
    Upscaler,
    first_stage_factor,
)
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.denoiser import (
    DenoiserConfig,
    DenoiserObjective,
    caption_tokens,
    load_text,
    null_tokens,
    save_pipeline,
)
from taiji.unet import EfficientUNet

Kind = tuple[type[ModelMixin], dict[str, Any], int, Space]
# U-Net class, its preset, scale, space
MODELS: dict[str, Kind] = {
    "tiny": (UNet2DConditionModel, presets.TINY_SR_UNET, 4, "latent"),
    "tiny-x2": (UNet2DConditionModel, presets.TINY_SR_X2_UNET, 2, "latent"),
    "tiny-pixel": (UNet2DConditionModel, presets.TINY_SR_IF_UNET, 4, "pixel"),
    "tiny-efficient": (EfficientUNet, presets.TINY_EFFICIENT_UNET, 4, "pixel"),
    "sr-s": (UNet2DConditionModel, presets.SR_S_UNET, 4, "latent"),
    "sr-s-x2": (UNet2DConditionModel, presets.SR_S_X2_UNET, 2, "latent"),
    "sr-l": (UNet2DConditionModel, presets.SR_L_UNET, 4, "latent"),
    "sr256-if": (UNet2DConditionModel, presets.SR256_IF_UNET, 4, "pixel"),
    "sr256-efficient": (EfficientUNet, presets.SR256_EFFICIENT_UNET, 4, "pixel"),
    "sr1024-efficient": (EfficientUNet, presets.SR1024_EFFICIENT_UNET, 4, "pixel"),
}
Model = Literal[
    "tiny", "tiny-x2", "tiny-pixel", "tiny-efficient", "sr-s", "sr-s-x2", "sr-l",
    "sr256-if", "sr256-efficient", "sr1024-efficient",
]  # fmt: skip


class Config(DenoiserConfig):
    """`first_stage` is a VQModel's folder, for latent models alone; its latent scale is measured
    again on this corpus. `crop` pixels of an image are trained on at a time. `max_noise_level` of
    the low-resolution image is the most the model is told of, and `clean_share` of the images get
    none, level 0. After training the first `measured` images, which are kept out of it, are
    enlarged at each of `levels`, and at level 0 in each of `compared_steps`: few steps give the
    mean of what fits, many give one of them. The effect of their captions is measured at each of
    `text_guidance`, that of tiles on a picture of `tiled_pixels` a side. `back_projection` is the
    pipeline's own."""

    phase: Literal["super_resolution"] = "super_resolution"
    architecture: Model = "tiny"
    first_stage: Path | None = None
    crop: int = Field(64, gt=0)
    max_noise_level: float = Field(0.35, ge=0, le=1)
    clean_share: float = Field(0.0, ge=0, lt=1)
    degradation: DegradationConfig = DegradationConfig()
    schedule: Schedule | Literal["edm"] = "linear"
    prediction_type: Prediction = "v_prediction"
    sampling: Sampling = Sampling(steps=20, noise_level=0.02)
    back_projection: float = Field(0.0, ge=0, le=1)
    measured: int = Field(32, ge=0)
    levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.35)
    compared_steps: tuple[int, ...] = (1, 4, 20)
    text_guidance: tuple[float, ...] = (1.0, 4.0)
    tiled_pixels: int = Field(1024, ge=0)


def train(config: Config, log: Log) -> dict[str, float]:
    kind, preset, scale, space = MODELS[config.architecture]
    vae = load_first_stage(config.first_stage, space)
    corpus = load(config.data, config.work, log)
    log(f"{config.phase}: {len(corpus)} images of {config.data.size} pixels")
    if config.crop > config.data.size:
        raise ValueError(f"crop={config.crop} is larger than the images, data.size is smaller")
    if vae is not None:
        probe = np.random.default_rng(config.loop.seed).permutation(len(corpus.images))[:256]
        factor = measure_scaling_factor(vae, to_tensor(corpus.images[probe]))
        vae.register_to_config(scaling_factor=factor)
    torch.manual_seed(config.loop.seed)
    width = preset.get("encoder_hid_dim", preset["cross_attention_dim"])
    encoder = presets.TINY_SANDWICH if width == 32 else presets.SANDWICH_LARGE
    tokenizer, text_encoder = load_text(config, corpus, encoder)
    unet = kind(**preset)
    scheduler = make_scheduler(config.schedule, config.prediction_type)
    objective = DenoiserObjective(
        unet,
        text_encoder,
        scheduler,
        null_tokens(tokenizer),
        config,
        upscaler=Upscaler(unet, scheduler, vae, scale),
        max_noise_level=config.max_noise_level,
        clean_share=config.clean_share,
    )
    draw = make_draw(corpus, config, scale, tokenizer)
    metrics = run(objective, draw, config.loop, config.work, log, corpus.source)
    pipe = TaijiSuperResolutionPipeline(
        unet.eval(),
        scheduler,
        vae,
        tokenizer,
        text_encoder.eval(),
        scale=scale,
        settings=config.sampling.model_dump(),
        back_projection=config.back_projection,
    )
    save_pipeline(pipe, config.model)
    if vae is not None:
        metrics["scaling_factor"] = vae.config.scaling_factor
    return metrics | evaluate(pipe, corpus, config)


def evaluate(
    pipe: TaijiSuperResolutionPipeline, corpus: Corpus, config: Config
) -> dict[str, float]:
    """The first `measured` images of the corpus, enlarged with their captions; and the tiles."""
    images, seed, steps = corpus.images[: config.measured], config.loop.seed, config.sampling.steps
    metrics: dict[str, float] = {}
    if config.measured:
        words = Random(seed)
        captions = [corpus.caption(i, words) for i in range(len(images))]
        asked = captions if uses_text(pipe.unet) else None
        for level in config.levels:
            db = fidelity(pipe, images, asked, level, steps, seed)
            metrics |= {f"{name}_{level:g}": value for name, value in db.items()}
        for count in config.compared_steps:
            db = fidelity(pipe, images, asked, 0.0, count, seed)
            metrics |= {f"{name}_steps_{count}": value for name, value in db.items()}
        if config.back_projection:
            db = fidelity(pipe, images, asked, 0.0, steps, seed, back_projection=0.0)
            metrics |= {f"{name}_0_uncorrected": value for name, value in db.items()}
        if asked:
            db = fidelity(pipe, images, None, 0.0, steps, seed)
            metrics |= {f"{name}_0_without_text": value for name, value in db.items()}
            for level, scale in product(filter(None, config.levels), config.text_guidance):
                effect = text_effect(pipe, images, captions, level, scale, seed)
                metrics[f"text_effect_{level:g}_guidance_{scale:g}"] = effect
    mosaic = corpus.images[: (config.tiled_pixels // config.data.size) ** 2]
    return metrics | tiling(pipe, mosaic, config.tiled_pixels, seed)


def load_first_stage(folder: Path | None, space: Space) -> VQModel | None:
    """Raises ValueError for a latent model without one, and for a pixel model with one."""
    if space == "pixel":
        if folder is not None:
            raise ValueError("a pixel-space model has no first stage; leave first_stage out")
        return None
    if folder is None or not (folder / "config.json").is_file():
        raise ValueError(
            f"first_stage={folder} is not a VQModel's folder; make one with "
            "`hcf train recipes/train/tiny_vqgan.yaml` and name its vqvae/"
        )
    return VQModel.from_pretrained(folder).eval()


def make_draw(corpus: Corpus, config: Config, scale: int, tokenizer: Any) -> Any:
    """Batches of crops, their low-resolution images and captions, without what is measured.

    Raises ValueError when that leaves fewer images than it takes.
    """
    kept_out = config.measured
    if len(corpus) < 2 * kept_out:
        raise ValueError(
            f"measured={kept_out} images are kept out of training, of only {len(corpus)}: lower it"
        )
    pick, captions = sampler(corpus, config.emoji_share), caption_tokens(tokenizer, corpus)
    slack = config.data.size - config.crop + 1

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        index = np.where(index < kept_out, index + kept_out, index)
        corners = rng.integers(0, slack, (count, 2))
        images = [
            corpus.images[i][y : y + config.crop, x : x + config.crop]
            for i, (y, x) in zip(index, corners, strict=True)
        ]
        low = [degrade(image, scale, rng, config.degradation) for image in images]
        pairs = {"images": to_tensor(np.stack(images)), "low": to_tensor(np.stack(low))}
        return {**pairs, **captions(index, rng)}

    return draw


def fidelity(
    pipe: TaijiSuperResolutionPipeline,
    images: np.ndarray,
    captions: list[str] | None,
    level: float,
    steps: int,
    seed: int,
    **call: Any,
) -> dict[str, float]:
    """How the pipeline enlarges averaged `images` (N, H, W, 3), in dB over the images' mean.

    `low_psnr` is of the output, averaged down again, against what it was made from; `high_psnr`
    against the originals.
    """
    low = reduced(images, pipe.config.scale)
    call |= {"prompt": captions, "num_inference_steps": steps, "noise_level": level}
    out = enlarged(pipe, low, seed, **call)
    return {
        "low_psnr": float(psnr(averaged(out, pipe.config.scale), low).mean()),
        "high_psnr": float(psnr(out, to_tensor(images)).mean()),
    }


def text_effect(
    pipe: TaijiSuperResolutionPipeline,
    images: np.ndarray,
    captions: list[str],
    level: float,
    guidance_scale: float,
    seed: int,
) -> float:
    """How much the captions decide, over how much the seed does, for images (N, H, W, 3).

    Root mean square difference to the output under the next image's caption with the same seed,
    over that to the output under the same caption with another seed, which draws both the noise
    of the low-resolution image and the sampler's anew.
    """
    low = reduced(images, pipe.config.scale)
    common = {"noise_level": level, "guidance_scale": guidance_scale}
    out = enlarged(pipe, low, seed, prompt=captions, **common)
    swapped = enlarged(pipe, low, seed, prompt=captions[1:] + captions[:1], **common)
    again = enlarged(pipe, low, seed + 1, prompt=captions, **common)
    return float(((swapped - out).square().mean() / (again - out).square().mean()).sqrt())


def tiling(
    pipe: TaijiSuperResolutionPipeline, images: np.ndarray, pixels: int, seed: int
) -> dict[str, float]:
    """`images` (N, H, H, 3) side by side, `pixels` a side, enlarged in tiles and at once.

    Tiles are half of it and overlap by a quarter of themselves: 128 and 32 cells at 1024 pixels
    over a first stage of factor 4. `seam_ratio` is the mean step between pixels at the tiles'
    borders, over the same places of the untiled picture. Empty when there are too few images.
    """
    across = pixels // images.shape[1]
    if not across or len(images) < across**2:
        return {}
    scale, factor = pipe.config.scale, 1 if pipe.vae is None else first_stage_factor(pipe.vae)
    rows = [np.concatenate(images[i : i + across], axis=1) for i in range(0, across**2, across)]
    # rolled, so that tiles do not end where the images do
    picture = np.roll(np.concatenate(rows, axis=0), 20, axis=(0, 1))
    low = reduced(picture[None], scale)
    grid = len(picture) // factor
    tile, overlap = grid // 2, grid // 8
    whole, parts = (
        enlarged(pipe, low, seed, noise_level=0.0, tile=cells, overlap=overlap)
        for cells in (None, tile)
    )
    starts = tile_starts(grid, tile, overlap)
    borders = torch.tensor([cell for cell in (*starts, *(s + tile for s in starts))]) * factor
    borders = borders[(borders > 0) & (borders < grid * factor)]
    steps = [
        (x[..., borders, :] - x[..., borders - 1, :]).abs().mean()
        + (x[..., borders] - x[..., borders - 1]).abs().mean()
        for x in (parts, whole)
    ]
    db = psnr(parts, whole).mean()
    return {"tiled_psnr": float(db), "seam_ratio": float(steps[0] / steps[1])}


def enlarged(pipe: TaijiSuperResolutionPipeline, low: Tensor, seed: int, **call: Any) -> Tensor:
    """low (B, 3, h, w) -> (B, 3, H, W), both in [-1, 1]; `call` are arguments of the pipeline"""
    generator = torch.Generator().manual_seed(seed)
    out = pipe((low + 1) / 2, generator=generator, output_type="pt", return_dict=False, **call)
    images: Tensor = out[0].cpu() * 2 - 1
    return images


def reduced(images: np.ndarray, scale: int) -> Tensor:
    """images (N, H, W, 3) uint8 -> (N, 3, H/s, W/s) in [-1, 1], averaged"""
    return to_tensor(np.stack([reduce(image, scale, Kernel.BOX) for image in images]))


def averaged(images: Tensor, scale: int) -> Tensor:
    """images (B, C, H, W) -> (B, C, H/s, W/s)"""
    return torch.nn.functional.avg_pool2d(images, scale)
