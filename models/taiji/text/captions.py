"""Captions as the text side wants them: language, style, length, and conditions left out.

B batch.
"""

import re
from random import Random

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from taiji.data import shapes
from taiji.data.corpus import Corpus

_IDEOGRAPH = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_SYLLABLE = r"\u3040-\u30ff\uac00-\ud7af"  # kana and hangul: a character is a unit, as in Chinese
_CHINESE = re.compile(f"[{_IDEOGRAPH}]")
_FOREIGN = re.compile(rf"[{_SYLLABLE}]|[^\W\d_{_IDEOGRAPH}{_SYLLABLE}]+")

# True of every scene of the shapes world, and silent about what it shows.
_REMARKS = (
    "这是一张干净的小图", "背景是一片纯白", "画面里没有文字", "四周没有边框", "图像是正方形的",
    "没有人物也没有动物", "边缘画得很平滑", "画风简单明了", "没有阴影和反光", "适合用来看图识物",
    "颜色均匀而鲜明", "只画了几何图形", "没有多余的装饰", "图中不含任何水印", "看起来像一张卡片",
)  # fmt: skip


class CaptionConfig(BaseModel):
    """What is done to a corpus's captions.

    `style` is a prefix for the whole corpus, put before a share of the captions. A share of the
    captions is lengthened to `characters`, or to any length from `least_characters` on: words must
    be found wherever they stand. `drop_both` and `drop_one` are the shares of rows that lose both
    text encoders, and each one alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_chinese: float = Field(0.5, ge=0, le=1)
    style: str | None = None
    style_share: float = Field(0.75, ge=0, le=1)
    long_share: float = Field(0.0, ge=0, le=1)
    characters: int = Field(128, gt=0)
    least_characters: int | None = Field(None, gt=0)
    drop_both: float = Field(0.1, ge=0, le=1)
    drop_one: float = Field(0.05, ge=0, le=0.5)

    @model_validator(mode="after")
    def check_shares(self) -> "CaptionConfig":
        if self.drop_both + 2 * self.drop_one > 1:
            raise ValueError(
                f"drop_both={self.drop_both} and twice drop_one={self.drop_one} exceed all rows"
            )
        if self.least_characters is not None and self.least_characters > self.characters:
            raise ValueError(
                f"least_characters={self.least_characters} exceeds characters={self.characters}"
            )
        return self


def chinese_share(text: str) -> float:
    """Share of Chinese characters among the words: a character of Chinese, Japanese or Korean is
    one, and so is a run of letters of another script. 0 for a text without words."""
    chinese = len(_CHINESE.findall(text))
    words = chinese + len(_FOREIGN.findall(text))
    return chinese / words if words else 0.0


def only_chinese(corpus: Corpus, floor: float) -> tuple[Corpus, int]:
    """`corpus` without the images whose label has a Chinese share under `floor`, and their number.

    Raises ValueError when none is left.
    """
    if not floor:  # nothing can be under it
        return corpus, 0
    kept, left_out = corpus.only(lambda text: chinese_share(text) >= floor)
    if not len(kept):
        raise ValueError(
            f"none of {len(corpus)} captions has a Chinese share of {floor}: check their "
            "language or lower min_chinese"
        )
    return kept, left_out


def lengthen(text: str, characters: int, rng: Random) -> str:
    """At most `characters` long: `text` stands at the end, behind as many remarks as fit that say
    nothing of its subject. A text that leaves no room stays as it is."""
    remarks, room = "", characters - len(text)
    for remark in rng.sample(_REMARKS, len(_REMARKS)):
        if len(remarks) + len(remark) + 1 <= room:
            remarks += remark + "。"
    return remarks + text


def prepare(text: str, rng: Random, config: CaptionConfig) -> str:
    """A caption with its style and length. `rng` is not asked where the configuration is neutral,
    so that a recipe without styles and long captions draws as it always did."""
    if config.style is not None and rng.random() < config.style_share:
        text = f"{config.style}，{text}"
    if config.long_share and rng.random() < config.long_share:
        least = config.least_characters
        length = config.characters if least is None else rng.randint(least, config.characters)
        text = lengthen(text, length, rng)
    return text


def drop_conditions(
    count: int, config: CaptionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """keep_clip, keep_sandwich (B,) bool: which rows keep which encoder."""
    u = torch.rand(count, generator=generator)
    keep_clip = u >= config.drop_both + config.drop_one
    return keep_clip, (u >= config.drop_both) & (u <= 1 - config.drop_one)


def scene_key(scene: shapes.Scene) -> shapes.Scene:
    """The same for all wordings of one scene: 'a left of b' is 'b right of a'."""
    opposite = {"right": "left", "below": "above"}
    if scene.relation not in opposite:
        return scene
    return shapes.Scene(scene.objects[::-1], opposite[scene.relation])
