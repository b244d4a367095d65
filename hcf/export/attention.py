"""INT8 for the two products of attention in a graph where they are MatMul, Softmax, MatMul.

    scores = Q(q sqrt(s)) Q(k sqrt(s))^T,  p = softmax(scores),  out = Q(p) Q(v)

One static range a tensor, from the calibration calls. That of p is measured, not 1: over 4096 keys
no weight comes near 1. p is INT8 although it is never negative: TensorRT has no UINT8, and one
graph serves every runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hcf.errors import HcfError, MissingDependency

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


@dataclass(frozen=True)
class Attention:
    """Names of the four tensors of one attention: scaled queries, keys, weights, values."""

    query: str
    key: str
    weights: str
    value: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.query, self.key, self.weights, self.value


def find_attention(model: ModelProto) -> list[Attention]:
    """Every MatMul - Softmax - MatMul of `model`, whose operands are all activations."""
    makers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in model.graph.initializer}
    found: list[Attention] = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        scores = makers.get(node.input[0])
        while scores is not None and scores.op_type in ("Add", "Mul", "Cast"):
            scores = makers.get(scores.input[0])
        after = readers.get(node.output[0], [])
        if scores is None or scores.op_type != "MatMul" or len(after) != 1:
            continue
        (product,) = after
        names = [*scores.input, *product.input]
        if product.op_type != "MatMul" or product.input[0] != node.output[0]:
            continue
        if constants.isdisjoint(names):
            found.append(Attention(*scores.input, *product.input))
    return found


def attention_ranges(
    graph: Path, attention: Sequence[Attention], feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """{tensor: greatest absolute value} of `attention` in the fp32 file `graph` over `feeds`.

    Runs on ONNX Runtime's CPU provider. Raises HcfError for a tensor that is not finite or is zero
    throughout, MissingDependency.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "the ranges of attention are measured with onnxruntime",
            fix="pip install 'hcf-toolkit[onnx]'",
        ) from error
    import onnx
    from onnx import TensorProto, helper

    names = sorted({name for one in attention for name in one.tensors})
    model = onnx.load(str(graph), load_external_data=False)
    for number, name in enumerate(names):
        absolute, reduced = f"hcf_abs_{number}", f"hcf_amax_{number}"
        model.graph.node.extend(
            [
                helper.make_node("Abs", [name], [absolute]),
                helper.make_node("ReduceMax", [absolute], [reduced], keepdims=0),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(reduced, TensorProto.FLOAT, []))
    # beside the graph, whose external weights it reads
    probe = graph.with_name(f".hcf-{graph.stem}-ranges.onnx")
    try:
        onnx.save(model, str(probe))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(probe), options, providers=["CPUExecutionProvider"]
        )
        wanted = [f"hcf_amax_{number}" for number in range(len(names))]
        rows = [session.run(wanted, dict(feed)) for feed in feeds]
    finally:
        probe.unlink(missing_ok=True)
    amax = {name: float(max(values)) for name, values in zip(names, zip(*rows, strict=True),
                                                             strict=True)}  # fmt: skip
    broken = [name for name, value in amax.items() if not np.isfinite(value) or value <= 0]
    if broken or not rows:
        raise HcfError(
            f"{graph.name}: attention tensors that are not finite or always zero: "
            + ", ".join(broken[:6] or ["there were no calls to measure"]),
            fix="look at the weights and the calibration prompts, or set quantize.attention: false",
        )
    return amax


def quantize_attention(
    model: ModelProto, attention: Sequence[Attention], amax: Mapping[str, float]
) -> int:
    """Puts Q/DQ in front of both products of every attention; returns the products. In place."""
    from onnx import helper, numpy_helper

    made: dict[str, str] = {}
    nodes: dict[str, list[NodeProto]] = {}
    for name in dict.fromkeys(name for one in attention for name in one.tensors):
        scale = numpy_helper.from_array(np.float32(amax[name] / 127), f"{name}_attention_scale")
        zero = numpy_helper.from_array(np.zeros((), np.int8), f"{name}_attention_zero")
        model.graph.initializer.extend([scale, zero])
        made[name] = f"{name}_attention_dequantized"
        parts = [scale.name, zero.name]
        codes = f"{name}_attention_codes"
        nodes[name] = [
            helper.make_node("QuantizeLinear", [name, *parts], [codes], name=f"{name}_attention_q"),
            helper.make_node("DequantizeLinear", [codes, *parts], [made[name]],
                             name=f"{name}_attention_dq"),
        ]  # fmt: skip
    pairs = {(one.query, one.key) for one in attention} | {
        (one.weights, one.value) for one in attention
    }
    ordered: list[NodeProto] = []
    done: set[str] = set()
    products = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and tuple(node.input) in pairs:
            for index, name in enumerate(list(node.input)):
                if name not in done:
                    ordered += nodes[name]
                    done.add(name)
                node.input[index] = made[name]
            products += 1
        ordered.append(node)
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    return products
