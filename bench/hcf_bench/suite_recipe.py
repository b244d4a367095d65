"""The recipe of a suite: its parts, checked by name before anything runs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from hcf.errors import RecipeError
from hcf.settings import Config

PartKind = Literal["ceilings", "peers", "batches", "profile", "artifacts", "selftest"]


class Part(Config):
    """One part of a suite. Only the keys of its `kind` count.

    ceilings: `dtypes`. peers: `workload` by `baseline` and each of `peers`, as interleaved pairs.
    batches: `workload` by each of `peers` at each of `batches`. profile: the layers of `workload`
    in `dtypes`. artifacts: the folder `baseline` against each of `peers` (folders), prompt to
    pixels. selftest: `comparisons` of each kind.

    `box_s` bounds the part, `subject_s` each subject in it; it is not begun with less than
    `least_s` left.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    kind: PartKind
    workload: str = ""
    baseline: str = ""
    peers: list[str] = []
    batch: int | None = Field(None, gt=0)
    batches: list[int] = []
    steps: int | None = Field(None, gt=0)
    dtypes: list[str] = []
    pairs: int = Field(8, gt=0)
    pairs_s: float = Field(20.0, gt=0)
    threshold: float = Field(0.01, gt=0)
    comparisons: int = Field(10, gt=0)
    load: int = Field(4, ge=0)
    box_s: float = Field(120.0, gt=0)
    subject_s: float = Field(120.0, gt=0)
    least_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Names are looked up when the recipe is read, not after half the suite has run."""
        if self.kind in ("peers", "batches", "profile"):
            from hcf_bench.workloads import find_workload

            if find_workload(self.workload).kind == "pipeline" and self.kind == "profile":
                raise RecipeError(
                    f"{self.workload} is a pipeline, and a profile is of one module",
                    f"name a part of it, such as {self.workload.partition('/')[0]}/unet",
                )
        if self.kind in ("peers", "batches"):
            from hcf_bench.peers import find_peer

            for name in (*([self.baseline] if self.kind == "peers" else []), *self.peers):
                find_peer(name)
        needed = {"profile": "dtypes", "ceilings": "dtypes", "batches": "batches",
                  "artifacts": "baseline"}.get(self.kind)  # fmt: skip
        if needed and not getattr(self, needed):
            raise ValueError(f"a part of kind {self.kind} needs {needed}")
        return self


class SuiteConfig(Config):
    """A suite: parts in order of value, on one device with one number of threads."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    device: str = "cpu"
    threads: int | None = Field(None, gt=0)
    seed: int = 0
    parts: list[Part] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two parts are called {', '.join(twice)}")
        return self
