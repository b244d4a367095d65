"""What recipes of all phases have."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji.data.corpus import CorpusConfig
from taiji.train.loop import LoopConfig


class PhaseConfig(BaseModel):
    """`model` is the folder that grows by a component a phase; `work` holds checkpoint and log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    work: Path
    loop: LoopConfig = LoopConfig(steps=1)


class CorpusPhaseConfig(PhaseConfig):
    """A phase on the mini corpus or a data set. `emoji_share` is the share of emoji in a batch."""

    takes_buckets: ClassVar[bool] = False
    takes_manifest: ClassVar[bool] = True

    data: CorpusConfig
    emoji_share: float = Field(0.6, ge=0, le=1)

    @model_validator(mode="after")
    def _takes_its_data(self) -> Self:
        if self.data.buckets is not None and not self.takes_buckets:
            raise ValueError("data.buckets are for the phases unet and text: leave them out")
        if self.data.manifest is not None and not self.takes_manifest:
            raise ValueError("this phase is for the mini corpus: data.manifest is not")
        if self.data.manifest is not None and "emoji_share" in self.model_fields_set:
            raise ValueError("a data set has weights of its own: leave emoji_share out")
        return self


class LatentPhaseConfig(CorpusPhaseConfig):
    """A phase on the latents of a first stage that is trained: they are kept in `latents`, else in
    the work folder, and read from there the next time."""

    takes_buckets: ClassVar[bool] = True

    latents: Path | None = None
