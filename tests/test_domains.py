"""Domains: who is told from whom, what a cap does to rows and draws, and the cartoon test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from taiji.data import shapes
from taiji.data.clip_filters import apply_head
from taiji.data.domains import (
    DOMAINS,
    capped_counts,
    domain_columns,
    generated_share,
    probe_names,
    sampling_shares,
    train_probe,
    zero_shot,
)
from taiji.data.filter_config import ClipFilter, DomainFilter
from taiji.data.filters import column_folders
from taiji.data.metadata import read_columns
from taiji.data.recipe import DataRecipe, filter_pairs, train_domain_probe
from taiji.data.select import Query, select

MINI = Path(__file__).parents[1] / "models" / "weights" / "taiji-sd-mini"
CLIP = ClipFilter(model=MINI / "image_clip", tokenizer=MINI / "tokenizer")
COLOURS = ("red", "blue", "green", "black", "yellow", "purple")
KINDS = ("circle", "square", "triangle", "star", "heart", "diamond")
PROMPTS = {
    colour: tuple(
        f"{count}个{shapes.COLOURS_ZH[colour]}的{shapes.SHAPES_ZH[kind]}"
        for kind in KINDS
        for count in "一两三"
    )
    for colour in COLOURS
}


def silent(line: str) -> None: ...


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DataRecipe:
    """600 scenes with CLIP features; the source states the shape as the domain."""
    recipe = DataRecipe.model_validate(
        {
            "name": "x",
            "output": tmp_path_factory.mktemp("domains"),
            "source": {"kind": "shapes", "count": 600, "size": 64},
            "filters": {"clip": CLIP},
            "select": {"rules": {"relevance": {"column": "relevance", "min": -1}}},
        }
    )
    filter_pairs(recipe, log=silent)
    return recipe


def single(recipe: DataRecipe) -> pa.Table:
    """The scenes of one kind of object that ImageCLIP was trained on."""
    columns = ["id", "domain", "caption", "clip_image"]
    table = read_columns(column_folders(recipe.output), columns)
    relation = pc.match_substring_regex(table["caption"], "[左右上下]")
    return table.filter(pc.and_(pc.invert(relation), pc.is_in(table["domain"], pa.array(KINDS))))


def test_zero_shot_tells_colours_apart(scenes: DataRecipe) -> None:
    table = single(scenes)
    for colour in COLOURS:
        named = pc.match_substring_regex(table["caption"], f"(^|[^深]){shapes.COLOURS_ZH[colour]}")
        rows = table.filter(named)
        found = domain_columns(rows, DomainFilter(prompts=PROMPTS), CLIP)
        right = [name == colour for name in found["domain"].to_pylist()]
        assert len(right) > 5 and np.mean(right) >= 0.9, colour
        score = np.array(found["domain_score"])
        assert (score > 1 / len(COLOURS)).all() and (score <= 1.0001).all()
    x = np.eye(3, 4, dtype=np.float32)
    assert np.allclose(zero_shot(x, [x[:1], x[1:2], x[2:]], 0.01), np.eye(3), atol=1e-6)


def test_a_probe_is_fitted_on_labels_and_used_as_the_filter(
    scenes: DataRecipe, tmp_path: Path
) -> None:
    table = single(scenes)
    path, labels = tmp_path / "probe.safetensors", tmp_path / "labels.csv"
    rows = zip(table["id"].to_pylist(), table["domain"].to_pylist(), strict=True)
    labels.write_text("id,domain\n" + "".join(f"{key.hex()},{name}\n" for key, name in rows))
    accuracy = train_domain_probe(scenes, path, labels, silent)
    assert accuracy > 0.6, accuracy  # of six shapes, from about 180 labels
    assert probe_names(path) == tuple(sorted(KINDS))
    found = domain_columns(table, DomainFilter(probe=path), CLIP)
    right = np.array(found["domain"].to_pylist()) == np.array(table["domain"].to_pylist())
    assert right.mean() > 0.9  # mostly what it was fitted on
    labels.write_text("\n".join(labels.read_text().splitlines()[:6]))
    with pytest.raises(ValueError, match="5 labelled images are too few"):
        train_domain_probe(scenes, path, labels, silent)


def test_a_probe_reaches_ninety_in_a_hundred_on_separable_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 32))
    label = rng.integers(5, size=2000)
    x = (centres[label] + 0.7 * rng.normal(size=(2000, 32))).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    path = tmp_path / "probe.safetensors"
    names = train_probe(x[:1000], [f"d{i}" for i in label[:1000]], path)
    guess = apply_head(x[1000:], path).argmax(1)
    assert names == tuple(f"d{i}" for i in range(5))
    assert (guess == label[1000:]).mean() >= 0.9
    with pytest.raises(FileNotFoundError, match="hcf data probe"):
        probe_names(tmp_path / "none")


def test_caps_hold_in_whole_rows_and_take_no_more_than_they_must() -> None:
    counts = {"cartoon": 9000, "food": 700, "city": 300}
    kept = capped_counts(counts, {"cartoon": 0.15})
    assert kept["food"] == 700 and kept["city"] == 300
    total = sum(kept.values())
    assert kept["cartoon"] <= 0.15 * total and kept["cartoon"] + 1 > 0.15 * (total + 1) - 1
    both = capped_counts({"a": 500, "b": 500, "c": 10}, {"a": 0.3, "b": 0.6})
    assert both["a"] <= 0.3 * sum(both.values()) and both["b"] <= 0.6 * sum(both.values())
    assert both["c"] == 10 and sum(both.values()) >= 98
    assert capped_counts({"a": 1, "b": 99}, {"a": 0.15}) == {"a": 1, "b": 99}
    assert capped_counts({"a": 0}, {"a": 0.1}) == {"a": 0}
    for wrong in ({"a": 5}, {"a": 5, "b": 5}):
        with pytest.raises(ValueError, match="raise a cap"):
            capped_counts(wrong, {"a": 0.15, "b": 0.2})


def test_shares_follow_the_power_and_stay_below_their_caps() -> None:
    assert sampling_shares({"a": 100, "b": 400}, 0.5, {}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert sampling_shares({"a": 100, "b": 400}, 1.0, {}) == pytest.approx({"a": 0.2, "b": 0.8})
    shares = sampling_shares({"cartoon": 900, "b": 100, "c": 100}, 0.5, {"cartoon": 0.15})
    assert shares == pytest.approx({"cartoon": 0.15, "b": 0.425, "c": 0.425})
    # what the first cap frees pushes the second domain over its own
    shares = sampling_shares({"a": 900, "b": 100, "c": 100}, 0.5, {"a": 0.1, "b": 0.3})
    assert shares == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    assert sampling_shares({"a": 1, "b": 0}, 0.5, {}) == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="raise a cap"):
        sampling_shares({"cartoon": 5}, 0.5, {"cartoon": 0.15})


def test_the_cartoon_share_after_selection_is_within_its_cap() -> None:
    rng = np.random.default_rng(0)
    domain = rng.choice(["cartoon", "food", "city"], 5000, p=[0.6, 0.3, 0.1])
    ids = [rng.bytes(16) for _ in range(5000)]
    table = pa.table(
        {"id": pa.array(ids, pa.binary(16)), "domain": domain, "score": rng.random(5000)}
    )
    rules = {"score": {"column": "score", "min": 0.2}}
    query = {"rules": rules, "domains": {"caps": {"cartoon": 0.15}}}
    selection = select(table, Query.model_validate(query))
    kept = domain[selection.kept]
    assert 0.149 < (kept == "cartoon").mean() <= 0.15
    assert (kept == "food").sum() == ((domain == "food") & (np.array(table["score"]) >= 0.2)).sum()
    turned = table.take(pa.array(np.arange(5000)[::-1]))  # the rows' order does not matter
    again = select(turned, Query.model_validate(query))
    assert np.array_equal(again.kept[::-1], selection.kept)


def test_generated_cartoons_must_match_their_training_share() -> None:
    def labels(cartoons: int) -> list[str]:
        return ["cartoon"] * cartoons + ["food"] * (1000 - cartoons)

    training = {"cartoon": 0.15, "food": 0.85}
    assert generated_share(labels(150), training).passed
    assert generated_share(labels(199), training).passed
    assert not generated_share(labels(201), training).passed
    assert not generated_share(labels(99), training).passed
    assert not generated_share(labels(210), {"cartoon": 0.2, "food": 0.8}).passed  # the ceiling
    with pytest.raises(ValueError, match="training share of game"):
        generated_share(labels(1), training, "game")


def test_the_shipped_domains_have_prompts() -> None:
    assert "cartoon" in DOMAINS and all(DOMAINS.values())
