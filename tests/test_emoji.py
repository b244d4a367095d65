"""The emoji builder on a tiny package made here: no network, no npm."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from taiji.data import emoji, packages

VENDORS = ("noto", "openmoji")
CONCEPTS = 14


def _pack(folder: Path, package: packages.Package, files: dict[str, Any]) -> packages.Package:
    """Writes the tarball of `package` with JSON `files` and returns the package with its hash."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / package.tarball, "w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    digest = hashlib.sha256((folder / package.tarball).read_bytes()).hexdigest()
    return replace(package, sha256=digest)


def _entry(code: str, label: str, order: int, group: int, tags: Sequence[str]) -> dict[str, Any]:
    return {"hexcode": code, "label": label, "order": order, "group": group, "tags": list(tags)}


def _body(number: int, radius: int) -> str:
    return f'<circle cx="16" cy="16" r="{radius}" fill="#{number * 9:02x}8040"/>'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    # "1F400" and so on are drawn; a flag, a clock face and a person must be left out
    codes = [f"1F4{i:02X}" for i in range(CONCEPTS)]
    codes[3] += "-FE0F"
    chinese = [_entry(c, f"动物{i}", 100 - i, 3, ("宠物", f"别名{i}")) for i, c in enumerate(codes)]
    english = [_entry(c, f"Animal’s No. {i}", 100 - i, 3, ()) for i, c in enumerate(codes)]
    for code, group in (("1F1E8", 9), ("1F550", 5), ("1F468", 1)):
        chinese.append(_entry(code, f"多余{code}", 1, group, ()))
        english.append(_entry(code, f"extra {code}", 1, group, ()))
    groups = {"groups": {"1": "people-body", "3": "animals-nature", "5": "travel-places", "9": "x"}}
    files = {"zh/data.json": chinese, "en/data.json": english, "meta/groups.json": groups}
    monkeypatch.setattr(emoji, "EMOJIBASE", _pack(folder, packages.EMOJIBASE, files))

    icons = {f"by-code-{i}": {"body": _body(i, 15)} for i in range(CONCEPTS)}
    icons["extra-1f468"] = {"body": _body(20, 3)}
    chars = {code.replace("-FE0F", "").lower(): f"by-code-{i}" for i, code in enumerate(codes)}
    noto = {"icons.json": {"icons": icons, "width": 32, "height": 32}, "chars.json": chars}
    # no code points here: matched by name, one through a mirrored alias; number 1 is noto's picture
    named: dict[str, Any] = {
        f"animals-no-{i}": {"body": _body(i, 15 if i == 1 else 9)} for i in range(CONCEPTS - 2)
    }
    named["one-side"] = {"body": '<rect width="8" height="32" fill="#c00"/>', "width": 32}
    alias = {"animals-no-12": {"parent": "one-side", "hFlip": True}}
    openmoji = {
        "icons.json": {"icons": named, "aliases": alias, "width": 32, "height": 32},
        "chars.json": {},
    }
    for name, content in (("noto", noto), ("openmoji", openmoji)):
        monkeypatch.setitem(packages.VENDORS, name, _pack(folder, packages.VENDORS[name], content))
    return folder


def _quiet(_: str) -> None: ...


def test_build_renders_names_and_deduplicates(tmp_path: Path, cache: Path) -> None:
    out = emoji.build(tmp_path / "emoji", cache=cache, vendors=VENDORS, log=_quiet)
    images, rows = emoji.load(out, 64)
    assert images.shape == (2 * CONCEPTS - 2, 64, 64, 3)
    # the byte-identical drawing counts once, for the vendor named first
    by_vendor = [row["codepoint"] for row in rows if row["vendor"] == "openmoji"]
    assert len(by_vendor) == CONCEPTS - 2 and "1F401" not in by_vendor
    row = next(r for r in rows if r["vendor"] == "noto" and r["codepoint"] == "1F403")
    assert (row["label"], row["concept"], row["tags"]) == (
        "动物3",
        "animals-no-3",
        ["宠物", "别名3"],
    )
    assert (row["licence"], row["vendor_role"]) == ("Apache-2.0", "generator")
    assert all(len(r["id"]) == 32 for r in rows) and len({r["id"] for r in rows}) == len(rows)
    assert not {r["codepoint"] for r in rows} & {"1F1E8", "1F550", "1F468"}
    colour = images[rows.index(row), 32, 32]
    assert np.abs(colour.astype(int) - (27, 0x80, 0x40)).max() <= 1
    assert (images[:, 0, 0] == 255).all()
    mirrored = next(i for i, r in enumerate(rows) if r["concept"] == "animals-no-12" and i >= 14)
    assert (images[mirrored, 32, 8] == 255).all() and images[mirrored, 32, 58].tolist() != [255] * 3


def test_small_images_are_block_means(tmp_path: Path, cache: Path) -> None:
    out = emoji.build(tmp_path / "emoji", cache=cache, vendors=VENDORS, log=_quiet)
    large, _ = emoji.load(out, 128)
    small, _ = emoji.load(out, 64)
    mean = large.reshape(-1, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - mean).max() <= 0.5


def test_two_builds_give_the_same_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji, "SHARD_ROWS", 10)
    for name in ("one", "two", "two"):  # the last one replaces a finished data set
        emoji.build(tmp_path / name, cache=cache, vendors=VENDORS, sizes=(32,), log=_quiet)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "NOTICE.txt", "images-32-00000.parquet", "images-32-00001.parquet",
        "images-32-00002.parquet", "metadata.parquet",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "packages", "two"]
    images, rows = emoji.load(tmp_path / "one", 32, vendors=["openmoji"])
    assert len(images) == len(rows) == CONCEPTS - 2
    assert "CC-BY-SA-4.0" in (tmp_path / "one" / "NOTICE.txt").read_text()


def test_split_depends_on_the_concept_alone(tmp_path: Path, cache: Path) -> None:
    out = emoji.build(tmp_path / "emoji", cache=cache, vendors=VENDORS, log=_quiet)
    rows = pq.read_table(out / "metadata.parquet").to_pylist()
    split: dict[str, set[str]] = {}
    for row in rows:
        split.setdefault(row["concept"], set()).add(row["concept_split"])
    assert all(len(values) == 1 for values in split.values())
    many = [emoji.Concept("", f"name-{i}", "", (), "").split for i in range(4000)]
    assert 0.08 < many.count("heldout") / 4000 < 0.12


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    tarball = cache / packages.VENDORS["noto"].tarball
    tarball.write_bytes(tarball.read_bytes()[:-20])
    with pytest.raises(ValueError, match="SHA-256.*Delete"):
        emoji.build(tmp_path / "emoji", cache=cache, vendors=VENDORS, log=_quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_a_failed_build_keeps_the_old_data(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = emoji.build(tmp_path / "emoji", cache=cache, vendors=VENDORS, log=_quiet)
    broken = {
        "icons.json": {"icons": {"by-code-0": {"body": "<g>"}}},
        "chars.json": {"1f400": "by-code-0"},
    }
    package = _pack(cache, packages.VENDORS["noto"], broken)
    monkeypatch.setitem(packages.VENDORS, "noto", package)
    with pytest.raises(ValueError):
        emoji.build(out, cache=cache, vendors=VENDORS, log=_quiet)
    assert len(emoji.load(out)[1]) == 2 * CONCEPTS - 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "packages"]


def test_bad_requests_name_the_remedy(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="unknown vendors.*twemoji"):
        emoji.build(tmp_path / "x", cache=cache, vendors=("apple",), log=_quiet)
    with pytest.raises(ValueError, match="divide"):
        emoji.build(tmp_path / "x", cache=cache, sizes=(48,), vendors=VENDORS, log=_quiet)
    with pytest.raises(FileNotFoundError, match="hcf data build emoji"):
        emoji.load(tmp_path / "x")
    out = emoji.build(tmp_path / "emoji", cache=cache, sizes=(64,), vendors=VENDORS, log=_quiet)
    with pytest.raises(FileNotFoundError, match="size 128"):
        emoji.load(out, 128)
    with pytest.raises(ValueError, match="twemoji"):
        emoji.load(out, 64, vendors=["twemoji"])
    foreign = tmp_path / "precious"
    foreign.mkdir()
    with pytest.raises(ValueError, match="not an emoji data set"):
        emoji.build(foreign, cache=cache, vendors=VENDORS, log=_quiet)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is needed.*Install"):
        emoji.build(tmp_path / "x", cache=cache, vendors=("twemoji",), log=_quiet)


def test_every_package_is_pinned_and_licensed() -> None:
    free = {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}
    for package in (packages.EMOJIBASE, *packages.VENDORS.values()):
        assert len(package.sha256) == 64 and package.licence in free and package.version
    # share-alike art never reaches the generator, whose weights are released
    generator = [packages.VENDORS[name] for name in emoji.GENERATOR_VENDORS]
    assert all(package.licence != "CC-BY-SA-4.0" for package in generator)
    assert set(emoji.STYLES) == set(packages.VENDORS)
    assert not set(emoji.GENERATOR_VENDORS) & set(emoji.JUDGE_VENDORS)
