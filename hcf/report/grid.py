"""Images side by side in one PNG. Captions go into the page and the PNG's text, never into pixels:
a machine without Chinese fonts would draw boxes."""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hcf.errors import StorageError


def as_image(image: Any) -> Image.Image:
    """A PIL image from PIL, numpy or torch: (H, W, 3), (3, H, W) or (H, W), uint8 or [0, 1] float.

    Raises:
        ValueError: another shape, values that are not finite.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image.detach().float().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"an image is (H, W, 3), (3, H, W) or (H, W), not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("an image holds values that are not finite")
    if array.dtype != np.uint8:
        array = (array.astype(np.float64).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def image_grid(
    images: Sequence[Any],
    columns: int,
    *,
    gap: int = 4,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Images of one size, row by row, `columns` a row, `gap` pixels apart and around.

    Raises:
        ValueError: no images, fewer than one column, or sizes that differ.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs images and columns, not {len(images)} and {columns}")
    tiles = [as_image(image) for image in images]
    width, height = tiles[0].size
    if any(tile.size != (width, height) for tile in tiles):
        raise ValueError(f"images of one size make a grid, not {sorted({t.size for t in tiles})}")
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    grid = Image.new("RGB", size, background)
    for i, tile in enumerate(tiles):
        grid.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return grid


def save_grid(
    path: Path,
    images: Sequence[Any],
    columns: int,
    *,
    captions: Sequence[str] | None = None,
    gap: int = 4,
) -> Path:
    """Writes the grid as PNG, whole or not at all; `captions` go into its text as a JSON list."""
    text = PngInfo()
    if captions is not None:
        if len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} images")
        text.add_itxt("captions", json.dumps(list(captions), ensure_ascii=False), lang="zh")
    buffer = io.BytesIO()
    image_grid(images, columns, gap=gap).save(buffer, "PNG", pnginfo=text, optimize=True)
    return replace_file(path, buffer.getvalue())


def png_data_uri(image: Any) -> str:
    """The image as a `data:` address, so that a page needs no second file."""
    buffer = io.BytesIO()
    as_image(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def replace_file(path: Path, content: bytes) -> Path:
    """Writes next to `path` and renames: a reader sees the old file or the new one."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", "free space or choose another output"
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path
