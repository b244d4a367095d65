"""The judge on a made-up world: 66 names, each a coloured pattern drawn by several "vendors"."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hcf.errors import HcfError, InvalidArtifact
from hcf.quality.clip_score import INFO_FILE, WEIGHTS_FILE, ClipZh
from hcf.quality.features import image_features, text_features
from hcf.quality.judge_training import degrade, train_judge

VENDORS = ("openmoji", "twemoji")  # one the judge trains on, one it never sees
COLOURS = {"红": (220, 30, 30), "绿": (30, 170, 50), "蓝": (40, 80, 230), "黄": (250, 210, 40),
           "紫": (140, 40, 190), "黑": (10, 10, 10)}  # fmt: skip
THINGS = ("圆", "方块", "三角", "横线", "竖线", "十字", "边框", "棋盘", "对角", "上半", "左半")


def draw(thing: str, colour: tuple[int, int, int], shrink: int) -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64] - 32
    r = 24 - shrink
    mask = {
        "圆": x**2 + y**2 < r**2,
        "方块": np.maximum(abs(x), abs(y)) < r,
        "三角": (y < r) & (abs(x) * 2 < y + r),
        "横线": (y // 5 % 2 == 0) & (abs(x) < r + 4),
        "竖线": (x // 5 % 2 == 0) & (abs(y) < r + 4),
        "十字": (np.minimum(abs(x), abs(y)) < 6) & (np.maximum(abs(x), abs(y)) < r + 4),
        "边框": (np.maximum(abs(x), abs(y)) < r) & (np.maximum(abs(x), abs(y)) > r - 7),
        "棋盘": ((x // 12 + y // 12) % 2 == 0) & (np.maximum(abs(x), abs(y)) < r + 4),
        "对角": abs(x - y) < 9,
        "上半": (y < 0) & (x**2 + y**2 < r**2),
        "左半": (x < 0) & (x**2 + y**2 < r**2),
    }[thing]
    return np.where(mask[..., None], np.array(colour), 255).astype(np.uint8)


def world() -> tuple[np.ndarray, list[dict[str, Any]]]:
    images, rows = [], []
    for number, vendor in enumerate(VENDORS):
        for colour, rgb in COLOURS.items():
            for thing in THINGS:
                images.append(draw(thing, rgb, 2 * number))
                label = f"{colour}色{thing}"
                rows.append({"vendor": vendor, "label": label, "tags": [thing], "md5": label})
    return np.stack(images), rows


def write_world(folder: Path, vendors: tuple[str, ...] = VENDORS) -> Path:
    """The made-up world as a data set that `taiji.data.emoji.load` reads."""
    images, rows = world()
    keep = [i for i, row in enumerate(rows) if row["vendor"] in vendors]
    table = [{**rows[i], "shard": 0, "index": n} for n, i in enumerate(keep)]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet")
    pixels = pa.table({"rgb": [images[i].tobytes() for i in keep]})
    pq.write_table(pixels, folder / "images-64-00000.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    train_judge(write_world(place / "data"), place / "judge", epochs=100, log=lambda line: None)
    return place / "judge"


@pytest.fixture(scope="module")
def judge(folder: Path) -> ClipZh:
    return ClipZh.load(folder)


def test_it_learns_and_its_accuracy_on_the_unseen_vendor_is_written_beside_it(
    judge: ClipZh, folder: Path
) -> None:
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    assert info["judge_vendors"] == ["openmoji"]
    assert info["unseen_vendors"] == ["twemoji"]
    assert judge.accuracy["r_at_5"] >= 0.5  # chance is 5 of 66
    assert judge.accuracy["cosine_true"] > judge.accuracy["cosine_shuffled"] + 0.1
    assert set(info["accuracy"]["by_vendor"]) == {"twemoji"}
    assert len(info["packages"]) == 3 and len(judge.labels) == 66
    assert "R@5" in judge.accuracy_line()


def test_score_prefers_the_right_caption(judge: ClipZh) -> None:
    images, rows = world()
    unseen = [i for i, row in enumerate(rows) if row["vendor"] == "twemoji"]
    labels = [rows[i]["label"] for i in unseen]
    right = judge.score(images[unseen], labels)
    wrong = judge.score(images[unseen], labels[::-1])
    assert right.shape == (66,) and right.dtype == np.float32
    assert (np.abs(right) <= 1 + 1e-5).all()
    assert right.mean() > wrong.mean() + 0.1


def test_retrieval_is_repeatable_and_near_chance_for_wrong_captions(judge: ClipZh) -> None:
    images, rows = world()
    unseen = [i for i, row in enumerate(rows) if row["vendor"] == "twemoji"]
    labels = [rows[i]["label"] for i in unseen]
    features = image_features(images[unseen])
    first = judge.hits(features, labels)
    assert np.array_equal(first, judge.hits(features, labels)) and first.mean() >= 0.5
    assert judge.retrieval(images[unseen[:9]], labels[:9]) == first[:9].mean()
    wrong = labels[38:] + labels[:38]  # another colour and another thing
    assert judge.hits(features, wrong).mean() < 0.4 * first.mean()


def test_a_judge_that_cannot_tell_names_apart_scores_nothing(judge: ClipZh) -> None:
    same = judge.label_embeddings[:1].expand(len(judge.labels), -1).contiguous()
    blind = ClipZh(judge.image_head, judge.text_head, judge.labels, same, judge.info)
    images, rows = world()
    assert blind.retrieval(images[:9], [row["label"] for row in rows[:9]]) == 0


def test_captions_are_reduced_to_their_concept(judge: ClipZh) -> None:
    assert judge.concept("推特风格红色圆") == "红色圆"
    assert judge.concept("红色圆，图形") == judge.concept("手绘风格红色圆,图形") == "红色圆"
    assert judge.concept("推特风格") == "推特风格"
    embedded = judge.embed_texts(["红色圆", "推特风格红色圆", "一辆公交车"])
    assert torch.equal(embedded[0], embedded[1])
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(3), atol=1e-4)
    direct = judge.text_head(torch.from_numpy(text_features(["红色圆"])))
    assert torch.allclose(embedded[:1], direct, atol=5e-3)


def test_wrong_numbers_are_refused(judge: ClipZh) -> None:
    images, rows = world()
    with pytest.raises(HcfError, match="2 images but 1 captions"):
        judge.score(images[:2], ["红色圆"])
    with pytest.raises(HcfError, match="the judge knows 66"):
        judge.retrieval(images[:1], ["红色圆"], candidates=67)


def test_a_missing_damaged_or_swapped_judge_is_invalid(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="judge.safetensors is missing"):
        ClipZh.load(tmp_path)
    payload = (folder / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(payload[:-8])
    (tmp_path / INFO_FILE).write_bytes((folder / INFO_FILE).read_bytes())
    with pytest.raises(InvalidArtifact, match="is not what judge.json describes"):
        ClipZh.load(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    (tmp_path / INFO_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="damaged"):
        ClipZh.load(tmp_path)


@pytest.mark.parametrize("vendors", [("openmoji",), ("twemoji",)])
def test_training_needs_vendors_of_both_sides(vendors: tuple[str, ...], tmp_path: Path) -> None:
    data = write_world(tmp_path / "data", vendors)
    with pytest.raises(HcfError, match="measured on"):
        train_judge(data, tmp_path / "judge", epochs=1)
    assert not (tmp_path / "judge").exists()


def test_degraded_images_stay_images_and_depend_on_the_seed_alone() -> None:
    images = world()[0][:3]
    one, two = (degrade(images, np.random.default_rng(4)) for _ in range(2))
    assert one.dtype == np.uint8 and one.shape == images.shape
    assert np.array_equal(one, two) and not np.array_equal(one, images)


def test_features_do_not_depend_on_the_batch() -> None:
    images = world()[0][:5]
    whole = image_features(images)
    assert np.allclose(whole, image_features(images, batch_size=2), atol=1e-3)
    with pytest.raises(HcfError, match="uint8"):
        image_features(images.astype(np.float32))
