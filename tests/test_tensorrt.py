"""TensorRT-RTX builds plans for a named GPU on this machine; running one needs that GPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hcf.engines.tensorrt import (
    PlanOptions,
    build_plan,
    network_precisions,
    package,
    parse_shapes,
    plan_entry,
    version,
)
from hcf.engines.tensorrt_runtime import TensorRTEngine, read_key
from hcf.errors import (
    EngineMismatch,
    HcfError,
    InvalidArtifact,
    MissingDependency,
    RecipeError,
)
from hcf.export.component import graph_inputs, relative_error
from hcf.export.onnx import export_component, graph_runner
from hcf.export.passes import insert_qdq
from hcf.quantize.int8 import choose_layers
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import quantisable
from hcf.recipe import BuildConfig, ExportConfig
from hcf.trace import DenoiserCall

pytestmark = pytest.mark.trt
SM80 = PlanOptions(driver="tensorrt_rtx", compute_capability="8.0")


@dataclass(frozen=True)
class Case:
    """The INT8 graph of a tiny U-Net, in an artefact-like folder, its layers, one call's inputs."""

    folder: Path
    fp32: Path
    int8: Path
    convolutions: list[str]
    products: list[str]
    inputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=48,
        use_linear_projection=True,
    )
    unet.eval().requires_grad_(False)
    text = torch.randn(2, 7, 48)
    calls = [
        DenoiserCall(torch.randn(2, 4, 8, 8), torch.full((2,), t), {"encoder_hidden_states": text})
        for t in (999.0, 333.0)
    ]
    folder = tmp_path_factory.mktemp("artefact")
    fp32, int8 = folder / "unet" / "model.onnx", folder / "unet" / "model.int8.onnx"
    inputs = graph_inputs(calls[0])
    pipe = SimpleNamespace(unet=unet)
    config = ExportConfig(components=["unet"], dynamic=False)
    export_component(pipe, "unet", inputs, fp32, config)
    layers, _ = choose_layers(unet, [])
    graph, _ = insert_qdq(onnx.load(str(fp32)), calibrate_scales(unet, layers, calls))
    onnx.save(graph, str(int8))
    convolutions = [n for n in layers if quantisable(unet, n).weight.ndim == 4]
    return Case(folder, fp32, int8, convolutions, layers, inputs)


def shapes_of(inputs: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in inputs.items()}


def test_parsed_network_has_int8_where_it_was_quantised(case: Case) -> None:
    layers = network_precisions(case.int8, "tensorrt_rtx")
    kinds = Counter((layer.kind, layer.precision) for layer in layers.values())
    assert kinds["convolution", "int8"] == len(case.convolutions)
    assert kinds["convolution", "fp32"] == 2  # conv_in and conv_out
    linear = len(case.products) - len(case.convolutions)
    assert kinds["matrix_multiply", "int8"] == linear
    assert kinds["matrix_multiply", "fp32"] > 0  # attention and the embeddings
    assert kinds["quantize", "int8"] > 0 and kinds["softmax", "fp32"] > 0
    floating = {precision for kind, precision in kinds if kind == "normalization"}
    assert floating == {"fp32"}
    plain = network_precisions(case.fp32, "tensorrt_rtx")
    assert "int8" not in {layer.precision for layer in plain.values()}


def test_int8_graph_builds_for_sm80_without_a_gpu(case: Case) -> None:
    opt = shapes_of(case.inputs)
    config = BuildConfig()
    entry = plan_entry(case.folder, "unet", case.int8, "int8", config, "8.0", opt)
    assert entry.file is not None and entry.file.startswith("engines/unet/tensorrt_rtx-sm80-")
    plan = case.folder / entry.file
    assert plan.stat().st_size > 100_000
    assert entry.machine == "sm80" and entry.version == version("tensorrt_rtx")
    assert entry.layer_precisions["int8"] == len(case.products)
    assert entry.shapes["sample"] == [[2, 4, 8, 8]] * 3
    key = read_key(plan)
    assert key["compute_capability"] == "sm80" and key["driver"] == "tensorrt_rtx"
    before = plan.stat().st_mtime_ns
    again = plan_entry(case.folder, "unet", case.int8, "int8", config, "sm80", opt)
    assert again.file == entry.file and plan.stat().st_mtime_ns == before  # same key, not rebuilt
    assert {path.suffix for path in plan.parent.iterdir()} == {".plan", ".json"}

    if torch.cuda.is_available():
        return
    with pytest.raises(MissingDependency, match="needs an NVIDIA GPU"):
        TensorRTEngine(plan, "unet", "int8")


def test_an_fp32_graph_is_no_int8_plan(case: Case) -> None:
    opt = shapes_of(case.inputs)
    with pytest.raises(HcfError, match="asked for int8"):
        plan_entry(case.folder, "unet", case.fp32, "int8", BuildConfig(), "8.0", opt)


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


def test_fp8_for_sm80_is_refused_in_tensorrts_words(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "fp8.onnx", TensorProto.FLOAT8E4M3FN)
    assert network_precisions(graph, "tensorrt_rtx")["product"].precision == "fp8"
    with pytest.raises(HcfError, match="(?s)for sm80.*fp8"):
        build_plan(graph, tmp_path / "plans", SM80)
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


def test_graphs_that_cannot_be_parsed_name_the_reason(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Imaginary", ["x"], ["y"], domain="nowhere")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [value], [out]))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    with pytest.raises(HcfError, match="Imaginary"):
        network_precisions(path, "tensorrt_rtx")
    path.write_bytes(b"no graph")
    with pytest.raises(HcfError, match="cannot parse"):
        network_precisions(path, "tensorrt_rtx")
    with pytest.raises(InvalidArtifact, match="does not exist"):
        network_precisions(tmp_path / "absent.onnx")


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


@pytest.mark.gpu
@pytest.mark.trt_run
def test_a_plan_computes_what_the_graph_computes(case: Case, tmp_path: Path) -> None:
    options = PlanOptions(opt_shapes=shapes_of(case.inputs))
    for graph, precision, limit in ((case.fp32, "fp32", 1e-2), (case.int8, "int8", 0.1)):
        engine: Any = TensorRTEngine(build_plan(graph, tmp_path, options), "unet", precision)
        found = engine(case.inputs)["out_sample"].cpu()
        assert relative_error(found, graph_runner(case.fp32)(case.inputs)) < limit
        assert torch.equal(found, engine(case.inputs)["out_sample"].cpu())
