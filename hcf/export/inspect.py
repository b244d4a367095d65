"""What is in an ONNX file: operators, Q/DQ, which products have INT8 on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hcf.errors import InvalidArtifact, MissingDependency

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
PASSES_QUANTISATION = ("Transpose", "Reshape", "Unsqueeze", "Squeeze")  # these only move values


@dataclass(frozen=True)
class GraphSummary:
    """`inputs`/`outputs`: name -> "float32[batch, 8, height, width]"; counts by operator type.

    `quantized`/`floating`: names of the Conv/MatMul/Gemm nodes with Q/DQ on both inputs / not.
    """

    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    quantize_nodes: int
    dequantize_nodes: int
    quantized: tuple[str, ...]
    floating: tuple[str, ...]
    weight_bytes: dict[str, int]


def inspect_onnx(path: Path) -> GraphSummary:
    """Read the graph, not its external weights. InvalidArtifact for a file that is no ONNX."""
    return summarise(read_graph(path))


def read_graph(path: Path) -> ModelProto:
    """The graph without its external weights. InvalidArtifact for a file that is no ONNX."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency(
            "reading an ONNX file needs onnx", fix="pip install 'hcf-toolkit[onnx]'"
        ) from error
    if not path.is_file():
        raise InvalidArtifact(f"{path} does not exist", fix="run `hcf export` on this model first")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is in another module with every version
        raise InvalidArtifact(
            f"{path} is not a readable ONNX file: {error}", fix="run `hcf export` again"
        ) from error


def summarise(model: ModelProto) -> GraphSummary:
    """The summary of a graph in memory."""
    from onnx import TensorProto

    producers = {output: node for node in model.graph.node for output in node.output}
    operators = Counter(node.op_type for node in model.graph.node)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    quantized = [node.name for node in products if _reads_int8(node, producers)]
    weight_bytes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weight_bytes[TensorProto.DataType.Name(tensor.data_type).lower()] += _tensor_bytes(tensor)
    return GraphSummary(
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        inputs={value.name: _describe(value) for value in model.graph.input},
        outputs={value.name: _describe(value) for value in model.graph.output},
        operators=dict(operators.most_common()),
        quantize_nodes=operators["QuantizeLinear"],
        dequantize_nodes=operators["DequantizeLinear"],
        quantized=tuple(quantized),
        floating=tuple(node.name for node in products if node.name not in set(quantized)),
        weight_bytes=dict(weight_bytes),
    )


def _reads_int8(node: NodeProto, producers: dict[str, NodeProto]) -> bool:
    """Whether both inputs of a product come out of a DequantizeLinear."""
    for name in node.input[:2]:
        maker = producers.get(name)
        while maker is not None and maker.op_type in PASSES_QUANTISATION:
            maker = producers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
    return True


def _describe(value: ValueInfoProto) -> str:
    from onnx import TensorProto

    kind = value.type.tensor_type
    dims = ", ".join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
    return f"{TensorProto.DataType.Name(kind.elem_type).lower()}[{dims}]"


def _tensor_bytes(tensor: TensorProto) -> int:
    from onnx import helper

    count = 1
    for dim in tensor.dims:
        count *= dim
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
