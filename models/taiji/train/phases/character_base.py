"""What training of adapters stands on: a Taiji-SD that draws characters by their captions.

Its packs, as latents; its own training, from any trained pipeline of the family; and the share of
drawn characters that the rules read right. Some characters are in no training at all.

N images, B batch, C latent channels, h w latent grid, H W pixels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from taiji.autoencoder.kl import encode_images
from taiji.data import characters
from taiji.data.characters import POSES, Character
from taiji.data.shapes import Pixels
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.text.captions import CaptionConfig
from taiji.text.conditioner import TextConditioner
from taiji.text.tokenizer import tokens
from taiji.train.checkpoint import changes, write_text
from taiji.train.loop import Batch, Log, LoopConfig, run
from taiji.train.phases.config import PhaseConfig
from taiji.train.phases.unet import UNetObjective, save_pipeline, size_condition

Draw = Callable[[np.random.Generator, int], Batch]
Names = Sequence[tuple[Character | None, str | None]]
SETTINGS = "characters.json"


class CharactersConfig(BaseModel):
    """`variations` images of every action of a character; `heldout` characters are not trained on.
    A share `full_captions` of the captions describes the character, others the action alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(64, ge=48)
    heldout: int = Field(24, gt=0)
    variations: int = Field(2, gt=0)
    full_captions: float = Field(0.7, ge=0, le=1)
    seed: int = 0


class CharacterPhaseConfig(PhaseConfig):
    """`base` is made from `start` by `base_loop` unless it is there. `judged` characters, of those
    that were never trained on, are drawn in every pose."""

    start: Path = Path("models/weights/taiji-sd-mini")
    base: Path
    base_loop: LoopConfig
    characters: CharactersConfig = CharactersConfig()
    steps: int = Field(20, gt=0)
    guidance_scale: float = Field(2.0, ge=1)
    judged: int = Field(12, gt=0)


@dataclass(frozen=True)
class Packs:
    """Images (N, H, W, 3) of characters and their latents (N, C, h, w), scaled: a character's pack
    is `per_pack` images in a row, `per_pack / 4` of each action in the order of `POSES`."""

    who: tuple[Character, ...]
    images: Pixels
    latents: Tensor
    per_pack: int

    def pose(self, index: int) -> str:
        return list(POSES)[index % self.per_pack * len(POSES) // self.per_pack]

    def character(self, index: int) -> Character:
        return self.who[index // self.per_pack]


def make_packs(
    who: Sequence[Character], config: CharactersConfig, pipe: TaijiStableDiffusionPipeline
) -> Packs:
    rng = Random(config.seed)
    images = np.stack(
        [
            image
            for one in who
            for _, image in characters.pack(
                one, rng, size=config.size, variations=config.variations
            )
        ]
    )
    latents = encode_images(pipe.vae, images).float()
    return Packs(tuple(who), images, latents, len(POSES) * config.variations)


def caption_tokens(pipe: TaijiStableDiffusionPipeline, texts: list[str]) -> Batch:
    """B texts -> ids and masks of both encoders"""
    tokenizer: PreTrainedTokenizerFast = pipe.tokenizer
    clip_ids, clip_mask = tokens(tokenizer, texts, pipe.fusion.config.clip_tokens)
    ids, mask = tokens(tokenizer, texts, pipe.fusion.config.sandwich_tokens)
    return {"clip_ids": clip_ids, "clip_mask": clip_mask, "ids": ids, "mask": mask}


# of an objective whose U-Net and text side are the base's
FROZEN: dict[str, Any] = {
    "gamma": None, "high_noise_share": 0.5, "train_unet": False, "train_text": "none",
}  # fmt: skip


def parts(pipe: TaijiStableDiffusionPipeline) -> tuple[Any, TextConditioner, Any]:
    """What a `UNetObjective` is made of."""
    text = TextConditioner(pipe.image_clip, pipe.text_encoder, pipe.fusion)
    return pipe.unet, text, pipe.scheduler


def captions(
    packs: Packs, index: Sequence[int], share: float, rng: np.random.Generator
) -> list[str]:
    """A caption of each image; a share of them describes the character too."""
    words = Random(int(rng.integers(2**62)))
    told = [packs.character(i) if words.random() < share else None for i in index]
    return [
        characters.caption(one, packs.pose(i), words) for one, i in zip(told, index, strict=True)
    ]


def caption_draw(packs: Packs, pipe: TaijiStableDiffusionPipeline, share: float) -> Draw:
    """Draws of images with a caption each."""

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = rng.integers(0, len(packs.latents), count)
        texts = captions(packs, index.tolist(), share, rng)
        return {"latents": packs.latents[index], **caption_tokens(pipe, texts)}

    return draw


def open_base(
    config: CharacterPhaseConfig, log: Log
) -> tuple[TaijiStableDiffusionPipeline, dict[str, float]]:
    """The pipeline in `config.base`, made there by training `config.start` on characters if it is
    not there yet, and what its training measured.

    Raises ValueError when it was made with other settings.
    """
    base, world, loop = config.base, config.characters, config.base_loop
    settings = {
        "start": str(config.start), "characters": world.model_dump(mode="json"),
        "loop": loop.model_dump(mode="json"),
    }  # fmt: skip
    if (base / SETTINGS).is_file():
        said = json.loads((base / SETTINGS).read_text())
        differing = changes(said["settings"], settings, ("loop.parallel", "loop.log_every"))
        if differing:
            raise ValueError(
                f"{base} was made with other settings ({'; '.join(differing[:4])}): name another "
                "folder as base, or put them back"
            )
        return TaijiStableDiffusionPipeline.from_pretrained(base), said["metrics"]
    pipe = TaijiStableDiffusionPipeline.from_pretrained(config.start)
    train_who, _ = characters.split(world.heldout, world.seed)
    packs = make_packs(train_who, world, pipe)
    log(f"characters: {len(packs.images)} images of {len(packs.who)} characters for the base")
    objective = UNetObjective(
        *parts(pipe),
        size_condition(world.size),
        gamma=None,
        captions=CaptionConfig(),
        high_noise_share=0.5,
    )
    draw = caption_draw(packs, pipe, world.full_captions)
    found = run(objective, draw, loop, config.work / "base", log)
    metrics = {f"base_{key}": found[key] for key in ("loss", "seconds")}
    save_pipeline(pipe, base)
    said = {"settings": settings, "metrics": metrics}
    write_text(base / SETTINGS, json.dumps(said, ensure_ascii=False, indent=2))
    return TaijiStableDiffusionPipeline.from_pretrained(base), metrics


def draw_images(
    pipe: TaijiStableDiffusionPipeline, texts: list[str], config: CharacterPhaseConfig
) -> Pixels:
    """One image (H, W, 3) uint8 a text, each from noise of its own."""
    seeds = range(config.loop.seed, config.loop.seed + len(texts))
    out: Any = pipe(
        texts,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    )
    return np.rint(out.images * 255).astype(np.uint8)


def score(images: Pixels, wanted: Names, prefix: str = "") -> dict[str, float]:
    """images (N, H, W, 3), who and what each should show -> shares read right: `identity` is the
    mean over a character's attributes, `all` of images with every one, `pose` of actions."""
    rows: dict[str, list[float]] = {}
    for image, (who, pose) in zip(images, wanted, strict=True):
        reading = characters.read(image)
        if who is not None:
            right = characters.agreement(reading, who)
            whole = {"identity": sum(right.values()) / len(right), "all": all(right.values())}
            for name, value in (*right.items(), *whole.items()):
                rows.setdefault(prefix + name, []).append(float(value))
        if pose is not None:
            rows.setdefault(prefix + "pose", []).append(float(reading.pose == pose))
    return {name: float(np.mean(row)) for name, row in rows.items()}
