"""GEGLU's projection as two halves: same numbers, no Split left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hcf.export.geglu import split_geglu


class Geglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * nn.functional.gelu(gate)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """INT8 weight behind a DequantizeLinear with a scale a column, in front of its MatMul."""
    (product,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    weight = next(t for t in model.graph.initializer if t.name == product.input[1])
    values = numpy_helper.to_array(weight)
    scale = np.abs(values).max(0).astype(np.float32) / 127
    for name, array in (
        ("w_int8", np.rint(values / scale).astype(np.int8)),
        ("w_scale", scale),
        ("w_zero", np.zeros(scale.shape, np.int8)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    node = helper.make_node(
        "DequantizeLinear", ["w_int8", "w_scale", "w_zero"], ["w_dq"], name="dq", axis=1
    )
    model.graph.node.insert(0, node)
    product.input[1] = "w_dq"
    return model


@pytest.fixture
def graph(tmp_path: Path) -> onnx.ModelProto:
    torch.manual_seed(0)
    program = torch.onnx.export(
        Geglu().eval(), (torch.randn(2, 5, 8),), dynamo=True, opset_version=21, verbose=False
    )
    assert program is not None
    return program.model_proto


def test_two_projections_compute_the_same(graph: onnx.ModelProto) -> None:
    assert split_geglu(graph) == 0, "a floating projection stays as it is"
    model = quantised(graph)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    wanted = run(model, x)
    before = [node.op_type for node in model.graph.node]
    assert "Split" in before and split_geglu(model) == 1
    after = [node.op_type for node in model.graph.node]
    assert "Split" not in after and after.count("MatMul") == 2
    onnx.checker.check_model(model)
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-6, atol=1e-7)
    assert not any(t.data_type == TensorProto.FLOAT and list(t.dims) == [8, 32]
                   for t in model.graph.initializer)  # fmt: skip
    assert split_geglu(model) == 0


def test_a_projection_with_another_reader_is_left_alone(graph: onnx.ModelProto) -> None:
    graph = quantised(graph)
    (split,) = [node for node in graph.graph.node if node.op_type == "Split"]
    value = helper.make_tensor_value_info(split.input[0], TensorProto.FLOAT, None)
    graph.graph.output.append(value)
    assert split_geglu(graph) == 0
