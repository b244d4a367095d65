"""The training corpus of Taiji-SD-mini: emoji of several artists and the coloured-shapes world.

One array of images and, for each, a way to draw a caption. N images, H = W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from taiji.data import emoji, shapes
from taiji.data.emoji import GENERATOR_VENDORS


class CorpusConfig(BaseModel):
    """Which images: emoji of `vendors`, all or those with one of `labels`, without the held-out
    concepts; and `shapes` generated scenes, without the held-out compositions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    emoji: Path | None = None
    vendors: tuple[str, ...] = GENERATOR_VENDORS
    labels: tuple[str, ...] | None = None
    size: int = 64
    shapes: int = Field(0, ge=0)
    colours: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    counts: tuple[int, ...] = (1, 2, 3)
    relation_share: float = Field(0.2, ge=0, le=1)
    texture_share: float = Field(0.0, ge=0, le=1)
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """images (N, H, W, 3) uint8, their concept numbers (N,) and caption sources."""

    images: npt.NDArray[np.uint8]
    concept: npt.NDArray[np.int64]
    rows: tuple[dict[str, Any], ...]  # the first len(rows) images are emoji, the rest shapes
    scenes: tuple[shapes.Scene, ...]

    def caption(self, index: int, rng: Random) -> str:
        if index < len(self.rows):
            return emoji_caption(self.rows[index], rng)
        return shapes.caption(self.scenes[index - len(self.rows)], rng=rng)

    def texts(self) -> list[str]:
        """Every string a caption can be made of, for the tokenizer's vocabulary."""
        rng = Random(0)
        texts = [*emoji.STYLES.values(), "，"]
        for row in self.rows:
            texts += [row["label"], *row["tags"]]
        return texts + [shapes.caption(s, rng=rng) for s in self.scenes for _ in range(3)]


def emoji_caption(row: dict[str, Any], rng: Random) -> str:
    """Name (85 %, a fifth of them with a tag) or one tag alone, three in four with the style."""
    tags = [t for t in row["tags"] if t != row["label"]]
    text = str(row["label"])
    if tags and rng.random() < 0.15:
        text = rng.choice(tags)
    elif tags and rng.random() < 0.2:
        text = f"{text}，{rng.choice(tags)}"
    return f"{emoji.STYLES[row['vendor']]}{text}" if rng.random() < 0.75 else text


def choose(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[int]:
    """Positions of the rows named in `labels`, train split only. Raises ValueError for a name that
    no row has."""
    unknown = sorted(set(labels) - {row["label"] for row in rows})
    if unknown:
        raise ValueError(f"no emoji is called {'、'.join(unknown[:5])}; see metadata.parquet")
    return [i for i, r in enumerate(rows) if r["label"] in labels and r["concept_split"] == "train"]


def load(config: CorpusConfig) -> Corpus:
    """Reads the emoji and draws the scenes. Raises what `emoji.load` raises."""
    rows: list[dict[str, Any]] = []
    images = np.empty((0, config.size, config.size, 3), np.uint8)
    if config.emoji is not None:
        images, rows = emoji.load(config.emoji, config.size, config.vendors)
        keep = choose(rows, config.labels or [row["label"] for row in rows])
        images, rows = images[keep], [rows[i] for i in keep]
    number = {c: i for i, c in enumerate(dict.fromkeys(r["codepoint"] for r in rows))}
    concept = [number[r["codepoint"]] for r in rows]
    drawn = shapes.sample(
        config.shapes,
        config.seed,
        size=config.size,
        colours=config.colours,
        shapes=config.kinds,
        counts=config.counts,
        relation_share=config.relation_share,
        texture_share=config.texture_share,
        split="train",
    )
    scenes = tuple(scene for scene, _, _ in drawn)
    texts = {text: len(number) + i for i, text in enumerate(dict.fromkeys(t for _, t, _ in drawn))}
    concept += [texts[t] for _, t, _ in drawn]
    if drawn:
        images = np.concatenate([images, np.stack([image for _, _, image in drawn])])
    return Corpus(images, np.array(concept, np.int64), tuple(rows), scenes)


def sampler(corpus: Corpus, emoji_share: float) -> Callable[[np.random.Generator, int], Any]:
    """Index draws (batch,) with a fixed share of emoji when both kinds are there."""
    emoji, total = len(corpus.rows), len(corpus.images)

    def draw(rng: np.random.Generator, count: int) -> Any:
        if emoji in (0, total):
            return rng.integers(0, total, count)
        first = round(count * emoji_share)
        parts = [rng.integers(0, emoji, first), rng.integers(emoji, total, count - first)]
        return np.concatenate(parts)

    return draw
