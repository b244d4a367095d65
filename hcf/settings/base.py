"""What every section is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """One section of a recipe: no unknown keys, no changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Threshold(Config):
    """Bounds on one metric of the candidate: absolute, relative to the baseline, or a difference.

    `drop_max`: baseline minus candidate may not exceed it.
    """

    min: float | None = None
    max: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    drop_max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Threshold:
        if not self.model_fields_set:
            raise ValueError("a threshold needs one of min, max, ratio_min, ratio_max, drop_max")
        return self
