"""What a phase is trained on: images, and for each a way to draw a caption.

The corpus of Taiji-SD-mini, emoji of several artists and the coloured-shapes world, is one array; a
data set by its manifest is read from its shards (`shard_corpus`). N images, H = W pixels, B drawn.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from taiji.data import emoji, shapes
from taiji.data.buckets import BucketConfig
from taiji.data.emoji import GENERATOR_VENDORS
from taiji.data.manifest import read_manifest
from taiji.data.metadata import file_hash

Draw = Callable[[np.random.Generator, int], Any]
Log = Callable[[str], object]
MINI = {"emoji", "vendors", "labels", "shapes"}  # the keys of the mini corpus alone
SKIPPED = "skipped.jsonl"  # of the work folder: the samples that could not be used, and why


class CorpusConfig(BaseModel):
    """Which images: emoji of `vendors`, all or those with one of `labels`, without the held-out
    concepts; and `shapes` generated scenes, without the held-out compositions.

    Or a data set: `manifest` is the folder or manifest that `hcf data shard` wrote. Its images are
    resized to cover `size` x `size` and cut to it, or those of one of the `buckets` each. The keys
    of the shapes world are then only those of the scenes that a phase judges itself by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: Path | None = None
    buckets: BucketConfig | None = None
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

    @model_validator(mode="after")
    def _one_kind(self) -> "CorpusConfig":
        other = MINI & self.model_fields_set
        if self.manifest is not None and other:
            raise ValueError(
                f"data.manifest names a whole data set, data.{min(other)} is of the mini corpus: "
                "leave one of them out"
            )
        if self.buckets is not None and self.manifest is None:
            raise ValueError("data.buckets are for data.manifest: the mini corpus is square")
        if self.buckets is not None and self.buckets.base != self.size:
            raise ValueError(
                f"data.size is {self.size} and data.buckets.base {self.buckets.base}: the square "
                "bucket is of data.size, set both to the same"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_new_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The mini corpus is told as it was before there were other data: old records stay."""
        tree: dict[str, Any] = handler(self)
        unset = {"manifest", "buckets"} if self.manifest is None else MINI
        return {key: value for key, value in tree.items() if key not in unset}


@dataclass(frozen=True)
class Corpus:
    """images (N, H, W, 3) uint8, their concept numbers (N,) and caption sources.

    Phases ask images and concepts by `[index]` only, which a corpus of shards answers by reading.
    `source` is what a trained model names: hashes of the manifest, or of the emoji.
    """

    images: Any
    concept: Any
    rows: tuple[dict[str, Any], ...]  # the first len(rows) images are emoji, the rest shapes
    scenes: tuple[shapes.Scene, ...]
    source: dict[str, str] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return f"{len(self.rows)} emoji images, {len(self.scenes)} scenes"

    def caption(self, index: int, rng: Random) -> str:
        if index < len(self.rows):
            return emoji_caption(self.rows[index], rng)
        return shapes.caption(self.scenes[index - len(self.rows)], rng=rng)

    def sampler(self, emoji_share: float) -> Draw:
        """Index draws (B,) with a fixed share of emoji when both kinds are there."""
        emoji, total = len(self.rows), len(self.images)

        def draw(rng: np.random.Generator, count: int) -> Any:
            if emoji in (0, total):
                return rng.integers(0, total, count)
            first = round(count * emoji_share)
            parts = [rng.integers(0, emoji, first), rng.integers(emoji, total, count - first)]
            return np.concatenate(parts)

        return draw

    def time_ids(self, index: Any) -> npt.NDArray[np.float32] | None:
        """Original size, cut and target size (B, 6); None where all images are alike and uncut."""
        return None

    def only(self, accept: Callable[[str], bool]) -> tuple["Corpus", int]:
        """The images whose label (or plainest caption) is accepted, and the number of others."""
        first = len(self.rows)
        rows = [i for i, row in enumerate(self.rows) if accept(row["label"])]
        scenes = [i for i, scene in enumerate(self.scenes) if accept(shapes.caption(scene))]
        keep = rows + [first + i for i in scenes]
        if len(keep) == len(self):
            return self, 0
        kept = replace(
            self,
            images=self.images[keep],
            concept=self.concept[keep],
            rows=tuple(self.rows[i] for i in rows),
            scenes=tuple(self.scenes[i] for i in scenes),
        )
        return kept, len(self) - len(keep)

    def texts(self) -> Iterable[str]:
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


def source_of(config: CorpusConfig) -> dict[str, str]:
    """The hash of the data set's manifest, or of the emoji's list, which has that of each image.

    Raises FileNotFoundError where it is not there, ValueError for an edited manifest.
    """
    if config.manifest is not None:
        return {"manifest": read_manifest(config.manifest).hash}
    if config.emoji is None:
        return {}
    listed = config.emoji / "metadata.parquet"
    if not listed.is_file():
        raise FileNotFoundError(
            f"no emoji data in {config.emoji}: make it with `hcf data build emoji`"
        )
    return {"emoji": file_hash(listed)}


def load(config: CorpusConfig, work: Path | None = None, log: Log = print) -> Corpus:
    """Reads the emoji and draws the scenes, or opens the data set; what of it cannot be used is
    listed in `work`. Raises what `emoji.load` and `reader.open_reader` raise."""
    if config.manifest is not None:
        from taiji.data.shard_corpus import open_shards

        return open_shards(config, work, log)
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
    number_of = np.array(concept, np.int64)
    return Corpus(images, number_of, tuple(rows), scenes, source=source_of(config))


def sampler(corpus: Corpus, emoji_share: float) -> Draw:
    """Index draws (B,) of a corpus; see there."""
    return corpus.sampler(emoji_share)
