"""Scores an image of the coloured-shapes world exactly: colour, shape, count, position.

Objects are the connected regions that differ from the background. Each is named after the nearest
palette colour in CIELAB and the template that its outline covers best (intersection over union of
the regions scaled to the same bounding square). No learned part: the same image always scores the
same. Shape legend: H = W image side, T template side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from taiji.data.shapes import COLOURS, SHAPES, Group, Scene, silhouette

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

SMOOTHING = 0.5  # sigma in pixels of a 64-pixel image, against noise
LEAST_CONTRAST = 14.0  # CIELAB distance from the background; a just visible one is about 2
EDGE_LEVEL = 0.35  # of a region's own contrast: above blur, below the light part of a texture
OUTLINE_LEVELS = (EDGE_LEVEL, 0.5, 0.65)  # the higher ones undo blur and bleeding colour
LEAST_AREA = 0.004  # of the image: 16 pixels of 64 x 64; anything smaller is a speck
LEAST_RELATIVE_AREA = 0.12  # of the largest region
TEMPLATE = 32
LEAST_IOU = 0.62


@dataclass(frozen=True)
class Blob:
    """One object found: its names (shape None when nothing fits), place and area in pixels."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: int
    iou: float


def to_lab(rgb: npt.ArrayLike) -> Floats:
    """sRGB (..., 3) in 0 to 255 -> CIELAB (..., 3), white point D65 (IEC 61966-2-1, CIE 15)."""
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ matrix.T / matrix.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


def _normalise(region: Mask) -> Floats:
    """region (H, W) -> (T, T) in [0, 1]: its bounding square, centred, aspect kept."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    part = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(part.shape)
    square = np.zeros((side, side), np.float32)
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    scaled = Image.fromarray(square).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(scaled, np.float64), 0, 1)


@cache
def _templates() -> tuple[tuple[str, Floats], ...]:
    """Each shape as it looks when small, medium and large, sharp and blurred."""
    found = []
    for shape in SHAPES:
        for half in (0.14, 0.2, 0.3):
            cover = silhouette(shape, 64, (0.5, 0.5, half))
            for sigma in (0.0, 1.0):
                soft = ndimage.gaussian_filter(cover, sigma) if sigma else cover
                found.append((shape, _normalise(soft > EDGE_LEVEL)))
    return tuple(found)


@cache
def _palette() -> tuple[tuple[str, ...], Floats]:
    return tuple(COLOURS), to_lab(list(COLOURS.values()))


def find(image: npt.NDArray[np.uint8]) -> list[Blob]:
    """image (H, W, 3) uint8 -> the objects in it, largest first.

    Raises:
        ValueError: another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    side = min(image.shape[:2])
    sigma = SMOOTHING * side / 64
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0))
    border = np.concatenate([smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1]])
    lab = to_lab(smooth)
    contrast = np.linalg.norm(lab - to_lab(np.median(border, axis=0)), axis=-1)
    least = LEAST_AREA * image.shape[0] * image.shape[1]
    blobs: list[Blob] = []
    coarse, number = ndimage.label(contrast > LEAST_CONTRAST)
    for label in range(1, number + 1):
        region = coarse == label
        if region.sum() < least:
            continue
        # its own edge lies at a share of its own contrast; weak bridges between two objects break
        strong = float(np.quantile(contrast[region], 0.9))
        fine, parts = ndimage.label(region & (contrast > max(LEAST_CONTRAST, EDGE_LEVEL * strong)))
        for part in range(1, parts + 1):
            piece = ndimage.binary_fill_holes(fine == part)
            if piece is not None and piece.sum() >= least:
                blobs.append(_name(piece, lab, contrast))
    blobs.sort(key=lambda blob: -blob.area)
    return [blob for blob in blobs if blob.area >= LEAST_RELATIVE_AREA * blobs[0].area]


def _name(piece: Mask, lab: Floats, contrast: Floats) -> Blob:
    """The colour of the most contrasting part (edges and tints are paler) and the best outline."""
    names, palette = _palette()
    depth = ndimage.distance_transform_edt(piece)
    core = piece & (depth >= min(2.0, 0.7 * float(depth.max())))
    chosen = core & (contrast >= np.quantile(contrast[core], 0.6))
    nearest = np.linalg.norm(palette - np.median(lab[chosen], axis=0), axis=-1)
    strong = float(np.quantile(contrast[piece], 0.9))
    levels = [ndimage.binary_fill_holes(piece & (contrast > v * strong)) for v in OUTLINE_LEVELS]
    scores = [
        (float(np.minimum(outline, t).sum() / np.maximum(outline, t).sum()), shape)
        for outline in (_normalise(level) for level in levels)
        for shape, t in _templates()
    ]
    iou, shape = max(scores)
    y, x = ndimage.center_of_mass(piece)
    return Blob(
        colour=names[int(nearest.argmin())],
        shape=shape if iou >= LEAST_IOU else None,
        x=float(x) / piece.shape[1],
        y=float(y) / piece.shape[0],
        area=int(piece.sum()),
        iou=iou,
    )


def judge(image: npt.NDArray[np.uint8], truth: dict[str, Any]) -> dict[str, bool | None]:
    """Whether `image` (H, W, 3) shows `truth` (see `Scene.truth`): colour, shape, count, position.

    The four are scored apart. One group: colour and shape hold when more than half of the objects
    found have them, count when their number is right, and position is None. A relation: the two
    objects found that fit best are compared with the two asked for; colour and shape must be right
    for both, the count must be two, and the position is right when the larger offset between them
    points the asked way and both were recognised by colour or shape.

    Raises:
        ValueError: not an image (see `find`) or not a scene.
    """
    scene = Scene.from_truth(truth)
    blobs = find(image)
    if scene.relation is None:
        thing = scene.objects[0]
        return {
            "colour": 2 * sum(b.colour == thing.colour for b in blobs) > len(blobs),
            "shape": 2 * sum(b.shape == thing.shape for b in blobs) > len(blobs),
            "count": len(blobs) == thing.count,
            "position": None,
        }
    count = len(blobs) == 2
    if len(blobs) < 2:
        return {"colour": False, "shape": False, "count": count, "position": False}
    pairs: list[tuple[Blob, Blob]] = list(permutations(blobs[:8], 2))
    first, second = max(pairs, key=lambda pair: _agreement(pair, scene.objects))
    pair = ((first, scene.objects[0]), (second, scene.objects[1]))
    known = all(b.colour == o.colour or b.shape == o.shape for b, o in pair)
    return {
        "colour": all(b.colour == o.colour for b, o in pair),
        "shape": all(b.shape == o.shape for b, o in pair),
        "count": count,
        "position": known and _offset(first, second) == scene.relation,
    }


def _agreement(blobs: Sequence[Blob], objects: Sequence[Group]) -> int:
    pairs = zip(blobs, objects, strict=True)
    return sum((b.colour == o.colour) + (b.shape == o.shape) for b, o in pairs)


def _offset(first: Blob, second: Blob) -> str:
    """The relation of `first` to `second` along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"
