"""hcf.export: the graphs compute what torch computes, at shapes they were not traced with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hcf.artifact import read_manifest, verify
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.export.component import (
    component_module,
    example_inputs,
    relative_error,
    with_batch,
)
from hcf.export.inspect import inspect_onnx
from hcf.export.onnx import export, export_component, graph_runner
from hcf.recipe import ExportConfig
from hcf.source import open_pipeline


@torch.no_grad()
def test_unet_graph_is_dynamic_in_batch_size_and_text(tiny_exported: Path) -> None:
    unet = open_pipeline(tiny_exported).unet
    run = graph_runner(tiny_exported / "unet" / "model.onnx")
    generator = torch.Generator().manual_seed(1)
    for batch, height, width, tokens in ((1, 8, 8, 16), (3, 12, 16, 9)):
        sample = torch.randn(batch, 4, height, width, generator=generator)
        context = torch.randn(batch, tokens, 32, generator=generator)
        timestep = torch.linspace(999, 1, batch)
        found = run({"sample": sample, "timestep": timestep, "encoder_hidden_states": context})
        assert relative_error(found, unet(sample, timestep, context).sample) < 1e-5


@torch.no_grad()
def test_decoder_graph_is_dynamic_in_batch_and_size(tiny_exported: Path) -> None:
    vae = open_pipeline(tiny_exported).vae
    run = graph_runner(tiny_exported / "vae_decoder" / "model.onnx")
    for shape in ((1, 4, 8, 8), (2, 4, 6, 10)):
        latents = torch.randn(shape)
        assert relative_error(run({"latents": latents}), vae.decode(latents).sample) < 1e-5


def test_manifest_names_graphs_errors_and_inputs(tiny_exported: Path) -> None:
    exports = read_manifest(tiny_exported).exports
    assert [e["file"] for e in exports["unet"]] == [
        "unet/model.onnx",
        "unet/model.int8.onnx",
        "unet/model.int8.u8s8.onnx",
    ]
    assert list(exports["unet"][0]["inputs"]) == ["sample", "timestep", "encoder_hidden_states"]
    assert len(exports["unet"][0]["relative_error"]) == 3
    assert max(exports["unet"][0]["relative_error"].values()) < 1e-5
    assert list(exports["vae_decoder"][0]["outputs"]) == ["image"]
    assert verify(tiny_exported) == []


def test_int8_graphs_hold_int8_weights_and_quantised_products(tiny_exported: Path) -> None:
    fp32 = inspect_onnx(tiny_exported / "unet" / "model.onnx")
    assert fp32.opset == 20 and fp32.quantized == () and fp32.dequantize_nodes == 0
    layers = read_manifest(tiny_exported).quantization["unet"]["layers"]
    for name in ("model.int8.onnx", "model.int8.u8s8.onnx"):
        summary = inspect_onnx(tiny_exported / "unet" / name)
        assert len(summary.quantized) == layers
        assert len(summary.quantized) + len(summary.floating) == len(fp32.floating)
        assert summary.weight_bytes["int8"] > 2 * summary.weight_bytes["float"] > 0


def test_files_do_not_name_the_machine_that_made_them(tiny_exported: Path) -> None:
    for graph in tiny_exported.rglob("*.onnx"):
        content = graph.read_bytes()
        assert b"site-packages" not in content and str(Path.cwd()).encode() not in content


def test_added_conditioning_becomes_inputs(tiny_xl_pipeline: Any, tmp_path: Path) -> None:
    inputs = example_inputs(tiny_xl_pipeline, "unet")
    path = tmp_path / "model.onnx"
    export_component(tiny_xl_pipeline, "unet", inputs, path, ExportConfig(dynamic=False))
    names = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert list(inspect_onnx(path).inputs) == names
    moved = with_batch(inputs, 2)
    with torch.no_grad():
        wanted = component_module(tiny_xl_pipeline, "unet", names)(*moved.values())
    assert relative_error(graph_runner(path)(moved), wanted) < 1e-5


def test_a_graph_outside_the_tolerance_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(components=["vae_decoder"], tolerance=1e-12, dynamic=False)
    with pytest.raises(HcfError, match="tolerance"):
        export(tiny_folder, tmp_path / "out", config, print)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_torchscript_exporter(tiny_folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(components=["vae_decoder"], exporter="torchscript", opset=17)
    out = export(tiny_folder, tmp_path / "out", config, print)
    assert inspect_onnx(out / "vae_decoder" / "model.onnx").opset == 17


def test_unknown_component_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'vae'"):
        export(tiny_folder, tmp_path / "out", ExportConfig(components=["vae"]), print)


def test_a_broken_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xffnot an onnx file")
    with pytest.raises(InvalidArtifact, match="model.onnx"):
        inspect_onnx(tmp_path / "model.onnx")
    with pytest.raises(InvalidArtifact, match="does not exist"):
        inspect_onnx(tmp_path / "other.onnx")
