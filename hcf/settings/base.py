"""What every section is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _resolved(precision: Any) -> Any:
    if precision != "auto":
        return precision
    from taiji.train.precision import fastest_precision

    return fastest_precision()


# as taiji's own: "auto" is read as what this machine trains fastest in, and kept as that
TrainingPrecision = Annotated[Literal["fp32", "bf16"], BeforeValidator(_resolved)]


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
