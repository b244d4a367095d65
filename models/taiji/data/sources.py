"""Where pairs come from: a table, webdataset tars, the emoji, the shapes world.

`ingest` turns a source into metadata parts (see `metadata`) and says what it found. It is repeated
only when the source changed.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from taiji.data import emoji, shapes
from taiji.data.metadata import (
    SCHEMA,
    content_hash,
    json_hash,
    part_path,
    part_paths,
    path_hash,
    row_id,
    write_json,
    write_table,
)
from taiji.data.tar import END, Member, members, tar_bytes
from taiji.data.workers import Engine, run_tasks

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableSource(_Source):
    """Parquet (a file or a folder) or CSV: `caption`, and `file` below `images` or `url`; every
    other column is kept, scores included. `columns` renames: {ours: theirs}."""

    kind: Literal["table"] = "table"
    path: Path
    images: Path | None = None
    columns: dict[str, str] = {}


class TarSource(_Source):
    """A folder of webdataset tars: per key an image, `.txt` and/or `.json` (caption, url, domain,
    tags, language), as img2dataset writes them. Each tar is one part."""

    kind: Literal["tars"] = "tars"
    path: Path


class EmojiSource(_Source):
    """What `hcf data build emoji` made, as PNG; the domain is the emoji's group."""

    kind: Literal["emoji"] = "emoji"
    path: Path
    size: int = 128
    vendors: tuple[str, ...] = emoji.GENERATOR_VENDORS


class ShapesSource(_Source):
    """Generated scenes, as PNG; the domain is the kind of the (first) object."""

    kind: Literal["shapes"] = "shapes"
    count: int = Field(gt=0)
    size: int = 64
    seed: int = 0


Source = Annotated[
    TableSource | TarSource | EmojiSource | ShapesSource, Field(discriminator="kind")
]


def images_root(source: Source, output: Path) -> Path:
    """The folder below which the rows' files lie."""
    if isinstance(source, TableSource):
        return source.images or (source.path if source.path.is_dir() else source.path.parent)
    return source.path if isinstance(source, TarSource) else output / "source"


def source_key(source: Source, rows_per_part: int) -> str:
    """Whether a source is still the one that was read: its settings, and names, sizes and times of
    its files. What was read is hashed in `metadata.json`.

    Raises:
        FileNotFoundError: there is nothing at the source's path.
    """
    tree = source.model_dump(mode="json", exclude={"path", "images"})
    if not isinstance(source, ShapesSource):
        tree["files"] = [
            [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in _files(source)
        ]
    return json_hash({"source": tree, "rows_per_part": rows_per_part})


def ingest(
    source: Source,
    output: Path,
    *,
    rows_per_part: int,
    workers: int = 1,
    engine: Engine = "local",
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Metadata parts of `source` in `output`/metadata; returns what `metadata.json` says."""
    folder, report = output / "metadata", output / "metadata.json"
    key = source_key(source, rows_per_part)
    if report.is_file():
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        if found["source"] == key:
            return found
    shutil.rmtree(folder, ignore_errors=True)
    report.unlink(missing_ok=True)
    damaged: list[str] = []
    if isinstance(source, TableSource):
        for number, table in enumerate(_table_parts(source, rows_per_part)):
            write_table(table, part_path(folder, number))
    else:
        root = images_root(source, output)
        if not isinstance(source, TarSource):
            shutil.rmtree(root, ignore_errors=True)
            _write_tars(_generated(source), root, rows_per_part)
        tasks = [(path, part_path(folder, i)) for i, path in enumerate(sorted(root.glob("*.tar")))]
        found_damage = run_tasks(ingest_tar, tasks, workers=workers, engine=engine)
        damaged = [problem for problem in found_damage if problem]
    parts = part_paths(folder)
    rows = sum(pq.read_metadata(path).num_rows for path in parts)
    if not rows:
        raise ValueError("the source holds no rows")
    hashes = [path_hash(path) for path in parts]
    found = {"source": key, "key": json_hash(hashes), "rows": rows, "parts": len(parts)}
    write_json({**found, "damaged": damaged}, report)
    log(f"metadata: {rows:,} rows in {len(parts)} parts, {len(damaged)} damaged tars")
    return found


def _files(source: TableSource | TarSource | EmojiSource) -> list[Path]:
    if source.path.is_file():
        return [source.path]
    kind = "*.tar" if isinstance(source, TarSource) else "*.parquet"
    found = sorted(source.path.rglob(kind))
    if not found:
        raise FileNotFoundError(f"no {kind} in {source.path}")
    return found


def _table_parts(source: TableSource, rows: int) -> Iterator[pa.Table]:
    """Tables of exactly `rows` rows (the last may be shorter), whatever the files' own chunks."""
    waiting: list[pa.Table] = []
    for batch in _table_batches(source.path):
        waiting.append(_normal(batch, source.columns))
        table = pa.concat_tables(waiting, promote_options="default")
        while table.num_rows >= rows:
            yield table.slice(0, rows).combine_chunks()
            table = table.slice(rows)
        waiting = [table]
    if waiting and waiting[0].num_rows:
        yield waiting[0].combine_chunks()


def _table_batches(path: Path) -> Iterator[pa.Table]:
    if path.suffix == ".csv":
        for batch in pa_csv.open_csv(path):
            yield pa.Table.from_batches([batch])
        return
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=16384):
            yield pa.Table.from_batches([batch])


def _normal(table: pa.Table, renames: dict[str, str]) -> pa.Table:
    """Any table -> the columns of SCHEMA, then its own others; ids are always made here."""
    theirs = {old: new for new, old in renames.items()}
    table = table.rename_columns([theirs.get(name, name) for name in table.column_names])
    names = set(table.column_names)
    if "caption" not in names or not names & {"url", "hash", "file"}:
        raise ValueError(
            f"the table has {', '.join(sorted(names))}: it needs caption and one of url, hash, "
            "file; map them with source.columns"
        )
    columns = {
        field.name: table[field.name].cast(field.type)
        if field.name in names
        else pa.nulls(len(table), field.type)
        for field in SCHEMA
    }
    identity = zip(
        *(columns[name].to_pylist() for name in ("url", "hash", "file", "caption")), strict=True
    )
    ids = [row_id(url or digest or file or "", text) for url, digest, file, text in identity]
    columns["id"] = pa.array(ids, pa.binary(16))
    others = {name: table[name] for name in table.column_names if name not in SCHEMA.names}
    return pa.table({**columns, **others})


def ingest_tar(task: tuple[Path, Path]) -> str:
    """Writes the metadata part of one tar; what is wrong with it, if anything. The samples before
    the damage are used."""
    path, target = task
    rows: list[dict[str, Any]] = []
    problem = ""
    try:
        rows.extend(_tar_row(path, key, found) for key, found in _samples(path))
    except ValueError as error:
        problem = str(error)
    write_table(pa.Table.from_pylist(rows, SCHEMA), target)
    return problem


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {suffix: member}) of a tar whose members of one key lie together."""
    key, found = "", dict[str, Member]()
    for member in members(path):
        base, _, suffix = member.name.partition(".")
        if base != key and found:
            yield key, found
            found = {}
        key = base
        found[suffix.lower()] = member
    if found:
        yield key, found


def _tar_row(path: Path, key: str, found: dict[str, Member]) -> dict[str, Any]:
    with path.open("rb") as handle:
        text = {
            suffix: found[suffix].read(handle).decode("utf-8", "replace")
            for suffix in ("json", "txt")
            if suffix in found
        }
        image = next((found[s] for s in IMAGE_SUFFIXES if s in found), None)
        digest = content_hash(image.read(handle)) if image else None
    try:
        about = json.loads(text.get("json", "{}"))
    except json.JSONDecodeError:
        about = None
    if isinstance(about, dict):
        caption = text.get("txt", about.get("caption"))
    else:  # damaged: as a pair without a caption it is counted, rejected and listed
        about, caption = {}, None
    row = {name: about.get(name) for name in ("url", "language", "domain", "width", "height")}
    return {
        **row,
        "id": row_id(row["url"] or digest or f"{path.name}/{key}", caption),
        "hash": digest,
        "file": path.name if image else None,
        "offset": image.data if image else None,
        "bytes": image.size if image else None,
        "caption": caption,
        "tags": about.get("tags"),
    }


Sample = tuple[Image.Image, str, dict[str, Any]]


def _generated(source: EmojiSource | ShapesSource) -> Iterator[Sample]:
    """(image, caption, metadata) of a source whose images are arrays."""
    if isinstance(source, ShapesSource):
        for scene, caption, pixels in shapes.sample(source.count, source.seed, size=source.size):
            yield Image.fromarray(pixels), caption, {"domain": scene.objects[0].shape}
        return
    images, rows = emoji.load(source.path, source.size, source.vendors)
    for pixels, row in zip(images, rows, strict=True):
        caption = emoji.STYLES[row["vendor"]] + row["label"]
        yield Image.fromarray(pixels), caption, {"domain": row["group"], "tags": row["tags"]}


def _write_tars(samples: Iterable[Sample], root: Path, rows_per_tar: int) -> None:
    root.mkdir(parents=True)
    write = partial(_write_tar, root)
    waiting: list[bytes] = []
    number = 0
    for index, (image, caption, about) in enumerate(samples):
        png = io.BytesIO()
        image.save(png, "png")
        files = {"json": json.dumps({"caption": caption, **about}, ensure_ascii=False).encode()}
        waiting.append(tar_bytes(f"{index:09d}", {"png": png.getvalue(), **files}))
        if len(waiting) == rows_per_tar:
            write(number, waiting)
            waiting, number = [], number + 1
    if waiting:
        write(number, waiting)


def _write_tar(root: Path, number: int, samples: list[bytes]) -> None:
    path = root / f"{number:05d}.tar"
    path.write_bytes(b"".join(samples) + END)
