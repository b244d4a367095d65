"""ImageCLIP and its tokenizer: from new weights, or on from earlier ones (`start`).

Two stages as in Chinese-CLIP: `lock_image_tower` with a trained image tower, then a second recipe
that starts from the first one's folder without it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import ChineseCLIPModel, PreTrainedTokenizerFast

from taiji import presets
from taiji.autoencoder.kl import to_tensor
from taiji.data import shapes
from taiji.data.corpus import Corpus, CorpusConfig, load, sampler
from taiji.text.captions import only_chinese, scene_key
from taiji.text.image_clip import (
    ImageClipObjective,
    ImageTower,
    TextTower,
    cap_logit_scale,
    image_clip_config,
    lock_image_tower,
    retrieval_r1,
    text_length,
)
from taiji.text.tokenizer import build_tokenizer, open_tokenizer, tokens
from taiji.train.checkpoint import save_component
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.config import CorpusPhaseConfig

WAYS = 64  # of the retrieval test


class Config(CorpusPhaseConfig):
    """`start`: a folder with `image_clip` and `tokenizer` to go on from. `tokenizer`: a folder with
    a vocabulary, else one is built of the corpus's characters. `positives`: rows that are no
    negatives of each other share their wording, or their scene however it is worded.
    `retrieval_sets`: sets of 64 held-out scenes that R@1 is measured on."""

    phase: Literal["image_clip"] = "image_clip"
    preset: Literal["tiny", "mini", "large", "huge"] = "mini"
    start: Path | None = None
    tokenizer: Path | None = None
    lock_image_tower: bool = False
    chunk_size: int | None = Field(None, gt=0)
    masking: float = Field(0.0, ge=0, lt=1)
    positives: Literal["caption", "scene"] = "caption"
    min_chinese: float = Field(0.5, ge=0, le=1)
    retrieval_sets: int = Field(0, ge=0)

    @model_validator(mode="after")
    def check_start(self) -> "Config":
        if self.lock_image_tower and self.start is None:
            raise ValueError("lock_image_tower needs start: a new image tower knows nothing yet")
        if self.start is not None and self.tokenizer is not None:
            raise ValueError("start brings its own tokenizer: leave tokenizer out")
        if self.positives == "scene" and self.data.manifest is not None:
            raise ValueError("a data set has captions, not scenes: set positives to caption")
        return self


def check_negatives(config: Config) -> None:
    """A row's negatives are those of the pieces that are computed at one time: a batch in more
    pieces than processes would have fewer. Raises ValueError for it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.loop.micro_batches != processes:
        raise ValueError(
            f"{config.loop.micro_batches} micro_batches on {processes} processes: a contrastive "
            f"batch is not divided; set loop.micro_batches={processes}, and chunk_size for memory"
        )


def open_towers(config: Config, corpus: Corpus) -> tuple[PreTrainedTokenizerFast, ChineseCLIPModel]:
    torch.manual_seed(config.loop.seed)
    if config.start is not None:
        tokenizer = open_tokenizer(config.start / "tokenizer")
        model = ChineseCLIPModel.from_pretrained(config.start / "image_clip").train()
    else:
        tokenizer = (
            open_tokenizer(config.tokenizer)
            if config.tokenizer is not None
            else build_tokenizer(corpus.texts(), max_length=presets.MINI_SANDWICH_TOKENS)
        )
        model = ChineseCLIPModel(image_clip_config(config.preset, len(tokenizer)))
    size = model.config.vision_config.image_size
    if size != config.data.size:
        raise ValueError(f"the image tower takes {size} pixels, data.size is {config.data.size}")
    return tokenizer, model


def scene_numbers(corpus: Corpus) -> Tensor:
    """Concept of every image (N,) int64, where scenes count as one whatever their wording."""
    first = len(corpus.rows)
    offset = int(corpus.concept[:first].max(initial=-1)) + 1
    keys = [scene_key(scene) for scene in corpus.scenes]
    number = {key: offset + i for i, key in enumerate(dict.fromkeys(keys))}
    scenes = np.array([number[key] for key in keys], np.int64)
    return torch.from_numpy(np.concatenate([corpus.concept[:first], scenes]))


def make_draw(
    config: Config, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, length: int
) -> Callable[[np.random.Generator, int], Batch]:
    pick = sampler(corpus, config.emoji_share)
    by_caption = config.positives == "caption"
    concept = corpus.concept if by_caption else scene_numbers(corpus).numpy()

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        ids, mask = tokens(tokenizer, [corpus.caption(i, words) for i in index], length)
        return {
            "images": to_tensor(corpus.images[index]),
            "input_ids": ids,
            "attention_mask": mask,
            "concept": torch.from_numpy(concept[index]),
        }

    return draw


def heldout_sets(data: CorpusConfig, count: int) -> list[list[tuple[str, shapes.Pixels]]]:
    """`count` sets of `WAYS` captions and images; the scenes of a set are held out and differ.

    Raises ValueError when the world of `data` has too few.
    """
    drawn = shapes.sample(
        4 * WAYS * count, data.seed, size=data.size, colours=data.colours, shapes=data.kinds,
        counts=data.counts, relation_share=data.relation_share, texture_share=data.texture_share,
        split="heldout",
    )  # fmt: skip
    sets: list[dict[shapes.Scene, tuple[str, shapes.Pixels]]] = [{}]
    for scene, caption, image in drawn:
        if len(sets[-1]) == WAYS:
            sets.append({})
        sets[-1].setdefault(scene_key(scene), (caption, image))
    if len(sets) <= count:
        raise ValueError(
            f"{count} retrieval_sets of {WAYS} held-out scenes that differ cannot be had: allow "
            "more colours, kinds or counts, or a larger relation_share"
        )
    return [list(pairs.values()) for pairs in sets[:count]]


@torch.no_grad()
def measure_retrieval(
    config: Config, tokenizer: PreTrainedTokenizerFast, model: ChineseCLIPModel
) -> dict[str, float]:
    """Mean R@1 of 64 in both directions over `retrieval_sets`, by one wording a scene."""
    model.eval()
    device, found = model.device, []
    for pairs in heldout_sets(config.data, config.retrieval_sets):
        images = to_tensor(np.stack([image for _, image in pairs])).to(device)
        ids, mask = tokens(tokenizer, [caption for caption, _ in pairs], text_length(model))
        text = TextTower(model)(ids.to(device), mask.to(device))
        found.append(retrieval_r1(text, ImageTower(model)(images)))
    to_image, to_text = np.mean(found, axis=0)
    return {"r1_text_to_image": float(to_image), "r1_image_to_text": float(to_text)}


def train(config: Config, log: Log) -> dict[str, float]:
    check_negatives(config)
    corpus, skipped = only_chinese(load(config.data, config.work, log), config.min_chinese)
    log(f"{config.phase}: {corpus}")
    log(f"{skipped} images left out: their captions are not Chinese")
    tokenizer, model = open_towers(config, corpus)
    if config.lock_image_tower:
        lock_image_tower(model)
    objective = ImageClipObjective(model, chunk_size=config.chunk_size, masking=config.masking)
    draw = make_draw(config, corpus, tokenizer, text_length(model))
    metrics: dict[str, Any] = run(objective, draw, config.loop, config.work, log, corpus.source)
    cap_logit_scale(model)  # the averaged weights may lie a step beyond it
    if config.retrieval_sets:
        metrics |= measure_retrieval(config, tokenizer, model)
    save_component(tokenizer, config.model / "tokenizer")
    save_component(model, config.model / "image_clip")
    return metrics
