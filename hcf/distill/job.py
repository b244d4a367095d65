"""What every method is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hcf.distill.data import DistillationSet
from hcf.distill.teacher import Guidance, Teacher
from hcf.settings import DistillConfig

Log = Callable[[str], None]
Draw = Callable[[np.random.Generator, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Distillation:
    """One distillation, opened. `shape` (C, h, w) is that of a latent."""

    config: DistillConfig
    model: Path
    pipe: Any
    teacher: Teacher
    student: nn.Module
    guidance: Guidance
    data: DistillationSet
    shape: tuple[int, ...]
    log: Log
