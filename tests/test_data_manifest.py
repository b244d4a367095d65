"""A manifest has the hash of its content, finds edited shards, and is re-weighted by bad cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from taiji.data.manifest import (
    MANIFEST,
    Manifest,
    read_badcases,
    read_manifest,
    reweight,
    verify,
    write_manifest,
)
from taiji.data.reader import open_reader, stream
from taiji.data.recipe import DataRecipe, filter_pairs, shard_pairs

ROWS = 160


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = DataRecipe.model_validate(
        {
            "name": "x",
            "output": tmp_path_factory.mktemp("data"),
            "source": {"kind": "shapes", "count": ROWS, "size": 32},
            "select": {
                "rules": {"caption": {"column": "caption_ok", "equals": True}},
                "domains": {"alpha": 1.0, "caps": {"star": 0.2}},
            },
            "shards": {"samples": 10},
        }
    )
    filter_pairs(recipe, log=silent)
    shard_pairs(recipe, log=silent)
    return recipe.output


def test_the_hash_is_of_the_content_and_an_edit_is_noticed(data_set: Path, tmp_path: Path) -> None:
    manifest = read_manifest(data_set)
    assert manifest.hash == read_manifest(data_set / MANIFEST).content_hash()
    text = (data_set / MANIFEST).read_text()
    assert str(data_set) not in text and "/" not in json.dumps(json.loads(text)["filters"])
    edited = tmp_path / MANIFEST
    edited.write_text(text.replace('"alpha": 1.0', '"alpha": 0.5'))
    with pytest.raises(ValueError, match="edited"):
        read_manifest(edited)
    with pytest.raises(FileNotFoundError, match="hcf data shard"):
        read_manifest(tmp_path / "none")
    assert manifest.rows == ROWS
    assert sum(r.samples for r in manifest.domains.values()) + sum(manifest.rejected.values()) == (
        ROWS - len(manifest.skipped)
    )


def test_verify_names_what_changed(data_set: Path) -> None:
    manifest = read_manifest(data_set)
    assert verify(manifest, data_set) == []
    path = data_set / "shards" / f"{manifest.shards[0].name}.tar"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:600] + b"x" + whole[601:])
        assert verify(manifest, data_set) == [f"{path.name} is not as it was written"]
        path.unlink()
        assert verify(manifest, data_set) == [f"{path.name} is missing"]
    finally:
        path.write_bytes(whole)


def records(data_set: Path, manifest: str) -> tuple[list[dict[str, str]], np.ndarray]:
    """Every sample's record, and how often 20,000 draws take it."""
    reader = open_reader(data_set / manifest)
    draws = np.bincount(reader.draw(np.random.default_rng(0), 20_000), minlength=len(reader))
    return [reader.read(i)[1] for i in range(len(reader))], draws / 20_000


def write_cases(folder: Path, text: str) -> Path:
    path = folder / "badcases.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_bad_cases_move_what_is_drawn_and_the_caps_hold(data_set: Path, tmp_path: Path) -> None:
    before = read_manifest(data_set)
    known, odds = records(data_set, MANIFEST)
    wrong = known[0]["id"]
    cases = write_cases(
        tmp_path,
        f"- {{ids: ['{wrong}'], factor: 0}}\n"
        "- {tag: 红色, factor: 4}\n- {tag: star, factor: 100}\n",
    )
    after = reweight(before, data_set, cases, silent)
    write_manifest(after, data_set / "reweighted.json")
    assert after.parent == before.hash != after.hash and after.shards == before.shards
    assert read_manifest(data_set / "reweighted.json") == after
    assert verify(after, data_set) == []
    assert after == reweight(before, data_set, cases, silent)

    less = write_cases(tmp_path, "- {tag: 红色, factor: 0.25}\n")
    third = reweight(after, data_set, less, silent)
    assert third.parent == after.hash
    lost = known[0]["domain"] == "heart"  # factors undone, but for the one that is left out
    assert third.domains["heart"].mass == before.domains["heart"].mass - lost

    same, moved = records(data_set, "reweighted.json")
    assert [row["id"] for row in same] == [row["id"] for row in known]
    assert moved[0] == 0 and odds[0] > 0
    red = np.array(["红色" in row["caption"] for row in known])
    star = np.array([row["domain"] == "star" for row in known])
    assert moved[red & ~star].sum() > 1.5 * odds[red & ~star].sum()
    # a hundredfold mass, but not above its cap
    assert after.domains["star"].share == pytest.approx(0.2)
    assert moved[star].sum() == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ValueError, match="use open_reader"):
        next(stream(data_set / "reweighted.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {ids: ['00'], factor: 1}", "pattern"),
        ("- {tag: x, factor: -1}", "greater than"),
        ("- {tags: x, factor: 1}", "Extra inputs"),
        ("- {factor: 2}", "needs ids or a tag"),
        ("", "needs one"),
    ],
)
def test_bad_lists_of_bad_cases_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=words):
        read_badcases(write_cases(tmp_path, text))


def test_an_unknown_id_and_an_empty_rest_are_refused(data_set: Path, tmp_path: Path) -> None:
    manifest = read_manifest(data_set)
    with pytest.raises(ValueError, match="no sample has the id"):
        reweight(manifest, data_set, write_cases(tmp_path, f"- {{ids: ['{'0' * 32}'], factor: 1}}"))
    rules = "\n".join(f"- {{tag: {name}, factor: 0}}" for name in manifest.domains)
    with pytest.raises(ValueError, match="leave no sample"):
        reweight(manifest, data_set, write_cases(tmp_path, rules), silent)


def test_a_manifest_is_frozen_and_knows_its_keys(data_set: Path) -> None:
    tree = read_manifest(data_set).model_dump(mode="json")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Manifest.model_validate({**tree, "date": "today"})
