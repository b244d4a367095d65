"""TensorRT plans: profiles, versions, the ladder, the inspector, weights, without running one."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hcf.engines.tensorrt import (
    PlanOptions,
    _build_down_the_ladder,
    build_plan,
    network_precisions,
    package,
    parse_shapes,
    rebuild_plan,
    version,
    workspaces,
)
from hcf.engines.tensorrt_network import engine_layers, engine_products, listen, summary
from hcf.engines.tensorrt_package import require_hardware, timing_cache_path
from hcf.engines.tensorrt_profiles import ShapeRange, pick_profile
from hcf.engines.tensorrt_refit import attach_weights, initialisers, refit_plan, weights_file
from hcf.engines.tensorrt_runtime import TensorRTEngine, read_key, require_gpu, require_version
from hcf.errors import (
    EngineMismatch,
    HcfError,
    InvalidArtifact,
    MissingDependency,
    RecipeError,
)

pytestmark = pytest.mark.trt
SM80 = PlanOptions(driver="tensorrt_rtx", compute_capability="8.0")
MINI = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/unet"


def small_graph(path: Path, kind: int, rows: int | str = 1) -> Path:
    """x (rows, 16) -> x W, both sides quantised to `kind` (INT8 or FLOAT8E4M3FN)."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), "w"),
        numpy_helper.from_array(np.float32(0.05), "scale"),
        helper.make_tensor("zero", kind, [], [0]),
    ]
    nodes = []
    for name in ("x", "w"):
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"])
        )
    nodes.append(helper.make_node("MatMul", ["x_d", "w_d"], ["y"], name="product"))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, 16]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def test_plans_of_another_version_or_without_a_key_are_refused(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    plan = build_plan(graph, tmp_path / "plans", SM80)
    sidecar = plan.with_suffix(".json")
    key = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**key, "version": "0.1"}))
    with pytest.raises(EngineMismatch, match="built by tensorrt_rtx 0.1"):
        TensorRTEngine(plan, "unet", "int8")
    sidecar.write_text("{")
    with pytest.raises(InvalidArtifact, match="damaged"):
        TensorRTEngine(plan, "unet", "int8")
    sidecar.unlink()
    with pytest.raises(InvalidArtifact, match="missing"):
        TensorRTEngine(plan, "unet", "int8")


def test_missing_package_says_what_to_install() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependency, match=r"hcf-toolkit\[trt\]"):
            package("tensorrt")
    assert version().rpartition(" ")[2]


def test_fp8_of_a_whole_unet_for_an_a100_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HcfError, match="71 layers in fp8.*Ada, Hopper and later"):
        require_hardware(tmp_path / "model.fp8.onnx", dict.fromkeys(map(str, range(71)), "fp8"),
                         "sm80")  # fmt: skip
    require_hardware(tmp_path / "model.fp8.onnx", {"a": "fp8"}, "sm90")


def test_several_profiles_and_which_is_taken(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8, rows="batch")
    ranges = tuple(ShapeRange({"x": [low, 16]}, {"x": [opt, 16]}, {"x": [high, 16]})
                   for low, opt, high in ((1, 2, 4), (4, 8, 16)))  # fmt: skip
    plan = build_plan(graph, tmp_path / "plans", replace(SM80, profiles=ranges))
    key = read_key(plan)
    assert [p["x"][1] for p in key["profiles"]] == [[2, 16], [8, 16]]
    assert [pick_profile(key["profiles"], {"x": [n, 16]}, "p") for n in (1, 4, 5)] == [0, 0, 1]
    with pytest.raises(HcfError, match=r"x 17x16\. Its profiles: 0: x 1..4 x 16; 1: x 4..16"):
        pick_profile(key["profiles"], {"x": [17, 16]}, "plan")
    again = rebuild_plan(plan, graph, tmp_path / "again")
    assert again.name == plan.name  # the same target, profiles and options: the same key


def test_versions_and_gpus_a_plan_runs_on() -> None:
    options = {"version_compatible": False, "hardware_compatibility_level": None}
    key: dict[str, Any] = {"version": "10.13.2", "compute_capability": "sm80", "options": options}
    require_version("plan", key, "tensorrt", "10.13.2")
    require_gpu("plan", key, "sm80")
    with pytest.raises(EngineMismatch, match="built by tensorrt 10.13.2, here is 10.14.1"):
        require_version("plan", key, "tensorrt", "10.14.1")
    with pytest.raises(EngineMismatch, match="built for sm80, this GPU is sm90"):
        require_gpu("plan", key, "sm90")
    options |= {"version_compatible": True, "hardware_compatibility_level": "ampere_plus"}
    require_version("plan", key, "tensorrt", "10.14.1")
    require_gpu("plan", key, "sm90")
    for other in ("10.9.0", "11.4.0"):
        with pytest.raises(EngineMismatch):
            require_version("plan", key, "tensorrt", other)
    with pytest.raises(EngineMismatch, match="ampere_plus"):
        require_gpu("plan", key, "sm75")


def stand_in(folder: Path, name: str, number: str) -> None:
    """A package that imports as TensorRT of another version would."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"__version__ = {number!r}\nclass Builder: pass\n")


def test_a_tensorrt_that_is_too_old_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, module)
    stand_in(tmp_path, "tensorrt", "10.3.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependency, match="tensorrt 10.3.0 is installed, 10.12 or") as caught:
        package("tensorrt")
    assert caught.value.fix == "pip install --upgrade 'tensorrt>=10.12'"
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt/__init__.py").write_text(
        '__version__ = "10.12.0.36"\nclass Builder: pass\n'
    )
    importlib.invalidate_caches()
    for cached in (tmp_path / "tensorrt").glob("__pycache__/*"):
        cached.unlink()
    assert package("tensorrt")[0] == "tensorrt"
    monkeypatch.delitem(sys.modules, "tensorrt")


def test_a_build_goes_down_the_ladder_when_memory_runs_out() -> None:
    """The builder here is a stand-in for TensorRT's, which takes what it gets without a GPU."""
    _, trt = package("tensorrt_rtx")
    log = listen(trt)

    class Settings:
        limit = 0

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.limit = size

    class Builder:
        def __init__(self, least: int, message: str) -> None:
            self.least, self.message = least, message

        def build_serialized_network(self, network: Any, config: Settings) -> bytes | None:
            if config.limit <= self.least:
                return b"plan"
            log.handle.log(trt.ILogger.Severity.ERROR, self.message)
            return None

    options = PlanOptions(workspace_gb=4.0)
    words = "[memory.cpp] Cuda Runtime (out of memory)"
    plan, _, rungs = _build_down_the_ladder(
        trt, Builder(1 << 30, words), None, Settings(), Settings, options, log
    )
    assert plan == b"plan" and log.out_of_memory == 2
    assert rungs == [
        {"gib": 4.0, "outcome": "out of memory"},
        {"gib": 2.0, "outcome": "out of memory"},
        {"gib": 1.0, "outcome": "built"},
    ]
    plan, _, rungs = _build_down_the_ladder(
        trt, Builder(0, words), None, Settings(), Settings, options, log
    )
    assert plan is None and len(rungs) == 6  # and no further
    plan, _, rungs = _build_down_the_ladder(
        trt, Builder(0, "no implementation"), None, Settings(), Settings, options, log
    )
    assert plan is None and [rung["outcome"] for rung in rungs] == ["failed"]
    assert workspaces(1.0) == [1 << 30 >> n for n in range(6)]


def test_skipped_tactics_are_counted() -> None:
    _, trt = package("tensorrt_rtx")
    log = listen(trt)
    for message in (
        "Skipping tactic 0x12 due to insufficient memory on requested size of 123",
        "Tactic 4 Name: x skipped", "Tactic skipped due to bad arguments", "all is well",
    ):  # fmt: skip
        log.handle.log(trt.ILogger.Severity.WARNING, message)
    assert log.skipped_tactics == 2 and log.out_of_memory == 1
    assert log.tail() == "TensorRT gave no reason"


def inspected(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"Layers": list(layers), "Bindings": []}


def test_the_inspectors_layers_of_both_versions_are_understood() -> None:
    of_10 = {
        "Name": "node_conv2d_1 + node_silu", "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Channel vectorized row major Int8 format"}],
        "TacticName": "sm80_xmma_fprop_i8i8_i8i32_f32",
        "Metadata": "[ONNX Layer: node_conv2d_1]\x1e[ONNX Layer: node_silu]",
    }  # fmt: skip
    of_11 = {
        "Name": "gemm", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_linear]",
        "Inputs": [{"Name": "x", "Format": "Linear", "DataType": "Half"}], "TacticName": "h16816",
    }  # fmt: skip
    fp8 = {**of_11, "Name": "g8", "Inputs": [{"DataType": "FP8"}], "Metadata": "[ONNX Layer: q]"}
    opaque = {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Metadata": "[ONNX Layer: r]"}
    layers = engine_layers(inspected(of_10, of_11, fp8, opaque))
    assert [layer.precision for layer in layers] == ["int8", "fp16", "fp8", ""]
    asked = {"node_conv2d_1": "int8", "node_linear": "int8", "q": "fp8", "r": "int8"}
    assert engine_products(layers, asked) == {
        "node_conv2d_1": "int8", "node_linear": "fp16", "q": "fp8"
    }  # fmt: skip
    assert summary(layers)["untold"] == 1
    names_alone = engine_layers({"Layers": ["conv + relu"]})
    assert names_alone[0].name == "conv + relu" and names_alone[0].precision == ""


def test_timings_are_kept_by_version_and_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path))
    path = timing_cache_path("tensorrt", "10.13.3.9", "sm90")
    assert path == tmp_path / "timing/tensorrt-10.13.3.9-sm90.cache"
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    plan = build_plan(graph, tmp_path / "a", replace(SM80, timing_cache=path))
    assert path.is_file() and len(path.read_bytes()) > 0
    again = build_plan(graph, tmp_path / "b", replace(SM80, timing_cache=path))
    assert plan.name == again.name  # it is no part of the key


def test_external_weights_are_part_of_the_key(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    first = build_plan(graph, tmp_path / "plans", SM80)
    graph.with_name("int8.onnx.data").write_bytes(b"other weights")
    assert build_plan(graph, tmp_path / "plans", SM80) != first


def test_new_weights_need_a_plan_built_for_them(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    plan = build_plan(graph, tmp_path / "plans", SM80)
    with pytest.raises(HcfError, match="built without refit"):
        attach_weights(plan, tmp_path / "other", graph)
    sidecar = plan.with_suffix(".json")
    key = json.loads(sidecar.read_text())
    key["options"]["refit"] = True
    sidecar.write_text(json.dumps(key))
    copy = attach_weights(plan, tmp_path / "other", graph)
    assert copy.read_bytes() == plan.read_bytes()
    wanted = read_key(copy)["weights"]
    assert weights_file(copy, wanted) == copy.parent / wanted["file"]
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(EngineMismatch, match="weights of a graph with hash"):
        weights_file(copy, wanted)
    graph.unlink()
    with pytest.raises(InvalidArtifact, match="which is missing"):
        weights_file(copy, wanted)
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependency, match="needs an NVIDIA GPU"):
            refit_plan(plan, {"w": np.zeros((16, 16), np.float32)})


def test_stored_weights_are_found_by_name(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    found = initialisers(graph, ["w", "scale", "absent"])
    assert found["w"].shape == (16, 16) and set(found) == {"w", "scale"}


def test_a_dynamic_graph_gets_a_profile(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8, rows="batch")
    shapes = replace(SM80, min_shapes={"x": [1, 16]}, opt_shapes={"x": [2, 16]})
    plan = build_plan(graph, tmp_path, replace(shapes, max_shapes={"x": [8, 16]}))
    assert read_key(plan)["shapes"] == {"x": [[1, 16], [2, 16], [8, 16]]}
    other = build_plan(graph, tmp_path, replace(shapes, max_shapes={"x": [4, 16]}))
    assert other != plan  # the shapes are part of the key


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8, rows="batch")
    with pytest.raises(RecipeError, match="needs opt shapes"):
        build_plan(graph, tmp_path, SM80)
    with pytest.raises(RecipeError, match="no input 'samples'"):
        build_plan(graph, tmp_path, replace(SM80, opt_shapes={"samples": [1]}))
    for wrong in ([2, 17], [2], [4, 16]):
        options = replace(SM80, opt_shapes={"x": wrong}, max_shapes={"x": [2, 16]})
        with pytest.raises(RecipeError, match="^x: "):
            build_plan(graph, tmp_path, options)
    assert parse_shapes("sample:1x4x64x64,timestep:1") == {
        "sample": [1, 4, 64, 64],
        "timestep": [1],
    }
    for text in ("sample", "sample:", "sample:1x0", "sample:axb"):
        with pytest.raises(RecipeError, match="no shape"):
            parse_shapes(text)


def test_fp8_for_sm80_is_refused(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "fp8.onnx", TensorProto.FLOAT8E4M3FN)
    assert network_precisions(graph, "tensorrt_rtx")["product"].precision == "fp8"
    with pytest.raises(HcfError, match="(?s)for sm80.*fp8 needs sm89") as caught:  # an A100
        build_plan(graph, tmp_path / "plans", SM80)
    assert "1 layers in fp8" in caught.value.message and "quantize.format int8" in caught.value.fix
    assert not (tmp_path / "plans").exists()
    plan = build_plan(graph, tmp_path / "plans", replace(SM80, compute_capability="8.9"))
    assert read_key(plan)["layer_precisions"] == {"fp8": 1}


def test_targets_and_options_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "int8.onnx", TensorProto.INT8)
    with pytest.raises(RecipeError, match="does not build for sm90"):
        build_plan(graph, tmp_path, replace(SM80, compute_capability="9.0"))
    with pytest.raises(HcfError, match="no option PASCAL"):
        build_plan(graph, tmp_path, replace(SM80, hardware_compatibility_level="pascal"))
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependency, match="no GPU here"):
            build_plan(graph, tmp_path, replace(SM80, compute_capability=None))
        with pytest.raises(HcfError, match="cannot build"):
            build_plan(graph, tmp_path, replace(SM80, refit=True))
    assert list(tmp_path.iterdir()) == [graph]
