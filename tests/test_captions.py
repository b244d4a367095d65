from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import BertTokenizerFast

from taiji.data import shapes
from taiji.data.corpus import Corpus
from taiji.text.captions import (
    CaptionConfig,
    chinese_share,
    drop_conditions,
    lengthen,
    only_chinese,
    prepare,
    scene_key,
)
from taiji.text.tokenizer import build_tokenizer, open_tokenizer, overlong, tokens

RED = shapes.Scene((shapes.Group("red", "circle"),))
PAIR = (shapes.Group("red", "circle"), shapes.Group("blue", "star"))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("一只红色的猫", 1.0), ("a red cat", 0.0), ("T恤", 0.5), ("苹果 iPhone 手机 15 Pro", 2 / 3),
        ("!? 123", 0.0), ("ねこがいる", 0.0), ("東京の夜", 0.75), ("빨간 고양이", 0.0),
        ("красный кот", 0.0), ("𠀀𠀁", 1.0),
    ],
)  # fmt: skip
def test_share_counts_characters_and_foreign_words(text: str, share: float) -> None:
    assert chinese_share(text) == pytest.approx(share)


def test_images_with_foreign_captions_are_counted_and_left_out() -> None:
    rows: Any = tuple({"label": label} for label in ("苹果", "apple", "T恤"))
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    corpus = Corpus(images, np.array([5, 6, 7, 8]), rows, (RED,))
    kept, skipped = only_chinese(corpus, 0.5)
    assert skipped == 1 and [row["label"] for row in kept.rows] == ["苹果", "T恤"]
    assert kept.images.ravel().tolist() == [0, 2, 3] and kept.concept.tolist() == [5, 7, 8]
    assert kept.scenes == (RED,)
    assert only_chinese(kept, 0.5) == (kept, 0)
    with pytest.raises(ValueError, match="none of 1 captions"):
        only_chinese(Corpus(images[1:2], np.array([6]), rows[1:2], ()), 0.5)


def test_long_captions_end_in_the_text_and_fit() -> None:
    rng = Random(0)
    found = [lengthen("一个红色的圆形", 128, rng) for _ in range(100)]
    assert all(text.endswith("。一个红色的圆形") for text in found)
    assert all(115 <= len(text) <= 128 for text in found) and len(set(found)) == 100
    assert lengthen("一个红色的圆形", 5, rng) == "一个红色的圆形"
    assert min(text.index("一个红色") for text in found) > 100


def test_style_and_length_by_share() -> None:
    config = CaptionConfig(style="水彩", style_share=0.75, long_share=0.5)
    rng = Random(0)
    found = [prepare("一个红色的圆形", rng, config) for _ in range(400)]
    assert np.mean(["水彩，一个" in text for text in found]) == pytest.approx(0.75, abs=0.06)
    assert np.mean([len(text) > 100 for text in found]) == pytest.approx(0.5, abs=0.06)
    before = rng.getstate()
    assert prepare("一个红色的圆形", rng, CaptionConfig()) == "一个红色的圆形"
    assert rng.getstate() == before


def test_any_length_between_two() -> None:
    config, rng = CaptionConfig(long_share=1.0, least_characters=30), Random(0)
    found = [len(prepare("一个红色的圆形", rng, config)) for _ in range(400)]
    assert 18 <= min(found) and max(found) <= 128 and np.std(found) > 20
    assert np.mean(found) == pytest.approx(75, abs=6)  # (30 + 128) / 2, less the room left over
    with pytest.raises(ValidationError, match="least_characters=9 exceeds characters=8"):
        CaptionConfig(characters=8, least_characters=9)


def test_conditions_are_dropped_by_their_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    clip, sandwich = drop_conditions(40_000, CaptionConfig(), generator)
    both, alone = ~clip & ~sandwich, (~clip & sandwich, clip & ~sandwich)
    assert both.float().mean().item() == pytest.approx(0.10, abs=0.005)
    for absent in alone:
        assert absent.float().mean().item() == pytest.approx(0.05, abs=0.005)
    with pytest.raises(ValidationError, match="drop_one"):
        CaptionConfig(drop_both=0.5, drop_one=0.4)


def test_one_scene_has_one_key() -> None:
    assert scene_key(RED) == RED
    for relation, other in (("right", "left"), ("below", "above")):
        turned = shapes.Scene(PAIR[::-1], other)
        assert scene_key(shapes.Scene(PAIR, relation)) == turned == scene_key(turned)


def test_truncation_is_reported() -> None:
    tokenizer = build_tokenizer(["红色的猫"], max_length=8)
    assert overlong(tokenizer, ["红色的猫", "红色的猫猫", "红"], 5) == 1  # [CLS] counts
    ids, mask = tokens(tokenizer, ["红色的猫猫", "红"], 5)
    assert ids.shape == (2, 5) and mask.sum(1).tolist() == [5, 2]


def test_one_function_opens_both_tokenizers(tmp_path: Any) -> None:
    words = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色的猫", "cat", "##s"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    bert = open_tokenizer(tmp_path / "bert")
    assert isinstance(bert, BertTokenizerFast)
    ids, mask = tokens(bert, ["红色的Cats"], 8)
    assert [words[i] for i in ids[0]] == ["[CLS]", *"红色的", "cat", "##s", "[SEP]", "[PAD]"]
    assert mask[0].tolist() == [1] * 7 + [0]

    bert.save_pretrained(tmp_path / "again")
    build_tokenizer(["红色的猫"], max_length=8).save_pretrained(tmp_path / "characters")
    assert torch.equal(tokens(open_tokenizer(tmp_path / "again"), ["红色的Cats"], 8)[0], ids)
    ids, _ = tokens(open_tokenizer(tmp_path / "characters"), ["红猫"], 4)
    assert ids[0, 0] == 2 and ids[0, 3] == 0

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.txt"):
        open_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "vocab.txt").write_text("红\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no \[PAD\]"):
        open_tokenizer(tmp_path / "empty")
