"""Kept pairs as webdataset tars, the same bytes whoever writes them and however often it is killed.

A domain's rows are ordered by their ids, which are hashes: the order is random and fixed. Each run
of `samples` rows is a shard and one task. Beside `<shard>.tar` lie `<shard>.parquet` (id, offset
and bytes of every sample) and `<shard>.json` (hash of the tar, and what was skipped and why).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from taiji.data.metadata import (
    canonical_json,
    decode,
    file_hash,
    id_order,
    ids_as_integers,
    part_paths,
    read_bytes,
    write_json,
    write_table,
)
from taiji.data.tar import END, Member, members, tar_bytes
from taiji.data.workers import Engine, run_tasks

SAMPLES = 10_000
FIELDS = ("id", "url", "file", "offset", "bytes", "caption", "domain")
LISTED = {"id", "offset", "bytes", "width", "height", "caption"}


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds. `key` is of the rows it was made from."""

    name: str
    domain: str
    key: str
    sha256: str
    bytes: int
    samples: int
    skipped: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its rows (columns FIELDS) in order."""

    name: str
    domain: str
    rows: pa.Table
    folder: Path
    root: Path


def write_shards(
    output: Path,
    root: Path,
    kept: npt.NDArray[np.bool_],
    domains: npt.NDArray[np.int32],
    names: Sequence[str],
    *,
    samples: int = SAMPLES,
    workers: int = 1,
    engine: Engine = "local",
    log: Callable[[str], object] = print,
) -> list[Shard]:
    """Writes the kept rows of the metadata in `output`; finished shards of the same rows stay.

    kept (N), domains (N) numbers into `names`. Shards that are no longer asked for are removed.
    """
    folder = output / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(output / "metadata", kept, domains, names)
    found: list[Shard] = []
    tasks = shard_tasks(rows, names, folder, root, samples)
    for shard in run_tasks(write_shard, tasks, workers=workers, engine=engine):
        found.append(shard)
        log(f"{shard.name}: {shard.samples:,} samples, {len(shard.skipped)} skipped")
    current = {f"{shard.name}.{suffix}" for shard in found for suffix in ("tar", "json", "parquet")}
    for path in folder.iterdir():
        if path.name not in current:
            path.unlink()
    return found


def kept_rows(
    metadata: Path,
    kept: npt.NDArray[np.bool_],
    domains: npt.NDArray[np.int32],
    names: Sequence[str],
) -> pa.Table:
    """Columns FIELDS of the kept rows; the domain is the selection's."""
    parts = []
    start = 0
    label = pa.array(list(names), pa.string())
    for path in part_paths(metadata):
        table = pq.read_table(path, columns=[name for name in FIELDS if name != "domain"])
        stop = start + len(table)
        table = table.append_column("domain", label.take(pa.array(domains[start:stop])))
        parts.append(table.filter(pa.array(kept[start:stop])))
        start = stop
    return pa.concat_tables(parts).select(list(FIELDS))


def shard_tasks(
    rows: pa.Table, names: Sequence[str], folder: Path, root: Path, samples: int
) -> Iterator[ShardTask]:
    """Shards of each domain in turn, at most `samples` rows each, in the order of the ids."""
    if not len(rows):
        return
    unfit = [name for name in names if "/" in name or "." in name]
    if unfit:
        raise ValueError(f"domain {unfit[0]} cannot name a file: leave out / and .")
    ordered = rows.take(pa.array(id_order(ids_as_integers(rows["id"]))))
    for domain in names:
        own = ordered.filter(pc.equal(ordered["domain"], domain))
        for number, start in enumerate(range(0, len(own), samples)):
            # taken, not sliced: a slice pickles the whole domain for each worker
            rows_of_shard = pa.array(range(start, min(start + samples, len(own))))
            part = own.take(rows_of_shard).combine_chunks()
            yield ShardTask(f"{domain}-{number:05d}", domain, part, folder, root)


def write_shard(task: ShardTask) -> Shard:
    """Writes one shard, continues what a killed process left, or finds it finished.

    The tar gets its name last, after its list and its report: where it is, all three are.
    """
    rows = task.rows.to_pylist()
    key = _rows_key(rows)
    final = task.folder / f"{task.name}.tar"
    report, listed = final.with_suffix(".json"), final.with_suffix(".parquet")
    if (done := _finished(report, key)) and final.is_file() and final.stat().st_size == done.bytes:
        if not listed.is_file() or not LISTED <= set(pq.read_schema(listed).names):
            write_table(sample_table(final), listed)  # an earlier version listed less
        return done
    for stale in (final, report, listed):
        stale.unlink(missing_ok=True)
    part = task.folder / f".{task.name}.{key[:16]}.part"
    skipped = _write_samples(part, rows, task.root)
    table = sample_table(part)
    with part.open("ab") as handle:
        handle.write(END)
    shard = Shard(
        task.name, task.domain, key, file_hash(part), part.stat().st_size, len(table), skipped
    )
    write_table(table, listed)
    write_json(asdict(shard), report)
    os.replace(part, final)
    return shard


def _rows_key(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json({**row, "id": row["id"].hex()}).encode())
    return digest.hexdigest()


def _finished(report: Path, key: str) -> Shard | None:
    if not report.is_file():
        return None
    found = json.loads(report.read_text(encoding="utf-8"))
    return Shard(**{**found, "skipped": tuple(found["skipped"])}) if found["key"] == key else None


def _write_samples(
    part: Path, rows: list[dict[str, Any]], root: Path
) -> tuple[dict[str, str], ...]:
    """Appends the samples that `part` lacks; the rows that cannot be written, with the reason."""
    written = _whole_samples(part)
    done, end = {key for key, *_ in written}, written[-1][2] if written else 0
    last = max((i for i, row in enumerate(rows) if row["id"].hex() in done), default=-1)
    skipped = []
    with part.open("r+b" if part.exists() else "wb") as handle:
        handle.truncate(end)
        handle.seek(end)
        for number, row in enumerate(rows):
            key = row["id"].hex()
            if key in done:
                continue
            try:
                files = _sample(row, root)
            except (OSError, ValueError) as error:
                skipped.append({"id": key, "reason": str(error)})
                continue
            if number < last:
                # unreadable when the killed process came to it, and mended since: begin again
                handle.close()
                part.unlink()
                return _write_samples(part, rows, root)
            handle.write(tar_bytes(key, files))
    return tuple(skipped)


def _sample(row: dict[str, Any], root: Path) -> dict[str, bytes]:
    """The files of one sample. Raises OSError or ValueError for what must not be delivered."""
    caption = row["caption"]
    if not caption or not caption.strip() or "\ufffd" in caption:
        raise ValueError("the caption is empty or badly decoded")
    if row["file"] is None:
        raise ValueError("no file")
    try:
        data = read_bytes(root, row["file"], row["offset"], row["bytes"])
    except OSError as error:
        raise ValueError(f"{row['file']}: {error.strerror}") from error
    decode(data)
    image = Image.open(io.BytesIO(data))
    about = {
        "id": row["id"].hex(),
        "url": row["url"],
        "caption": caption,
        "domain": row["domain"],
        "width": image.width,
        "height": image.height,
    }
    suffix = {"JPEG": "jpg"}.get(image.format or "", (image.format or "bin").lower())
    return {
        suffix: data,
        "json": canonical_json(about).encode(),
        "txt": caption.encode(),
    }


def _whole_samples(path: Path) -> list[tuple[str, int, int, Member]]:
    """(key, start, end, record) of the samples of which every member is there; `.txt` is the last
    one, `.json` the record."""
    found: list[tuple[str, int, int, Member]] = []
    start, record = 0, None
    if not path.exists():
        return found
    try:
        for member in members(path):
            key, _, suffix = member.name.partition(".")
            if suffix == "json":
                record = member
            elif suffix == "txt" and record is not None:
                found.append((key, start, member.end, record))
                start = member.end
    except ValueError:  # a part may end anywhere
        pass
    return found


def sample_table(path: Path) -> pa.Table:
    """The columns LISTED of each sample in a tar, in its order."""
    found = _whole_samples(path)
    with path.open("rb") as handle:
        records = [json.loads(record.read(handle)) for *_, record in found]
    return pa.table(
        {
            "id": pa.array([bytes.fromhex(key) for key, *_ in found], pa.binary(16)),
            "offset": pa.array([start for _, start, _, _ in found], pa.int64()),
            "bytes": pa.array([end - start for _, start, end, _ in found], pa.int64()),
            "width": pa.array([record["width"] for record in records], pa.int32()),
            "height": pa.array([record["height"] for record in records], pa.int32()),
            "caption": pa.array([record["caption"] for record in records], pa.string()),
        }
    )
