"""fp16 and bf16 graphs from the fp32 one: float16 or bfloat16 between islands that stay float32.

    x fp32 -Cast-> Conv, MatMul, Add, ... fp16 -Cast-> norm, softmax, time embedding fp32 -Cast->

Graph inputs and outputs stay float32, so every graph of a component is called alike. Parameters
keep their names; those of islands stay float32. Islands are the operators in `ISLAND_OPS`, whatever
is inside the modules in `ISLAND_MODULES` (sums of many squares, exp, and the sine of 10^3 need more
than 11 bits or more than 65504), and modules whose names match the patterns given.

The error that rounding explains: each product rounds a weight, an input and an output, each by a
relative error of standard deviation u / sqrt(3) at most, u = 2^-11 (fp16), 2^-8 (bf16). Errors of n
products in a row that know nothing of each other add in squares, to u sqrt(n); the limit is twice
that.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from hcf.errors import HcfError
from hcf.export.patterns import SCOPE_KEYS, opset_of, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

FP16_LIMIT = 65504.0
MASK = -1e30  # below this a constant hides something from a softmax; its size does not matter
BF16_OPSET = 22  # the first whose Conv takes bfloat16
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention")
ISLAND_OPS = (
    "Softmax", "LogSoftmax", "InstanceNormalization", "GroupNormalization", "LayerNormalization",
    "RMSNormalization", "BatchNormalization", "LpNormalization", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "ReduceL2", "CumSum", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Sin",
    "Cos", "Range", "RandomNormal", "RandomNormalLike",
)  # fmt: skip
ISLAND_MODULES = ("GroupNorm", "LayerNorm", "RMSNorm", "Timesteps", "TimestepEmbedding")
# where the exporter does not say what class a module is of, its name has to do
ISLAND_NAMES = ("*time_proj", "*time_embedding*", "*add_embedding*")
# everything else that has no place here is computed in float32: it is right, if not fast
LOW_OPS = (
    *PRODUCTS, "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sigmoid", "Tanh", "Relu", "LeakyRelu",
    "Gelu", "Erf", "HardSwish", "Swish", "Clip", "Max", "Min", "Concat", "Split", "Slice",
    "Transpose", "Reshape", "Flatten", "Expand", "Tile", "Gather", "GatherElements", "GatherND",
    "ScatterND", "Unsqueeze", "Squeeze", "Identity", "Where", "Pad", "Resize", "AveragePool",
    "MaxPool", "GlobalAveragePool", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
SOURCES = ("Cast", "Constant", "ConstantOfShape")  # float32 comes out; whoever wants less casts it
ANY_TYPE = ("Cast", "Shape", "Size")
STAYS_FP32 = {"Resize": (1, 2)}  # roi and scales


@dataclass(frozen=True)
class Lowering:
    """What became of a graph. `islands`: {operator or module or pattern: nodes}; `depth`: products
    in a row; `limit`: relative L2 error that the rounding explains."""

    precision: str
    opset: int
    low_nodes: int
    island_nodes: int
    low_products: int
    float_products: int
    casts: int
    islands: dict[str, int]
    depth: int
    limit: float


def lower(
    model: ir.Model, precision: str, patterns: Sequence[str] = (), domains: Sequence[str] = ("",)
) -> Lowering:
    """`model` (float32) computes in `precision` ("fp16", "bf16") outside its islands, in place.

    `patterns`: names of modules (fnmatch, without the wrapper's first name) that are islands too.
    `domains`: of whose operators some are not; of any but ONNX's own, all those that no pattern
    names. A bf16 graph is raised to opset 22. Weights are converted when they are written.
    Raises HcfError for one beyond float16.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    raise_opset(model, precision)
    if any(out.dtype is None for node in model.graph for out in node.outputs if out.uses()):
        ShapeInferencePass()(model)
    reasons = {node: island_of(node, patterns, domains) for node in model.graph}
    low = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16
    forms = _Forms(model, low, reasons)
    for node, reason in reasons.items():
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
               for a in node.attributes.values()):  # fmt: skip
            raise HcfError(
                f"{node.name} is a {node.op_type}, whose graph inside has no {precision} form",
                fix="leave this precision out of export.precisions",
            )
        if not _gives_floats(node):
            reason = node.op_type  # comparisons, sizes, casts: of the value as it was computed
        for index, value in enumerate(node.inputs):
            if value is None or index in STAYS_FP32.get(node.op_type, ()):
                continue
            if reason is None:
                node.replace_input_with(index, forms.lowered(value))
            elif node.op_type not in ANY_TYPE:
                node.replace_input_with(index, forms.in_float32(value))
        if reason is None:
            for out in node.outputs:
                out.dtype = low if out.dtype == ir.DataType.FLOAT else out.dtype
            if node.op_type == "Attention":
                node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", 1)
    _float32_outputs(model, forms)
    sweep(model)
    return _summary(model, precision, reasons, forms.made)


def raise_opset(model: ir.Model, precision: str) -> None:
    """To the opset that `precision` needs, where it is lower."""
    if precision == "bf16" and opset_of(model) < BF16_OPSET:
        from onnxscript import version_converter

        version_converter.convert_version(model, BF16_OPSET)


def _summary(
    model: ir.Model, precision: str, reasons: dict[ir.Node, str | None], casts: int
) -> Lowering:
    floats = {node: reason for node, reason in reasons.items() if _gives_floats(node, low=True)}
    products = [reason for node, reason in floats.items() if node.op_type in PRODUCTS]
    islands = Counter(reason for reason in floats.values() if reason is not None)
    depth = longest_chain(model, PRODUCTS)
    return Lowering(
        precision=precision,
        opset=opset_of(model),
        low_nodes=len(floats) - islands.total(),
        island_nodes=islands.total(),
        low_products=products.count(None),
        float_products=len(products) - products.count(None),
        casts=casts,
        islands=dict(islands.most_common()),
        depth=depth,
        limit=2 * ROUNDOFF[precision] * math.sqrt(max(depth, 1)),
    )


def _gives_floats(node: ir.Node, low: bool = False) -> bool:
    """Whether `node` computes floating-point values: float32, with `low` of any width."""
    import onnx_ir as ir

    kinds = {v.dtype for v in node.outputs if v.dtype is not None}
    wanted = {ir.DataType.FLOAT}
    if low:
        wanted |= {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return bool(kinds & wanted) and node.op_type not in SOURCES


def island_of(
    node: ir.Node, patterns: Sequence[str] = (), domains: Sequence[str] = ("",)
) -> str | None:
    """Why `node` stays in float32: its operator, its module's class, a pattern; None if not."""
    names, classes = (_scopes(node, key) for key in SCOPE_KEYS)
    if not names:
        # the other exporter's nodes are called /denoiser/down_blocks.0/.../Conv
        names = _joined(node.name or "")
        patterns = (*patterns, *ISLAND_NAMES)
    if (pattern := matching(names, patterns)) is not None:
        return pattern
    if node.domain and node.domain in domains:
        return None
    for name in reversed(classes):
        if (kind := name.rpartition(".")[2]) in ISLAND_MODULES:
            return kind
    return node.op_type if node.op_type in ISLAND_OPS or node.op_type not in LOW_OPS else None


def matching(names: Iterable[str], patterns: Sequence[str]) -> str | None:
    """The first pattern that a module name fits, the wrapper's own first part left off."""
    for name in names:
        inner = name.partition(".")[2]
        for pattern in patterns:
            if inner and (fnmatchcase(inner, pattern) or inner.startswith(f"{pattern}.")):
                return pattern
    return None


def longest_chain(model: ir.Model, op_types: Sequence[str]) -> int:
    """The most nodes of these types that follow one another."""
    depth: dict[int, int] = {}
    for node in model.graph:
        before = max((depth.get(id(v), 0) for v in node.inputs if v is not None), default=0)
        for out in node.outputs:
            depth[id(out)] = before + (node.op_type in op_types)
    return max(depth.values(), default=0)


class _Forms:
    """The other form of a value, made once, right behind what makes the value."""

    def __init__(
        self, model: ir.Model, low: ir.DataType, reasons: dict[ir.Node, str | None]
    ) -> None:
        self.model, self.low, self.reasons, self.made = model, low, reasons, 0
        self.known: dict[ir.Value, ir.Value] = {}

    def lowered(self, value: ir.Value) -> ir.Value:
        """A float32 `value` in low precision: a parameter converted where no island reads it."""
        import onnx_ir as ir

        if value.dtype != ir.DataType.FLOAT:
            return value
        if value.is_initializer() and not value.is_graph_input() and not value.is_graph_output():
            if all(self.reasons.get(use.node) is None for use in value.uses()):
                _convert(value, self.low)
                return value
        return self._cast(value, self.low)

    def in_float32(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        return self._cast(value, ir.DataType.FLOAT) if value.dtype == self.low else value

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        if value in self.known:
            return self.known[value]
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_to_{dtype.name}")
        out = self.known[value] = node.outputs[0]
        out.name = f"{value.name}_{dtype.name.lower()}"
        out.dtype, out.shape = dtype, value.shape
        if (source := value.producer()) is not None:
            node.metadata_props.update(source.metadata_props)
            self.model.graph.insert_after(source, node)
        else:
            self.model.graph.insert_before(self.model.graph[0], node)
        self.made += 1
        return out


def _float32_outputs(model: ir.Model, forms: _Forms) -> None:
    for index, value in enumerate(list(model.graph.outputs)):
        if value.dtype == forms.low:
            out = forms.in_float32(value)
            out.name, value.name = value.name, f"{value.name}_{forms.low.name.lower()}"
            model.graph.outputs[index] = out


def _convert(value: ir.Value, low: ir.DataType) -> None:
    """The parameter in `low`, computed when it is read: the graph holds no second copy."""
    import onnx_ir as ir

    tensor, name = value.const_value, str(value.name)
    assert tensor is not None
    half = low == ir.DataType.FLOAT16
    if half:
        _require_in_range(name, tensor.numpy())

    def make() -> ir.Tensor:
        array = tensor.numpy()
        if half and array.size and array.min() < MASK:
            array = np.where(array < MASK, np.float32(-FP16_LIMIT), array)
        return ir.Tensor(array.astype(low.numpy()), dtype=low, name=name)

    value.const_value = ir.LazyTensor(make, dtype=low, shape=tensor.shape, name=name)
    value.dtype = low


def _require_in_range(name: str, array: Any) -> None:
    """HcfError for a weight that float16 cannot hold; what hides keys from a softmax may be."""
    if array.size and array.min() < MASK:
        array = array[array > MASK]
    if not array.size:
        return
    largest = max(-float(array.min()), float(array.max()))
    if not largest <= FP16_LIMIT:
        raise HcfError(
            f"{name} holds {largest:.3g}, beyond float16's {FP16_LIMIT:.0f}",
            fix="use bf16, or name its module in export.islands",
        )


def _scopes(node: ir.Node, key: str) -> list[str]:
    """The names, outermost first, that the exporter wrote under `key`."""
    text = node.metadata_props.get(key, "")
    return [str(name) for name in ast.literal_eval(text)] if text.startswith("[") else []


def _joined(name: str) -> list[str]:
    """ "/a/b.0/c/Conv" -> a, a.b.0, a.b.0.c"""
    parts = [part for part in name.split("/")[:-1] if part]
    return [".".join(parts[: index + 1]) for index in range(len(parts))]
