"""One block of device memory for the activations of all engines of a pipeline.

Engines of one pipeline run one after another, so they need the memory of the largest, not the sum:
an SDXL U-Net and decoder would else hold both. TensorRT's contexts are made without memory of their
own and are given this block. Everything that uses it runs on its one stream, in order.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor


class ActivationMemory:
    """A block that only grows. `generation` tells those who hold its address that it has moved."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.lock = threading.RLock()
        self.block: Tensor | None = None
        self.generation = 0

    def reserve(self, size: int) -> None:
        """Makes the block at least `size` bytes; work that still uses the old one is not hurt."""
        if self.block is not None and len(self.block) >= size:
            return
        # memory freed and taken on one stream is reused in that stream's order
        with torch.cuda.stream(self.stream):
            self.block = None
            self.block = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        self.generation += 1

    def __len__(self) -> int:
        return 0 if self.block is None else len(self.block)


@cache
def shared_memory(index: int) -> ActivationMemory:
    """The one block of GPU `index` in this process."""
    return ActivationMemory(torch.device("cuda", index))
