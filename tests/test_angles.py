"""Sines and cosines stay float32 in a bf16 OpenVINO model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hcf.engines.angles import PREFIX, split_angles
from hcf.engines.openvino import OpenVinoEngine, convert, runs_here

WIDTH = 16


def embedding(path: Path, angular: bool = True) -> Path:
    """t (b,) -> [sin(t f), cos(t f)] W (b, 8), or without the sines."""
    rng = np.random.default_rng(0)
    frequencies = np.exp(-np.log(1e4) * np.arange(WIDTH) / WIDTH).astype(np.float32)
    weight = rng.standard_normal((2 * WIDTH, 8)).astype(np.float32)
    kinds = ("Sin", "Cos") if angular else ("Neg", "Abs")
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angle"]),
        helper.make_node(kinds[0], ["angle"], ["s"]),
        helper.make_node(kinds[1], ["angle"], ["c"]),
        helper.make_node("Concat", ["s", "c"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w"], ["y"], name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["b"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 8])],
        [
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(frequencies, "frequencies"),
            numpy_helper.from_array(weight, "w"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        str(path),
    )
    return path


def test_the_model_is_cut_at_its_sines(tmp_path: Path) -> None:
    core = openvino.Core()
    model = core.read_model(str(embedding(tmp_path / "g.onnx")))
    angles = split_angles(model)
    assert angles is not None
    assert [port.get_any_name() for port in angles.inputs] == ["timestep"]
    names = {port.get_any_name() for port in angles.outputs}
    assert names == {f"{PREFIX}0", f"{PREFIX}1"}
    assert names <= {port.get_any_name() for port in model.inputs}
    assert not {"Sin", "Cos"} & {node.get_type_name() for node in model.get_ops()}
    plain = core.read_model(str(embedding(tmp_path / "plain.onnx", angular=False)))
    before = len(plain.inputs)
    assert split_angles(plain) is None and len(plain.inputs) == before


def test_a_late_timestep_keeps_its_embedding_in_bf16(tmp_path: Path) -> None:
    if not runs_here("bf16"):
        pytest.skip("this CPU has no bf16 arithmetic")
    convert(embedding(tmp_path / "g.onnx"), tmp_path / "g.xml")
    engine = OpenVinoEngine(tmp_path / "g.xml", "unet", "bf16", 1, {"timestep": (2,)})
    wanted = OpenVinoEngine(tmp_path / "g.xml", "unet", "fp32", 1, {"timestep": (2,)})
    assert engine.report.details["float32_angles"] == 2
    assert wanted.report.details["float32_angles"] == 0
    for steps in ([999.0, 997.0], [1.0, 0.0], [999.0, 997.0]):
        inputs = {"timestep": torch.tensor(steps)}
        found = engine(inputs)["y"]
        assert torch.allclose(found, wanted(inputs)["y"], atol=0.05)  # 8 bits of weights and sums
    assert len(engine.known_angles) == 2  # the third call's were known
