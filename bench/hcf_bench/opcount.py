"""FLOPs and bytes of every op of a case, counted on the meta device: no arithmetic is run.

FLOPs are `torch.utils.flop_counter`'s (2 per multiply-accumulate; convolutions, matmuls and
attention). Bytes are what an ideal implementation without fusion across heavy ops must move:

- convolution, linear: activations and weights read once, output written once, each in its dtype;
- attention: q, k, v (and a mask) read, output written; the score matrix never reaches memory;
- normalisation, softmax, reductions: one pass, input read and output written;
- a gated activation (GEGLU): one pass, both halves read, one written;
- concatenation, resizing, embedding lookup: one pass;
- all other pointwise ops (bias, activation after a norm, residual sum, scaling) ride on the op
  before them and move nothing; views and changes of layout or dtype move nothing.

By these rules the sum over ops of the larger of FLOPs / ceiling and bytes / ceiling gives the
published roofline sums of a guided U-Net step in bf16: SD1.5 2.70 and SDXL 20.6 ms at 794.5 TFLOP/s
and 3.0 TB/s (H100) within 1 %, 6.97 and 56.6 ms at 271.2 TFLOP/s and 1.75 TB/s (A100) within 2 %.
Reading the residual of each sum once more would add 2 to 3 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from hcf_bench.presets import PRESETS
from hcf_bench.workloads import DTYPES, Case, Workload, build_case, find_workload

OpKind = Literal["conv", "linear", "attention", "norm", "elementwise", "copy"]

_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_NORMS: Final = frozenset(
    ("native_group_norm", "native_layer_norm", "_fused_rms_norm", "_softmax", "mean", "sum",
     "amax", "amin", "argmax", "argmin", "var_mean", "cumsum", "linalg_vector_norm")
)  # fmt: skip
_COPIES: Final = frozenset(
    ("cat", "stack", "embedding", "index", "index_select", "gather", "repeat", "roll",
     "constant_pad_nd", "upsample_nearest2d", "upsample_bilinear2d", "avg_pool2d",
     "pixel_unshuffle", "pixel_shuffle")
)  # fmt: skip
_GATES: Final = frozenset(("gelu", "silu", "glu"))
_LAYOUT: Final = frozenset(
    ("clone", "copy_", "_to_copy", "empty", "empty_like", "full", "zeros", "ones", "arange",
     "scalar_tensor", "lift_fresh", "detach", "_unsafe_view")
)  # fmt: skip


@dataclass(frozen=True)
class OpCost:
    """One op. `layer` is its module's path in the case's module ("" at the top), `dtype` its
    output's."""

    name: str
    layer: str
    flops: int
    bytes: int
    dtype: str
    kind: OpKind


def count_workload(
    workload: Workload, batch: int | None = None, dtype: str = "fp32"
) -> list[OpCost]:
    """Ops of a workload at `batch`; a pipeline's are those of its parts as often as it runs them.

    A pipeline guides: text towers and U-Net run on 2 rows an image. Layers begin with the part.
    """
    if workload.kind != "pipeline":
        return count_ops(build_case(workload, batch=batch, device="meta", dtype=dtype))
    images = workload.batch if batch is None else batch
    ops: list[OpCost] = []
    for name in PRESETS[workload.preset].parts:
        decoder = name.startswith("vae_decoder")
        part = find_workload(f"{workload.preset}/{name}")
        once = count_workload(part, images if decoder else 2 * images, dtype)
        once = [replace(op, layer=f"{name}.{op.layer}".rstrip(".")) for op in once]
        ops += once * (workload.steps if name == "unet" else 1)
    return ops


def count_ops(case: Case) -> list[OpCost]:
    """Ops of one forward of a case built on the meta device, in order."""
    recorder = _Recorder(type(case.module).__name__)
    with torch.no_grad(), recorder.modules, _WholeAttention(recorder), recorder:
        case.module(*case.inputs.values())
    return recorder.ops


class _Recorder(TorchDispatchMode):
    """Notes every op that reaches the dispatcher, unless `paused`."""

    def __init__(self, root: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root = root
        self.modules = ModuleTracker()
        self.ops: list[OpCost] = []
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write
                      for r in func._schema.returns)  # fmt: skip
        if not (self.paused or is_view or name in _LAYOUT):
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            self.note(name, flops, tree_leaves((args, kwargs)), tree_leaves(out))
        return out

    def note(self, name: str, flops: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        ins = list({id(t): t for t in read if isinstance(t, Tensor)}.values())
        outs = [t for t in written if isinstance(t, Tensor)]
        kind, moved = _traffic(name, ins, outs[:1])
        dtype = outs[0].dtype
        self.ops.append(
            OpCost(name, self._layer(), flops, moved, _DTYPE_NAMES.get(dtype, str(dtype)), kind)
        )

    def _layer(self) -> str:
        deepest = max(self.modules.parents - {"Global"}, key=len, default="")
        return deepest.removeprefix(self.root).removeprefix(".")


class _WholeAttention(TorchFunctionMode):
    """Notes attention as one op: on the meta device it dispatches as separate matmuls."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.recorder.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.recorder.paused = False
        names = ("query", "key", "value", "attn_mask")
        named: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
        flops = sdpa_flop_count(q.shape, k.shape, v.shape)
        self.recorder.note("scaled_dot_product_attention", flops, [q, k, v, mask], [out])
        return out


def _traffic(name: str, ins: Sequence[Tensor], outs: Sequence[Tensor]) -> tuple[OpKind, int]:
    """Kind of an op and the bytes it moves by the rules above."""
    once = sum(map(_bytes, ins)) + sum(map(_bytes, outs))
    if "conv" in name:
        return "conv", once
    if name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm"):
        return "linear", once
    if name == "scaled_dot_product_attention":
        return "attention", once
    if name in _NORMS:
        return "norm", once
    if name == "embedding":  # reads the rows it writes, not the table
        return "copy", 2 * _bytes(outs[0]) + _bytes(ins[1])
    if name in _COPIES:
        return "copy", once
    if name in _GATES and _half_of_a_pair(ins[0], outs[0]):
        return "elementwise", 3 * _bytes(outs[0])
    return "elementwise", 0


def _half_of_a_pair(x: Tensor, out: Tensor) -> bool:
    """Whether an activation reads one half of a split tensor: then it gates the other half."""
    stored = x.untyped_storage().nbytes()
    return stored == 2 * out.numel() * out.element_size()


def _bytes(tensor: Tensor) -> int:
    """Of its elements; of its storage where that is less (an expanded tensor)."""
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes())
