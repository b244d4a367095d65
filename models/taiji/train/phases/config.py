"""What recipes of all phases have."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from taiji.data.corpus import CorpusConfig
from taiji.train.loop import LoopConfig


class PhaseConfig(BaseModel):
    """`model` is the folder that grows by a component a phase; `work` holds checkpoint and log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    work: Path
    loop: LoopConfig = LoopConfig(steps=1)


class CorpusPhaseConfig(PhaseConfig):
    """A phase on the mini corpus. `emoji_share` is the share of emoji in a batch."""

    data: CorpusConfig
    emoji_share: float = Field(0.6, ge=0, le=1)
