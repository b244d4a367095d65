"""Reads a data set by its manifest: single samples with the manifest's weights, or a stream.

B samples of a draw.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from taiji.data.manifest import MANIFEST, Manifest, read_manifest, sample_factors
from taiji.data.metadata import decode

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """The samples of a manifest: which shard (N), where in it (N), and the odds to be drawn (N)."""

    folder: Path
    manifest: Manifest
    ids: pa.ChunkedArray
    shard: Rows
    offset: Rows
    size: Rows
    cumulative: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.shard)

    def draw(self, rng: np.random.Generator, count: int) -> Rows:
        """Sample numbers (B,): domains by their shares, samples by their factors."""
        return np.searchsorted(self.cumulative, rng.random(count), "right")

    def read(self, number: int) -> tuple[Image.Image, dict[str, Any]]:
        """The RGB image of a sample and its record (id, caption, domain, width, height, url)."""
        name = self.manifest.shards[self.shard[number]].name
        with (self.folder / "shards" / f"{name}.tar").open("rb") as handle:
            handle.seek(self.offset[number])
            blob = handle.read(self.size[number])
        files: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(blob), mode="r:") as archive:
            for entry in archive:
                content = archive.extractfile(entry)
                assert content is not None  # shards hold regular files alone
                files[entry.name.partition(".")[2]] = content.read()
        record = json.loads(files.pop("json"))
        files.pop("txt")
        return decode(files.popitem()[1]), record


def open_reader(path: Path) -> Reader:
    """Of a manifest file, or of the `manifest.json` in a folder.

    Raises:
        FileNotFoundError: the manifest or a shard's list is missing.
        ValueError: the manifest was edited.
    """
    manifest = read_manifest(path)
    folder = path if path.is_dir() else path.parent
    tables = [pq.read_table(folder / "shards" / f"{s.name}.parquet") for s in manifest.shards]
    table = pa.concat_tables(tables)
    lengths = [len(t) for t in tables]
    shard = np.repeat(np.arange(len(tables)), lengths)
    weight = _weights(manifest, folder, table["id"], shard)
    return Reader(
        folder,
        manifest,
        table["id"],
        shard,
        table["offset"].to_numpy(),
        table["bytes"].to_numpy(),
        np.cumsum(weight) / weight.sum(),
    )


def _weights(
    manifest: Manifest, folder: Path, ids: pa.ChunkedArray, shard: Rows
) -> npt.NDArray[np.float64]:
    """Each sample's odds: its domain's share, split over the domain by the factors."""
    factor = np.ones(len(ids))
    if manifest.factors:
        factor = sample_factors(manifest, folder, ids.to_pylist())
    records = [manifest.domains[s.domain] for s in manifest.shards]
    odds = np.array([record.share / record.mass if record.mass else 0.0 for record in records])
    return factor * odds[shard]


def stream(path: Path, *, seed: int = 0, buffer: int = 1000) -> Iterator[dict[str, Any]]:
    """Endless samples read from front to back of each tar by webdataset, domains by their shares.

    For shards on slow disks. Factors of single samples need `open_reader`.

    Raises:
        ValueError: the manifest has factors.
    """
    import webdataset as wds

    manifest = read_manifest(path)
    if manifest.factors:
        raise ValueError(
            f"{MANIFEST} re-weights single samples, which a stream cannot: use open_reader"
        )
    folder = (path if path.is_dir() else path.parent) / "shards"
    sets, shares = [], []
    drawn = {name: r for name, r in manifest.domains.items() if r.share > 0}
    for name, record in drawn.items():
        files = [str(folder / f"{s.name}.tar") for s in manifest.shards if s.domain == name]
        data = wds.WebDataset(files, shardshuffle=False, empty_check=False, seed=seed)
        sets.append(data.shuffle(buffer, seed=seed).decode("pilrgb").repeat())
        shares.append(record.share)
    rng = np.random.default_rng(seed)
    streams = [iter(data) for data in sets]
    while True:
        yield next(streams[rng.choice(len(streams), p=shares)])
