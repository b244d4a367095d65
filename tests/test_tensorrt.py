"""TensorRT-RTX builds plans for a named GPU on this machine; running one needs that GPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hcf.engines.tensorrt import (
    PlanOptions,
    build_plan,
    network_precisions,
    plan_entry,
    version,
)
from hcf.engines.tensorrt_profiles import describe, pick_profile, span, with_rows
from hcf.engines.tensorrt_refit import initialisers
from hcf.engines.tensorrt_runtime import TensorRTEngine, read_key
from hcf.errors import (
    HcfError,
    InvalidArtifact,
    MissingDependency,
)
from hcf.export.component import graph_inputs, relative_error
from hcf.export.graphs import graph_name, save_graph
from hcf.export.onnx import export_component, graph_runner
from hcf.export.passes import insert_qdq
from hcf.export.precision import lower
from hcf.quantize.quantize import choose_layers
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import quantisable
from hcf.quantize.statistics import collect_statistics
from hcf.settings import BuildConfig, ExportConfig
from hcf.trace import DenoiserCall

pytestmark = pytest.mark.trt
SM80 = PlanOptions(driver="tensorrt_rtx", compute_capability="8.0")
MINI = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/unet"


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
    folder = tmp_path_factory.mktemp("artefact")
    text = {"encoder_hidden_states": torch.randn(2, 7, 48)}
    graphs = write_graphs(unet, text, 8, folder, ("int8",), dynamic=False)
    convolutions = [n for n in graphs.layers if quantisable(unet, n).weight.ndim == 4]
    return Case(
        folder, graphs.files["fp32"], graphs.files["int8"], convolutions, graphs.layers,
        graphs.inputs,
    )  # fmt: skip


@dataclass(frozen=True)
class Graphs:
    """Graphs of one U-Net in an artefact-like folder: "fp32", "fp16", "int8", "int8.fp16", ..."""

    folder: Path
    files: dict[str, Path]
    layers: list[str]
    inputs: dict[str, torch.Tensor]


def write_graphs(
    unet: Any,
    conditioning: dict[str, torch.Tensor],
    size: int,
    folder: Path,
    formats: tuple[str, ...],
    dynamic: bool = True,
) -> Graphs:
    """fp32 and fp16 graphs of `unet`, and Q/DQ of each format in both, calibrated on noise."""
    import onnx_ir as ir

    unet.eval().requires_grad_(False)
    channels = unet.config.in_channels
    calls = [
        DenoiserCall(torch.randn(2, channels, size, size), torch.full((2,), t), conditioning)
        for t in (999.0, 333.0)
    ]
    own = folder / "unet"
    files = {"fp32": own / "model.onnx", "fp16": own / "model.fp16.onnx"}
    inputs = graph_inputs(calls[0])
    config = ExportConfig(components=["unet"], dynamic=dynamic)
    export_component(SimpleNamespace(unet=unet), "unet", inputs, files["fp32"], config)
    model = ir.load(files["fp32"])
    lower(model, "fp16")
    save_graph(model, files["fp16"])
    layers, _ = choose_layers(unet, [])
    statistics = collect_statistics(unet, layers, calls)
    for kind in formats:
        scales = calibrate_scales(unet, dict.fromkeys(layers, kind), statistics)
        for floating in ("fp32", "fp16"):
            name = graph_name(kind, floating)
            graph, _ = insert_qdq(onnx.load(str(files[floating])), scales)
            files[name.removeprefix("model.").removesuffix(".onnx")] = own / name
            onnx.save(graph, str(own / name))
    return Graphs(folder, files, layers, inputs)


@pytest.fixture(scope="module", params=["sd15", "taiji"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """The U-Net of SD 1.5 at a tenth of its width, and the whole one of the Taiji mini model."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sd15":
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 96, 96),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=64,
        )
        text = {"encoder_hidden_states": torch.randn(2, 77, 64)}
        return write_graphs(unet, text, 16, folder, ("int8", "fp8"))
    config = json.loads((MINI / "config.json").read_text())
    unet = UNet2DConditionModel.from_config(config)
    text = {
        "encoder_hidden_states": torch.randn(2, 77, 192),
        "text_embeds": torch.randn(2, 320),
        "time_ids": torch.rand(2, 6) * 100,
    }
    return write_graphs(unet, text, 16, folder, ("int8", "fp8"))


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


@pytest.mark.gpu
@pytest.mark.trt_run
def test_a_plan_computes_what_the_graph_computes(case: Case, tmp_path: Path) -> None:
    options = PlanOptions(opt_shapes=shapes_of(case.inputs))
    for graph, precision, limit in ((case.fp32, "fp32", 1e-2), (case.int8, "int8", 0.1)):
        engine: Any = TensorRTEngine(build_plan(graph, tmp_path, options), "unet", precision)
        found = engine(case.inputs)["out_sample"].cpu()
        assert relative_error(found, graph_runner(case.fp32)(case.inputs)) < limit
        assert torch.equal(found, engine(case.inputs)["out_sample"].cpu())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "precision", "capability"),
    [("fp16", "fp16", "8.0"), ("int8.fp16", "int8", "8.0"), ("fp8.fp16", "fp8", "8.9")],
)
def test_real_unets_build_with_dynamic_profiles(
    family: Graphs, graph: str, precision: str, capability: str
) -> None:
    opt = shapes_of(family.inputs)
    large = {**opt, "sample": [2, opt["sample"][1], 32, 24]}
    profiles = [
        span([opt, with_rows(opt, 1)]),
        span([large, with_rows(large, 1), with_rows(large, 4)]),
    ]
    config = BuildConfig(tensorrt_driver="tensorrt_rtx", builder_optimization_level=1)
    entry = plan_entry(
        family.folder, "unet", family.files[graph], precision, config, capability, opt, profiles, 8
    )
    counts = entry.layer_precisions
    islands = "fp32" if precision == "fp16" else "fp16"
    if precision == "fp16":
        assert counts["fp16"] > len(family.layers) and counts[islands] > 0  # the time embedding
    else:
        assert counts[precision] == len(family.layers) and counts[islands] > 0
    assert len(entry.details["profiles"]) == 2 and entry.file is not None
    key = read_key(family.folder / entry.file)
    lines = describe(key["profiles"], key["pixels_per_latent"])
    assert "(256 x 192 pixels)" in lines[1] and "sample 1..4" in lines[1]
    assert pick_profile(key["profiles"], with_rows(large, 3), "plan", 8) == 1
    with pytest.raises(
        HcfError, match=r"takes no input of sample 2x\d+x64x64 \(512 x 512 pixels\)"
    ):
        beyond = {**opt, "sample": [2, opt["sample"][1], 64, 64]}
        pick_profile(key["profiles"], beyond, "plan", 8)
    assert entry.details["workspace"] == [{"gib": None, "outcome": "built"}]


@pytest.mark.gpu
@pytest.mark.trt_run
def test_calls_of_several_shapes_replay_and_keep_their_outputs(
    family: Graphs, tmp_path: Path
) -> None:
    opt = shapes_of(family.inputs)
    large = {**opt, "sample": [2, opt["sample"][1], 32, 24]}
    options = PlanOptions(driver="tensorrt", profiles=(span([opt, with_rows(opt, 1)]),
                          span([large])), pixels_per_latent=8, refit=True)  # fmt: skip
    plan = build_plan(family.files["fp16"], tmp_path, options)
    engine = TensorRTEngine(plan, "unet", "fp16")
    run = graph_runner(family.files["fp32"])
    kept = []
    for step in range(4):  # plain, captured, replayed
        for size in ((16, 16), (32, 24)):
            inputs = {**family.inputs, "sample": torch.randn(2, opt["sample"][1], *size)}
            inputs["timestep"] = torch.full((2,), 100.0 * step)
            placed = {name: tensor.cuda() for name, tensor in inputs.items()}
            kept.append((engine(placed)["out_sample"], run(inputs)["out_sample"]))
    for found, wanted in kept:
        assert relative_error(found.cpu(), wanted) < 0.02
    assert engine.report.details["cuda_graphs"] == "on"
    with pytest.raises(HcfError, match="Its profiles"):
        engine({**family.inputs, "sample": torch.randn(2, opt["sample"][1], 64, 64)})

    # A, B, A: each from the pristine plan
    name = next(n for n in ("denoiser.conv_out.bias",))
    bias = initialisers(family.files["fp16"], [name])[name]
    first = TensorRTEngine(plan, "unet", "fp16", weights={name: bias})(family.inputs)["out_sample"]
    moved = TensorRTEngine(plan, "unet", "fp16", weights={name: bias + 1})(family.inputs)
    again = TensorRTEngine(plan, "unet", "fp16", weights={name: bias})(family.inputs)["out_sample"]
    assert torch.equal(first, again)
    assert torch.allclose(moved["out_sample"], first + 1, atol=0.02)


@pytest.mark.gpu
@pytest.mark.trt_run
def test_a_stripped_plan_gets_its_weights_from_the_graph(case: Case, tmp_path: Path) -> None:
    options = PlanOptions(driver="tensorrt", opt_shapes=shapes_of(case.inputs))
    whole = TensorRTEngine(build_plan(case.fp32, tmp_path, options), "unet", "fp32")
    plan = build_plan(case.fp32, tmp_path, replace(options, strip_weights=True))
    stripped = TensorRTEngine(plan, "unet", "fp32")
    found, wanted = (engine(case.inputs)["out_sample"] for engine in (stripped, whole))
    assert relative_error(found, wanted) < 1e-3
