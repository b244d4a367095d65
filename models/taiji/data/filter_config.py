"""What a recipe may say about each filter. Filters write columns; no threshold is named here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji.data.caption_filters import CaptionFilter
from taiji.data.decontaminate import EvaluationFilter
from taiji.data.duplicates import DuplicateFilter
from taiji.data.image_filters import ImageFilter
from taiji.data.metadata import path_hash


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipFilter(_Config):
    """Writes `clip_image` and `relevance`, the cosine of image and caption, with a ChineseCLIPModel
    folder; its tokenizer lies there too or in a folder of its own."""

    model: Path
    tokenizer: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer or self.model


class HeadFilter(_Config):
    """Writes a column for each of `files`: a safetensors head on `clip_image`, for aesthetics,
    watermarks, nudity, text in the image."""

    files: dict[str, Path] = Field(min_length=1)


class DomainFilter(_Config):
    """Writes `domain` and `domain_score`: the nearest of `prompts` (zero-shot; the names and
    prompts of `domains.DOMAINS` where none are given), or what a linear `probe` says."""

    prompts: dict[str, tuple[str, ...]] | None = None
    probe: Path | None = None
    temperature: float = Field(0.01, gt=0)


class Filters(_Config):
    """The filters to run, in this order."""

    caption: CaptionFilter | None = CaptionFilter()
    image: ImageFilter | None = None
    clip: ClipFilter | None = None
    heads: HeadFilter | None = None
    domain: DomainFilter | None = None
    evaluation: EvaluationFilter | None = None
    duplicates: DuplicateFilter | None = DuplicateFilter()

    @model_validator(mode="after")
    def _features_first(self) -> Filters:
        if self.clip is None and (self.heads or self.domain):
            raise ValueError(
                "filters.heads and filters.domain read CLIP features: add filters.clip"
            )
        return self


def content_of(config: BaseModel) -> dict[str, Any]:
    """A filter's settings with every path replaced by the hash of what lies there."""
    return {name: _content(getattr(config, name)) for name in type(config).model_fields}


def _content(value: Any) -> Any:
    if isinstance(value, Path):
        return path_hash(value)
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items()}
    return value
