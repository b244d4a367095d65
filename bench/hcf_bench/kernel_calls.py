"""Which kernels a model asks for, with which shapes: read off its fused form on the meta device.

Beside the calls of the fused form stand those it would make in other forms: its linear layers and
convolutions in 8 bits, and its 16-bit convolutions by our own kernel, which `hcf.fuse` leaves to
the library. A call is recorded as torch sees it (shapes, strides, dtypes, scalars), so that it can
be made again with random values on any device: for timing, and for tuning under the very key that
the kernel's launcher will look up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hcf.fuse import DEFAULTS, fuse
from hcf_bench.workloads import build_case, find_workload

NAMESPACE = "hcf"
ALIGNED = 16  # values of a row: what 8-bit products are for
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
        out = self.empty(device)
        if self.dtype == torch.int8:
            return out.random_(-127, 128, generator=generator)
        if self.dtype == torch.float8_e4m3fn:
            values = torch.randn(self.shape, generator=generator, device=device)
            return out.copy_(values.clamp(-4, 4) * 100)
        return out.normal_(generator=generator)

    def empty(self, device: str) -> Tensor:
        """Such a tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

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

    def output(self) -> Tensor:
        """What it returns, on the meta device."""
        given = (a.empty("meta") if isinstance(a, TensorSpec) else a for a in self.arguments)
        found: Tensor = getattr(torch.ops.hcf, self.op)(*given)
        return found

    def __str__(self) -> str:
        words = [_word(a) for a in self.arguments if isinstance(a, TensorSpec)]
        return f"{self.op}({', '.join(words)})"


class Recorder(TorchDispatchMode):
    """Inside, `calls` counts every call of one of our operators, made or possible."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[KernelCall] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        op = func._overloadpacket.__name__
        given = [*args, *(kwargs or {}).values()]
        if func.namespace == NAMESPACE:
            fixed = (_recorded(op, a) if isinstance(a, Tensor) else a for a in given)
            self.calls[KernelCall(op, tuple(fixed))] += 1
        self.calls.update(OTHER_FORMS[op](*given) if op in OTHER_FORMS else ())
        return func(*args, **(kwargs or {}))


def model_calls(workload: str, batch: int, dtype: str = "bf16") -> Counter[KernelCall]:
    """{call: how often one forward makes it} of a module's fused form in channels_last."""
    case = build_case(find_workload(workload), batch=batch, device="meta", dtype=dtype)
    case.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse(case.module, DEFAULTS["cuda"])
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


def _products(*given: Any) -> list[KernelCall]:
    """8-bit forms of bias + a b, or a b: a (M, K), b (K, N)."""
    (bias, a, b) = given[:3] if len(given) > 2 else (None, *given)
    (m, k), n = a.shape, b.shape[1]
    if m < 2 or k % ALIGNED or n % ALIGNED:
        return []
    row = None if bias is None else _spec((n,), a.dtype)
    calls = []
    for op, codes in (("int8_gemm", torch.int8), ("fp8_gemm", torch.float8_e4m3fn)):
        scales = _spec((), torch.float32), _spec((n,), torch.float32)
        operands = _spec((m, k), codes), _spec((n, k), codes)
        calls.append(KernelCall(op, (*operands, *scales, row, None, "none", a.dtype)))
        calls.append(KernelCall("quantize", (_spec((m, k), a.dtype), scales[0], codes, -1)))
    return calls


def _convolutions(x: Tensor, w: Tensor, bias: Any, stride: Any, *rest: Any) -> list[KernelCall]:
    """Our own forms of a 3x3 or 1x1 convolution: in x's dtype, and in 8 bits."""
    (outputs, channels), sides = w.shape[:2], tuple(w.shape[2:])
    padding, dilation, transposed, _, groups = rest
    plain = list(padding) == [sides[0] // 2] * 2 and list(dilation) == [1, 1] and groups == 1
    if sides not in ((3, 3), (1, 1)) or transposed or not plain:
        return []
    if channels % ALIGNED or outputs % ALIGNED:
        return []
    row = None if bias is None else _spec((outputs,), x.dtype)
    shapes = tuple(x.shape), tuple(w.shape)
    floats = (_image(shape, x.dtype) for shape in shapes)
    calls = [KernelCall("conv3x3", (*floats, row, None, None, stride[0]))]
    for codes in (torch.int8, torch.float8_e4m3fn):
        scales = _spec((), torch.float32), _spec((outputs,), torch.float32)
        images = (_image(shape, codes) for shape in shapes)
        after = row, None, None, stride[0], x.dtype
        calls.append(KernelCall("conv3x3_quantized", (*images, *scales, *after)))
    return calls


def _gates(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[KernelCall]:
    """The 8-bit form of a GEGLU."""
    width = weight.shape[0]
    operands = (
        _spec((x.shape[:-1].numel(), x.shape[-1]), torch.int8),
        _spec(tuple(weight.shape), torch.int8),
    )
    scales = _spec((), torch.float32), _spec((width,), torch.float32)
    row = None if bias is None else _spec((width,), x.dtype)
    return [KernelCall("geglu_int8", (*operands, *scales, row, x.dtype))]


OTHER_FORMS = {"mm": _products, "addmm": _products, "convolution": _convolutions, "geglu": _gates}


def _spec(shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    """Contiguous."""
    return TensorSpec(shape, torch.empty(shape, device="meta").stride(), dtype)


def _image(shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    """channels_last."""
    like = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    return TensorSpec(shape, like.stride(), dtype)


def _word(spec: TensorSpec) -> str:
    return "x".join(str(size) for size in spec.shape) or "scalar"
