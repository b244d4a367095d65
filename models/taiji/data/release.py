"""What ships beside the weights so that the toolkit can distil, calibrate and check without the
corpus: latents with captions, and the prompts of the quality check with their ground truth.

`hcf_data/latents_distill.safetensors`  latents (N, C, h, w) float16, scaled; row (M,) int64
`hcf_data/captions_distill.json`        M captions; caption m describes latent row[m]
`hcf_data/check_prompts.json`           list of {id, prompt, kind, split, label, truth}
"""

import json
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from taiji.data import emoji, shapes
from taiji.data.corpus import Corpus, CorpusConfig


class ReleaseConfig(BaseModel):
    """`scenes` latents of shapes beside all emoji; `emoji_prompts` + `shape_prompts` to check."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenes: int = Field(1400, ge=0)
    captions_per_latent: int = Field(3, gt=0)
    emoji_prompts: int = Field(224, ge=0)
    shape_prompts: int = Field(96, ge=0)
    seed: int = 0


def distillation_captions(
    corpus: Corpus, config: ReleaseConfig, emoji_share: float
) -> tuple[list[int], list[str], list[int]]:
    """Corpus positions to release, their captions, and each caption's index into the positions.

    Pairs of emoji are there as often as makes `emoji_share` of all pairs theirs, which is what is
    drawn in training: a student that saw mostly shapes would draw emoji worse than its teacher.
    """
    rng = Random(config.seed)
    emoji_count = len(corpus.rows)
    positions = list(range(emoji_count))
    positions += range(emoji_count, emoji_count + min(config.scenes, len(corpus.scenes)))
    captions: list[str] = []
    row: list[int] = []
    for number, i in enumerate(positions):
        drawn = dict.fromkeys(corpus.caption(i, rng) for _ in range(config.captions_per_latent))
        captions += drawn
        row += [number] * len(drawn)
    pairs = sum(number < emoji_count for number in row)
    if pairs and emoji_share < 1:
        wanted = emoji_share / (1 - emoji_share) * (len(row) - pairs)
        again = max(1, round(wanted / pairs))
        captions = captions[:pairs] * again + captions[pairs:]
        row = row[:pairs] * again + row[pairs:]
    return positions, captions, row


def check_prompts(
    corpus: Corpus, data: CorpusConfig, config: ReleaseConfig
) -> list[dict[str, Any]]:
    """Trained concepts in every style and in none, and held-out compositions of shapes."""
    rng = Random(config.seed + 1)
    labels = sorted({row["label"] for row in corpus.rows})
    rng.shuffle(labels)
    styles = ["", *(emoji.STYLES[v] for v in data.vendors)]
    prompts: list[dict[str, Any]] = []
    for i in range(config.emoji_prompts):
        label = labels[i % len(labels)]
        prompts.append(
            {"prompt": styles[i % len(styles)] + label, "kind": "emoji", "split": "train",
             "label": label, "truth": None}
        )  # fmt: skip
    scenes = shapes.sample(
        config.shape_prompts, config.seed, colours=data.colours, shapes=data.kinds,
        counts=data.counts, relation_share=data.relation_share, texture_share=data.texture_share,
        split="heldout",
    )  # fmt: skip
    for scene, text, _ in scenes:
        prompts.append(
            {"prompt": text, "kind": "shapes", "split": "heldout", "label": text,
             "truth": scene.truth()}
        )  # fmt: skip
    return [{"id": i, **p} for i, p in enumerate(prompts)]


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=0)
