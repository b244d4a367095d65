"""Emoji of several artists with their Chinese names: images, captions, licences, splits.

`build` renders the vector art of the pinned packages (see `packages.py`) on white and writes a
folder of parquet files; `load` reads it back. Two builds of the same packages give the same bytes.
Shape legend: N images, H = W pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from taiji.data.packages import EMOJIBASE, VENDORS, Package, default_cache, obtain, read_json

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import resvg_py
except ImportError as error:
    raise ImportError(
        f"the emoji data needs pyarrow and resvg-py ({error}): pip install 'hcf-toolkit[data]'"
    ) from error

Pixels = npt.NDArray[np.uint8]

RENDER_SIZE = 128
MARGIN = 0.04  # of the art's longer side, so that antialiased rims are not cut
SHARD_ROWS = 1000
HELDOUT_SHARE = 0.10
GROUPS = (
    "smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects",
)  # fmt: skip
CLOCK_FACES = frozenset(f"{code:X}" for code in range(0x1F550, 0x1F568))
GENERATOR_VENDORS = tuple(name for name, p in VENDORS.items() if p.role == "generator")
JUDGE_VENDORS = tuple(name for name, p in VENDORS.items() if p.role == "judge")
STYLES = {
    "noto": "谷歌风格",
    "twemoji": "推特风格",
    "fluent-emoji-flat": "扁平风格",
    "emojione": "卡通风格",
    "openmoji": "手绘风格",
    "noto-v1": "圆润风格",
    "emojione-v1": "复古风格",
    "fluent-emoji": "立体风格",
}


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tones: code points, English slug, Chinese label and tags, group."""

    codepoint: str
    slug: str
    label: str
    tags: tuple[str, ...]
    group: str

    @property
    def split(self) -> str:
        """train, or heldout for about one in ten, by a hash of the slug alone."""
        digest = hashlib.blake2b(f"split:{self.slug}".encode(), digest_size=8).digest()
        return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


@dataclass(frozen=True)
class Row:
    """Metadata of one image, as stored in `metadata.parquet`."""

    id: str
    vendor: str
    vendor_role: str
    codepoint: str
    concept: str
    concept_split: str
    label: str
    tags: list[str]
    group: str
    licence: str
    width: int
    height: int
    md5: str
    shard: int
    index: int


def slug(text: str) -> str:
    """English CLDR label -> icon name ("face with tears of joy" -> "face-with-tears-of-joy")."""
    text = text.lower().replace("’", "").replace("'", "").replace("ñ", "n").replace("é", "e")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def strip_variation(codepoint: str) -> str:
    """Code points in upper case, joined by "-", without the variation selector FE0F."""
    return "-".join(part for part in codepoint.upper().split("-") if part != "FE0F")


def concepts(tarball: Path) -> list[Concept]:
    """The working subset in CLDR order: no people, symbols, flags, clock faces or skin tones."""
    chinese, english, meta = read_json(tarball, "zh/data.json", "en/data.json", "meta/groups.json")
    names = {entry["hexcode"]: entry["label"] for entry in english}
    keys = {int(number): key for number, key in meta["groups"].items()}
    rows: list[tuple[int, Concept]] = []
    for entry in chinese:
        code = strip_variation(entry["hexcode"])
        group = keys.get(entry.get("group", -1), "")
        if group in GROUPS and code not in CLOCK_FACES and entry["hexcode"] in names:
            tags = tuple(tag for tag in entry.get("tags", ()) if tag != entry["label"])
            name = slug(names[entry["hexcode"]])
            rows.append((entry["order"], Concept(code, name, entry["label"], tags, group)))
    return [concept for _, concept in sorted(rows, key=lambda row: row[0])]


def build(
    output: Path,
    *,
    sizes: Sequence[int] = (64, 128),
    cache: Path | None = None,
    vendors: Sequence[str] = (*GENERATOR_VENDORS, *JUDGE_VENDORS),
    log: Callable[[str], object] = print,
) -> Path:
    """Render the working subset of `vendors` into the folder `output` and return it.

    Writes `metadata.parquet` (fields of `Row`), `images-{size}-{shard:05d}.parquet` (raw RGB) and
    NOTICE.txt. An existing `output` is replaced only when the new one is complete. Byte-identical
    renderings are kept once, for the vendor named first. `cache` holds the npm tarballs and is
    filled where one is missing.

    Raises:
        ValueError: unknown vendor, size that does not divide 128, damaged package.
        RuntimeError: a package is missing and npm is not there or fails.
    """
    unknown = [name for name in vendors if name not in VENDORS]
    if unknown or not vendors:
        raise ValueError(f"unknown vendors {unknown}: choose from {', '.join(VENDORS)}")
    wrong = [size for size in sizes if size < 8 or RENDER_SIZE % size]
    if wrong or not sizes:
        raise ValueError(f"sizes {wrong} do not divide the rendered {RENDER_SIZE} pixels")
    cache = default_cache() if cache is None else cache
    subset = concepts(obtain(EMOJIBASE, cache))
    tarballs = {name: obtain(VENDORS[name], cache) for name in vendors}
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        staging.chmod(0o755)
        _write(staging, subset, tarballs, sizes, log)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _write(
    folder: Path,
    subset: Sequence[Concept],
    tarballs: dict[str, Path],
    sizes: Sequence[int],
    log: Callable[[str], object],
) -> None:
    rows: list[Row] = []
    waiting: list[Pixels] = []
    seen: set[str] = set()

    def flush() -> None:
        if waiting:
            for size in sizes:
                _write_shard(folder, size, rows[-len(waiting) :], waiting)
            waiting.clear()

    for vendor, tarball in tarballs.items():
        before = len(rows)
        for concept, image in _render_vendor(tarball, subset):
            md5 = hashlib.md5(image.tobytes(), usedforsecurity=False).hexdigest()
            if md5 in seen:
                continue
            seen.add(md5)
            rows.append(_row(VENDORS[vendor], vendor, concept, md5, len(rows)))
            waiting.append(image)
            if len(waiting) == SHARD_ROWS:
                flush()
        log(f"{vendor}: {len(rows) - before} images")
    flush()
    if not rows:
        raise ValueError("the packages hold no drawing of the working subset")
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), folder / "metadata.parquet")
    (folder / "NOTICE.txt").write_text(_notice(list(tarballs)), encoding="utf-8")
    log(f"{len(rows)} images of {len({row.concept for row in rows})} concepts")


def _row(package: Package, vendor: str, concept: Concept, md5: str, number: int) -> Row:
    identity = hashlib.blake2b(f"{vendor}:{concept.codepoint}".encode(), digest_size=16).hexdigest()
    return Row(
        id=identity,
        vendor=vendor,
        vendor_role=package.role,
        codepoint=concept.codepoint,
        concept=concept.slug,
        concept_split=concept.split,
        label=concept.label,
        tags=list(concept.tags),
        group=concept.group,
        licence=package.licence,
        width=RENDER_SIZE,
        height=RENDER_SIZE,
        md5=md5,
        shard=number // SHARD_ROWS,
        index=number % SHARD_ROWS,
    )


def _render_vendor(tarball: Path, subset: Sequence[Concept]) -> Iterator[tuple[Concept, Pixels]]:
    """Each concept the package draws, by code point where it lists them, else by name."""
    icons, chars = read_json(tarball, "icons.json", "chars.json")
    by_code = {strip_variation(code): name for code, name in chars.items()}
    for concept in subset:
        name = by_code.get(concept.codepoint, concept.slug)
        icon = _resolve(icons, name)
        if icon is not None:
            yield concept, render(icon)


def _resolve(icons: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The icon called `name` with the defaults of its set, following iconify's aliases."""
    changes: list[dict[str, Any]] = []
    for _ in range(8):  # longer chains do not occur: a cycle in a damaged file ends here
        if name in icons["icons"]:
            icon = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
            for change in (icons["icons"][name], *reversed(changes)):
                icon.update({key: value for key, value in change.items() if key != "parent"})
            return icon
        if name not in icons.get("aliases", {}):
            return None
        changes.append(icons["aliases"][name])
        name = changes[-1]["parent"]
    return None


def render(icon: dict[str, Any]) -> Pixels:
    """An iconify icon -> (128, 128, 3) uint8 on white, aspect kept, a small margin around it."""
    left, top = float(icon.get("left", 0)), float(icon.get("top", 0))
    width, height = float(icon["width"]), float(icon["height"])
    try:
        image = _rasterise(icon["body"], (left, top, width, height), MARGIN)
    except BaseException as error:
        # resvg 0.48 indexes out of bounds in a filter at some scales: draw without the margin, at
        # another scale. Its Rust panic is no Exception and has no class that could be imported.
        if type(error).__name__ != "PanicException":
            raise
        image = _rasterise(icon["body"], (left, top, width, height), 0.0)
    if icon.get("hFlip"):
        image = image[:, ::-1]
    if icon.get("vFlip"):
        image = image[::-1]
    return np.ascontiguousarray(np.rot90(image, -int(icon.get("rotate", 0))))


def _rasterise(body: str, view: tuple[float, float, float, float], margin: float) -> Pixels:
    left, top, width, height = view
    rim = margin * max(width, height)
    box = f"{left - rim:g} {top - rim:g} {width + 2 * rim:g} {height + 2 * rim:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{box}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def shrink(images: Pixels, size: int) -> Pixels:
    """images (N, H, H, 3) -> (N, size, size, 3) by the mean of whole pixel blocks."""
    count, side = images.shape[:2]
    if side == size:
        return images
    block = side // size
    cells = images.reshape(count, size, block, size, block, 3).astype(np.uint32)
    return ((cells.sum(axis=(2, 4)) + block * block // 2) // (block * block)).astype(np.uint8)


def _write_shard(folder: Path, size: int, rows: Sequence[Row], images: Sequence[Pixels]) -> None:
    pixels = shrink(np.stack(images), size)
    table = pa.table(
        {
            "id": [row.id for row in rows],
            "rgb": pa.array([image.tobytes() for image in pixels], pa.binary(size * size * 3)),
        }
    )
    target = folder / f"images-{size}-{rows[0].shard:05d}.parquet"
    pq.write_table(table, target, compression="zstd", use_dictionary=False)


def _notice(vendors: Sequence[str]) -> str:
    """Credits by licence: the art stays under its own terms, whatever is made of it."""
    by_licence: dict[str, list[Package]] = {}
    for package in (EMOJIBASE, *(VENDORS[name] for name in vendors)):
        by_licence.setdefault(package.licence, []).append(package)
    lines = ["Images and names in this folder, by licence (SPDX). The images were rasterised."]
    for licence in sorted(by_licence):
        lines += ["", licence, "-" * len(licence)]
        lines += [
            f"{package.art}; {package.source}; from npm {package.name}@{package.version}"
            for package in by_licence[licence]
        ]
    return "\n".join(lines) + "\n"


def _replace(staging: Path, output: Path) -> None:
    """Move the finished folder to its place; the old one disappears only after that."""
    if not output.exists():
        os.rename(staging, output)
        return
    if not (output / "metadata.parquet").exists():
        raise ValueError(f"{output} exists and is not an emoji data set: choose another folder")
    old = staging.with_name(staging.name + "-old")
    os.rename(output, old)
    os.rename(staging, output)
    shutil.rmtree(old)


def load(
    folder: Path, size: int = 64, vendors: Sequence[str] | None = None
) -> tuple[Pixels, list[dict[str, Any]]]:
    """Images (N, size, size, 3) uint8 and their N metadata rows, of all or the named vendors.

    Raises:
        FileNotFoundError: no data set in `folder`, or none at this size.
        ValueError: a vendor that the data set does not hold.
    """
    if not (folder / "metadata.parquet").exists():
        raise FileNotFoundError(f"no emoji data in {folder}: make it with `hcf data build emoji`")
    rows: list[dict[str, Any]] = pq.read_table(folder / "metadata.parquet").to_pylist()
    if vendors is not None:
        missing = set(vendors) - {row["vendor"] for row in rows}
        if missing:
            raise ValueError(f"{folder} holds no images of {', '.join(sorted(missing))}")
        rows = [row for row in rows if row["vendor"] in vendors]
    images = np.empty((len(rows), size, size, 3), np.uint8)
    shards: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        shards.setdefault(row["shard"], []).append(position)
    for shard, positions in shards.items():
        path = folder / f"images-{size}-{shard:05d}.parquet"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: build the data set with size {size}")
        column = pq.read_table(path, columns=["rgb"])["rgb"]
        for position in positions:
            rgb = column[rows[position]["index"]].as_py()
            images[position] = np.frombuffer(rgb, np.uint8).reshape(size, size, 3)
    return images, rows
