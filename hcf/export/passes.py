"""Graph passes: a clean fp32 ONNX graph and calibrated scales in, an explicit INT8 Q/DQ graph out.

For each quantised Conv / MatMul / Gemm:

    x ---> QuantizeLinear ---> DequantizeLinear ---> Conv|MatMul|Gemm ---> y        scale (), zero
    point 0 int8 weight initializer -> DequantizeLinear ------^                            scale
    (O,), zero point 0

TensorRT and OpenVINO recognise this shape and run the node on INT8 arithmetic; ONNX Runtime runs it
too, as floats between the pairs (its CPU kernels want the u8s8 form of `hcf.export.u8s8`).
Weights are stored as INT8, a quarter of the file. Activations quantised once are shared by all
their consumers (q, k, v of attention).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hcf.errors import HcfError, InvalidArtifact
from hcf.quantize.scales import LayerScale

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # written by torch.onnx.export(dynamo=True) on every node
QUANTISABLE = ("Conv", "MatMul", "Gemm")
INT8 = 3  # onnx.TensorProto.INT8


@dataclass(frozen=True)
class QdqCounts:
    """What the pass changed. Bytes are those of the initializers; ops are node counts by type."""

    layers: tuple[str, ...]
    nodes: int
    activation_quantizers: int
    shared_consumers: int
    weight_bytes_before: int
    weight_bytes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]


@dataclass(frozen=True)
class _Match:
    """A node that computes a quantised layer: its fp32 weight as the node reads it, O on `axis`."""

    layer: str
    node: NodeProto
    weight: str
    values: NDArray[np.float32]
    axis: int


def insert_qdq(model: ModelProto, scales: Mapping[str, LayerScale]) -> tuple[ModelProto, QdqCounts]:
    """Put explicit symmetric INT8 Q/DQ on every layer of `scales`; changes `model` and returns it.

    `model` is the fp32 graph of `torch.onnx.export(dynamo=True)` at opset >= 13, weights loaded.
    Raises `InvalidArtifact` if a layer of `scales` has no node in the graph or its weight has
    another channel count, and `HcfError` if the graph holds Q/DQ already.
    """
    from onnx import helper, numpy_helper

    ops_before = Counter(node.op_type for node in model.graph.node)
    if ops_before["QuantizeLinear"] or ops_before["DequantizeLinear"]:
        raise HcfError(
            "the graph is quantised already", fix="start from the fp32 export (model.onnx)"
        )
    bytes_before = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    matches = {id(match.node): match for match in _match_layers(model, scales)}
    missing = sorted(set(scales) - {match.layer for match in matches.values()})
    if missing:
        raise InvalidArtifact(
            f"{len(missing)} of {len(scales)} quantised layers have no node in the ONNX graph: "
            + ", ".join(missing[:8]),
            fix="export the same model that was quantised, with the dynamo exporter",
        )

    activation_amax: dict[str, float] = {}
    consumers: Counter[str] = Counter()
    for match in matches.values():
        source = match.node.input[0]
        # one tensor, one scale: the widest any consumer needs (equal for q, k, v anyway)
        activation_amax[source] = max(
            activation_amax.get(source, 0.0), scales[match.layer].input_amax
        )
        consumers[source] += 1

    new_tensors: list[TensorProto] = []
    new_nodes: list[NodeProto] = []
    dequantised: dict[str, str] = {}
    weights: dict[tuple[str, int], str] = {}  # a module called twice has one weight
    zero = numpy_helper.from_array(np.zeros((), np.int8), "hcf_int8_zero")
    for node in model.graph.node:
        match_or_none = matches.get(id(node))
        if match_or_none is None:
            new_nodes.append(node)
            continue
        match = match_or_none
        source = node.input[0]
        if source not in dequantised:
            scale = numpy_helper.from_array(
                np.asarray(activation_amax[source] / 127, np.float32), f"{source}_scale"
            )
            new_tensors.append(scale)
            quantised, dequantised[source] = f"{source}_int8", f"{source}_dequantized"
            new_nodes += [
                helper.make_node(
                    "QuantizeLinear",
                    [source, scale.name, zero.name],
                    [quantised],
                    name=f"{source}_q",
                ),
                helper.make_node(
                    "DequantizeLinear",
                    [quantised, scale.name, zero.name],
                    [dequantised[source]],
                    name=f"{source}_dq",
                ),
            ]
        if (match.layer, match.axis) not in weights:
            tensors, dequantize = _int8_weight(match, scales[match.layer])
            new_tensors += tensors
            new_nodes.append(dequantize)
            weights[match.layer, match.axis] = dequantize.output[0]
        node.input[0] = dequantised[source]
        node.input[1] = weights[match.layer, match.axis]
        new_nodes.append(node)

    del model.graph.node[:]
    model.graph.node.extend(new_nodes)
    model.graph.initializer.extend([zero, *new_tensors])
    _drop_unused(model)
    return model, QdqCounts(
        layers=tuple(sorted(scales)),
        nodes=len(matches),
        activation_quantizers=len(dequantised),
        shared_consumers=sum(count - 1 for count in consumers.values()),
        weight_bytes_before=bytes_before,
        weight_bytes_after=sum(tensor.ByteSize() for tensor in model.graph.initializer),
        ops_before=dict(ops_before),
        ops_after=dict(Counter(node.op_type for node in model.graph.node)),
    )


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
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type not in QUANTISABLE or (layer := layer_of(node, scales)) is None:
            continue
        weight, transpose = node.input[1], None
        if weight not in initializers and (maker := producers.get(weight)) is not None:
            # an export without constant folding leaves Transpose(weight) in front of the MatMul
            if maker.op_type == "Transpose" and maker.input[0] in initializers:
                transpose = _ints(maker, "perm")
                weight = maker.input[0]
        if weight not in initializers:
            continue  # attention's own products: both sides are activations
        values = numpy_helper.to_array(initializers[weight])
        if values.dtype != np.float32:
            raise InvalidArtifact(
                f"{layer}: its weight in the ONNX graph is {values.dtype}, not float32",
                fix="insert Q/DQ into the fp32 export",
            )
        if transpose is not None:
            values = np.transpose(values, transpose or None)
        axis = 0 if node.op_type == "Conv" or _ints(node, "transB") == [1] else 1
        out_channels = len(scales[layer].weight_amax)
        if values.shape[axis] != out_channels:
            raise InvalidArtifact(
                f"{layer}: the ONNX weight has shape {values.shape}, "
                f"the scales have {out_channels} output channels",
                fix="export the same model that was quantised",
            )
        yield _Match(layer, node, weight, values, axis)


def _int8_weight(match: _Match, scale: LayerScale) -> tuple[list[TensorProto], NodeProto]:
    """INT8 initializer (shape of the fp32 one) and its per-channel DequantizeLinear."""
    from onnx import helper, numpy_helper

    shape = [1] * match.values.ndim
    shape[match.axis] = -1
    prefix = f"{match.layer}.weight" if match.axis == 0 else f"{match.layer}.weight_transposed"
    quantised = np.rint(match.values / scale.weight_scale.reshape(shape)).clip(-128, 127)
    tensors = [
        numpy_helper.from_array(quantised.astype(np.int8), f"{prefix}_int8"),
        numpy_helper.from_array(scale.weight_scale, f"{prefix}_scale"),
        numpy_helper.from_array(np.zeros(scale.weight_scale.shape, np.int8), f"{prefix}_zero"),
    ]
    node = helper.make_node(
        "DequantizeLinear",
        [tensor.name for tensor in tensors],
        [f"{prefix}_dequantized"],
        name=f"{prefix}_dq",
        axis=match.axis,
    )
    return tensors, node


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
