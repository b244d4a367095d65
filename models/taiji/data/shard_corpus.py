"""A data set by its manifest as a corpus: images and captions are read when they are asked for.

A sample that cannot be used, because its image or record is damaged, is listed with the reason and
replaced by the next usable one of its bucket. Which one that is depends on the data alone, so the
same draws give the same batches after a restart and on any number of processes.

N samples of the set, B of a draw, H W pixels of a bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from taiji.data.buckets import Index, Size, assign, cut, nearest_buckets, place
from taiji.data.buckets import sampler as bucket_sampler
from taiji.data.corpus import SKIPPED, Corpus, CorpusConfig, Draw, Log
from taiji.data.reader import Reader, open_reader

Pixels = npt.NDArray[np.uint8]


class Sample(NamedTuple):
    """pixels (H, W, 3), not there where latents stand for them."""

    caption: str
    pixels: Pixels | None


@dataclass
class Skips:
    """The samples that cannot be used. Every process finds its own, and lists in `file` those that
    no other has listed there (`known`, up to byte `end`)."""

    file: Path | None
    log: Log
    reasons: dict[int, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    end: int = 0

    def add(self, number: int, name: str, reason: str) -> None:
        if number in self.reasons:
            return
        reason = self.reasons[number] = reason.removeprefix(f"{name}: ")
        count = len(self.reasons)
        if str(count).strip("0") == "1":  # 1, 10, 100 ...
            where = f"; all are listed in {self.file.name}" if self.file else ""
            self.log(f"{name}: {reason}: skipped, {count} so far{where}")
        if self.file is not None:
            self._list(self.file, name, reason)

    def _list(self, file: Path, name: str, reason: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as handle:
            handle.seek(self.end)
            self.known |= listed(handle.read())
            self.end = handle.tell()
            if name not in self.known:
                row = json.dumps({"sample": name, "reason": reason}, ensure_ascii=False)
                handle.write(row.encode() + b"\n")


def listed(lines: bytes) -> set[str]:
    """ "shard/id" of the samples in a list of skipped ones; a torn line is of none."""
    found = set()
    for line in lines.splitlines():
        try:
            found.add(json.loads(line)["sample"])
        except (ValueError, KeyError):
            continue
    return found


@dataclass
class Samples:
    """Reads single samples, each resized and cut to its bucket (N,) of `sizes`. `weight` (N,) is
    the share of the draws. `held` keeps what the last draw read. Where `decodes` is off, images are
    not looked at: what is wrong with them is known."""

    reader: Reader
    sizes: tuple[Size, ...]
    bucket: Index
    weight: npt.NDArray[np.float64]
    skips: Skips
    held: dict[int, Sample] = field(default_factory=dict)
    decodes: bool = True

    def read(self, number: int) -> Sample:
        """Raises ValueError for a sample that cannot be used."""
        if not self.decodes:
            return Sample(self.reader.record(number)["caption"], None)
        image, record = self.reader.read(number)
        size = (image.height, image.width)
        placed = place(size, self.sizes[self.bucket[number]])
        return Sample(record["caption"], np.asarray(cut(image, placed)))

    def can_read(self, number: int) -> bool:
        try:
            self.read(number)
        except ValueError:
            return False
        return True

    def find(self, number: int) -> tuple[int, Sample]:
        """The sample, or the next of its bucket that can be used; its number and itself."""
        bucket = self.bucket[number]
        for i in chain(range(number, len(self.reader)), range(number)):
            if self.bucket[i] != bucket or i in self.skips.reasons or not self.weight[i]:
                continue
            try:
                return i, self.held.get(i) or self.read(i)
            except ValueError as error:
                self.skips.add(i, self.reader.name(i), str(error))
        height, width = self.sizes[bucket]
        raise ValueError(
            f"no sample of {height}x{width} pixels can be used: run `hcf data verify`, then `hcf "
            "data shard` on the set's recipe"
        )

    def pixels(self, number: int) -> Pixels:
        found = self.find(number)[1].pixels
        if found is None:
            raise ValueError("images of this corpus stand in its latents")
        return found

    def concept(self, number: int) -> npt.NDArray[np.int64]:
        """A number that samples of one caption share"""
        caption = self.find(number)[1].caption
        digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
        return np.array(int.from_bytes(digest, "big") >> 1, np.int64)


@dataclass(frozen=True)
class _Lazy:
    """An array along whose first axis items are read: `[3]`, `[2:5]`, `[numbers]`."""

    read: Callable[[int], npt.NDArray[Any]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        if isinstance(index, int | np.integer):
            return self.read(int(index))
        numbers = range(self.count)[index] if isinstance(index, slice) else np.asarray(index)
        return np.stack([self.read(int(i)) for i in numbers])


@dataclass(frozen=True)
class ShardCorpus(Corpus):
    """`images` and `concept` of `samples`; there are no emoji and no scenes."""

    samples: Samples = field(kw_only=True)

    def __str__(self) -> str:
        reader = self.samples.reader
        return f"{len(self):,} samples of {reader.manifest.name} {reader.manifest.hash[:16]}"

    def caption(self, index: int, rng: Random) -> str:
        return self.samples.find(int(index))[1].caption

    def sampler(self, emoji_share: float) -> Draw:
        """Numbers (B,) by the manifest's weights, of one bucket; samples that can be used."""
        samples = self.samples
        pick = bucket_sampler(samples.bucket, samples.weight)

        def draw(rng: np.random.Generator, count: int) -> Any:
            _, numbers = pick(rng, count)
            samples.held.clear()
            for_each = []
            for number in numbers.tolist():
                i, sample = samples.find(number)
                samples.held[i] = sample
                for_each.append(i)
            return np.array(for_each, np.int64)

        return draw

    def time_ids(self, index: Any) -> npt.NDArray[np.float32] | None:
        samples = self.samples
        sides = samples.reader.sides[index].tolist()
        sizes = [samples.sizes[i] for i in samples.bucket[index]]
        placed = [place((h, w), size).time_ids() for (h, w), size in zip(sides, sizes, strict=True)]
        return np.array(placed, np.float32)

    def only(self, accept: Callable[[str], bool]) -> tuple[Corpus, int]:
        """Those whose caption is accepted; a domain's share goes to what is left of it."""
        samples, reader = self.samples, self.samples.reader
        kept = np.fromiter((accept(text) for text in reader.captions()), np.bool_, len(self))
        left_out = int((~kept & (samples.weight > 0)).sum())
        if not left_out:
            return self, 0
        weight = samples.weight * kept
        names = np.array([shard.domain for shard in reader.manifest.shards])
        for domain in np.unique(names):
            own = np.isin(reader.shard, np.flatnonzero(names == domain))
            if left := weight[own].sum():
                weight[own] *= samples.weight[own].sum() / left
        if not weight.any():
            return replace(self, images=_Lazy(samples.pixels, 0)), left_out
        return _corpus(replace(samples, weight=weight, held={})), left_out

    def texts(self) -> Iterable[str]:
        return compress(self.samples.reader.captions(), self.samples.weight > 0)


def open_shards(config: CorpusConfig, work: Path | None, log: Log) -> ShardCorpus:
    """Raises what `reader.open_reader` raises, and ValueError for a bucket without an image."""
    assert config.manifest is not None
    reader = open_reader(config.manifest)
    sizes = config.buckets.chosen() if config.buckets else ((config.size, config.size),)
    bucket = nearest_buckets(reader.sides, sizes)
    skips = Skips(work / SKIPPED if work else None, log)
    return _corpus(Samples(reader, sizes, bucket, reader.weight, skips))


def _corpus(samples: Samples) -> ShardCorpus:
    drawn = samples.weight > 0
    assign(samples.reader.sides[drawn], samples.sizes)  # for its error: each bucket has an image
    count = len(samples.reader)
    return ShardCorpus(
        _Lazy(samples.pixels, count),
        _Lazy(samples.concept, count),
        (),
        (),
        source={"manifest": samples.reader.manifest.hash},
        samples=samples,
    )
