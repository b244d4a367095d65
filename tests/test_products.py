"""What a graph says its products run in, and the hash of a graph with its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hcf.artifact import hash_file
from hcf.engines import EngineReport, require_layers
from hcf.engines.onnxruntime import optimise, runtime_products
from hcf.engines.openvino import OpenVinoEngine, convert
from hcf.engines.products import graph_products, hash_graph, listed_hash
from hcf.errors import HcfError, InvalidArtifact

WIDTH = 64


def weight_only(path: Path, kind: int) -> Path:
    """x (b, 64) -> x W (b, 64), W stored as `kind` in blocks of 32 and dequantised."""
    rng = np.random.default_rng(0)
    most = 127 if kind == TensorProto.INT8 else 7
    values = rng.integers(-most, most + 1, (WIDTH, WIDTH)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    scale = np.full((WIDTH // 32, WIDTH), 1 / most, np.float32)
    tensors = [
        helper.make_tensor("w", kind, [WIDTH, WIDTH], values.flatten().tolist()),
        numpy_helper.from_array(scale, "s"),
    ]
    values_info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", WIDTH]) for n in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "g", values_info[:1], values_info[1:], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        str(path),
    )
    return path


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_alone_are_read_back_in_both_cpu_engines(tmp_path: Path, kind: str) -> None:
    graph = weight_only(tmp_path / "g.onnx", getattr(TensorProto, kind.upper()))
    asked = graph_products(graph)
    assert asked == {"product": kind}
    optimise(graph, tmp_path / "o.onnx", 1)
    assert runtime_products(tmp_path / "o.onnx", weights_alone=True) == {"product": kind}
    convert(graph, tmp_path / "g.xml")
    shapes = {"x": (4, WIDTH)}
    engine = OpenVinoEngine(tmp_path / "g.xml", "unet", f"{kind}-weight", 1, shapes, asked)
    assert engine.report.layer_precisions == {kind: 1}


def test_fp32_and_int8_graphs_say_what_they_are(tiny_exported: Path) -> None:
    folder = tiny_exported / "unet"
    plain, int8 = graph_products(folder / "model.onnx"), graph_products(folder / "model.int8.onnx")
    assert set(plain.values()) == {"fp32"}
    quantised = {name for name, kind in int8.items() if kind == "int8"}
    assert quantised and quantised < set(int8)
    with pytest.raises(InvalidArtifact, match="does not exist"):
        graph_products(folder / "absent.onnx")
    (folder.parent / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidArtifact, match="not a readable ONNX"):
        graph_products(folder.parent / "broken.onnx")
    (folder.parent / "broken.onnx").unlink()


def test_external_weights_are_in_the_hash(tmp_path: Path) -> None:
    path, data = tmp_path / "g.onnx", tmp_path / "g.onnx.data"
    path.write_bytes(b"graph")
    alone = hash_graph(path)
    assert alone == hash_file(path) == listed_hash({"g.onnx": alone}, "g.onnx")
    data.write_bytes(b"weights")
    with_data = hash_graph(path)
    data.write_bytes(b"WEIGHTS")
    assert len({alone, with_data, hash_graph(path)}) == 3
    files = {"g.onnx": hash_file(path), "g.onnx.data": hash_file(data)}
    assert listed_hash(files, "g.onnx") == hash_graph(path)
    assert listed_hash(files, "other.onnx") == "missing"


def report(precision: str, counts: dict[str, int]) -> EngineReport:
    return EngineReport(
        engine="openvino",
        version="1",
        component="unet",
        device="cpu",
        provider="",
        precision=precision,
        layer_precisions=counts,
    )


def test_layers_that_fell_back_are_named() -> None:
    asked = {"a": "int8", "b": "int8", "c": "fp32"}
    fine = report("int8", {"int8": 2, "fp32": 1})
    assert require_layers(fine, asked, dict(asked)) is fine
    assert require_layers(fine, asked, {"a": "int8", "c": "fp32"}) is fine  # b fused into another
    with pytest.raises(HcfError, match=r"to 2 layers, but 1 of them fell back \(b\)"):
        require_layers(report("int8", {"int8": 1, "fp32": 2}), asked, {**asked, "b": "fp32"})
    with pytest.raises(HcfError, match="renamed by the runtime"):
        found = {"a": "int8", "x": "fp32", "c": "fp32"}
        require_layers(report("int8", {"int8": 1, "fp32": 2}), asked, found)
    with pytest.raises(HcfError, match="asked for fp16.*but runs"):
        require_layers(report("fp16", {"fp32": 3}))
    half = {"a": "fp16", "c": "fp32"}
    mixed = report("fp16", {"fp16": 1, "fp32": 1})
    assert require_layers(mixed, half, {"a": "fp16", "c": "fp16"}) is mixed  # a hint
    with pytest.raises(HcfError, match=r"1 of them fell back \(a\)"):
        require_layers(mixed, half, {"a": "fp32", "c": "fp32"}, exact=True)
    weights = report("int8-weight", {"int8": 2})
    assert require_layers(weights) is weights
