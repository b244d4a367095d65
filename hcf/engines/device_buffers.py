"""Device memory that an engine reads and writes at fixed addresses, one set a shape.

An input is copied into its buffer only when it has changed since the last call: the text of a
prompt stays the same over all steps. Outputs are handed out in memory of their own (one copy on the
device, in stream order): multistep schedulers keep up to four of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

Sizes = tuple[tuple[int, ...], ...]
Value = TypeVar("Value")


class InputBuffer:
    """A tensor (B, ...) at a fixed address, and what was last copied there."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self.source: Tensor | None = None  # held, so that its address is not another's meanwhile
        self.version = -1
        self.copies = 0

    def fill(self, source: Tensor) -> bool:
        """Copies `source` unless it is what is there already; whether it did.

        A tensor of another device is always copied (numpy may have changed it unseen), and one made
        in inference mode, which counts no changes.
        """
        source = source.detach()
        counted = source.device == self.tensor.device and not source.is_inference()
        version = source._version if counted else -1
        if version >= 0 and version == self.version and _same(source, self.source):
            return False
        self.tensor.copy_(source, non_blocking=True)
        self.source, self.version = source, version
        self.copies += 1
        return True


class ShapeCache(Generic[Value]):
    """One value a combination of input shapes, the `limit` used last.

    `before_dropping` is called before one is let go: the device may still work with it.
    """

    def __init__(
        self,
        limit: int,
        make: Callable[[Sizes], Value],
        before_dropping: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit = limit
        self.make = make
        self.before_dropping = before_dropping
        self.values: OrderedDict[Sizes, Value] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor], names: list[str]) -> Value:
        """The value for the shapes of `inputs`, in the order of `names`; made if new."""
        sizes = tuple(tuple(inputs[name].shape) for name in names)
        if sizes in self.values:
            self.values.move_to_end(sizes)
            return self.values[sizes]
        while len(self.values) >= self.limit:
            self.before_dropping()
            self.values.popitem(last=False)  # before the new one takes memory
        self.values[sizes] = self.make(sizes)
        return self.values[sizes]


def handed_out(tensor: Tensor) -> Tensor:
    """A buffer's content in memory of its own: floats in float32, integers as they are."""
    if tensor.is_floating_point() and tensor.dtype != torch.float32:
        return tensor.float()
    return tensor.clone()


def _same(source: Tensor, kept: Tensor | None) -> bool:
    """Whether both are views of the same memory in the same layout."""
    return (
        kept is not None
        and source.data_ptr() == kept.data_ptr()
        and source.shape == kept.shape
        and source.stride() == kept.stride()
        and source.dtype == kept.dtype
        and source.device == kept.device
    )
