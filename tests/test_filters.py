"""Sources become metadata, filters write columns: captions, pixels, CLIP features, own scorers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save_file

from taiji.data import filters as filters_module
from taiji.data import image_filters, shapes
from taiji.data.caption_filters import caption_columns, languages, normal_form
from taiji.data.clip_filters import apply_head, clip_columns, features_of, load_clip
from taiji.data.filter_config import ClipFilter, Filters, HeadFilter
from taiji.data.filters import CODE, code_hash, column_folders, filter_keys, run_filters
from taiji.data.metadata import decode, ids_as_integers, read_columns, row_id
from taiji.data.sources import ShapesSource, TableSource, TarSource, ingest
from taiji.data.tar import END, tar_bytes

MINI = Path(__file__).parents[1] / "models" / "weights" / "taiji-sd-mini"
CLIP = ClipFilter(model=MINI / "image_clip", tokenizer=MINI / "tokenizer")


def silent(line: str) -> None: ...


def png(pixels: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(target, "png")
    return target.getvalue()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six files and a CSV of them: two scenes, a blank, a cut PNG, no image, a missing file."""
    drawn = shapes.sample(2, 0, size=64)
    for number, (_, _, pixels) in enumerate(drawn):
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    (tmp_path / "2.png").write_bytes(png(np.full((40, 80, 3), 255)))
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:-80])
    (tmp_path / "4.png").write_text("not an image")
    rows = [(f"{i}.png", text) for i, text in enumerate([drawn[0][1], drawn[1][1], *"白坏字无"])]
    table = pa.table({"path": [file for file, _ in rows], "caption": [text for _, text in rows]})
    pa_csv.write_csv(table, tmp_path / "pairs.csv")
    return tmp_path


def table_source(folder: Path) -> TableSource:
    return TableSource(path=folder / "pairs.csv", images=folder, columns={"file": "path"})


def test_languages_are_told_by_script() -> None:
    texts = {
        "一只红色的猫": "zh", "两只cat": "zh", "a red cat on the wall": "latin",
        "赤い猫がいる庭": "ja", "붉은 고양이": "ko", "красный кот": "cyrillic", "123 !?": "none",
        "iPhone 手机": "zh",
    }  # fmt: skip
    assert languages(pa.array(texts)).to_pylist() == list(texts.values())


def test_caption_columns_find_what_is_broken_and_ignore_how_it_is_typed() -> None:
    texts = ["一只 猫。", "一只猫", None, "  ", "坏\ufffd字", "ＡＢ c"]
    found = caption_columns(pa.chunked_array([texts]))
    assert found["caption_ok"].to_pylist() == [True, True, False, False, False, True]
    assert found["characters"].to_pylist() == [3, 3, 0, 0, 2, 3]
    keys = found["caption_key"].to_pylist()
    assert keys[0] == keys[1] and len(set(keys)) == 4
    assert normal_form(pa.array(["ＡＢ c"])).to_pylist() == ["abc"]


def test_texture_measures_on_images_whose_values_are_known() -> None:
    flat = np.full((32, 32), 100, np.float32)
    two = np.where(np.arange(32) < 16, 0, 255).astype(np.float32)[None].repeat(32, 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.float32)
    assert image_filters.entropy(flat) == 0 and image_filters.entropy(two) == 1
    assert 7.8 < image_filters.entropy(noise) <= 8
    assert image_filters.laplacian_variance(flat) == 0
    # of 30 inner columns the two beside the step answer with +255 and -255
    assert image_filters.laplacian_variance(two) == pytest.approx(255**2 * 2 / 30)
    assert image_filters.edge_density(flat) == 0
    assert image_filters.edge_density(two) == pytest.approx(2 / 30)
    assert image_filters.edge_density(np.zeros((1, 1), np.float32)) == 0
    assert image_filters.perceptual_hash(Image.fromarray(flat.astype(np.uint8))) == 0


def test_transparency_is_white_and_damage_is_named() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    target = io.BytesIO()
    clear.save(target, "png")
    assert decode(target.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    for data, words in ((target.getvalue()[:-40], "damaged"), (b"text", "not a readable")):
        with pytest.raises(ValueError, match=words):
            decode(data)


def test_ids_stay_when_rows_move_and_sort_as_bytes() -> None:
    assert row_id("a", "猫") == row_id("a", "猫") != row_id("a", "狗")
    ids = pa.chunked_array([[row_id(str(i), None)] for i in range(20)], pa.binary(16))
    numbers = ids_as_integers(ids)
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    assert [ids[int(i)].as_py() for i in order] == sorted(ids.to_pylist())


def test_a_table_is_cut_into_parts_and_images_are_measured(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = ingest(table_source(pairs), out, rows_per_part=4, log=silent)
    assert found["rows"] == 6 and found["parts"] == 2
    keys = run_filters(Filters(image=image_filters.ImageFilter()), out, pairs, log=silent)
    assert list(keys) == ["caption", "duplicates", "image"]
    rows = read_columns(
        column_folders(out), ["readable", "unreadable_because", "width", "height", "entropy"]
    ).to_pylist()
    assert [row["readable"] for row in rows] == [True, True, True, False, False, False]
    assert (rows[2]["width"], rows[2]["height"], rows[2]["entropy"]) == (80, 40, 0)
    assert "damaged" in rows[3]["unreadable_because"] and "No such" in rows[5]["unreadable_because"]
    with pytest.raises(ValueError, match="no column beauty.*entropy"):
        read_columns(column_folders(out), ["beauty"])


def test_only_what_changed_is_computed_again(pairs: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", list[str]()
    ingest(table_source(pairs), out, rows_per_part=4, log=silent)
    filters = Filters(image=image_filters.ImageFilter())
    run_filters(filters, out, pairs, log=silent)
    (out / "columns" / "image" / "part-00001.parquet").unlink()  # a killed run
    run_filters(filters, out, pairs, log=lines.append)
    assert lines == ["filter image: 1 of 2 parts"]
    lines.clear()
    run_filters(filters, out, pairs, scorers={"white": whiteness}, log=lines.append)
    assert lines == ["filter white: 2 of 2 parts"]
    lines.clear()
    ingest(table_source(pairs), out, rows_per_part=4, log=lines.append)
    run_filters(Filters(image=None), out, pairs, log=lines.append)
    # the duplicates read the hashes that are gone now
    assert lines == ["filter duplicates: 2 of 2 parts"]
    assert not (out / "columns" / "image").exists() and (out / "columns" / "white").exists()
    (pairs / "pairs.csv").write_text("path,caption\n0.png,一\n")
    assert ingest(table_source(pairs), out, rows_per_part=4, log=silent)["rows"] == 1


def test_a_filter_whose_code_changed_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what reads its columns; the others are not."""
    assert set(CODE) == set(Filters.model_fields)
    folder = Path(filters_module.__file__).parent
    for modules in CODE.values():
        for name in set(modules) - {"filters"}:  # what it imports of the engine is counted too
            text = (folder / f"{name}.py").read_text()
            imported = set(re.findall(r"^from taiji\.data\.(\w+) import", text, re.M))
            assert imported <= {*modules, "filter_config"}, (modules, name)
    filters = Filters(caption={}, image={}, duplicates={})
    before = filter_keys(filters, "metadata", ["own"])

    def edited(modules: tuple[str, ...]) -> str:
        return "edited" if "duplicates" in modules else code_hash(modules)

    monkeypatch.setattr(filters_module, "code_hash", edited)
    after = filter_keys(filters, "metadata", ["own"])
    assert {name for name in before if before[name] != after[name]} == {"duplicates"}
    monkeypatch.setattr(filters_module, "code_hash", lambda modules: str("metadata" in modules))
    changed = filter_keys(filters, "metadata", ["own"])
    assert changed["image"] != after["image"] and changed["own"] != after["own"]


def test_tars_keep_what_is_whole_and_name_the_damage(tmp_path: Path) -> None:
    _, caption, pixels = shapes.sample(1, 0, size=64)[0]
    about = json.dumps({"url": "u", "domain": "物", "tags": ["a"], "caption": "其他"}).encode()
    first = tar_bytes("0", {"png": png(pixels), "json": about, "txt": caption.encode()})
    second = tar_bytes("1", {"png": png(pixels), "txt": b"\xff\xfe"})
    third = tar_bytes("2", {"txt": "无图".encode()})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(first + second + third + END)
    (tmp_path / "in" / "00001.tar").write_bytes((first + second)[:-600])
    out = tmp_path / "out"
    ingest(TarSource(path=tmp_path / "in"), out, rows_per_part=4, workers=2, log=silent)
    rows = pq.read_table(out / "metadata").to_pylist()
    assert [row["caption"] for row in rows] == [caption, "\ufffd\ufffd", "无图", caption]
    assert rows[0]["domain"] == "物" and rows[0]["tags"] == ["a"] and rows[2]["file"] is None
    assert rows[0]["id"] == rows[3]["id"] == row_id("u", caption)
    damaged = json.loads((out / "metadata.json").read_text())["damaged"]
    assert len(damaged) == 1 and "00001.tar" in damaged[0]


def test_bad_sources_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tar in"):
        ingest(TarSource(path=tmp_path), tmp_path / "o", rows_per_part=1, log=silent)
    (tmp_path / "x.csv").write_text("text\n猫\n")
    with pytest.raises(ValueError, match="needs caption and one of url, hash, file"):
        ingest(TableSource(path=tmp_path / "x.csv"), tmp_path / "o", rows_per_part=1, log=silent)
    with pytest.raises(ValidationError, match="add filters.clip"):
        Filters(heads=HeadFilter(files={"aesthetic": tmp_path / "a"}))


def test_clip_prefers_the_caption_that_is_true(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest(ShapesSource(count=24, size=64, seed=3), out, rows_per_part=16, log=silent)
    rows = pq.read_table(out / "metadata")
    true = clip_columns(rows, out / "source", CLIP)
    turned = rows.set_column(
        rows.schema.get_field_index("caption"), "caption", [rows["caption"].to_pylist()[::-1]]
    )
    false = clip_columns(turned, out / "source", CLIP)
    gain = np.array(true["relevance"]) - np.array(false["relevance"])
    assert gain.mean() > 0.2 and (gain > 0).mean() > 0.8
    features, known = features_of(pa.chunked_array([true["clip_image"]]))
    assert known.all() and np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    # the model's own forward is the reference
    clip = load_clip(CLIP.model, CLIP.tokenizer_folder)
    image = decode(
        (out / "source" / "00000.tar").read_bytes()[512 : 512 + rows["bytes"][0].as_py()]
    )
    with torch.inference_mode():
        pixels = clip._prepare(image)[None]
        ids = clip.tokenizer([rows["caption"][0].as_py()], return_tensors="pt")
        cosine = (
            clip.model(
                input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixels
            ).logits_per_image
            / clip.model.logit_scale.exp()
        )
    assert float(cosine) == pytest.approx(true["relevance"][0].as_py(), abs=1e-4)


def test_an_unreadable_image_has_no_features_and_no_score(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest(table_source(pairs), out, rows_per_part=4, log=silent)
    head = tmp_path / "head.safetensors"
    width = load_clip(CLIP.model, CLIP.tokenizer_folder).model.config.projection_dim
    save_file({"0.weight": np.ones((1, width), np.float32)}, head)
    filters = Filters(clip=CLIP, heads=HeadFilter(files={"aesthetic": head}))
    run_filters(filters, out, pairs, scorers={"white": whiteness}, log=silent)
    rows = read_columns(column_folders(out), ["clip_image", "aesthetic", "relevance", "white"])
    for name in ("aesthetic", "relevance", "white"):
        assert [value is None for value in rows[name].to_pylist()] == [False] * 3 + [True] * 3
    features, known = features_of(rows["clip_image"])
    assert known.tolist() == [True] * 3 + [False] * 3 and (features[3:] == 0).all()
    assert rows["aesthetic"][0].as_py() == pytest.approx(features[0].sum(), abs=1e-3)
    assert rows["white"][2].as_py() == 1


def whiteness(images: list[Image.Image]) -> Any:
    return np.array([(np.asarray(image) == 255).mean() for image in images])


def test_heads_follow_their_metadata_and_refuse_another_width(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 4)), rng.normal(size=(1, 5))
    tensors = {"layers.0.weight": first, "layers.0.bias": np.ones(5), "layers.2.weight": second}
    x = rng.normal(size=(3, 4)).astype(np.float32)
    hidden = x @ first.T + 1
    expected = {
        "none": hidden @ second.T,
        "relu": np.maximum(hidden, 0) @ second.T,
    }
    for activation, value in expected.items():
        path = tmp_path / f"{activation}.safetensors"
        save_file(tensors, path, metadata={"activation": activation})
        assert np.allclose(apply_head(x, path), value, atol=1e-5)
    save_file(tensors, path, metadata={"activation": "relu", "output": "sigmoid"})
    assert np.allclose(apply_head(x, path), 1 / (1 + np.exp(-expected["relu"])), atol=1e-5)
    with pytest.raises(ValueError, match="belongs to another CLIP"):
        apply_head(np.zeros((1, 7), np.float32), path)
    with pytest.raises(FileNotFoundError, match="no head at"):
        apply_head(x, tmp_path / "none")
