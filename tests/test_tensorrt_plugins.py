"""Kernels as TensorRT plugins: what a package without a GPU can show of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from conftest import make_tiny_pipeline
from torch import Tensor
from torch.nn import functional as F

from hcf.engines.tensorrt import PlanOptions, build_plan
from hcf.engines.tensorrt_plugins import PLUGINS, _creators, compute, require_in_network
from hcf.errors import HcfError, RecipeError
from hcf.export.function_bodies import BODIES
from hcf.export.onnx import export_components
from hcf.fuse import is_fused
from hcf.settings import ExportConfig

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.trt
GROUPS, EPS = 4, 1e-5


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def calls() -> dict[str, tuple[list[Tensor], Tensor]]:
    """{function: (its inputs, what it computes)}"""
    x, weight, bias = image(2, 16, 6, 5), image(16), image(16)
    add, each, shift = image(2, 16, 1, 1), image(2, 16, 1, 1) + 1, image(2, 16, 1, 1) - 1
    norm = F.group_norm(x, GROUPS, weight, bias, EPS)
    added = F.group_norm(x + add, GROUPS, weight, bias, EPS)
    modulated = F.group_norm(x, GROUPS, eps=EPS) * each + shift
    tokens, wide, ends = image(2, 7, 16), image(24, 16), image(24)
    hidden, gate = F.linear(tokens, wide, ends).chunk(2, -1)
    return {
        "GroupNorm": ([x, weight, bias], norm),
        "GroupNormSiLU": ([x, weight, bias], F.silu(norm)),
        "AddGroupNorm": ([x, add, weight, bias], added),
        "AddGroupNormSiLU": ([x, add, weight, bias], F.silu(added)),
        "ModulatedGroupNorm": ([x, each, shift], modulated),
        "ModulatedGroupNormSiLU": ([x, each, shift], F.silu(modulated)),
        "LayerNorm": ([tokens, weight, bias], F.layer_norm(tokens, (16,), weight, bias, EPS)),
        "GEGLU": ([tokens, wide, ends], hidden * F.gelu(gate)),
    }


def desc(tensor: Tensor, nhwc: bool = False) -> Any:
    kind = {torch.float32: trt.DataType.FLOAT, torch.float16: trt.DataType.HALF}[tensor.dtype]
    layout = trt.TensorFormat.HWC8 if nhwc else trt.TensorFormat.LINEAR
    return SimpleNamespace(dims=tuple(tensor.shape), type=kind, format=layout)


def plugin(name: str) -> Any:
    kernel = _creators("tensorrt_rtx")[name].create_plugin(
        "layer", fields_of(name), trt.TensorRTPhase.BUILD
    )
    kernel.device = "cpu"
    return kernel


def fields_of(name: str) -> list[Any]:
    values = {"groups": [GROUPS], "epsilon": [EPS]}
    return [SimpleNamespace(name=key, data=values[key]) for key in PLUGINS[name]]


def enqueued(kernel: Any, inputs: Sequence[Tensor], y: Tensor, nhwc: bool = False) -> Tensor:
    """What the plugin leaves at the address of y."""
    described = [desc(inputs[0], nhwc), *map(desc, inputs[1:])]
    kernel.enqueue(
        described, [desc(y, nhwc)], [t.data_ptr() for t in inputs], [y.data_ptr()], 0, 0
    )  # fmt: skip
    return y


def test_every_plugin_is_a_function_of_the_graph() -> None:
    assert set(PLUGINS) < set(BODIES)
    for name, attributes in PLUGINS.items():
        assert set(attributes) == set(BODIES[name].function_ir.attributes)
    assert set(calls()) == set(PLUGINS)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_computes_its_function_where_it_is_told_to(name: str) -> None:
    inputs, wanted = calls()[name]
    kernel = plugin(name).clone()
    torch.testing.assert_close(
        enqueued(kernel, inputs, torch.full_like(wanted, 7.0)), wanted, rtol=1e-4, atol=1e-5
    )


def test_images_stay_in_nhwc() -> None:
    inputs, wanted = calls()["AddGroupNormSiLU"]
    half = [tensor.half() for tensor in inputs]
    half[0] = half[0].contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(half[0])
    enqueued(plugin("AddGroupNormSiLU"), half, y, nhwc=True)
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)


def test_the_formats_it_takes() -> None:
    x, weight = torch.empty(2, 16, 4, 4, dtype=torch.half), torch.empty(16, dtype=torch.half)

    def takes(name: str, pos: int, *descriptions: Any) -> bool:
        in_out = [SimpleNamespace(desc=each) for each in descriptions]
        return bool(plugin(name).supports_format_combination(pos, in_out, 3))

    hwc, flat, w = desc(x, nhwc=True), desc(x), desc(weight)
    assert takes("GroupNormSiLU", 0, hwc) and takes("GroupNormSiLU", 0, flat)
    assert takes("GroupNormSiLU", 3, hwc, w, w, hwc)
    assert not takes("GroupNormSiLU", 3, hwc, w, w, flat)
    assert not takes("GroupNormSiLU", 1, hwc, desc(weight.float()))  # one type for all
    assert not takes("GroupNormSiLU", 0, desc(x.float(), nhwc=True))
    assert not takes("GroupNormSiLU", 0, desc(x[:, :12], nhwc=True))  # padded to 16 there
    assert not takes("LayerNorm", 0, hwc)


def test_attributes_survive_the_plan() -> None:
    kernel = plugin("AddGroupNorm")  # whose memory the fields are
    kept = kernel.get_fields_to_serialize()
    assert {f.name: f.data.tolist() for f in kept} == {
        "groups": [GROUPS],
        "epsilon": [pytest.approx(EPS)],
    }


PARSES = """
import os, sys
import tensorrt_rtx as trt
from hcf.engines import tensorrt_plugins as plugins
plugins.register(trt, ["LayerNorm", "AddGroupNormSiLU"])
plugins.register(trt, ["AddGroupNormSiLU"], alone=True)
creator = plugins._creators("tensorrt_rtx")["AddGroupNormSiLU"]
def made(layer, fields, phase):
    print({f.name: f.data.tolist() for f in fields}, flush=True)
    os._exit(0)  # this package would abort at the layer
creator.create_plugin = made
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
parser.parse_from_file(sys.argv[1])
sys.exit(3)
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unet/model.onnx and model.fp16.onnx of a model that is not fused, for plugins."""
    folder, pipe = tmp_path_factory.mktemp("plugins"), make_tiny_pipeline()
    config = ExportConfig(components=["unet"], kernels="plugins", precisions=["fp32", "fp16"])
    records = export_components(pipe, folder, config, lambda line: None)
    assert not is_fused(pipe)
    assert all(max(r["relative_error"].values()) < 1e-2 for r in records["unet"])
    return folder / "unet"


def test_the_parser_asks_for_a_plugin_by_its_name(graphs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSES, str(graphs / "model.fp16.onnx")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("{'groups': [")


def test_nodes_of_a_lower_graph_take_its_own_precision(graphs: Path) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(graphs / "model.fp16.onnx")).graph
    casts = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    nodes = [node for node in graph.node if node.domain == "hcf"]
    assert len(nodes) > 10
    assert not casts & {node.input[0] for node in nodes}
    kinds = {t.name: t.data_type for t in graph.initializer}
    weights = {kinds[name] for node in nodes for name in node.input if name in kinds}
    assert weights == {onnx.TensorProto.FLOAT16}


def test_plugins_that_cannot_be_are_errors(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*names: str, graph: str = "model.onnx") -> None:
        options = PlanOptions("tensorrt_rtx", compute_capability="8.0", plugins=names)
        build_plan(graphs / graph, graphs / "plans", options)

    with pytest.raises(RecipeError, match="no plugin 'GroupNormSilu'"):
        build("GroupNormSilu")
    with pytest.raises(RecipeError, match="tensorrt_rtx .* has no plugins"):
        build("GroupNormSiLU")
    monkeypatch.setattr(trt.INetworkDefinition, "add_plugin_v3", None, raising=False)
    with pytest.raises(RecipeError, match="no node ModulatedGroupNorm: it has .*GroupNormSiLU"):
        build("ModulatedGroupNorm")
    assert not (graphs / "plans").exists()
    network = SimpleNamespace(num_layers=0)
    with pytest.raises(HcfError, match=r"made 0 plugin layers of the \d+ nodes GroupNormSiLU"):
        require_in_network(trt, network, graphs / "model.onnx", ["GroupNormSiLU"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLUGINS)
def test_on_a_gpu_it_writes_to_the_address(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    inputs, wanted = calls()[name]
    kernel = plugin(name)
    kernel.device = "cuda"
    stream = torch.cuda.Stream()
    moved, y = [tensor.cuda() for tensor in inputs], torch.empty_like(wanted, device="cuda")
    torch.cuda.synchronize()
    kernel.enqueue(
        [desc(t) for t in moved], [desc(y)], [t.data_ptr() for t in moved], [y.data_ptr()], 0,
        stream.cuda_stream,
    )  # fmt: skip
    stream.synchronize()
    torch.testing.assert_close(y.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_what_is_computed_needs_no_tensorrt() -> None:
    inputs, wanted = calls()["LayerNorm"]
    y = torch.empty_like(wanted)
    compute("LayerNorm", inputs, y, {"epsilon": EPS})
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
