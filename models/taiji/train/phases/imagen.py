"""The base of Taiji-Imagen: phase 1 with the text encoder frozen, phase 2 with both trained."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from pydantic import Field, model_validator
from torch import nn
from torch.nn.utils import parameters_to_vector

from taiji import presets
from taiji.autoencoder.kl import to_tensor
from taiji.data import shapes
from taiji.data.corpus import load, sampler
from taiji.data.degradation import Kernel, reduce
from taiji.data.rule_judge import judge
from taiji.diffusion.guidance import ThresholdRule
from taiji.diffusion.sampling import Sampling
from taiji.diffusion.schedules import make_scheduler
from taiji.pipelines.imagen import TaijiImagenPipeline
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.denoiser import (
    DenoiserConfig,
    DenoiserObjective,
    caption_tokens,
    load_text,
    null_tokens,
    save_pipeline,
)
from taiji.unet import ImagenUNet

# U-Net class, its preset, the text encoder's preset
BASES: dict[str, tuple[type[ModelMixin], dict[str, Any], dict[str, Any]]] = {
    "a-tiny": (UNet2DConditionModel, presets.A_TINY_UNET, presets.TINY_SANDWICH),
    "a-300m": (UNet2DConditionModel, presets.A_300M_UNET, presets.SANDWICH_LARGE),
    "a-1.3b": (UNet2DConditionModel, presets.A_1_3B_UNET, presets.SANDWICH_LARGE),
    "b-tiny": (ImagenUNet, presets.TINY_B_UNET, presets.TINY_SANDWICH),
    "b-300m": (ImagenUNet, presets.B_300M_UNET, presets.SANDWICH_LARGE),
    "b-1.3b": (ImagenUNet, presets.B_1_3B_UNET, presets.SANDWICH_LARGE),
}
RULES: tuple[ThresholdRule, ...] = ("none", "static", "dynamic")
JUDGED_SIZE = 64  # the rule judge's own; smaller images are enlarged to it by repeating pixels


class Config(DenoiserConfig):
    """`start` is a folder that this phase made, whose U-Net is trained on. `sampling` becomes the
    pipeline's default; after training `judged` scenes of the corpus are drawn with it, and again
    with guidance at `strong_guidance` to see what thresholding does. Of an encoder that was trained
    `encoder_moved` is the relative change of its weights."""

    phase: Literal["imagen"] = "imagen"
    base: Literal["a-tiny", "a-300m", "a-1.3b", "b-tiny", "b-300m", "b-1.3b"] = "a-tiny"
    start: Path | None = None
    sampling: Sampling = Sampling(steps=30, guidance_scale=7.5, thresholding="dynamic")
    judged: int = Field(64, ge=0)
    strong_guidance: float = Field(15.0, gt=1)

    @model_validator(mode="after")
    def _scenes_to_judge(self) -> "Config":
        if self.data.manifest is not None and self.judged and "judged" in self.model_fields_set:
            raise ValueError("a data set has no scenes to be judged: leave judged out")
        return self


def train(config: Config, log: Log) -> dict[str, float]:
    kind, preset, encoder = BASES[config.base]
    corpus = load(config.data, config.work, log)
    scale = reduction(config.data.size, preset["sample_size"])
    log(f"{config.phase}: {len(corpus)} images of {preset['sample_size']} pixels")
    torch.manual_seed(config.loop.seed)
    if config.start is not None:
        config = config.model_copy(update={"text": config.text or config.start})
    tokenizer, text_encoder = load_text(config, corpus, encoder)
    unet = kind(**preset) if config.start is None else load_unet(kind, config.start)
    scheduler = make_scheduler(config.schedule, config.prediction_type)
    pick, captions = sampler(corpus, config.emoji_share), caption_tokens(tokenizer, corpus)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        images = [reduce(image, scale, Kernel.BOX) for image in corpus.images[index]]
        return {"images": to_tensor(np.stack(images)), **captions(index, rng)}

    objective = DenoiserObjective(unet, text_encoder, scheduler, null_tokens(tokenizer), config)
    before = parameters_to_vector(text_encoder.parameters()).detach().clone()
    metrics = run(objective, draw, config.loop, config.work, log, corpus.source)
    if not config.freeze_encoder:
        after = parameters_to_vector(text_encoder.parameters()).detach()
        metrics["encoder_moved"] = ((after - before).norm() / before.norm()).item()
    pipe = TaijiImagenPipeline(
        tokenizer,
        text_encoder.eval(),
        unet.eval(),
        scheduler,
        settings=[config.sampling.model_dump()],
    )
    save_pipeline(pipe, config.model)
    scenes = corpus.scenes[: config.judged]
    metrics |= judged(pipe, scenes, config.loop.seed)
    return metrics | saturation(pipe, scenes, config.strong_guidance, config.loop.seed)


def load_unet(kind: type[ModelMixin], folder: Path) -> nn.Module:
    """Raises ValueError for a folder without a U-Net."""
    if not (folder / "unet").is_dir():
        raise ValueError(
            f"start={folder} has no unet/; give the model folder of an earlier run of this phase, "
            "or leave start out"
        )
    return kind.from_pretrained(folder / "unet")


def reduction(size: int, target: int) -> int:
    """How many times the corpus's images are as large as the U-Net's.

    Raises ValueError unless `size` is a multiple of `target`.
    """
    scale, rest = divmod(size, target)
    if rest or not scale:
        raise ValueError(
            f"images of {size} pixels do not reduce to the U-Net's {target}; set data.size to a "
            "multiple"
        )
    return scale


def judged(
    pipe: TaijiImagenPipeline, scenes: tuple[shapes.Scene, ...], seed: int
) -> dict[str, float]:
    """Share of the scenes' base images that the rule judge finds right, a key a property."""
    answers: dict[str, list[bool]] = {}
    for i in range(0, len(scenes), 32):
        part = scenes[i : i + 32]
        images = pipe(
            [shapes.caption(scene) for scene in part],
            super_resolution_stages=0,
            generator=torch.Generator().manual_seed(seed + i),
            output_type="np",
            return_dict=False,
        )[0]
        for image, scene in zip(enlarged(images), part, strict=True):
            for name, right in judge(image, scene.truth()).items():
                if right is not None:
                    answers.setdefault(name, []).append(right)
    return {name: float(np.mean(right)) for name, right in answers.items()}


def saturation(
    pipe: TaijiImagenPipeline, scenes: tuple[shapes.Scene, ...], scale: float, seed: int
) -> dict[str, float]:
    """Share of the values of base images drawn at guidance `scale` that are black or white, by the
    rule of thresholding."""
    found: dict[str, float] = {}
    for rule in RULES if scenes else ():
        images = pipe(
            [shapes.caption(scene) for scene in scenes],
            guidance_scale=scale,
            thresholding=rule,
            super_resolution_stages=0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
        )[0]
        found[f"saturated_{rule}"] = float(np.mean(np.abs(images * 2 - 1) > 1 - 1 / 255))
    return found


def enlarged(images: np.ndarray) -> np.ndarray:
    """images (B, H, W, 3) in [0, 1] -> uint8, at least as large as the judge's, pixels repeated"""
    times = max(1, JUDGED_SIZE // images.shape[1])
    return np.rint(images * 255).astype(np.uint8).repeat(times, 1).repeat(times, 2)
