"""Reads a data set by its manifest: single samples with the manifest's weights, or a stream.

N samples of the set, B of a draw.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from taiji.data.manifest import MANIFEST, Manifest, read_manifest, sample_factors
from taiji.data.metadata import decode
from taiji.data.shards import LISTED

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """The samples of a manifest: which shard (N), where in it (N), height and width (N, 2), and
    each one's share of the draws (N). Images and captions stay on the disk."""

    folder: Path
    manifest: Manifest
    ids: pa.ChunkedArray
    shard: Rows
    offset: Rows
    size: Rows
    sides: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def cumulative(self) -> npt.NDArray[np.float64]:
        total = np.cumsum(self.weight)
        return total / total[-1]

    def draw(self, rng: np.random.Generator, count: int) -> Rows:
        """Sample numbers (B,): domains by their shares, samples by their factors."""
        return np.searchsorted(self.cumulative, rng.random(count), "right")

    def read(self, number: int) -> tuple[Image.Image, dict[str, Any]]:
        """The RGB image of a sample and its record (id, caption, domain, width, height, url).

        Raises ValueError, naming the sample, for an image or a record that is damaged.
        """
        files = self._files(number, with_image=True)
        record = self._record(number, files)
        try:
            return decode(files.get("image", b"")), record
        except ValueError as error:
            raise ValueError(f"{self.name(number)}: {error}") from error

    def record(self, number: int) -> dict[str, Any]:
        """The record alone; the image is passed over."""
        return self._record(number, self._files(number, with_image=False))

    def name(self, number: int) -> str:
        """ "shard/id" """
        return f"{self._shard_name(number)}/{self.ids[number].as_py().hex()}"

    def captions(self) -> Iterator[str]:
        """All N as the shards list them, a shard at a time."""
        for shard in self.manifest.shards:
            yield from _listed(self.folder, shard.name, ["caption"])["caption"].to_pylist()

    def _shard_name(self, number: int) -> str:
        return self.manifest.shards[self.shard[number]].name

    def _files(self, number: int, *, with_image: bool) -> dict[str, bytes]:
        """ "json" and "image" of a sample; what is damaged is not there."""
        files: dict[str, bytes] = {}
        key = self.ids[number].as_py().hex()
        path = self.folder / "shards" / f"{self._shard_name(number)}.tar"
        try:
            with path.open("rb") as handle:
                handle.seek(self.offset[number])
                with tarfile.open(fileobj=handle, mode="r:") as archive:
                    for entry in archive:
                        found, _, suffix = entry.name.partition(".")
                        if found != key or suffix == "txt":  # of another sample; the last
                            break
                        kind = "json" if suffix == "json" else "image"
                        content = archive.extractfile(entry)
                        if content is not None and (kind == "json" or with_image):
                            files[kind] = content.read()
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{self.name(number)}: {error}") from error
        return files

    def _record(self, number: int, files: dict[str, bytes]) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(files["json"])
            caption = record["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.name(number)}: damaged record") from error
        if not isinstance(caption, str) or not caption.strip() or "\ufffd" in caption:
            raise ValueError(f"{self.name(number)}: the caption is empty or badly decoded")
        return record


def open_reader(path: Path) -> Reader:
    """Of a manifest file, or of the `manifest.json` in a folder.

    Raises:
        FileNotFoundError: the manifest, a shard or its list is missing.
        ValueError: the manifest was edited, a shard is not as long as it says, or its list is of
            an earlier version.
    """
    manifest = read_manifest(path)
    folder = path if path.is_dir() else path.parent
    for record in manifest.shards:
        tar = folder / "shards" / f"{record.name}.tar"
        if not tar.is_file():
            raise FileNotFoundError(f"{tar} is missing: run `hcf data shard` on the set's recipe")
        if tar.stat().st_size != record.bytes:
            raise ValueError(
                f"{tar} has {tar.stat().st_size} bytes, the manifest says {record.bytes}: it was "
                "cut or changed; run `hcf data shard` on the set's recipe"
            )
    columns = ["id", "offset", "bytes", "width", "height"]
    tables = [_listed(folder, record.name, columns) for record in manifest.shards]
    table = pa.concat_tables(tables)
    shard = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    return Reader(
        folder,
        manifest,
        table["id"],
        shard,
        table["offset"].to_numpy(),
        table["bytes"].to_numpy(),
        np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1),
        _weights(manifest, folder, table["id"], shard),
    )


def _listed(folder: Path, name: str, columns: list[str]) -> pa.Table:
    path = folder / "shards" / f"{name}.parquet"
    if not LISTED <= set(pq.read_schema(path).names):
        raise ValueError(
            f"{path} does not list sizes and captions, it is of an earlier version: run `hcf data "
            "shard` on the set's recipe, which leaves the shards as they are"
        )
    return pq.read_table(path, columns=columns)


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
