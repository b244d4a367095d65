"""Graph passes: a clean ONNX graph and calibrated scales in, an explicit Q/DQ graph out.

For each quantised Conv / MatMul / Gemm of scheme int8 (fp8 likewise, in FLOAT8E4M3FN):

    x ---> QuantizeLinear ---> DequantizeLinear ---> Conv|MatMul|Gemm ---> y     scale (), zero 0
    int8 weight initializer -> DequantizeLinear ------^                          scale (O,), zero 0

Schemes may differ from layer to layer; what else may stand around one is in `hcf.export.qdq`.
TensorRT and OpenVINO recognise this shape and run the node on INT8 arithmetic; ONNX Runtime runs it
too, as floats between the pairs (its CPU kernels want the u8s8 form of `hcf.export.u8s8`).
Weights are stored on their grid, a quarter or an eighth of the file. Activations quantised once are
shared by all their consumers (q, k, v of attention). Smoothing goes into the affine of the norm
before, where nothing else reads that norm; elsewhere it is a Mul.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hcf.errors import HcfError, InvalidArtifact
from hcf.export.fold import fold_smoothing
from hcf.export.qdq import (
    QdqNodes,
    activation_key,
    gained_input,
    group_size,
    grouped_input,
    plain_weight,
    rounded_input,
    rounded_weight,
    smoothed_input,
    with_branches,
)
from hcf.quantize.formats import OPSETS
from hcf.quantize.scales import LayerScale

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # written by torch.onnx.export(dynamo=True) on every node
QUANTISABLE = ("Conv", "MatMul", "Gemm")
INT8 = 3  # onnx.TensorProto.INT8
IR_OF_INT4 = 10  # first ONNX file version with 4-bit integers (FP8 came with 9)


@dataclass(frozen=True)
class QdqCounts:
    """What the pass changed. Bytes are those of the initializers; ops are node counts by type.

    `folded`: tensors whose smoothing a norm has taken in; `smoothed`: those multiplied instead.
    `low_rank`, `bucketed`: nodes with a branch beside them, with ranges per timestep.
    """

    layers: tuple[str, ...]
    nodes: int
    activation_quantizers: int
    shared_consumers: int
    weight_bytes_before: int
    weight_bytes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    folded: int = 0
    smoothed: int = 0
    low_rank: int = 0
    bucketed: int = 0


@dataclass(frozen=True)
class _Match:
    """A node that computes a quantised layer: the initializer it reads and how, O on `axis`."""

    layer: str
    node: NodeProto
    weight: str
    transpose: list[int] | None
    axis: int
    dtype: Any


def insert_qdq(
    model: ModelProto,
    scales: Mapping[str, LayerScale],
    folder: Path | None = None,
    quantise: bool = True,
) -> tuple[ModelProto, QdqCounts]:
    """Put explicit symmetric Q/DQ on every layer of `scales`; changes `model` and returns it.

    `model` is the fp32, fp16 or bf16 graph of `torch.onnx.export(dynamo=True)`. With `folder` it
    may have been loaded without its external data, which are then read from there, one weight at a
    time; the returned model holds all it needs. With `quantise=False` only what is exact is done
    (smoothing, low-rank branches), for tools that round by themselves.

    Raises `InvalidArtifact` if a layer of `scales` has no node in the graph or its weight has
    another channel count, and `HcfError` if the graph holds Q/DQ already or its opset lacks the
    types.
    """
    ops_before = Counter(node.op_type for node in model.graph.node)
    if ops_before["QuantizeLinear"] or ops_before["DequantizeLinear"]:
        raise HcfError(
            "the graph is quantised already", fix="start from the fp32 export (model.onnx)"
        )
    if quantise:
        _require_opset(model, scales)
    bytes_before = _weight_bytes(model)
    matches = {id(match.node): match for match in _match_layers(model, scales)}
    missing = sorted(set(scales) - {match.layer for match in matches.values()})
    if missing:
        raise InvalidArtifact(
            f"{len(missing)} of {len(scales)} quantised layers have no node in the ONNX graph: "
            + ", ".join(missing[:8]),
            fix="export the same model that was quantised, with the dynamo exporter",
        )
    folded = fold_smoothing(
        model, {key: (m.node, scales[m.layer].smooth) for key, m in matches.items()}, folder
    )
    into = QdqNodes(model, {}, names=_names(model))
    consumers: Counter[tuple[Any, ...]] = Counter()
    for match in matches.values():
        scale = scales[match.layer]
        # one tensor, one scale: the widest any consumer needs (equal for q, k, v anyway)
        key = activation_key(match.node.input[0], scale, 0)
        into.amax[key] = max(into.amax.get(key, 0.0), scale.input_amax or 0.0)
        if scale.input_grid is not None:
            consumers[key] += 1

    weights = _Weights(model, matches.values(), folder)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if (found := matches.get(id(node))) is None:
            into.nodes.append(node)
        else:
            _rewrite(into, found, scales[found.layer], weights, folded, quantise)
    model.graph.node.extend(into.nodes)
    model.graph.initializer.extend(into.tensors)
    _drop_unused(model)
    if folder is not None:
        _load_rest(model, folder)
    used = [scales[match.layer] for match in matches.values()]
    ops_after = Counter(node.op_type for node in model.graph.node)
    return model, QdqCounts(
        layers=tuple(sorted(scales)),
        nodes=len(matches),
        activation_quantizers=ops_after["QuantizeLinear"],
        shared_consumers=sum(count - 1 for count in consumers.values()),
        weight_bytes_before=bytes_before,
        weight_bytes_after=_weight_bytes(model),
        ops_before=dict(ops_before),
        ops_after=dict(ops_after),
        folded=len(folded),
        smoothed=sum(key[0] == "smooth" for key in into.made),
        low_rank=sum(scale.low_rank is not None for scale in used),
        bucketed=sum(scale.bucket_amax is not None for scale in used),
    )


def _rewrite(
    into: QdqNodes,
    match: _Match,
    scale: LayerScale,
    weights: _Weights,
    folded: set[str],
    quantise: bool,
) -> None:
    """Appends the node of one layer with all that stands around it."""
    node, dtype = match.node, match.dtype
    axis = 1 if node.op_type == "Conv" else -1
    weight = weights.take(match)
    if weight.shape[0] != len(scale.weight_amax if scale.weight_amax.ndim else weight):
        raise InvalidArtifact(
            f"{match.layer}: the ONNX weight has shape {tuple(weight.shape)}, "
            f"the scales have {len(scale.weight_amax)} output channels",
            fix="export the same model that was quantised",
        )
    source = node.input[0]
    x = smoothed_input(into, source, scale, axis, folded, dtype)
    gain = None
    if quantise:
        group = group_size(scale, tuple(weight.shape))
        key = activation_key(source, scale, 0)
        ranged, gain = gained_input(into, x, scale, _rank(into.model, node), dtype)
        if group:
            key = activation_key(source, scale, group)
            node.input[0] = grouped_input(into, ranged, key, weight.shape[1], axis, dtype)
        else:
            node.input[0] = rounded_input(into, ranged, scale, key, dtype)
        node.input[1] = rounded_weight(into, match.layer, weight, scale, match.axis, dtype)
    else:
        node.input[0] = x
        if scale.smooth is not None or scale.low_rank is not None:
            node.input[1] = plain_weight(into, match.layer, weight, scale, match.axis, dtype)
    bias = None
    if gain is not None and len(node.input) > 2 and node.input[2]:
        bias = weights.read(node.input[2])
        del node.input[2]
    kernel = tuple(weight.shape[2:])
    with_branches(into, node, match.layer, x, scale, gain, bias, kernel, dtype)


def layer_of(node: NodeProto, layers: Mapping[str, object]) -> str | None:
    """The module in `layers` whose forward made `node`, or None.

    Read from the exporter's scopes, e.g. "['', 'unet', 'unet.mid_block',
    'unet.mid_block.attentions.0', ...]", innermost first; a wrapper's attribute ("unet.") in front
    of the name is allowed for.
    """
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "")
    scopes = ast.literal_eval(text) if text.startswith("[") else []
    names = [str(scope) for scope in reversed(scopes)]
    names += [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
    for name in names:
        if name in layers:
            return name
        if (inner := name.partition(".")[2]) in layers:
            return inner
    return None


def _match_layers(model: ModelProto, scales: Mapping[str, LayerScale]) -> Iterator[_Match]:
    from onnx import helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type not in QUANTISABLE or (layer := layer_of(node, scales)) is None:
            continue
        weight, transpose = node.input[1], None
        if weight not in initializers and (maker := producers.get(weight)) is not None:
            # an export without constant folding leaves Transpose(weight) in front of the MatMul
            if maker.op_type == "Transpose" and maker.input[0] in initializers:
                transpose = _ints(maker, "perm") or [1, 0]
                weight = maker.input[0]
        if weight not in initializers:
            continue  # attention's own products: both sides are activations
        dtype = helper.tensor_dtype_to_np_dtype(initializers[weight].data_type)
        if dtype.name not in ("float32", "float16", "bfloat16"):
            raise InvalidArtifact(
                f"{layer}: its weight in the ONNX graph is {dtype}, not floating point",
                fix="insert Q/DQ into the fp32 export",
            )
        axis = 0 if node.op_type == "Conv" or _ints(node, "transB") == [1] else 1
        yield _Match(layer, node, weight, transpose, axis, dtype)


class _Weights:
    """Weights of the matched nodes, each given back once its last reader has taken it."""

    def __init__(self, model: ModelProto, matches: Any, folder: Path | None) -> None:
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.folder = "" if folder is None else str(folder)
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.takers = Counter(match.weight for match in matches)

    def read(self, name: str) -> Any:
        """An initializer's values."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[name], self.folder)

    def take(self, match: _Match) -> torch.Tensor:
        """The weight of a match as torch has it: float32, O first."""
        values = self.read(match.weight)
        if match.transpose is not None:
            values = np.transpose(values, match.transpose)
        if match.axis == 1:
            values = values.T
        weight = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        self.takers[match.weight] -= 1
        if not self.takers[match.weight] and match.transpose is None:
            if self.readers[match.weight] == 1:
                self.tensors[match.weight].ClearField("raw_data")
        return weight


def _rank(model: ModelProto, node: NodeProto) -> int:
    """Dimensions of what a product reads."""
    if node.op_type in ("Conv", "Gemm"):
        return 4 if node.op_type == "Conv" else 2
    for value in (*model.graph.value_info, *model.graph.input):
        if value.name == node.input[0]:
            return len(value.type.tensor_type.shape.dim)
    return 3  # diffusers' transformer blocks


def _require_opset(model: ModelProto, scales: Mapping[str, LayerScale]) -> None:
    """Raises HcfError where the graph's opset is older than the types the scales want."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for grid in {scale.weight_grid for scale in scales.values()}:
        if opset < OPSETS[grid]:
            raise HcfError(
                f"{grid} needs ONNX opset {OPSETS[grid]} or newer, the graph has {opset}",
                fix=f"set export.opset to {OPSETS[grid]} or more and export again",
            )
        if grid != "int8":
            model.ir_version = max(model.ir_version, IR_OF_INT4)


def _names(model: ModelProto) -> set[str]:
    """Every name of a tensor in the graph."""
    return {
        *(name for node in model.graph.node for name in node.output),
        *(tensor.name for tensor in model.graph.initializer),
        *(value.name for value in model.graph.input),
    }


def _weight_bytes(model: ModelProto) -> int:
    """Bytes of the initializers' values, wherever they are."""
    from onnx import TensorProto, helper

    total = 0
    for tensor in model.graph.initializer:
        bits = 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        bits = 4 if tensor.data_type == TensorProto.INT4 else bits
        total += (prod(tensor.dims) * bits + 7) // 8
    return total


def _load_rest(model: ModelProto, folder: Path) -> None:
    """Read what is still in external files."""
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor

    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def _ints(node: NodeProto, name: str) -> list[int]:
    """An attribute of `node` as a list; [] when it is not there."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) or [attribute.i]
    return []


def _drop_unused(model: ModelProto) -> None:
    """Remove nodes nobody reads and the fp32 weights the INT8 ones replaced."""
    wanted = {output.name for output in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(model.graph.node):
        if any(output in wanted for output in node.output):
            kept.append(node)
            wanted.update(node.input)
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(initializers)
