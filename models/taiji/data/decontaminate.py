"""Finds training pairs that are evaluation items: the same picture, resized, re-encoded or slightly
cropped, or the same caption.

V variants of an evaluation image, N rows of the training data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji.data.caption_filters import normal_form, text_keys
from taiji.data.duplicates import Hashes, hamming_pairs
from taiji.data.image_filters import perceptual_hash, reduced
from taiji.data.metadata import decode

# Kept intervals of each axis: a training image cut by up to a tenth is close to one of them
INTERVALS = ((0.0, 1.0), (0.0, 0.95), (0.05, 1.0), (0.04, 0.96), (0.0, 0.9), (0.1, 1.0))
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class EvaluationFilter(BaseModel):
    """Writes `evaluation_distance`, the Hamming distance to the nearest evaluation image up to
    `distance` (null beyond), and `evaluation_caption`. `images` is a folder, or Parquet with a
    column `phash`; `captions` a text file with one a line. Captions shorter than `least_characters`
    in normal form (猫) are too common to tell anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Path | None = None
    captions: Path | None = None
    distance: int = Field(8, ge=0, le=16)
    least_characters: int = Field(6, ge=1)

    @model_validator(mode="after")
    def _names_something(self) -> EvaluationFilter:
        if self.images is None and self.captions is None:
            raise ValueError("filters.evaluation needs images, captions or both")
        return self


def variants(image: Image.Image) -> Hashes:
    """An evaluation image -> hashes (V,) of it and of its crops"""
    gray = reduced(image).convert("L")
    width, height = gray.size
    found = [
        perceptual_hash(
            gray.crop((round(a * width), round(c * height), round(b * width), round(d * height)))
        )
        for (a, b), (c, d) in product(INTERVALS, INTERVALS)
    ]
    return np.array(found, np.uint64)


def evaluation_hashes(images: Path, log: Callable[[str], object] = print) -> Hashes:
    """Sorted distinct hashes of a folder's images with their crops, or of a Parquet's `phash`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an image of the evaluation set cannot be read.
    """
    if images.is_file():
        found = pq.read_table(images, columns=["phash"])["phash"].to_numpy()
        return np.unique(found.astype(np.uint64))
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no images in {images}: filters.evaluation.images names them")
    hashes = []
    for path in files:
        try:
            hashes.append(variants(decode(path.read_bytes())))
        except ValueError as error:
            raise ValueError(f"evaluation image {path.name}: {error}; mend or remove it") from error
    log(f"evaluation: {len(files):,} images")
    return np.unique(np.concatenate(hashes))


def caption_keys(captions: Path, least_characters: int) -> Hashes:
    """Sorted distinct keys of the normal forms of a file's lines."""
    lines = captions.read_text(encoding="utf-8").splitlines()
    normal = normal_form(pa.array(lines, pa.string())).to_pylist()
    return np.unique(text_keys([text for text in normal if len(text) >= least_characters]))


def evaluation_columns(
    rows: pa.Table, hashes: Hashes | None, captions: Hashes | None, distance: int
) -> dict[str, pa.Array]:
    """rows (N; phash, caption_key where they are asked for) -> the filter's columns (N)"""
    columns = {}
    if hashes is not None:
        near = nearest_distance(rows["phash"], hashes, distance)
        columns["evaluation_distance"] = pa.array(near, pa.uint8(), mask=near > distance)
    if captions is not None:
        known = pc.is_in(rows["caption_key"], value_set=pa.array(captions))
        columns["evaluation_caption"] = known.combine_chunks()
    return columns


def nearest_distance(
    column: pa.ChunkedArray, hashes: Hashes, distance: int
) -> npt.NDArray[np.uint8]:
    """phash (N) -> Hamming distance (N) to the nearest of `hashes`; 255 beyond `distance`"""
    known = column.is_valid().to_numpy()
    own = pc.fill_null(column, 0).to_numpy().astype(np.uint64)
    result = np.full(len(own), 255, np.uint8)
    rows = np.flatnonzero(known)
    query, match = hamming_pairs(own[rows], hashes, distance)
    np.minimum.at(result, rows[query], np.bitwise_count(own[rows][query] ^ hashes[match]))
    return result
