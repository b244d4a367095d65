"""Columns that need an image's pixels but no model: can it be read, how complex is it, its hash.

H, W image side in pixels, of a gray reduction whose short side is at most SIDE.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, ConfigDict

from taiji.data.metadata import content_hash, read_images

Gray = npt.NDArray[np.float32]
Scorer = Callable[[Sequence[Image.Image]], npt.NDArray[np.floating[Any]]]

SIDE = 256  # measures depend on scale: larger images are reduced to this short side
EDGE = 32.0  # Sobel magnitude per pixel step, of 255
JPEG_QUALITY = 75
HASH_SIDE, HASH_LOW = 32, 8
DEAD_ZONE = 0.1
GRID = 4
SCORER_BATCH = 32


class ImageFilter(BaseModel):
    """Writes `readable`, `width`, `height`, `content` (hash of the bytes), `phash`, `colour` (mean
    RGB of a 4 x 4 grid), and the texture measures `entropy` (bits), `laplacian` (variance), `edges`
    (share), `jpeg_bytes` (a pixel)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def reduced(image: Image.Image) -> Image.Image:
    short = min(image.size)
    if short <= SIDE:
        return image
    width, height = (max(1, round(side * SIDE / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def entropy(gray: Gray) -> float:
    """gray (H, W) in 0 to 255 -> bits of the histogram's Shannon entropy, 0 to 8"""
    counts = np.bincount(gray.astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / gray.size
    return float(-(share * np.log2(share)).sum())


def laplacian_variance(gray: Gray) -> float:
    """gray (H, W) -> variance of the four-neighbour Laplacian: low is blurred or empty"""
    inner = gray[1:-1, 1:-1]
    response = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner
    return float(response.var(dtype=np.float64)) if response.size else 0.0


def edge_density(gray: Gray) -> float:
    """gray (H, W) -> share of pixels whose Sobel gradient is above EDGE"""
    down = gray[:-2] + 2 * gray[1:-1] + gray[2:]
    across = gray[:, :-2] + 2 * gray[:, 1:-1] + gray[:, 2:]
    x, y = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    strength = np.hypot(x, y) / 4  # the kernel's weights add up to 4 a side
    return float((strength > EDGE).mean()) if strength.size else 0.0


def jpeg_bytes(image: Image.Image) -> float:
    """Bytes a pixel of one fixed JPEG encoding: the source's own quality does not matter"""
    target = io.BytesIO()
    image.save(target, "jpeg", quality=JPEG_QUALITY)
    return target.tell() / (image.width * image.height)


@cache
def _dct() -> Gray:
    """The first HASH_LOW + 1 rows of the orthonormal DCT-II of HASH_SIDE samples"""
    k, n = np.mgrid[0 : HASH_LOW + 1, 0:HASH_SIDE]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * HASH_SIDE)).astype(np.float32)


def perceptual_hash(gray: Image.Image) -> int:
    """64 bits: which of 8 x 8 low DCT frequencies are above their median (Zauner 2010, pHash).

    Row and column 0 are left out: they hold brightness and shading, not structure. A bit needs
    DEAD_ZONE of the frequencies' size beyond the median: half of a symmetric drawing's frequencies
    are zero, and their bits would be noise that every re-encoding changes. An image without
    structure has the hash 0.
    """
    size = (HASH_SIDE, HASH_SIDE)
    small = np.asarray(gray.convert("L").resize(size, Image.Resampling.BOX), np.float32)
    basis = _dct()
    low = np.round((basis @ small @ basis.T)[1:, 1:], 1)
    bits = low > np.median(low) + DEAD_ZONE * np.sqrt(np.square(low).mean())
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def colour_grid(image: Image.Image) -> bytes:
    """The mean RGB of GRID x GRID cells, row by row: what a hash of the gray image cannot tell"""
    return image.resize((GRID, GRID), Image.Resampling.BOX).tobytes()


def measure(data: bytes, image: Image.Image) -> dict[str, Any]:
    """The columns of one image."""
    small = reduced(image)
    gray_image = small.convert("L")
    gray = np.asarray(gray_image, np.float32)
    return {
        "readable": True,
        "width": image.width,
        "height": image.height,
        "content": content_hash(data),
        "phash": perceptual_hash(gray_image),
        "colour": colour_grid(small),
        "entropy": entropy(gray),
        "laplacian": laplacian_variance(gray),
        "edges": edge_density(gray),
        "jpeg_bytes": jpeg_bytes(small),
    }


SCHEMA = pa.schema(
    [
        ("readable", pa.bool_()),
        ("unreadable_because", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("content", pa.string()),
        ("phash", pa.uint64()),
        ("colour", pa.binary(3 * GRID * GRID)),
        ("entropy", pa.float32()),
        ("laplacian", pa.float32()),
        ("edges", pa.float32()),
        ("jpeg_bytes", pa.float32()),
    ]
)


def image_columns(rows: pa.Table, root: Path) -> dict[str, pa.Array]:
    """rows (N; file, offset, bytes) -> columns of N rows; an unreadable image says why"""
    found = [
        measure(*item)
        if not isinstance(item, str)
        else {"readable": False, "unreadable_because": item}
        for item in read_images(root, rows)
    ]
    table = pa.Table.from_pylist(found, SCHEMA)
    return {name: table[name].combine_chunks() for name in SCHEMA.names}


def scorer_column(rows: pa.Table, root: Path, scorer: Scorer) -> pa.Array:
    """rows (N) -> the scorer's value of each image (N) float32, null where it cannot be read"""
    values: list[float | None] = []
    waiting: list[Image.Image] = []
    places: list[int] = []

    def score() -> None:
        for place, value in zip(places, scorer(waiting) if waiting else (), strict=True):
            values[place] = float(value)
        waiting.clear()
        places.clear()

    for item in read_images(root, rows):
        values.append(None)
        if not isinstance(item, str):
            waiting.append(item[1])
            places.append(len(values) - 1)
        if len(waiting) == SCORER_BATCH:
            score()
    score()
    return pa.array(values, pa.float32())
