"""The convolutions and matrix products of an ONNX graph, and the precision it gives each.

What the graph says is what an engine is held to: `hcf.engines.require_layers` compares it, name by
name, with what the runtime says that it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hcf.artifact import hash_file
from hcf.export.inspect import read_graph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")
# ONNX element types by the name layer counts use
STORED = {
    "INT8": "int8", "UINT8": "int8", "INT4": "int4", "UINT4": "int4",
    "FLOAT8E4M3FN": "fp8", "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16",
}  # fmt: skip


def graph_products(path: Path) -> dict[str, str]:
    """Name -> precision ("fp32", "fp16", "bf16", "int8", "fp8", "int4") of every product.

    A product whose weights alone are dequantised counts as what they are stored in. Reads no
    external weights. Raises InvalidArtifact for a file that is no ONNX graph.
    """
    return products_of(read_graph(path))


def products_of(model: ModelProto) -> dict[str, str]:
    """As `graph_products`, of a graph in memory."""
    from onnx import TensorProto

    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    types = {t.name: TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types.setdefault(value.name, TensorProto.DataType.Name(value.type.tensor_type.elem_type))
    default = STORED.get(_floating_type(types), "fp32")
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        sides = [_dequantised_from(name, makers, types) for name in node.input[:2]]
        kinds = [side[0] for side in sides if side is not None]
        weight_alone = sides[1] is not None and sides[1][1]
        quantised = len(kinds) == 2 or weight_alone
        found[node.name] = kinds[-1] if quantised else _computed_in(node, makers, types, default)
    return found


def hash_graph(path: Path) -> str:
    """SHA-256 of a graph with its external weights (`<name>.data` beside it), hexadecimal."""
    data = external_data(path)
    return combine_hashes(hash_file(path), hash_file(data) if data.is_file() else None)


def listed_hash(files: Mapping[str, str], source: str) -> str:
    """`hash_graph` of the graph `source` from the file hashes of a manifest; "missing" if not."""
    if source not in files:
        return "missing"
    return combine_hashes(files[source], files.get(f"{source}.data"))


def combine_hashes(graph: str, data: str | None) -> str:
    """The graph's own hash, or one over both where its weights are in a file of their own."""
    if data is None:
        return graph
    return hashlib.sha256(json.dumps([graph, data]).encode()).hexdigest()


def external_data(path: Path) -> Path:
    """Where the exporter puts the weights of a graph that is too large for one message."""
    return path.with_name(f"{path.name}.data")


def _dequantised_from(
    name: str, makers: Mapping[str, NodeProto], types: Mapping[str, str]
) -> tuple[str, bool] | None:
    """What a tensor was dequantised from ("int8"), and whether that is stored; else None.

    A Cast after it is a change of floating type: the values are the dequantised ones.
    """
    node = makers.get(name)
    while node is not None and node.op_type in (*MOVES, "Cast"):
        node = makers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source = node.input[0]
    maker = makers.get(source)
    while maker is not None and maker.op_type in MOVES:
        source = maker.input[0]
        maker = makers.get(source)
    if maker is None:
        return STORED.get(types.get(source, ""), "int8"), True
    # a quantised activation: the zero point says its type
    for quantiser in (maker, node):
        if len(quantiser.input) > 2 and quantiser.input[2] in types:
            return STORED.get(types[quantiser.input[2]], "int8"), False
    return "int8", False


def _computed_in(
    node: NodeProto, makers: Mapping[str, NodeProto], types: Mapping[str, str], default: str
) -> str:
    """The floating type of a product: its weight's, else what shape inference left, else the
    graph's. A cast above an input says it too (float32 islands)."""
    for name in (*node.output, *node.input):
        if name in types and types[name] in ("FLOAT", "FLOAT16", "BFLOAT16"):
            return STORED[types[name]]
        maker = makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            return STORED.get(_cast_to(maker), default)
        if maker is not None and maker.op_type == "Transpose" and maker.input[0] in types:
            return STORED.get(types[maker.input[0]], default)
    return default


def _cast_to(node: NodeProto) -> str:
    from onnx import TensorProto

    kind = next((a.i for a in node.attribute if a.name == "to"), TensorProto.FLOAT)
    return TensorProto.DataType.Name(kind)


def _floating_type(types: Mapping[str, str]) -> str:
    """The floating type most weights have."""
    floats = Counter(k for k in types.values() if k in ("FLOAT", "FLOAT16", "BFLOAT16"))
    return floats.most_common(1)[0][0] if floats else "FLOAT"
