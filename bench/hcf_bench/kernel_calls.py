"""Which kernels a model asks for, with which shapes: read off its fused form on the meta device.

A call is recorded as torch sees it (shapes, strides, dtypes, scalars), so that the same call can be
made again with random values on any device: for timing, and for tuning under the very key that the
kernel's launcher will look up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hcf.fuse import OPS, fuse
from hcf_bench.workloads import build_case, find_workload

NAMESPACE = "hcf"
# batch 2: a guided step of one image; decoders run on one
MODELS = (
    ("sd15/unet", 2), ("sdxl/unet", 2), ("taiji-sd-a/unet", 2), ("taiji-imagen-300m/unet", 2),
    ("sr-s/unet", 1), ("sd15/vae_decoder", 1), ("sdxl/vae_decoder", 1),
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Of `tensor`, whatever device it is on."""
        return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self, device: str, generator: torch.Generator) -> Tensor:
        """Such a tensor with random values: unit normal, or codes over their whole range."""
        out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        if self.dtype == torch.int8:
            return out.random_(-127, 128, generator=generator)
        if self.dtype == torch.float8_e4m3fn:
            values = torch.randn(self.shape, generator=generator, device=device)
            return out.copy_(values.clamp(-4, 4) * 100)
        return out.normal_(generator=generator)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class KernelCall:
    """One call of torch.ops.hcf.`op`; tensors among `arguments` are TensorSpecs."""

    op: str
    arguments: tuple[Any, ...]

    def make(self, device: str, seed: int = 0) -> tuple[Any, ...]:
        """Its arguments with random values on `device`."""
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(
            a.make(device, generator) if isinstance(a, TensorSpec) else a for a in self.arguments
        )

    def __str__(self) -> str:
        words = [_word(a) for a in self.arguments if isinstance(a, TensorSpec)]
        return f"{self.op}({', '.join(words)})"


class Recorder(TorchDispatchMode):
    """Inside, `calls` counts every call of one of our operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[KernelCall] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            given = [*args, *(kwargs or {}).values()]
            op = func._overloadpacket.__name__
            fixed = (_recorded(op, a) if isinstance(a, Tensor) else a for a in given)
            self.calls[KernelCall(op, tuple(fixed))] += 1
        return func(*args, **(kwargs or {}))


def model_calls(workload: str, batch: int, dtype: str = "bf16") -> Counter[KernelCall]:
    """{call: how often one forward makes it} of a module's fused form in channels_last."""
    case = build_case(find_workload(workload), batch=batch, device="meta", dtype=dtype)
    case.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse(case.module, OPS)
    with torch.no_grad(), Recorder() as recorder:
        case.module(*case.inputs.values())
    return recorder.calls


def calls_of(workloads: Sequence[str] | None = None, dtype: str = "bf16") -> Counter[KernelCall]:
    """{call: how often, over one forward of each workload}; of MODELS without names."""
    chosen = MODELS if not workloads else [(w, find_workload(w).batch) for w in workloads]
    found: Counter[KernelCall] = Counter()
    for workload, batch in chosen:
        found.update(model_calls(workload, batch, dtype))
    return found


def _recorded(op: str, tensor: Tensor) -> TensorSpec:
    """Images in channels_last, which convolutions keep to on a GPU and not on the meta device."""
    if op.startswith(("group_norm", "conv", "upsample")) and tensor.ndim in (3, 4):
        moved = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        return TensorSpec.of(moved)
    return TensorSpec.of(tensor)


def _word(spec: TensorSpec) -> str:
    return "x".join(str(size) for size in spec.shape) or "scalar"
