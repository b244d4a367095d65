"""The nodes that stand around one quantised layer of an ONNX graph.

    x -> [Mul 1/s] -> [Mul g] -> Q -> DQ -> Conv|MatMul|Gemm -> [Mul 1/g] -> [Add L1 L2] -> [Add b]

What is in brackets is there only if the layer's scale has it. Numbers are those of
`hcf.quantize.simulate`, in the same order. Initializers take the graph's own floating-point type,
and codes are made from scales as that type holds them.

O output channels, I input channels, K = I * kh * kw, R rank, T timestep buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hcf.errors import HcfError
from hcf.quantize.formats import SMALLEST_SCALE, group_of, numpy_codes, residual_weight
from hcf.quantize.formats import weight_codes as codes_of
from hcf.quantize.scales import GRID_MAX, LayerScale

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

TIMESTEP = "timestep"  # the graph input that ranges per timestep are looked up by


@dataclass
class QdqNodes:
    """Nodes and initializers in the making; each product of the same tensor is made once.

    `amax` is the widest range that any reader of an activation wants, by `activation_key`.
    """

    model: ModelProto
    amax: dict[tuple[Any, ...], float]
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    made: dict[tuple[Any, ...], str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    constants: dict[str, str] = field(default_factory=dict)

    def constant(self, values: Any, name: str) -> str:
        """An initializer; asked for by the same name again it is the same one."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = self.free_name(name)
            self.tensors.append(numpy_helper.from_array(np.asarray(values), self.constants[name]))
        return self.constants[name]

    def node(
        self, kind: str, inputs: list[str], output: str, name: str = "", **options: Any
    ) -> str:
        """Appends a node of one output and returns the output's name."""
        from onnx import helper

        made = helper.make_node(kind, inputs, [output], name=name or output, **options)
        self.nodes.append(made)
        return output

    def free_name(self, wanted: str) -> str:
        """`wanted`, or with a number where it is taken (one tensor rounded in two ways)."""
        name, number = wanted, 1
        while name in self.names:
            name, number = f"{wanted}_{number}", number + 1
        self.names.add(name)
        return name


def activation_key(source: str, scale: LayerScale, group: int) -> tuple[Any, ...]:
    """What has to agree for two layers to share their rounded input."""
    smooth = None if scale.smooth is None else scale.smooth.tobytes()
    gain = scale.bucket_gain
    return source, smooth, None if gain is None else gain.tobytes(), scale.input_grid, group


def smoothed_input(
    into: QdqNodes, source: str, scale: LayerScale, axis: int, folded: set[str], dtype: Any
) -> str:
    """x / s: the source itself where there is no s, or where the norm before it has taken it in."""
    if scale.smooth is None or source in folded:
        return source
    key = ("smooth", source, scale.smooth.tobytes())
    if key not in into.made:
        shape = (-1, 1, 1) if axis == 1 else (-1,)
        output = into.free_name(f"{source}_smoothed")
        inverse = into.constant((1 / scale.smooth).reshape(shape).astype(dtype), f"{output}_factor")
        into.made[key] = into.node("Mul", [source, inverse], output)
    return into.made[key]


def gained_input(
    into: QdqNodes, x: str, scale: LayerScale, rank: int, dtype: Any
) -> tuple[str, str | None]:
    """(x g, g) with g (B, 1, ..) looked up by timestep; (x, None) for a layer without buckets."""
    gain = scale.bucket_gain
    if gain is None or scale.bucket_edges is None:
        return x, None
    factor = _gain(into, gain, scale.bucket_edges, rank, dtype)
    key = ("gained", x, factor)
    if key not in into.made:
        into.made[key] = into.node("Mul", [x, factor], into.free_name(f"{x}_gained"))
    return into.made[key], factor


def rounded_input(
    into: QdqNodes, x: str, scale: LayerScale, key: tuple[Any, ...], dtype: Any
) -> str:
    """Q and DQ with one static scale; x itself where the layer's input is not rounded so."""
    grid = scale.input_grid
    if grid is None:
        return x
    if ("rounded", *key) not in into.made:
        step = np.asarray(into.amax[key] / GRID_MAX[grid]).astype(dtype)
        output = into.free_name(f"{x}_dequantized")
        base = x + output.removeprefix(f"{x}_dequantized")
        step_name = into.constant(step, f"{base}_scale")
        zero = into.constant(numpy_codes(np.zeros(()), grid), f"hcf_{grid}_zero")
        codes = into.node("QuantizeLinear", [x, step_name, zero], f"{base}_{grid}", f"{base}_q")
        into.made["rounded", *key] = into.node(
            "DequantizeLinear", [codes, step_name, zero], output, f"{base}_dq"
        )
    return into.made["rounded", *key]


def grouped_input(
    into: QdqNodes, x: str, key: tuple[Any, ...], channels: int, axis: int, dtype: Any
) -> str:
    """INT4 with a scale for each group of channels, found at run time.

    No engine has products of 4-bit integers for this, and blocked QuantizeLinear runs on few, so
    the rounding is written out: x / s to the nearest integer, times s, s = max |x| / 7.
    """
    group = key[-1]
    if ("grouped", *key) not in into.made:
        base = into.free_name(f"{x}_grouped")
        # (B, I / g, g, H W) or (B L, I / g, g): the groups always on axis 2
        shape = [0, channels // group, group, -1] if axis == 1 else [-1, channels // group, group]
        tiny = max(SMALLEST_SCALE, float(np.finfo(np.float16).tiny) if dtype == np.float16 else 0)
        before = into.node("Shape", [x], f"{base}_shape")
        to = into.constant(np.array(shape, np.int64), f"{base}_groups")
        grouped = into.node("Reshape", [x, to], f"{base}_split")
        size = into.node("Abs", [grouped], f"{base}_abs")
        two = into.constant(np.array([2], np.int64), "hcf_axis_2")
        largest = into.node("ReduceMax", [size, two], f"{base}_amax", keepdims=1)
        floor = into.constant(np.asarray(tiny).astype(dtype), f"hcf_tiny_{np.dtype(dtype).name}")
        safe = into.node("Max", [largest, floor], f"{base}_safe")
        top = into.constant(np.asarray(7.0).astype(dtype), f"hcf_seven_{np.dtype(dtype).name}")
        step = into.node("Div", [safe, top], f"{base}_step")
        codes = into.node("Div", [grouped, step], f"{base}_codes")
        rounded = into.node("Round", [codes], f"{base}_int4")
        scaled = into.node("Mul", [rounded, step], f"{base}_scaled")
        into.made["grouped", *key] = into.node("Reshape", [scaled, before], f"{base}_dequantized")
    return into.made["grouped", *key]


def rounded_weight(
    into: QdqNodes, layer: str, weight: torch.Tensor, scale: LayerScale, axis: int, dtype: Any
) -> str:
    """Codes of the weight (O, I, ...) as initializer, and their DequantizeLinear; O on `axis`.

    Blocks of a Conv2d run over the flattened (O, K): TensorRT takes blocks along the last or last
    but one dimension only.
    """
    prefix = f"{layer}.weight" if axis == 0 else f"{layer}.weight_transposed"
    if (made := into.made.get(("weight", prefix))) is not None:
        return made
    grid = scale.weight_grid
    steps = np.asarray(np.maximum(scale.weight_scale.astype(dtype), _smallest(dtype)))
    codes = codes_of(weight, scale, torch.tensor(steps.astype(np.float32)))
    values = codes.numpy()
    options: dict[str, Any] = {}
    if steps.ndim == 2:
        options = {"axis": 1 - axis, "block_size": values[0].size // steps.shape[1]}
        values = values.reshape(len(values), -1)
    elif steps.ndim == 1:
        options = {"axis": axis}
    if axis == 1:
        values, steps = values.T, steps.T
    inputs = [
        into.constant(np.ascontiguousarray(numpy_codes(values, grid)), f"{prefix}_{grid}"),
        into.constant(np.ascontiguousarray(steps) if steps.ndim else steps, f"{prefix}_scale"),
        into.constant(numpy_codes(np.zeros(steps.shape, np.float32), grid), f"{prefix}_zero"),
    ]
    name = f"{prefix}_dequantized"
    if values.ndim == weight.ndim:
        into.node("DequantizeLinear", inputs, name, f"{prefix}_dq", **options)
    else:
        flat = into.node("DequantizeLinear", inputs, f"{prefix}_flat", f"{prefix}_dq", **options)
        shape = into.constant(np.array(weight.shape, np.int64), f"{prefix}_shape")
        into.node("Reshape", [flat, shape], name)
    into.made["weight", prefix] = name
    return name


def plain_weight(
    into: QdqNodes, layer: str, weight: torch.Tensor, scale: LayerScale, axis: int, dtype: Any
) -> str:
    """The smoothed weight less its low-rank part, not rounded, as initializer."""
    values = residual_weight(weight, scale).numpy()
    name = f"{layer}.weight_residual" if axis == 0 else f"{layer}.weight_residual_transposed"
    values = values if axis == 0 else values.T
    return into.constant(np.ascontiguousarray(values.astype(dtype)), name)


def with_branches(
    into: QdqNodes,
    node: NodeProto,
    layer: str,
    x: str,
    scale: LayerScale,
    gain: str | None,
    bias: Any,
    kernel: tuple[int, ...],
    dtype: Any,
) -> None:
    """Appends `node` and what is done to its output: gain undone, low-rank branch, bias (O,).

    `kernel` is (kh, kw) of a convolution, () of a Linear.
    """
    if gain is None and scale.low_rank is None:
        into.nodes.append(node)
        return
    final = node.output[0]
    steps: list[tuple[str, str]] = []
    if gain is not None:
        steps.append(("Div", gain))
    if scale.low_rank is not None:
        steps.append(("Add", _branch(into, node, layer, x, scale, kernel, dtype)))
    if bias is not None:
        shape = (1, -1, 1, 1) if node.op_type == "Conv" else (-1,)
        name = into.free_name(f"{layer}.bias_apart")
        steps.append(("Add", into.constant(bias.reshape(shape), f"{name}_value")))
    current = into.free_name(f"{final}_product")
    node.output[0] = current
    into.nodes.append(node)
    for number, (kind, other) in enumerate(steps):
        last = number == len(steps) - 1
        output = final if last else into.free_name(f"{final}_step")
        current = into.node(kind, [current, other], output, name=f"{output}_{kind.lower()}")


def _branch(
    into: QdqNodes,
    node: NodeProto,
    layer: str,
    x: str,
    scale: LayerScale,
    kernel: tuple[int, ...],
    dtype: Any,
) -> str:
    """L1 (L2 x): a pair of products in floating point."""
    from onnx import helper

    assert scale.low_rank is not None
    up, down = (part.astype(dtype) for part in scale.low_rank)
    base = into.free_name(f"{layer}.low_rank")
    if node.op_type == "Conv":
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        down_name = into.constant(down.reshape(len(down), -1, *kernel), f"{layer}.low_rank_down")
        up_name = into.constant(up[..., None, None], f"{layer}.low_rank_up")
        inner = into.node("Conv", [x, down_name], f"{base}_inner", **options)
        return into.node("Conv", [inner, up_name], f"{base}_out", kernel_shape=[1, 1])
    down_name = into.constant(np.ascontiguousarray(down.T), f"{layer}.low_rank_down")
    up_name = into.constant(np.ascontiguousarray(up.T), f"{layer}.low_rank_up")
    inner = into.node("MatMul", [x, down_name], f"{base}_inner")
    return into.node("MatMul", [inner, up_name], f"{base}_out")


def _gain(into: QdqNodes, gain: Any, edges: Any, rank: int, dtype: Any) -> str:
    """(B, 1, ..) of `rank` dimensions: gain[number of inner edges <= timestep]."""
    key = ("gain", gain.tobytes(), edges.tobytes(), rank)
    if key in into.made:
        return into.made[key]
    if TIMESTEP not in (value.name for value in into.model.graph.input):
        raise HcfError(
            f"ranges per timestep need a graph input called {TIMESTEP!r}, found "
            + ", ".join(value.name for value in into.model.graph.input),
            fix="set quantize.timestep_buckets=0 for this component",
        )
    index_key = ("bucket", edges.tobytes())
    if index_key not in into.made:
        base = into.free_name("hcf_bucket")
        time = into.node("Cast", [TIMESTEP], f"{base}_time", to=1)
        one = into.constant(np.array([1], np.int64), "hcf_axis_1")
        column = into.node("Unsqueeze", [time, one], f"{base}_column")
        inner = into.constant(edges[1:-1].astype(np.float32), f"{base}_edges")
        above = into.node("GreaterOrEqual", [column, inner], f"{base}_above")
        number = into.node("Cast", [above], f"{base}_number", to=7)
        into.made[index_key] = into.node("ReduceSum", [number, one], base, keepdims=0)
    base = into.free_name("hcf_gain")
    table = into.constant(gain.astype(dtype), f"{base}_table")
    flat = into.node("Gather", [table, into.made[index_key]], f"{base}_flat")
    axes = into.constant(np.arange(1, rank, dtype=np.int64), f"hcf_axes_{rank}")
    into.made[key] = into.node("Unsqueeze", [flat, axes], base)
    return into.made[key]


def group_size(scale: LayerScale, weight_shape: tuple[int, ...]) -> int:
    """Channels that share a run-time scale; 0 for schemes without such."""
    if scale.scheme != "int4":
        return 0
    return group_of(scale, weight_shape[1], int(np.prod(weight_shape[1:])))


def _smallest(dtype: Any) -> Any:
    """The least positive scale a type can hold with any accuracy."""
    tiny = 2.0**-24 if np.dtype(dtype) == np.float16 else 1e-30
    return np.asarray(tiny).astype(dtype)
