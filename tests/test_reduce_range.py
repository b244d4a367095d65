"""Weights in 7 bits: what changes in the graph, where it is done, and that engines still agree."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hcf.artifact import read_manifest
from hcf.engines import reduce_range as module
from hcf.engines.build import build
from hcf.engines.forms import entry_name
from hcf.engines.reduce_range import for_this_cpu, int8_saturates, reduce_range
from hcf.settings import BuildConfig

WEIGHT = np.array([[127, -127, 64, 1], [-1, 3, 126, 0]], dtype=np.int8)


def graph() -> Any:
    """x -> Q/DQ -> Gemm with an int32 bias -> y, and the same weight transposed for a MatMul."""
    tensors = {
        "weight": WEIGHT,
        "bias": np.array([100, -7], dtype=np.int32),
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w_scale": np.array([0.01, 0.02], dtype=np.float32),
        "b_scale": np.array([0.0002, 0.0004], dtype=np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["weight", "w_scale"], ["w_dq"], axis=0),
        helper.make_node("DequantizeLinear", ["bias", "b_scale"], ["b_dq"], axis=0),
        helper.make_node("Gemm", ["x_dq", "w_dq", "b_dq"], ["y"], name="first", transB=1),
        helper.make_node("Transpose", ["weight"], ["w_t"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["w_t", "w_scale"], ["w_t_dq"], axis=1),
        helper.make_node("MatMul", ["x_dq", "w_t_dq"], ["z"], name="second"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2]) for name in ("y", "z")],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def outputs(model: Any, x: np.ndarray) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(model).run(None, {"x": x}))


def test_halves_once_and_doubles_the_scales() -> None:
    model = graph()
    x = np.random.default_rng(0).uniform(-2.5, 2.5, (3, 4)).astype(np.float32)
    before = outputs(model, x)
    assert reduce_range(model) == 1  # one weight, read by two products
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert tensors["weight"].tolist() == [[64, -64, 32, 0], [0, 2, 63, 0]]  # ties to even
    assert tensors["bias"].tolist() == [50, -4]
    scales = {n.output[0]: tensors[n.input[1]] for n in model.graph.node if n.op_type[0] == "D"}
    assert scales["w_dq"] == pytest.approx([0.02, 0.04])
    assert scales["w_t_dq"] == pytest.approx([0.02, 0.04])
    assert scales["b_dq"] == pytest.approx([0.0004, 0.0008])
    assert scales["x_dq"] == np.float32(0.02)  # activations keep 8 bits
    # a weight moves by half of its new step of 0.04, an input of at most 2.56 multiplies that
    for old, new in zip(before, outputs(model, x), strict=True):
        assert 0 < np.abs(old - new).max() <= 4 * 2.56 * 0.02


def test_what_is_kept_cannot_saturate() -> None:
    assert 2 * 255 * np.abs(WEIGHT.astype(int)).max() > 2**15 - 1
    model = graph()
    reduce_range(model)
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    assert 2 * 255 * np.abs(numpy_helper.to_array(weight).astype(int)).max() <= 2**15 - 1


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2", "fma"}, True),
        ("AMD64", set(), True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512f", "avx512_vnni"}, False),
        ("x86_64", {"amx_int8"}, False),
        ("aarch64", {"asimd"}, False),
    ],
)
def test_which_processors(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], expected: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
    assert int8_saturates() is expected


@pytest.mark.parametrize("large", [False, True])
def test_a_copy_is_changed_and_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    source, work = tmp_path / "model.onnx", tmp_path / "work"
    work.mkdir()
    onnx.save(graph(), str(source), save_as_external_data=large, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    as_it_was = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert len(as_it_was) == 1 + large
    monkeypatch.setattr(module, "int8_saturates", lambda: True)
    with for_this_cpu(source, "int8", work) as copy:
        assert copy.parent.parent == work
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(copy)).graph.initializer}
        assert np.abs(found["weight"].astype(int)).max() == 64
    assert not list(work.iterdir())
    assert all((tmp_path / name).read_bytes() == data for name, data in as_it_was.items())
    for precision in ("fp32", "bf16", "int8-weight"):
        with for_this_cpu(source, precision, work) as same:
            assert same == source
    monkeypatch.setattr(module, "int8_saturates", lambda: False)
    with for_this_cpu(source, "int8", work) as same:
        assert same == source


def test_engines_for_such_a_processor_agree_with_eager(
    tiny_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any machine: 7 bits are right everywhere, they are only not needed."""
    monkeypatch.setattr(module, "int8_saturates", lambda: True)
    config = BuildConfig(
        engines=["onnxruntime", "openvino"], precisions=["int8"], components=["unet"], threads=1,
        repeats=1,
    )  # fmt: skip
    entries = read_manifest(build(tiny_exported, tmp_path / "out", config, print)).engines["unet"]
    for name in ("onnxruntime-int8", "openvino-int8"):
        entry = next(entry for entry in entries if entry_name(entry) == name)
        assert entry.error is not None and 1e-3 < entry.error < 0.15, name
        assert entry.details["weight_bits"] == 7
        assert entry.layer_precisions["int8"] > 60
        assert entry.source is not None
        stored = tiny_exported / entry.source
        assert (tmp_path / "out" / entry.source).read_bytes() == stored.read_bytes()
