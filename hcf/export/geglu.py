"""GEGLU's one wide projection as two: no runtime then has to cut its output apart.

    hidden, gate = split(x W + b)    ->    hidden = x W[:, :N] + b[:N],  gate = x W[:, N:] + b[N:]

The numbers are the same. Done to INT8 weights behind a DequantizeLinear when OpenVINO's form is
built: on CPUs it copies each half in its reference implementation, 4 % of SD 1.5's INT8 U-Net. The
exported graph keeps the wide form, which TensorRT fuses itself.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


def split_geglu(model: ModelProto) -> int:
    """Rewrites every Split of a linear layer's output in half; returns how many. In place.

    Only where the layer has no other reader and its weight is behind a DequantizeLinear with a
    scale a column; weights have to be loaded.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    replaced: dict[int, list[NodeProto]] = {}
    gone: set[int] = set()
    added: list[TensorProto] = []
    for node in graph.node:
        if node.op_type != "Split" or len(node.output) != 2:
            continue
        add = makers.get(node.input[0])
        product = (
            next((makers.get(name) for name in add.input if name in makers), None) if add else None
        )
        if add is None or product is None or add.op_type != "Add" or product.op_type != "MatMul":
            continue
        bias = next((tensors[name] for name in add.input if name in tensors), None)
        dequantize = makers.get(product.input[1])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        weight = tensors.get(dequantize.input[0])
        if bias is None or weight is None or len(weight.dims) != 2 or len(bias.dims) != 1:
            continue
        if readers[add.output[0]] != 1 or readers[product.output[0]] != 1:
            continue
        if not _per_column(dequantize, tensors, int(weight.dims[1])):
            continue
        if weight.dims[1] % 2 or _axis(node) not in (-1, 2) or weight.dims[1] != bias.dims[0]:
            continue
        nodes: list[NodeProto] = []
        for part, output in enumerate(node.output):
            made, fresh = _half(product, add, dequantize, weight, bias, tensors, part, output)
            nodes += made
            added += fresh
        replaced[id(node)] = nodes
        gone |= {id(add), id(product), id(dequantize)}
    kept = [
        n for node in graph.node if id(node) not in gone for n in replaced.get(id(node), [node])
    ]
    del graph.node[:]
    graph.node.extend(kept)
    wanted = {name for node in kept for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend([*initializers, *added])
    return len(replaced)


def _half(
    product: NodeProto,
    add: NodeProto,
    dequantize: NodeProto,
    weight: TensorProto,
    bias: TensorProto,
    tensors: dict[str, TensorProto],
    part: int,
    output: str,
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and tensors of columns `part` (0: first half) of the layer, ending in `output`."""
    from onnx import NodeProto as Node

    suffix = f"_half{part}"
    half_bias = _columns(bias, part, f"{bias.name}{suffix}")
    half_weight = _columns(weight, part, f"{weight.name}{suffix}")
    parts = [half_weight]
    for name in dequantize.input[1:]:
        parts.append(_columns(tensors[name], part, f"{name}{suffix}"))
    made = Node()
    made.CopyFrom(dequantize)
    source = f"{dequantize.output[0]}{suffix}"
    _rewire(made, [tensor.name for tensor in parts], source, suffix)
    times = Node()
    times.CopyFrom(product)
    _rewire(times, [product.input[0], source], f"{product.output[0]}{suffix}", suffix)
    plus = Node()
    plus.CopyFrom(add)
    inputs = [half_bias.name if name == bias.name else times.output[0] for name in add.input]
    _rewire(plus, inputs, output, suffix)
    return [made, times, plus], [half_bias, *parts]


def _rewire(node: NodeProto, inputs: list[str], output: str, suffix: str) -> None:
    del node.input[:], node.output[:]
    node.input.extend(inputs)
    node.output.append(output)
    node.name = f"{node.name}{suffix}"


def _columns(tensor: TensorProto, part: int, name: str) -> TensorProto:
    """The first (0) or second (1) half along the last axis; a scalar stays whole."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    if values.ndim:
        values = np.split(values, 2, axis=-1)[part]
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def _per_column(node: NodeProto, tensors: dict[str, TensorProto], columns: int) -> bool:
    """Whether a DequantizeLinear of (K, 2N) has one constant scale, or one a column."""
    known = all(name in tensors for name in node.input)
    return known and list(tensors[node.input[1]].dims) in ([columns], [])


def _axis(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
