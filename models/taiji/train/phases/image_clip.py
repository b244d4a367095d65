"""ImageCLIP and the tokenizer of the mini model."""

from random import Random
from typing import Literal

import numpy as np
import torch
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from taiji import presets
from taiji.autoencoder.kl import to_tensor
from taiji.data.corpus import load, sampler
from taiji.text.image_clip import ImageClipObjective
from taiji.text.tokenizer import build_tokenizer, tokens
from taiji.train.checkpoint import save_component
from taiji.train.loop import Batch, Log, run
from taiji.train.phases.config import CorpusPhaseConfig


class Config(CorpusPhaseConfig):
    phase: Literal["image_clip"] = "image_clip"


def train(config: Config, log: Log) -> dict[str, float]:
    corpus = load(config.data)
    log(f"{config.phase}: {len(corpus.rows)} emoji images, {len(corpus.scenes)} scenes")
    tokenizer = build_tokenizer(corpus.texts(), max_length=presets.MINI_SANDWICH_TOKENS)
    towers = ChineseCLIPConfig(
        text_config={**presets.MINI_CLIP_TEXT, "vocab_size": len(tokenizer)},
        vision_config=presets.MINI_CLIP_VISION,
        projection_dim=presets.MINI_CLIP_PROJECTION,
    )
    torch.manual_seed(config.loop.seed)
    model = ChineseCLIPModel(towers)
    pick = sampler(corpus, config.emoji_share)

    def draw(rng: np.random.Generator, count: int) -> Batch:
        index = pick(rng, count)
        words = Random(int(rng.integers(2**62)))
        ids, mask = tokens(
            tokenizer, [corpus.caption(i, words) for i in index], presets.MINI_CLIP_TOKENS
        )
        return {
            "images": to_tensor(corpus.images[index]),
            "input_ids": ids,
            "attention_mask": mask,
            "concept": torch.from_numpy(corpus.concept[index]),
        }

    metrics = run(ImageClipObjective(model), draw, config.loop, config.work, log)
    save_component(tokenizer, config.model / "tokenizer")
    save_component(model, config.model / "image_clip")
    return metrics
