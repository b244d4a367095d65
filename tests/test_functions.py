"""Fused models as graphs: the plain pattern, or functions that runtimes may replace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tiny_pipeline
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from hcf.errors import RecipeError
from hcf.export.graphs import write_graph
from hcf.export.onnx import export_components
from hcf.export.parity import graph_session
from hcf.fuse import OPS, fuse, is_fused
from hcf.recipe import parse
from hcf.settings import ExportConfig


def exported(pipe: Any, folder: Path, **options: Any) -> Any:
    config = ExportConfig(components=["unet"], **options)
    records = export_components(pipe, folder, config, lambda line: None)
    assert max(records["unet"][0]["relative_error"].values()) < 1e-5
    return onnx.load(folder / "unet" / "model.onnx")


def test_a_fused_model_exports_as_if_it_had_never_been(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    wanted = exported(pipe, tmp_path / "plain")
    fuse(pipe, OPS)
    found = exported(pipe, tmp_path / "fused")
    assert is_fused(pipe)
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in wanted.graph.node]
    assert not found.functions


def test_as_functions_every_kernel_is_one_node(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    report = fuse(pipe.unet, OPS)
    graph = exported(pipe, tmp_path, kernels="functions")
    nodes = [node.op_type for node in graph.graph.node if node.domain == "hcf"]
    counts = report.counts()
    assert nodes.count("GEGLU") == counts["geglu"]
    assert nodes.count("LayerNorm") == counts["layer_norm"]
    assert nodes.count("Attention") * 2 == counts["attention"]  # the other half is self-attention
    assert nodes.count("AddGroupNormSiLU") == nodes.count("GroupNormSiLU") - 1
    assert {f.name for f in graph.functions} == set(nodes)
    onnx.checker.check_model(str(tmp_path / "unet" / "model.onnx"))
    kinds = {node.op_type for node in graph.graph.node if node.domain == ""}
    assert not kinds & {"GroupNormalization", "LayerNormalization", "Gelu", "Erf"}


def test_a_scale_and_shift_for_each_image_is_a_function_too(tmp_path: Path) -> None:
    block = ResnetBlock2D(
        in_channels=16, temb_channels=8, groups=4, time_embedding_norm="scale_shift"
    ).eval()
    nn.init.normal_(block.norm2.weight)
    fuse(block, OPS)
    inputs = {"sample": torch.randn(2, 16, 4, 4), "temb": torch.randn(2, 8)}
    path = tmp_path / "model.onnx"
    write_graph(block, inputs, ["out"], path, ExportConfig(kernels="functions", dynamic=False))
    assert "ModulatedGroupNormSiLU" in {node.op_type for node in onnx.load(path).graph.node}
    (found,) = graph_session(path)(inputs).values()
    with torch.no_grad():
        torch.testing.assert_close(found, block(*inputs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("override", [False, True])
def test_tensorrts_parser_takes_the_functions(tmp_path: Path, override: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    pipe = make_tiny_pipeline()
    fuse(pipe.unet, OPS)
    exported(pipe, tmp_path, kernels="functions")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, logger)
    if override:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    parsed = parser.parse_from_file(str(tmp_path / "unet" / "model.onnx"))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.num_outputs == 1 and np.prod(network.get_output(0).shape) != 0


def test_functions_need_the_exporter_that_can_write_them() -> None:
    with pytest.raises(RecipeError, match="needs exporter: dynamo"):
        parse(ExportConfig, {"kernels": "functions", "exporter": "torchscript"}, "here")
