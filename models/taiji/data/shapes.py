"""A generated world of coloured shapes with Chinese and English captions and exact ground truth.

A scene is one group of equal objects, or two single objects with a relation. It states what the
caption may ask for; places and sizes are drawn while rendering. Antialiased, on white. Some
(colour, shape, count) triples and some pairs never occur in the "train" split: see `split_of`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from random import Random
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.float32]
Box = tuple[float, float, float]  # centre x, centre y, half side; all as shares of the image side
Split = Literal["train", "heldout"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (250, 130, 20),
    "yellow": (252, 212, 30),
    "green": (56, 176, 60),
    "cyan": (20, 190, 200),
    "blue": (40, 100, 235),
    "navy": (22, 28, 110),
    "purple": (140, 50, 190),
    "pink": (250, 140, 185),
    "brown": (125, 75, 35),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
}
COLOURS_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色",
    "blue": "蓝色", "navy": "深蓝色", "purple": "紫色", "pink": "粉色", "brown": "棕色",
    "gray": "灰色", "black": "黑色",
}  # fmt: skip
SHAPES_ZH = {
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "五角星",
    "heart": "心形", "diamond": "菱形", "cross": "十字形", "crescent": "月牙形",
}  # fmt: skip
SHAPES = tuple(SHAPES_ZH)
TEXTURES = ("solid", "striped", "dotted")
TEXTURES_ZH = {"striped": "带条纹的", "dotted": "带圆点的"}
RELATIONS_ZH = {"left": "左", "right": "右", "above": "上", "below": "下"}
RELATIONS_EN = {
    "left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
}  # fmt: skip
COUNTS_ZH = ("", "一", "两", "三", "四", "五", "六")
COUNTS_EN = ("", "one", "two", "three", "four", "five", "six")
MAX_COUNT = 6

HELDOUT_SHARE = 0.10
TINT = 0.5  # share of white in the light part of a texture
OVERSAMPLING = 6
EDGE = 0.03  # white rim, and twice this the least gap between two objects
# half side of an object by the number of objects in the scene
HALF_SIDE = (
    (), (0.22, 0.36), (0.16, 0.21), (0.15, 0.19), (0.15, 0.20), (0.122, 0.132), (0.122, 0.132),
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """`count` equal objects; names are keys of `COLOURS`, `SHAPES` and `TEXTURES`."""

    colour: str
    shape: str
    count: int = 1
    texture: str = "solid"

    def __post_init__(self) -> None:
        for value, known in (
            (self.colour, COLOURS), (self.shape, SHAPES), (self.texture, TEXTURES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count {self.count} is outside 1 to {MAX_COUNT}")


@dataclass(frozen=True)
class Scene:
    """One group, or two different single objects where the first is `relation` of the second."""

    objects: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.relation is None:
            if len(self.objects) != 1:
                raise ValueError("a scene without a relation has exactly one group")
            return
        if self.relation not in RELATIONS_ZH:
            raise ValueError(f"{self.relation!r} is not one of {', '.join(RELATIONS_ZH)}")
        looks = {(thing.colour, thing.shape) for thing in self.objects}
        if len(self.objects) != 2 or len(looks) != 2 or any(o.count != 1 for o in self.objects):
            raise ValueError("a relation holds between two single objects that look different")

    def truth(self) -> dict[str, Any]:
        """The scene as plain JSON values, for prompt files and the rule judge."""
        return {"objects": [asdict(thing) for thing in self.objects], "relation": self.relation}

    @staticmethod
    def from_truth(truth: dict[str, Any]) -> Scene:
        """The inverse of `truth()`. Raises ValueError for unknown names or counts."""
        try:
            return Scene(tuple(Group(**thing) for thing in truth["objects"]), truth["relation"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene: {truth!r} ({error})") from error


def _share(key: str) -> float:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(scene: Scene) -> Split:
    """heldout when a (colour, shape, count) triple, or the pair in either order, is held out."""
    keys = [f"{thing.colour} {thing.shape} {thing.count}" for thing in scene.objects]
    if len(keys) == 2:
        keys.append(" | ".join(sorted(keys)))
    return "heldout" if any(_share(key) < HELDOUT_SHARE for key in keys) else "train"


def caption(scene: Scene, lang: str = "zh", rng: Random | None = None) -> str:
    """A natural caption; with `rng` one of several wordings, without it the plainest one.

    Raises:
        ValueError: `lang` is neither "zh" nor "en".
    """
    if lang not in ("zh", "en"):
        raise ValueError(f"captions are written in zh or en, not {lang!r}")
    if scene.relation is None:
        forms = _group_zh(scene.objects[0]) if lang == "zh" else _group_en(scene.objects[0])
    elif lang == "zh":
        forms = _relation_zh(scene.objects[0], scene.objects[1], scene.relation)
    else:
        first, second = (_group_en(thing)[0] for thing in scene.objects)
        forms = [f"{first} {RELATIONS_EN[scene.relation]} {second}"]
    return forms[0] if rng is None else rng.choice(forms)


def _noun_zh(thing: Group) -> tuple[str, str]:
    """The two usual wordings: 红色的圆形 and 红色圆形."""
    adjective = TEXTURES_ZH.get(thing.texture, "") + COLOURS_ZH[thing.colour]
    return f"{adjective}的{SHAPES_ZH[thing.shape]}", f"{adjective}{SHAPES_ZH[thing.shape]}"


def _group_zh(thing: Group) -> list[str]:
    full, short = _noun_zh(thing)
    number = COUNTS_ZH[thing.count]
    forms = [f"{number}个{full}", f"{number}个{short}"]
    if thing.shape in ("star", "heart"):
        forms.append(f"{number}颗{full}")
    forms += [
        f"图中有{number}个{full}", f"画面上有{number}个{short}", f"白色背景上的{number}个{full}",
    ]  # fmt: skip
    return forms + [full, short] if thing.count == 1 else forms


def _group_en(thing: Group) -> list[str]:
    texture = "" if thing.texture == "solid" else f"{thing.texture} "
    noun = f"{texture}{thing.colour} {thing.shape}"
    if thing.count == 1:
        return [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}", f"one {noun}"]
    plural = noun + ("es" if thing.shape == "cross" else "s")
    return [f"{COUNTS_EN[thing.count]} {plural}"]


def _relation_zh(first: Group, second: Group, relation: str) -> list[str]:
    side = RELATIONS_ZH[relation]
    other = RELATIONS_ZH[_OPPOSITE[relation]]
    (a, a_short), (b, b_short) = _noun_zh(first), _noun_zh(second)
    word = "边" if relation in ("left", "right") else "面"
    return [
        f"{a}在{b}{side}{word}",
        f"{a}在{b}的{side}{word}",
        f"一个{a}在一个{b}的{side}{word}",
        f"{a_short}在{b_short}{side}{word}",
        f"{b}的{side}{word}有一个{a}",
        f"{side}{word}是{a}，{other}{word}是{b}",
        f"{b}在{a}的{other}{word}",
    ]


_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The polygon of a shape in [-1, 1] x [-1, 1], y downwards; it touches the square's sides."""
    if shape == "circle":
        turn = [2 * math.pi * i / 64 for i in range(64)]
        return tuple((math.cos(t), math.sin(t)) for t in turn)
    if shape == "square":
        return ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
    if shape == "triangle":
        return ((0.0, -0.9), (1.0, 0.85), (-1.0, 0.85))
    if shape == "diamond":
        return ((0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0))
    if shape == "cross":
        a = 0.32
        return (
            (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
            (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a),
        )  # fmt: skip
    if shape == "star":
        spokes = [(i, 1.05 if i % 2 == 0 else 0.45) for i in range(10)]
        return tuple(
            (r * math.sin(math.pi * i / 5), 0.1 - r * math.cos(math.pi * i / 5)) for i, r in spokes
        )
    if shape == "heart":
        turn = [2 * math.pi * i / 64 for i in range(64)]
        wave = [
            13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            for t in turn
        ]
        return tuple((math.sin(t) ** 3, -(w + 2.5) / 15) for t, w in zip(turn, wave, strict=True))
    assert shape == "crescent"  # two arcs: a circle less a circle shifted to the right
    outer = [math.radians(a) for a in range(40, 321, 5)]
    x, y = math.cos(outer[0]), math.sin(outer[0])
    inner_x, radius = 0.62, math.hypot(x - 0.62, y)
    open_angle = math.atan2(y, x - inner_x)
    steps = [2 * math.pi - open_angle - (2 * math.pi - 2 * open_angle) * i / 40 for i in range(41)]
    points = [(math.cos(t), math.sin(t)) for t in outer]
    points += [(inner_x + radius * math.cos(t), radius * math.sin(t)) for t in steps]
    return tuple((px + 0.12, py) for px, py in points)


def silhouette(shape: str, size: int, box: Box) -> Mask:
    """Coverage (size, size) float32 in [0, 1] of one shape in the square `box`."""
    x, y, half = (value * size for value in box)
    left, top = max(0, math.floor(x - half) - 1), max(0, math.floor(y - half) - 1)
    side = math.ceil(2 * half) + 3  # only this window is drawn: it holds the whole outline
    canvas = Image.new("L", (side * OVERSAMPLING,) * 2, 0)
    points = [
        ((x + half * px - left) * OVERSAMPLING - 0.5, (y + half * py - top) * OVERSAMPLING - 0.5)
        for px, py in _outline(shape)
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    window = np.asarray(canvas.reduce(OVERSAMPLING), np.float32) / 255
    cover = np.zeros((size, size), np.float32)
    cover[top : top + side, left : left + side] = window[: size - top, : size - left]
    return cover


def _light_part(texture: str, size: int, box: Box) -> Mask:
    """Share of the tint in each pixel, (size, size) float32."""
    x, y, half = box
    period = min(0.1, half * 0.62)
    step = (np.arange(size * 2, dtype=np.float32) + 0.5) / (size * 2)
    across, down = (step[None, :] - x) / period, (step[:, None] - y) / period
    if texture == "striped":
        light = np.broadcast_to((across + down) % 1.6 < 0.5, (size * 2, size * 2))
    else:
        light = (across % 1 - 0.5) ** 2 + (down % 1 - 0.5) ** 2 < 0.26**2
    cells = light.reshape(size, 2, size, 2).astype(np.float32)
    return np.asarray(cells.mean(axis=(1, 3)), np.float32)


def _inside(cover: Mask) -> Mask:
    """cover (H, W) -> (H, W), less a rim: textures keep off the outline, which tells the shape."""
    for axis in (0, 1):
        for _ in range(max(1, cover.shape[0] // 64)):
            cover = np.minimum(cover, np.minimum(np.roll(cover, 1, axis), np.roll(cover, -1, axis)))
    return cover


def _scatter(count: int, half: float, rng: Random) -> list[Box]:
    """`count` square boxes of half side `half` that keep their distance, anywhere in the image."""
    if count > 3:  # too dense for trial and error: cells of a grid, jittered
        columns, rows = (2, 2) if count == 4 else rng.choice([(3, 2), (2, 3)])
        cells = rng.sample([(i, j) for i in range(columns) for j in range(rows)], count)
        return [
            (_jitter(i, columns, half, rng), _jitter(j, rows, half, rng), half) for i, j in cells
        ]
    while True:
        low, high = EDGE + half, 1 - EDGE - half
        centres = [(rng.uniform(low, high), rng.uniform(low, high)) for _ in range(count)]
        apart = 2 * half + 2 * EDGE
        if all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= apart
            for i, a in enumerate(centres) for b in centres[:i]
        ):  # fmt: skip
            return [(x, y, half) for x, y in centres]


def _jitter(cell: int, cells: int, half: float, rng: Random) -> float:
    width = (1 - 2 * EDGE) / cells
    slack = max(0.0, width / 2 - half - 0.8 * EDGE)
    return EDGE + (cell + 0.5) * width + rng.uniform(-slack, slack)


def _place(scene: Scene, rng: Random) -> list[tuple[Group, Box]]:
    if scene.relation is None:
        thing = scene.objects[0]
        half = rng.uniform(*HALF_SIDE[thing.count])
        return [(thing, box) for box in _scatter(thing.count, half, rng)]
    first, second = scene.objects
    if scene.relation in ("right", "below"):
        first, second = second, first
    half = rng.uniform(0.16, 0.21)
    near = EDGE + half + rng.uniform(0, 0.5 - 2 * EDGE - 2 * half)
    far = 1 - EDGE - half - rng.uniform(0, 0.5 - 2 * EDGE - 2 * half)
    middle = 0.5 + rng.uniform(-0.2, 0.2)
    shift = rng.uniform(-0.06, 0.06)
    one, two = (near, middle + shift), (far, middle - shift)
    if scene.relation in ("above", "below"):
        one, two = one[::-1], two[::-1]
    return [(first, (*one, half)), (second, (*two, half))]


def render(scene: Scene, size: int, rng: Random) -> Pixels:
    """The scene as (size, size, 3) uint8 on white; places and object sizes come from `rng`.

    Raises:
        ValueError: `size` below 32, where small shapes stop being distinct.
    """
    if size < 32:
        raise ValueError(f"size {size} is below 32 pixels, where small shapes look alike")
    image = np.full((size, size, 3), 255, np.float32)
    for thing, box in _place(scene, rng):
        cover = silhouette(thing.shape, size, box)
        paint = np.asarray(COLOURS[thing.colour], np.float32)
        if thing.texture != "solid":
            light = (_light_part(thing.texture, size, box) * _inside(cover))[..., None] * TINT
            paint = paint * (1 - light) + 255 * light
        image = image * (1 - cover[..., None]) + paint * cover[..., None]
    return np.asarray(np.rint(image), np.uint8)


def sample(
    n: int,
    seed: int,
    *,
    size: int = 64,
    colours: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    counts: Sequence[int] = (1, 2, 3),
    relation_share: float = 0.25,
    texture_share: float = 0.2,
    split: Split = "train",
    lang: str = "zh",
) -> list[tuple[Scene, str, Pixels]]:
    """`n` scenes of one split with caption and image (size, size, 3); the same for the same seed.

    A share `relation_share` of them has two objects, and each object is textured with probability
    `texture_share`. Colours, shapes and counts are drawn evenly from those given (all by default).

    Raises:
        ValueError: unknown names, shares outside [0, 1], or no scene of the split among these.
    """
    for name, value in (("relation_share", relation_share), ("texture_share", texture_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: it must lie in [0, 1]")
    if split not in ("train", "heldout"):
        raise ValueError(f"split is train or heldout, not {split!r}")
    rng = Random(f"shapes:{split}:{seed}")
    names = (tuple(colours or COLOURS), tuple(shapes or SHAPES))
    found = []
    for _ in range(n):
        related = rng.random() < relation_share
        scene = _draw(*names, tuple(counts), related, texture_share, split, rng)
        found.append((scene, caption(scene, lang, rng), render(scene, size, rng)))
    return found


def _draw(
    colours: Sequence[str],
    shapes: Sequence[str],
    counts: Sequence[int],
    related: bool,
    texture_share: float,
    split: Split,
    rng: Random,
) -> Scene:
    def group(count: int) -> Group:
        textured = rng.random() < texture_share
        texture = rng.choice(TEXTURES[1:]) if textured else TEXTURES[0]
        return Group(rng.choice(colours), rng.choice(shapes), count, texture)

    for _ in range(5000):
        if related:
            pair = (group(1), group(1))
            if (pair[0].colour, pair[0].shape) == (pair[1].colour, pair[1].shape):
                continue
            scene = Scene(pair, rng.choice(tuple(RELATIONS_ZH)))
        else:
            scene = Scene((group(rng.choice(counts)),))
        if split_of(scene) == split:
            return scene
    raise ValueError(
        f"no {split} scene among {len(colours)} colours, {len(shapes)} shapes and counts "
        f"{tuple(counts)}: allow more of them"
    )
