"""Explicit Q/DQ in an exported graph computes what the fake-quantised model computes, in INT8."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hcf.engines.reduce_range import for_this_cpu, int8_saturates
from hcf.errors import HcfError, InvalidArtifact
from hcf.export import u8s8
from hcf.export.component import graph_inputs, relative_error
from hcf.export.inspect import inspect_onnx
from hcf.export.onnx import export_component, graph_runner
from hcf.export.passes import QdqCounts, insert_qdq
from hcf.export.u8s8 import onnxruntime_form
from hcf.quantize.quantize import choose_layers
from hcf.quantize.ranges import calibrate_scales, layer_scale
from hcf.quantize.report import fake_quantized, quantisable
from hcf.quantize.scales import LayerScale
from hcf.quantize.statistics import LayerStatistics, Statistics, collect_statistics
from hcf.settings import ExportConfig, QuantizeConfig
from hcf.trace import DenoiserCall, call_denoiser


@dataclass(frozen=True)
class Case:
    """A tiny U-Net: fp32 and INT8 graphs, its scales and three calls of unit variance."""

    unet: torch.nn.Module
    calls: list[DenoiserCall]
    statistics: Statistics
    scales: dict[str, LayerScale]
    fp32: Path
    int8: Path
    counts: QdqCounts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from types import SimpleNamespace

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
    calls = [
        DenoiserCall(
            torch.randn(1, 4, 8, 8),
            torch.full((1,), timestep),
            {"encoder_hidden_states": torch.randn(1, 7, 48)},
        )
        for timestep in (999.0, 666.0, 333.0)
    ]
    calls[0].sample.mul_(4)  # ranges move over the trajectory
    folder = tmp_path_factory.mktemp("graphs")
    fp32, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    config = ExportConfig(components=["unet"], dynamic=False, opset=23)
    export_component(SimpleNamespace(unet=unet), "unet", graph_inputs(calls[0]), fp32, config)
    layers, _ = choose_layers(unet, [])
    statistics = collect_statistics(unet, layers, calls, buckets=3)
    scales = calibrate_scales(unet, dict.fromkeys(layers, "int8"), statistics)
    graph, counts = insert_qdq(onnx.load(str(fp32)), scales)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(int8))
    return Case(unet, calls, statistics, scales, fp32, int8, counts)


def plain_options() -> Any:
    """Sessions that run the Q/DQ nodes as they are written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def test_graph_computes_what_the_fake_quantised_model_computes(case: Case) -> None:
    run = graph_runner(case.int8, plain_options())
    shares: list[float] = []
    for call in case.calls:
        with torch.no_grad():
            plain = call_denoiser(case.unet, call.sample, call.timestep, call.kwargs)
            with fake_quantized(case.unet, case.scales):
                wanted = call_denoiser(case.unet, call.sample, call.timestep, call.kwargs)
        found = run(graph_inputs(call))
        error = relative_error(found, plain)
        assert 1e-3 < error < 0.1  # it is quantised
        shares.append(relative_error(found, wanted) / error)
    # one value on a rounding boundary that goes the other way moves all that comes after it by
    # about the quantisation error; calls without one agree
    assert min(shares) < 1e-3 and max(shares) < 1.5, shares


MIXED = "mixed"
SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("fp8", {}),
    ("fp8", {"weight_granularity": "tensor", "algorithm": "mse"}),
    ("int8-weight", {}),
    ("int4-weight", {"block_size": 32}),
    ("int8", {"smooth": 0.5}),
    ("int8", {"smooth": "search", "low_rank": 4, "weight_algorithm": "mse"}),
    ("int4", {"low_rank": 4}),
    ("int8", {"timestep_buckets": 3, "bucket_ratio": 1.05}),
    (MIXED, {"timestep_buckets": 3, "bucket_ratio": 1.05, "smooth": 0.5, "low_rank": 4}),
]


@pytest.mark.parametrize(("scheme", "settings"), SCHEMES)
def test_every_scheme_computes_what_its_simulation_computes(
    case: Case, tmp_path: Path, scheme: str, settings: dict[str, Any]
) -> None:
    schemes = ("int8", "fp8", "int8-weight", "int4-weight", "int4")
    formats = {
        name: schemes[i % len(schemes)] if scheme == MIXED else scheme
        for i, name in enumerate(case.scales)
    }
    config = QuantizeConfig(**settings)
    scales = calibrate_scales(case.unet, formats, case.statistics, config, case.calls)
    graph, counts = insert_qdq(onnx.load(str(case.fp32)), scales)
    onnx.checker.check_model(graph, full_check=True)
    path = tmp_path / "model.onnx"
    onnx.save(graph, str(path))

    assert counts.nodes == len(scales)
    assert counts.low_rank == sum(s.low_rank is not None for s in scales.values())
    assert counts.bucketed == sum(s.bucket_amax is not None for s in scales.values())
    asked = {"low_rank": "low_rank", "bucketed": "timestep_buckets"}
    assert all((getattr(counts, count) > 0) == (key in settings) for count, key in asked.items())
    # 4 bits are smoothed without being asked
    smoothed = "smooth" in settings or scheme.startswith("int4")
    assert (counts.smoothed > 0) == (counts.folded > 0) == smoothed

    run = graph_runner(path, plain_options())
    shares: list[float] = []
    for call in case.calls:
        with torch.no_grad():
            plain = call_denoiser(case.unet, call.sample, call.timestep, call.kwargs)
            with fake_quantized(case.unet, scales):
                wanted_output = call_denoiser(case.unet, call.sample, call.timestep, call.kwargs)
        found = run(graph_inputs(call))
        error = relative_error(found, plain)
        assert 1e-3 < error < 0.6
        shares.append(relative_error(found, wanted_output) / error)
    # as above: a value on a rounding boundary may go the other way
    assert min(shares) < 1e-3 and max(shares) < 1.5, shares


def test_codes_take_the_type_of_their_scheme(case: Case) -> None:
    kinds = onnx.TensorProto
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    conv = "mid_block.resnets.0.conv1"
    wanted = {"fp8": kinds.FLOAT8E4M3FN, "int4-weight": kinds.INT4, "int8-weight": kinds.INT8}
    for scheme, kind in wanted.items():
        formats = {name: scheme, conv: scheme}
        scales = calibrate_scales(
            case.unet, formats, case.statistics, QuantizeConfig(smooth="none")
        )
        graph, counts = insert_qdq(onnx.load(str(case.fp32)), scales)
        stored = [t for t in graph.graph.initializer if t.name.startswith((f"{name}.", f"{conv}."))]
        codes = [t for t in stored if t.data_type == kind and "zero" not in t.name]
        assert len(codes) == 2
        assert counts.activation_quantizers == (2 if scheme == "fp8" else 0)
        blocked = [n for n in graph.graph.node if any(a.name == "block_size" for a in n.attribute)]
        assert len(blocked) == (2 if scheme == "int4-weight" else 0)


def test_an_old_opset_is_refused_for_the_types_it_lacks(case: Case) -> None:
    name = "mid_block.resnets.0.conv1"
    for scheme, opset in (("fp8", 18), ("int4-weight", 20)):
        model = onnx.load(str(case.fp32))
        model.opset_import[0].version = opset
        config = QuantizeConfig(smooth="none")
        scales = calibrate_scales(case.unet, {name: scheme}, case.statistics, config)
        with pytest.raises(HcfError, match=f"needs ONNX opset.*the graph has {opset}"):
            insert_qdq(model, scales)


def test_ranges_per_timestep_need_the_timestep(case: Case) -> None:
    name = "mid_block.resnets.0.conv1"
    config = QuantizeConfig(timestep_buckets=3, bucket_ratio=1.05)
    scales = calibrate_scales(case.unet, {name: "int8"}, case.statistics, config)
    model = onnx.load(str(case.fp32))
    next(value for value in model.graph.input if value.name == "timestep").name = "time"
    with pytest.raises(HcfError, match="need a graph input called 'timestep'"):
        insert_qdq(model, scales)


def test_weights_can_stay_on_disk_until_they_are_rounded(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load(str(case.fp32)),
        str(path),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    scales = {name: s for i, (name, s) in enumerate(case.scales.items()) if i % 2}
    wanted, counts = insert_qdq(onnx.load(str(case.fp32)), scales)
    found, same = insert_qdq(onnx.load(str(path), load_external_data=False), scales, tmp_path)
    assert same == counts
    ours, theirs = (
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for model in (found, wanted)
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-weight", "int4"])
def test_graphs_in_half_precision_keep_their_type(scheme: str, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(2, 5, 64)
    node = helper.make_node("MatMul", ["x", "a.weight_transposed"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'a']")
    weight = layer.weight.detach().numpy().T.astype(np.float16)
    graph = helper.make_graph(
        [node],
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", 5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["b", 5, 32])],
        [numpy_helper.from_array(np.ascontiguousarray(weight), "a.weight_transposed")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    layer.weight.data = layer.weight.data.half().float()
    module = torch.nn.Sequential()
    module.add_module("a", layer)
    amax = float(x.abs().max())
    seen = LayerStatistics(amax, x.abs().amax((0, 1)), torch.ones(2048), torch.ones(1))
    config = QuantizeConfig(smooth="none", low_rank=4)
    scale = layer_scale(layer, scheme, seen, torch.tensor([0.0, 1.0]), config)
    found, _ = insert_qdq(model, {"a": scale})
    onnx.checker.check_model(found, full_check=True)
    path = tmp_path / "half.onnx"
    onnx.save(found, str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), plain_options(), providers=["CPUExecutionProvider"]
    )
    y = torch.from_numpy(session.run(None, {"x": x.half().numpy()})[0]).float()
    with torch.no_grad(), fake_quantized(module, {"a": scale}):
        wanted = module(x.half().float())
    # steps are rounded to half precision, and a few codes with them
    assert relative_error(y, wanted) < 0.3 * relative_error(wanted, layer(x)) + 2e-3


def test_counts_and_size(case: Case) -> None:
    counts = case.counts
    assert counts.layers == tuple(sorted(case.scales))
    assert counts.nodes == len(case.scales)
    summary = inspect_onnx(case.int8)
    assert len(summary.quantized) == counts.nodes
    before, after = counts.ops_before, counts.ops_after
    assert "QuantizeLinear" not in before
    assert after["QuantizeLinear"] == counts.activation_quantizers
    assert after["DequantizeLinear"] == counts.activation_quantizers + counts.nodes
    for kind in ("Conv", "MatMul", "Gemm"):
        assert before[kind] == after[kind]
    assert counts.weight_bytes_after < 0.45 * counts.weight_bytes_before
    assert case.int8.stat().st_size < 0.6 * case.fp32.stat().st_size  # 4x on real sizes


def test_attention_quantises_its_input_once(case: Case) -> None:
    graph = onnx.load(str(case.int8)).graph
    readers: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("MatMul", "Conv", "Gemm"):
            readers[node.input[0]] += 1
    assert max(readers[n.output[0]] for n in graph.node if n.name.endswith("_dq")) >= 3
    texts = [n for n in graph.node if "encoder_hidden_states" in n.input]
    assert [n.op_type for n in texts] == ["QuantizeLinear"]  # every cross attention shares it
    assert case.counts.shared_consumers >= 2 * 3  # q, k, v of three self attentions


def test_weights_are_int8_and_on_the_grid(case: Case) -> None:
    tensors = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(str(case.int8)).graph.initializer
    }
    for name, scale in case.scales.items():
        weight = quantisable(case.unet, name).weight.numpy()
        key = f"{name}.weight" if f"{name}.weight_int8" in tensors else f"{name}.weight_transposed"
        stored = tensors[f"{key}_int8"]
        assert stored.dtype == np.int8
        grid = stored.T if key.endswith("transposed") else stored
        step = scale.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert np.abs(grid * step - weight).max() <= 0.5001 * step.max()
        assert name + ".weight" not in tensors


def test_scales_are_shared_at_the_widest_range(case: Case) -> None:
    scales = dict(case.scales)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    scales[f"{name}.to_k"] = LayerScale(
        2 * scales[f"{name}.to_q"].input_amax, scales[f"{name}.to_k"].weight_amax
    )
    graph, counts = insert_qdq(onnx.load(str(case.fp32)), scales)
    assert counts.activation_quantizers == case.counts.activation_quantizers
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    widest = np.float32(scales[f"{name}.to_k"].input_amax / 127)
    assert any(t.size == 1 and t == widest for n, t in tensors.items() if n.endswith("_scale"))


def test_missing_layers_wrong_shapes_and_second_runs_are_errors(case: Case) -> None:
    extra = {**case.scales, "mid_block.imaginary": LayerScale(1.0, np.ones(4, np.float32))}
    with pytest.raises(InvalidArtifact, match="have no node.*mid_block.imaginary"):
        insert_qdq(onnx.load(str(case.fp32)), extra)
    name = "mid_block.resnets.0.conv1"
    with pytest.raises(InvalidArtifact, match=f"{name}.*output channels"):
        insert_qdq(onnx.load(str(case.fp32)), {name: LayerScale(1.0, np.ones(3, np.float32))})
    with pytest.raises(HcfError, match="quantised already"):
        insert_qdq(onnx.load(str(case.int8)), case.scales)


def test_openvino_really_runs_int8(case: Case, tmp_path: Path) -> None:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    with for_this_cpu(case.int8, "int8", tmp_path) as graph:
        compiled = core.compile_model(str(graph), "CPU", options)
    kinds: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = str(info["layerType"].astype(str))
        if kind in ("Convolution", "FullyConnected", "MatMul"):
            kinds[kind, str(info["runtimePrecision"].astype(str))] += 1
    in_int8 = sum(n for (kind, precision), n in kinds.items() if precision in ("u8", "i8"))
    assert in_int8 == case.counts.nodes, kinds
    assert kinds["Convolution", "f32"] == 2  # conv_in and conv_out
    inputs = {name: value.numpy() for name, value in graph_inputs(case.calls[0]).items()}
    found = torch.from_numpy(compiled(inputs)[0])
    written = graph_runner(case.int8, plain_options())(graph_inputs(case.calls[0]))
    plain = graph_runner(case.fp32)(graph_inputs(case.calls[0]))
    limit = 3 if int8_saturates() else 1.5  # there the weights have 7 bits
    assert relative_error(found, plain) < limit * relative_error(written, plain)


def test_onnxruntime_form_really_runs_int8(case: Case, tmp_path: Path) -> None:
    import onnxruntime

    int8 = tmp_path / "model.int8.u8s8.onnx"
    counts = onnxruntime_form(case.fp32, case.calls, int8, list(case.scales))
    assert counts["QuantizeLinear"] > 0
    assert int8.stat().st_size < 0.6 * case.fp32.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [int8.name]
    inputs = graph_inputs(case.calls[0])
    wanted = graph_runner(case.fp32)(inputs)
    (tmp_path / "work").mkdir()
    with for_this_cpu(int8, "int8", tmp_path / "work") as graph:
        assert 1e-3 < relative_error(graph_runner(graph)(inputs), wanted) < 0.1

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "runtime.onnx")
    onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    kinds = Counter(n.op_type for n in onnx.load(str(tmp_path / "runtime.onnx")).graph.node)
    convolutions = [n for n in case.scales if quantisable(case.unet, n).weight.ndim == 4]
    assert kinds["QLinearConv"] == len(convolutions)
    assert kinds["Conv"] + kinds["FusedConv"] == 2  # conv_in and conv_out
    with pytest.raises(InvalidArtifact, match="no node"):
        onnxruntime_form(case.fp32, case.calls, int8, ["mid_block.imaginary"])


def test_onnxruntime_form_keeps_smoothing_and_branches(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [n for n in case.scales if n.startswith("mid_block")]
    config = QuantizeConfig(smooth=0.5, low_rank=4)
    formats = dict.fromkeys(names, "int8")
    scales = calibrate_scales(case.unet, formats, case.statistics, config, case.calls)
    exact = tmp_path / "exact.onnx"
    model, counts = insert_qdq(onnx.load(str(case.fp32)), scales, quantise=False)
    assert counts.smoothed and counts.low_rank and not counts.activation_quantizers
    onnx.save(model, str(exact))
    inputs = graph_inputs(case.calls[0])
    wanted = graph_runner(case.fp32)(inputs)
    assert relative_error(graph_runner(exact)(inputs), wanted) < 1e-5

    int8 = tmp_path / "model.int8.u8s8.onnx"
    kinds = onnxruntime_form(case.fp32, case.calls, int8, scales)
    assert kinds["Conv"] == Counter(n.op_type for n in model.graph.node)["Conv"]
    found = graph_runner(int8)(inputs)
    assert 1e-4 < relative_error(found, wanted) < 0.05
    monkeypatch.setattr(u8s8, "EXTERNAL_FROM_BYTES", 1000)  # as a graph of over 2 GB is written
    large = tmp_path / "large" / int8.name
    assert onnxruntime_form(case.fp32, case.calls, large, scales) == kinds
    assert {p.name for p in large.parent.iterdir()} == {int8.name, f"{int8.name}.data"}
    assert torch.equal(graph_runner(large)(inputs), found)
    with pytest.raises(HcfError, match="INT8 throughout.*fp8"):
        other = {names[0]: LayerScale(1.0, scales[names[0]].weight_amax, "fp8")}
        onnxruntime_form(case.fp32, case.calls, int8, other)
