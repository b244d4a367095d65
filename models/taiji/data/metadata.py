"""Metadata of image-caption pairs: one row a pair, in Parquet parts that are the units of work.

A row names its image by `file` below a root, and by `offset` and `bytes` where the file is a tar
that holds many. Its id is 128 bits of the image's identity (url, else content hash, else file) and
its caption: it stays the same however the rows are ordered, split or moved.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(
        f"the data engine needs pyarrow ({error}): pip install 'hcf-toolkit[data]'"
    ) from error

SCHEMA = pa.schema(
    [
        ("id", pa.binary(16)),
        ("url", pa.string()),
        ("hash", pa.string()),  # of the image's bytes, where the source knows it
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("language", pa.string()),
        ("domain", pa.string()),
        ("tags", pa.list_(pa.string())),
    ]
)


def row_id(identity: str, caption: str | None) -> bytes:
    """128-bit BLAKE2b of an image's identity and its caption."""
    text = f"{identity}\0{caption or ''}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def content_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of one file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def path_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        return file_hash(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise FileNotFoundError(f"{path} is missing or empty")
    listed = [f"{p.relative_to(path).as_posix()} {file_hash(p)}" for p in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def json_hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet under a temporary name, then renamed: a part that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def write_json(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def part_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def read_columns(folders: Sequence[Path], columns: Sequence[str]) -> pa.Table:
    """The named columns of all rows; of two folders with a column the later one has its way.

    Raises:
        ValueError: a column that no folder has; the message lists those there are.
    """
    owner: dict[str, Path] = {}
    for folder in folders:
        for name in pq.read_schema(part_paths(folder)[0]).names:
            owner[name] = folder
    missing = [name for name in columns if name not in owner]
    if missing:
        raise ValueError(
            f"no column {', '.join(missing)}: run the filter that writes it, or choose from "
            f"{', '.join(sorted(owner))}"
        )
    found = {}
    for name in columns:
        parts = [pq.read_table(path, columns=[name])[name] for path in part_paths(owner[name])]
        found[name] = pa.chunked_array([chunk for part in parts for chunk in part.chunks])
    return pa.table(found)


def fixed_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """A column (N,) of W bytes each -> (N, W) uint8; what stands for null is not defined."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, width * len(chunk), width * chunk.offset)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).reshape(-1, width)


def ids_as_integers(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """ids (N,) of 16 bytes -> (N, 2) uint64 that sort as the bytes do."""
    return fixed_bytes(ids).view(">u8").astype(np.uint64)


def id_order(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """ids (N, 2) -> the rows in ascending order of their ids; equal ids stay in row order."""
    return np.lexsort((ids[:, 1], ids[:, 0]))


def read_bytes(root: Path, file: str, offset: int | None, size: int | None) -> bytes:
    """The image's bytes as stored. Raises OSError for a missing file, ValueError for a cut one."""
    with (root / file).open("rb") as handle:
        if offset is None:
            return handle.read()
        handle.seek(offset)
        data = handle.read(size)
    if size is not None and len(data) < size:
        raise ValueError(f"{file} ends before byte {offset + size}")
    return data


def decode(data: bytes) -> Image.Image:
    """An RGB image, transparency on white. Raises ValueError for what cannot be decoded whole."""
    try:
        opened = Image.open(io.BytesIO(data))
        opened.load()
        image: Image.Image = opened
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except UnidentifiedImageError as error:  # its text is of an object in memory
        raise ValueError("not a readable image") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"not a readable image: {error}") from error
    except (OSError, SyntaxError, IndexError, EOFError) as error:  # what Pillow's decoders raise
        raise ValueError(f"damaged image: {error}") from error


def read_images(root: Path, rows: pa.Table) -> Iterator[tuple[bytes, Image.Image] | str]:
    """For each row (columns file, offset, bytes) its bytes and image, or why there is none."""
    for file, offset, size in zip(
        rows["file"].to_pylist(), rows["offset"].to_pylist(), rows["bytes"].to_pylist(), strict=True
    ):
        if file is None:
            yield "no file"
            continue
        try:
            data = read_bytes(root, file, offset, size)
            yield data, decode(data)
        except (OSError, ValueError) as error:
            yield str(error)
