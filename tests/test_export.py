"""hcf.export: the graphs compute what torch computes, at shapes they were not traced with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET, make_tiny_pipeline
from test_component import tiny_controlnet, tiny_of

import hcf.export.graphs
import hcf.export.offload
from hcf.artifact import read_manifest, verify
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.export.component import (
    component_module,
    example_inputs,
    relative_error,
    with_batch,
)
from hcf.export.inspect import inspect_onnx
from hcf.export.offload import offloaded
from hcf.export.onnx import (
    export,
    export_component,
    export_components,
    export_quantized,
    graph_runner,
    parity_cases,
)
from hcf.export.parity import compare, graph_session, torch_outputs
from hcf.settings import ExportConfig
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
    assert fp32.opset == 21 and fp32.quantized == () and fp32.dequantize_nodes == 0
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


def make(kind: str) -> Any:
    """Pipelines whose components differ in their inputs."""
    from diffusers import (
        StableDiffusionControlNetPipeline,
        StableDiffusionInpaintPipeline,
        UNet2DConditionModel,
    )

    if kind == "controlnet":
        return tiny_of(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**UNET, "in_channels": 9}).eval()
    return tiny_of(StableDiffusionInpaintPipeline, unet=unet)


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        ("controlnet", "unet"),
        ("controlnet", "controlnet"),
        ("controlnet", "text_encoder"),
        ("inpaint", "unet"),
        ("inpaint", "vae_encoder"),
        ("xl", "unet"),
        ("xl", "text_encoder_2"),
    ],
)
def test_every_component_at_batches_and_sizes_it_was_not_traced_with(
    kind: str, component: str, tiny_xl_pipeline: Any, tmp_path: Path
) -> None:
    pipe = tiny_xl_pipeline if kind == "xl" else make(kind)
    config = ExportConfig(components=[component], sizes=[(24, 40), (16, 8)])
    (record,) = export_components(pipe, tmp_path, config, lambda line: None)[component]
    text = component.startswith("text_encoder")
    assert len(record["relative_error"]) == (3 if text else 5)
    assert max(record["relative_error"].values()) < 1e-5
    # one more that the export itself did not look at
    inputs = with_batch(example_inputs(pipe, component, 1, height=32, width=24), 4)
    module = component_module(pipe, component, list(inputs))
    run = graph_session(tmp_path / component / "model.onnx")
    assert max(compare(run, [inputs], torch_outputs(module, [inputs])).values()) < 1e-5


def test_default_components_and_cases(tmp_path: Path) -> None:
    pipe = make("controlnet")
    cases = parity_cases(pipe, "controlnet", ExportConfig())
    shapes = [tuple(case["controlnet_cond"].shape) for case in cases]
    assert shapes == [(2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 8, 16)]
    assert len(parity_cases(pipe, "controlnet", ExportConfig(dynamic=False))) == 1
    with pytest.raises(RecipeError, match="'text_encoder_2'"):
        # before anything is written
        export_components(pipe, tmp_path, ExportConfig(components=["unet", "text_encoder_2"]))
    assert list(tmp_path.iterdir()) == []


def test_precisions_are_written_checked_and_recorded(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    config = ExportConfig(components=["vae_encoder"], precisions=["fp32", "fp16", "bf16"])
    records = export_components(pipe, tmp_path, config, lambda line: None)["vae_encoder"]
    assert [Path(r["file"]).name for r in records] == [
        "model.onnx",
        "model.fp16.onnx",
        "model.bf16.onnx",
    ]
    assert [r["opset"] for r in records] == [21, 21, 22]
    for entry in records:
        assert entry["exporter"] == "dynamo" and entry["torch"] == torch.__version__
        assert entry["checked_on"].split()[0] in ("onnxruntime", "openvino")
        assert 0 < max(entry["relative_error"].values()) <= entry["tolerance"]
        assert all(p["nodes_after"] <= p["nodes_before"] for p in entry["passes"])
    assert records[1]["tolerance"] == records[1]["lowering"]["limit"] < 0.01
    assert records[1]["weight_bytes"]["float16"] > records[1]["weight_bytes"]["float"]
    tight = config.model_copy(update={"tolerances": {"fp16": 1e-9}})
    with pytest.raises(HcfError, match=r"model\.fp16\.onnx") as caught:
        export_components(pipe, tmp_path, tight, lambda line: None)
    assert "export.tolerances.fp16" in str(caught.value.fix)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_weights_too_large_for_one_file_lie_beside_it(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hcf.export.graphs, "EXTERNAL_FROM_BYTES", 300_000)
    pipe = make_tiny_pipeline()
    config = ExportConfig(
        components=["vae_decoder"], precisions=["fp16"], exporter=exporter, dynamic=False
    )
    records = export_components(pipe, tmp_path, config, lambda line: None)["vae_decoder"]
    folder = tmp_path / "vae_decoder"
    # half of the weights fit into one file again
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert sorted(sizes) == ["model.fp16.onnx", "model.onnx", "model.onnx.data"]
    assert sizes["model.onnx.data"] > 300_000 > sizes["model.onnx"]
    assert [max(r["relative_error"].values()) < r["tolerance"] for r in records] == [True, True]
    monkeypatch.setattr(hcf.export.graphs, "EXTERNAL_FROM_BYTES", 2**30)
    export_components(pipe, tmp_path, config, lambda line: None)
    assert "model.onnx.data" not in {p.name for p in folder.iterdir()}


def test_both_exporters_compute_the_same_and_are_recorded(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    found = {}
    for exporter, opset in (("dynamo", 21), ("torchscript", 20)):
        config = ExportConfig(components=["text_encoder"], exporter=exporter)  # type: ignore[arg-type]
        (entry,) = export_components(pipe, tmp_path, config, lambda line: None)["text_encoder"]
        assert (entry["exporter"], entry["opset"]) == (exporter, opset)
        found[exporter] = max(entry["relative_error"].values())
    assert max(found.values()) < 1e-5


def test_quantised_graphs_among_float16_layers_and_without_torch(
    tiny_quantized: Path, tmp_path: Path
) -> None:
    pipe = open_pipeline(tiny_quantized)
    for name in ("quantization.safetensors", "calibration.safetensors"):
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / name).write_bytes((tiny_quantized / "unet" / name).read_bytes())
    config = ExportConfig(components=["unet"], precisions=["fp16"])
    records = export_components(pipe, tmp_path, config, lambda line: None)["unet"]
    names = [Path(entry["file"]).name for entry in records]
    assert names == [
        "model.onnx",
        "model.fp16.onnx",
        "model.int8.onnx",
        "model.int8.fp16.onnx",
        "model.int8.u8s8.onnx",
    ]
    assert [entry["other_layers"] for entry in records[2:4]] == ["fp32", "fp16"]
    assert records[2]["quantized"] == records[3]["quantized"] > 0
    assert records[2]["wiring"] < 0.1 and records[3]["wiring"] < 0.25
    before = (tmp_path / "unet" / "model.int8.onnx").read_bytes()
    again = export_quantized(tmp_path, "unet", lambda line: None)
    assert [Path(entry["file"]).name for entry in again] == names[2:]
    assert (tmp_path / "unet" / "model.int8.onnx").read_bytes() == before


def test_torchscript_graphs_cannot_be_quantised(tiny_quantized: Path, tmp_path: Path) -> None:
    config = ExportConfig(components=["unet"], exporter="torchscript", opset=17)
    with pytest.raises(RecipeError, match="torchscript") as caught:
        export(tiny_quantized, tmp_path / "out", config, lambda line: None)
    assert "dynamo" in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_weights_are_mapped_while_graphs_run_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_tiny_pipeline().unet
    before = {name: p.clone() for name, p in unet.named_parameters()}
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    wanted = unet(x, 1, context).sample
    with offloaded(unet, tmp_path) as moved:
        assert not moved and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(hcf.export.offload, "OFFLOAD_FROM_BYTES", 1)
    with offloaded(unet, tmp_path) as moved:
        (file,) = tmp_path.iterdir()
        assert moved and file.stat().st_size >= sum(p.nbytes for p in before.values())
        assert torch.equal(unet(x, 1, context).sample, wanted)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    unet.conv_in.weight.add_(1)  # no longer a mapping of a file that is gone
    config = ExportConfig(components=["text_encoder"])
    records = export_components(make_tiny_pipeline(), tmp_path, config, lambda line: None)
    assert max(records["text_encoder"][0]["relative_error"].values()) < 1e-5


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


def test_a_disk_that_is_full_leaves_the_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_tiny_pipeline().unet
    before = {name: p.clone() for name, p in unet.named_parameters()}

    def full(held: Any, path: Path) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hcf.export.offload, "OFFLOAD_FROM_BYTES", 1)
    monkeypatch.setattr(hcf.export.offload, "_write", full)
    with pytest.raises(OSError, match="No space"), offloaded(unet, tmp_path):
        raise AssertionError("it cannot begin")
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
