"""Super-resolution, in the latents of a first stage or in pixels."""

from pathlib import Path
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
from taiji.diffusion.guidance import Space
from taiji.diffusion.sampling import Sampling
from taiji.diffusion.schedules import Prediction, Schedule, make_scheduler
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

TILED = 3  # images along a side of the picture that tiling is measured on
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
    the low-resolution image is the most the model is told of. After training, `measured` images
    are enlarged at each of `levels`, and at level 0 in each of `compared_steps`: few steps give the
    mean of what fits, many give one of them."""

    phase: Literal["super_resolution"] = "super_resolution"
    architecture: Model = "tiny"
    first_stage: Path | None = None
    crop: int = Field(64, gt=0)
    max_noise_level: float = Field(0.35, ge=0, le=1)
    degradation: DegradationConfig = DegradationConfig()
    schedule: Schedule | Literal["edm"] = "linear"
    prediction_type: Prediction = "v_prediction"
    sampling: Sampling = Sampling(steps=20, noise_level=0.02)
    measured: int = Field(32, ge=0)
    levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.35)
    compared_steps: tuple[int, ...] = (1, 4, 20)


def train(config: Config, log: Log) -> dict[str, float]:
    kind, preset, scale, space = MODELS[config.architecture]
    vae = load_first_stage(config.first_stage, space)
    corpus = load(config.data)
    log(f"{config.phase}: {len(corpus.images)} images of {config.data.size} pixels")
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
    )
    metrics = run(
        objective, make_draw(corpus, config, scale, tokenizer), config.loop, config.work, log
    )
    pipe = TaijiSuperResolutionPipeline(
        unet.eval(),
        scheduler,
        vae,
        tokenizer,
        text_encoder.eval(),
        scale=scale,
        settings=config.sampling.model_dump(),
    )
    save_pipeline(pipe, config.model)
    if vae is not None:
        metrics["scaling_factor"] = vae.config.scaling_factor
    chosen = corpus.images[: config.measured]
    for level in config.levels:
        db = fidelity(pipe, chosen, level, config.sampling.steps, config.loop.seed)
        metrics |= {f"{name}_{level:g}": value for name, value in db.items()}
    for steps in config.compared_steps:
        db = fidelity(pipe, chosen, 0.0, steps, config.loop.seed)
        metrics |= {f"{name}_steps_{steps}": value for name, value in db.items()}
    return metrics | tiling(pipe, corpus.images[: TILED**2], config.loop.seed)


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
    """Batches of crops, their low-resolution images and captions."""
    pick, captions = sampler(corpus, config.emoji_share), caption_tokens(tokenizer, corpus)
    slack = config.data.size - config.crop + 1

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
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
    pipe: TaijiSuperResolutionPipeline, images: np.ndarray, level: float, steps: int, seed: int
) -> dict[str, float]:
    """How the pipeline enlarges averaged `images` (N, H, W, 3), in dB over the images' mean.

    `low_psnr` is of the output, averaged down again, against what it was made from; `high_psnr`
    against the originals.
    """
    if not len(images):
        return {}
    scale = pipe.config.scale
    low = to_tensor(np.stack([reduce(image, scale, Kernel.BOX) for image in images]))
    out = pipe(
        (low + 1) / 2,
        num_inference_steps=steps,
        noise_level=level,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        return_dict=False,
    )[0].cpu()
    return {
        "low_psnr": float(psnr(averaged(out * 2 - 1, scale), low).mean()),
        "high_psnr": float(psnr(out * 2 - 1, to_tensor(images)).mean()),
    }


def tiling(pipe: TaijiSuperResolutionPipeline, images: np.ndarray, seed: int) -> dict[str, float]:
    """One large picture of nine enlarged in tiles against enlarged at once.

    Tiles are two thirds of it and overlap by a quarter. `seam_ratio` is the mean step between
    pixels at the tiles' borders, over the same places of the untiled picture.
    """
    if len(images) < TILED**2:
        return {}
    scale, factor = pipe.config.scale, 1 if pipe.vae is None else first_stage_factor(pipe.vae)
    rows = [np.concatenate(images[i : i + TILED], axis=1) for i in range(0, TILED**2, TILED)]
    # rolled, so that tiles do not end where the nine do
    picture = np.roll(np.concatenate(rows, axis=0), 20, axis=(0, 1))
    low = to_tensor(reduce(picture, scale, Kernel.BOX)[None])
    grid = len(picture) // factor
    tile = 2 * grid // TILED
    whole, parts = (
        pipe(
            (low + 1) / 2,
            noise_level=0.0,
            tile=cells,
            overlap=tile // 4,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            return_dict=False,
        )[0].cpu()
        for cells in (None, tile)
    )
    borders = torch.tensor([grid - tile, tile]) * factor
    steps = [
        (x[..., borders, :] - x[..., borders - 1, :]).abs().mean()
        + (x[..., borders] - x[..., borders - 1]).abs().mean()
        for x in (parts, whole)
    ]
    db = psnr(parts * 2 - 1, whole * 2 - 1).mean()
    return {"tiled_psnr": float(db), "seam_ratio": float(steps[0] / steps[1])}


def averaged(images: Tensor, scale: int) -> Tensor:
    """images (B, C, H, W) -> (B, C, H/s, W/s)"""
    return torch.nn.functional.avg_pool2d(images, scale)
