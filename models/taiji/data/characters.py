"""A generated world of sticker characters: who a character is stays, what it does changes.

A character is a head of some colour and shape with eyes cut out of it and perhaps a crown above.
Two hands float beside the head, and the action word says which of them are up. Several images of
one character with different actions are a pack. `read` gives all of this back from an image by
rules alone, so that identity and action of a generated image are measured exactly.

H = W image side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from random import Random

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from taiji.data.rule_judge import Blob, Floats, find, to_lab
from taiji.data.shapes import COLOURS, COLOURS_ZH, SHAPES_ZH, Box, Pixels, silhouette

HEAD_COLOURS = ("red", "orange", "yellow", "green", "blue", "pink")
HEADS = ("circle", "square", "heart")
CROWNS = ("none", "yellow", "blue", "black")
EYES = (1, 2)
# of each pose: the hand at the left side of the image is up, the one at the right side is
POSES: dict[str, tuple[bool, bool]] = {
    "down": (False, False), "left": (True, False), "right": (False, True), "both": (True, True),
}  # fmt: skip
POSES_ZH = {"down": "放下双手", "left": "升起左手", "right": "升起右手", "both": "升起双手"}
NOUN = "小怪物"

HAND, CROWN = 0.085, 0.105  # half sides, as shares of the image's
ASIDE, RAISED = 0.335, 0.2  # of a hand from the middle of the head
CROWN_ABOVE = 0.35
LEAST_EYE = 0.0015  # of the image: 6 pixels of 64 x 64
WHITE = to_lab((255, 255, 255))


@dataclass(frozen=True)
class Character:
    """Names are of `HEAD_COLOURS`, `HEADS` and `CROWNS`; `eyes` is their number."""

    colour: str
    shape: str
    crown: str = "none"
    eyes: int = 2

    def __post_init__(self) -> None:
        for value, known in (
            (self.colour, HEAD_COLOURS), (self.shape, HEADS), (self.crown, CROWNS),
            (self.eyes, EYES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(map(str, known))}")


@dataclass(frozen=True)
class Reading:
    """What an image shows; None where the rules find nothing."""

    colour: str | None = None
    shape: str | None = None
    crown: str | None = None
    eyes: int | None = None
    pose: str | None = None


IDENTITY = tuple(field.name for field in fields(Character))


def characters() -> list[Character]:
    """All of them, in a fixed order."""
    return [Character(*values) for values in product(HEAD_COLOURS, HEADS, CROWNS, EYES)]


def split(heldout: int, seed: int) -> tuple[list[Character], list[Character]]:
    """Characters to train on, and `heldout` others.

    Raises ValueError unless both have some.
    """
    found = characters()
    if not 0 < heldout < len(found):
        raise ValueError(f"heldout={heldout} of {len(found)} characters: keep some of both")
    Random(seed).shuffle(found)
    return found[heldout:], found[:heldout]


def caption(who: Character | None, pose: str | None, rng: Random | None = None) -> str:
    """The Chinese caption; without `who` of the action, without `pose` of the character alone.
    With `rng` what belongs to the character comes in any order.

    Raises ValueError for an unknown pose.
    """
    if pose is not None and pose not in POSES:
        raise ValueError(f"{pose!r} is not one of {', '.join(POSES)}")
    action = [] if pose is None else [POSES_ZH[pose]]
    if who is None:
        return "，".join([NOUN, *action])
    parts = ["独眼" if who.eyes == 1 else "双眼"]
    if who.crown != "none":
        parts.append(f"{COLOURS_ZH[who.crown]}皇冠")
    if rng is not None:
        rng.shuffle(parts)
    head = f"{COLOURS_ZH[who.colour]}的{SHAPES_ZH[who.shape]}{NOUN}"
    return "，".join([head, *parts, *action])


def texts() -> list[str]:
    """Every caption, for a tokenizer's vocabulary."""
    who: Iterable[Character | None] = [None, *characters()]
    return [caption(one, pose) for one in who for pose in POSES]


def render(who: Character, pose: str, size: int, rng: Random) -> Pixels:
    """(size, size, 3) uint8 on white; where it stands and how large it is come from `rng`.

    Raises:
        ValueError: an unknown pose, or `size` below 48, where eyes are too small to be counted.
    """
    if size < 48:
        raise ValueError(f"size {size} is below 48 pixels, where eyes cannot be counted")
    if pose not in POSES:
        raise ValueError(f"{pose!r} is not one of {', '.join(POSES)}")
    x, y = 0.5 + rng.uniform(-0.02, 0.02), 0.56 + rng.uniform(-0.02, 0.02)
    half = rng.uniform(0.185, 0.205)
    image = np.full((size, size, 3), 255, np.float32)
    paint = COLOURS[who.colour]
    _lay(image, who.shape, (x, y, half), paint)
    for box in _eyes(who.eyes, x, y):
        _lay(image, "circle", box, (255, 255, 255))
    if who.crown != "none":
        _lay(image, "triangle", (x, y - CROWN_ABOVE, CROWN), COLOURS[who.crown])
    for side, up in zip((-1, 1), POSES[pose], strict=True):
        _lay(image, "circle", (x + side * ASIDE, y - RAISED if up else y + RAISED, HAND), paint)
    return np.asarray(np.rint(image), np.uint8)


def _eyes(number: int, x: float, y: float) -> list[Box]:
    if number == 1:
        return [(x, y - 0.02, 0.075)]
    return [(x + side * 0.075, y - 0.03, 0.05) for side in (-1, 1)]


def _lay(image: npt.NDArray[np.float32], shape: str, box: Box, paint: tuple[int, int, int]) -> None:
    """Paints a shape over `image` (H, W, 3) in place."""
    cover = silhouette(shape, len(image), box)[..., None]
    image *= 1 - cover
    image += cover * np.asarray(paint, np.float32)


def pack(
    who: Character, rng: Random, *, size: int = 64, variations: int = 1
) -> list[tuple[str, Pixels]]:
    """Pose and image (size, size, 3) of every action of a character, `variations` of each."""
    return [(pose, render(who, pose, size, rng)) for pose in POSES for _ in range(variations)]


def read(image: Pixels) -> Reading:
    """image (H, W, 3) uint8 -> what it shows. The head is the largest object.

    Raises ValueError for another shape or dtype.
    """
    blobs = find(image)
    if not blobs:
        return Reading()
    head, rest = blobs[0], blobs[1:]
    lab = to_lab(image)
    colour = _nearest(lab, head, HEAD_COLOURS)
    crowns = [b for b in rest if head.y - b.y > 0.25 and abs(b.x - head.x) < 0.15]
    crown = "none" if not crowns else _nearest(lab, crowns[0], CROWNS[1:])
    eyes = _count_eyes(lab, colour)
    return Reading(
        colour=colour,
        shape=head.shape if head.shape in HEADS else None,
        crown=crown if len(crowns) < 2 else None,
        eyes=eyes if eyes in EYES else None,
        pose=_pose(head, [b for b in rest if b not in crowns]),
    )


def _nearest(lab: Floats, blob: Blob, names: Sequence[str]) -> str:
    """The colour of `names` nearest to the median of the blob's middle, less what is nearer white.

    `Blob.colour` is of the whole palette, most of which no character has.
    """
    reach = 0.4 * np.sqrt(blob.area)
    y, x = blob.y * lab.shape[0], blob.x * lab.shape[1]
    part = lab[
        int(max(0, y - reach)) : int(y + reach) + 1, int(max(0, x - reach)) : int(x + reach) + 1
    ]
    contrast = np.linalg.norm(part - WHITE, axis=-1)
    paint = np.median(part[contrast >= 0.7 * np.quantile(contrast, 0.95)], axis=0)
    away = [float(np.linalg.norm(paint - to_lab(COLOURS[name]))) for name in names]
    return names[int(np.argmin(away))]


def _pose(head: Blob, others: Sequence[Blob]) -> str | None:
    """None unless there is one hand on each side, clearly up or down."""
    left = [b.y - head.y for b in others if b.x < head.x - 0.2]
    right = [b.y - head.y for b in others if b.x > head.x + 0.2]
    if len(left) != 1 or len(right) != 1 or min(abs(left[0]), abs(right[0])) < 0.08:
        return None
    ups = (left[0] < 0, right[0] < 0)
    return next(pose for pose, hands in POSES.items() if hands == ups)


def _count_eyes(lab: Floats, colour: str) -> int:
    """lab (H, W, 3) -> holes in the head: pixels nearer to white than to its colour, walled in."""
    white = np.linalg.norm(lab - WHITE, axis=-1)
    solid = np.linalg.norm(lab - to_lab(COLOURS[colour]), axis=-1) <= white
    holes, number = ndimage.label(ndimage.binary_fill_holes(solid) & ~solid)
    areas = ndimage.sum_labels(holes > 0, holes, range(1, number + 1))
    return int(np.sum(np.asarray(areas) >= LEAST_EYE * solid.size))


def agreement(reading: Reading, who: Character) -> dict[str, bool]:
    """Whether each attribute of `who` was read."""
    return {name: getattr(reading, name) == getattr(who, name) for name in IDENTITY}
