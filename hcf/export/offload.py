"""Weights out of memory and back: where a graph is checked, torch's copy only takes up room."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

OFFLOAD_FROM_BYTES = 2 * 2**30
ALIGNMENT = 64


@contextmanager
def offloaded(module: nn.Module, folder: Path) -> Iterator[bool]:
    """Inside, weights of 2 GiB and more lie in a file of `folder` and are mapped, not held.

    `module` computes as before: pages are read when they are used, and can be dropped by the
    system. Yields whether it did; afterwards the weights are in memory and the file is gone.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device.type == "cpu"]
    size = sum(tensor.nbytes for tensor in tensors)
    if size < OFFLOAD_FROM_BYTES:
        yield False
        return
    path = folder / "weights.offloaded"
    held = [tensor for tensor in tensors if tensor.is_contiguous() and tensor.nbytes]
    try:
        offsets = _write(held, path)
        _map(held, offsets, path)
        gc.collect()
        try:
            yield True
        finally:
            _read(held, offsets, path)
    finally:
        path.unlink(missing_ok=True)


def _write(held: list[Tensor], path: Path) -> list[int]:
    """Writes tensors one after the other; where each begins."""
    offsets: list[int] = []
    with path.open("wb") as file:
        for tensor in held:
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            offsets.append(file.tell())
            tensor.detach().reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.seek(0, os.SEEK_END)
    return offsets


def _map(held: list[Tensor], offsets: list[int], path: Path) -> None:
    """Points each tensor at its place in the file."""
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    for tensor, offset in zip(held, offsets, strict=True):
        mapped = torch.empty(0, dtype=tensor.dtype)
        mapped.set_(storage, offset // tensor.element_size(), tensor.shape, tensor.stride())  # type: ignore[arg-type]
        tensor.data = mapped


def _read(held: list[Tensor], offsets: list[int], path: Path) -> None:
    """Tensors back into memory: read from the file, since pages of a mapping would count twice."""
    for tensor, offset in zip(held, offsets, strict=True):
        count = tensor.nbytes
        raw = torch.from_numpy(np.fromfile(path, np.uint8, count, offset=offset))
        tensor.data = raw.view(tensor.dtype).view(tensor.shape)
