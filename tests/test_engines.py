"""hcf.engines: every engine computes what eager does and says truly what runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hcf.artifact import EngineEntry, Manifest, read_manifest
from hcf.engines import check_precision, machine_kind
from hcf.engines.build import build, choose, time_interleaved, with_shapes
from hcf.engines.forms import entry_name, open_entry, open_torch, speed
from hcf.engines.openvino import OpenVinoEngine, runs_here
from hcf.engines.products import graph_products
from hcf.errors import (
    EngineMismatch,
    HcfError,
    InvalidArtifact,
    MissingDependency,
    RecipeError,
)
from hcf.export.component import example_inputs, relative_error
from hcf.settings import BuildConfig
from hcf.source import open_pipeline

LIMITS = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.15}


def entry_of(manifest: Manifest, component: str, name: str) -> EngineEntry:
    return next(e for e in manifest.engines[component] if entry_name(e) == name)


def test_every_built_engine_agrees_with_eager(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    names = [entry_name(e) for e in manifest.engines["unet"]]
    assert sorted(names) == sorted(
        ["eager-fp32", "eager-bf16", "onnxruntime-fp32", "onnxruntime-int8"]
        + ["openvino-fp32", "openvino-int8", "openvino-bf16"]
        if "avx512_bf16" in machine_kind() or "amx_bf16" in machine_kind()
        else [n for n in names]
    )
    for entries in manifest.engines.values():
        for entry in entries:
            assert entry.error is not None and entry.error < LIMITS[entry.precision], entry
            assert entry.latency_ms is not None and entry.latency_ms > 0


def test_reports_count_what_really_runs(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    layers = manifest.quantization["unet"]["layers"]
    # OpenVINO runs each GEGLU projection in two halves
    for name, more in (("openvino-int8", 4), ("onnxruntime-int8", 0)):
        entry = entry_of(manifest, "unet", name)
        assert entry.layer_precisions["int8"] == layers + more
        assert entry.layer_precisions["fp32"] > 0  # the excluded first and last layers
    assert set(entry_of(manifest, "unet", "openvino-fp32").layer_precisions) == {"fp32"}
    assert set(entry_of(manifest, "unet", "eager-bf16").layer_precisions) == {"bf16"}
    assert entry_of(manifest, "unet", "onnxruntime-fp32").provider == "CPUExecutionProvider"


def test_the_fastest_is_chosen(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    for component, entries in manifest.engines.items():
        order = sorted(entries, key=speed)
        while "in the median not faster" in order[0].reason:  # quantised, and did not win
            del order[0]
        assert manifest.chosen[component] == entry_name(order[0])
        assert order[0].reason.startswith("chosen: the fastest")
        assert all(entry.reason for entry in entries)


def test_the_other_layers_of_an_int8_graph_run_in_bf16(tiny_built: Path) -> None:
    if not runs_here("int8-bf16"):
        pytest.skip("this CPU has no bf16 arithmetic")
    manifest, pipe = read_manifest(tiny_built), open_pipeline(tiny_built)
    entry = entry_of(manifest, "unet", "openvino-int8")
    assert entry.file is not None and entry.source is not None
    inputs = example_inputs(pipe, "unet", batch=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    asked = graph_products(tiny_built / entry.source)
    engine = OpenVinoEngine(tiny_built / entry.file, "unet", "int8-bf16", 1, shapes, asked)
    counts = engine.report.layer_precisions
    assert counts["int8"] == entry.layer_precisions["int8"] and counts["bf16"] > 0
    assert "fp32" not in counts and engine.report.details["float32_angles"] > 0
    wanted = open_torch(pipe, "unet", "eager", "fp32", list(inputs))(inputs)["out_sample"]
    assert relative_error(engine(inputs)["out_sample"], wanted) < 0.2


@pytest.mark.parametrize("name", ["openvino-fp32", "onnxruntime-fp32", "eager-bf16"])
def test_other_batches_and_sizes_and_kept_outputs(tiny_built: Path, name: str) -> None:
    manifest, pipe = read_manifest(tiny_built), open_pipeline(tiny_built)
    entry = entry_of(manifest, "unet", name)
    engine = open_entry(tiny_built, "unet", entry, manifest, pipe, threads=1)
    assert engine.report.precision == entry.precision and engine.report.component == "unet"
    inputs = example_inputs(pipe, "unet", batch=3)
    inputs["sample"] = torch.randn(3, 4, 12, 8)
    reference = open_torch(pipe, "unet", "eager", "fp32", list(inputs))
    first = engine(inputs)["out_sample"]
    kept = first.clone()
    assert relative_error(first, reference(inputs)["out_sample"]) < LIMITS[entry.precision]
    engine({**inputs, "sample": -inputs["sample"]})
    assert torch.equal(first, kept)  # schedulers keep outputs over the next call


@pytest.mark.slow
def test_compile_agrees_with_eager(tiny_built: Path) -> None:
    pipe = open_pipeline(tiny_built)
    engine = open_torch(pipe, "vae_decoder", "compile", "fp32", ["latents"])
    inputs: dict[str, Tensor] = {"latents": torch.randn(1, 4, 8, 8)}
    with torch.no_grad():
        wanted = pipe.vae.decode(inputs["latents"]).sample
    assert relative_error(engine(inputs)["image"], wanted) < 1e-4
    assert engine.report.engine == "compile"


def test_a_precision_no_layer_got_is_an_error(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    entry = entry_of(manifest, "unet", "openvino-fp32")
    assert entry.file is not None
    shapes = {name: tuple(rows[0]) for name, rows in entry.shapes.items()}
    with pytest.raises(HcfError, match="asked for int8"):
        OpenVinoEngine(tiny_built / entry.file, "unet", "int8", 1, shapes)


def test_impossible_precisions_are_refused() -> None:
    with pytest.raises(HcfError, match="onnxruntime engine does not run bf16"):
        check_precision("onnxruntime", "bf16")
    with pytest.raises(HcfError, match="no engine 'cuda'"):
        check_precision("cuda", "fp32")


@pytest.mark.parametrize(
    ("field", "value"), [("version", "2020.1"), ("machine", "sparc"), ("source_hash", "0" * 64)]
)
def test_engines_of_another_version_machine_or_graph_are_refused(
    tiny_built: Path, field: str, value: str
) -> None:
    manifest = read_manifest(tiny_built)
    entry = entry_of(manifest, "unet", "openvino-fp32").model_copy(update={field: value})
    with pytest.raises(EngineMismatch) as caught:
        open_entry(tiny_built, "unet", entry, manifest, None, 1)
    assert value in str(caught.value) and "hcf build" in str(caught.value)


def test_a_missing_engine_file_is_named(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    entry = entry_of(manifest, "unet", "openvino-fp32")
    gone = entry.model_copy(update={"file": "engines/unet/gone.xml"})
    with pytest.raises(InvalidArtifact, match="gone.xml"):
        open_entry(tiny_built, "unet", gone, manifest, None, 1)


def candidate(engine: str, precision: str, latency_ms: float, error: float) -> EngineEntry:
    return EngineEntry(
        engine=engine,
        precision=precision,
        latency_ms=latency_ms,
        latency_low_ms=latency_ms,
        latency_high_ms=latency_ms,
        error=error,
    )


def test_int8_that_is_not_fastest_is_said_and_not_chosen() -> None:
    lines: list[str] = []
    entries = [
        candidate("eager", "fp32", 10.0, 0.0),
        candidate("openvino", "int8", 3.0, 0.05),
        candidate("openvino", "bf16", 2.0, 0.01),
    ]
    assert choose("unet", entries, ["openvino"], lines.append) == 2
    assert any("INT8 is not the fastest" in line for line in lines)


def test_a_fast_engine_with_a_wrong_result_is_not_chosen() -> None:
    entries = [
        candidate("eager", "fp32", 10.0, 0.0),
        candidate("openvino", "int8", 1.0, 0.75),
        candidate("onnxruntime", "fp32", 5.0, 1e-6),
    ]
    assert choose("unet", entries, ["openvino", "onnxruntime"], print) == 2
    with pytest.raises(HcfError, match="no engine of unet"):
        choose("unet", entries, ["openvino"], print)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    samples = time_interleaved([lambda: order.append("a"), lambda: order.append("b")], 3, warmup=0)
    assert all(len(s) >= 3 for s in samples)
    switches = sum(x != y for x, y in zip(order, order[1:], strict=False))
    assert switches >= 4


def test_shapes_are_repeated_and_cut_along_every_axis() -> None:
    inputs = {"sample": torch.arange(8.0).reshape(2, 1, 2, 2), "timestep": torch.ones(2)}
    changed = with_shapes(inputs, {"sample": [3, 1, 4, 1]})
    assert changed["sample"].shape == (3, 1, 4, 1) and changed["timestep"].shape == (3,)
    with pytest.raises(RecipeError, match="needed 4 numbers"):
        with_shapes(inputs, {"sample": [3, 1]})


@pytest.mark.trt
def test_tensorrt_plans_are_built_for_a_named_target_and_not_run(
    tiny_exported: Path, tmp_path: Path
) -> None:
    config = BuildConfig(
        engines=["eager", "tensorrt"],
        precisions=["fp32", "int8"],
        components=["unet"],
        compute_capabilities=["8.0"],
        opt_shapes={"latents": [1, 4, 8, 8]},
        repeats=1,
    )
    lines: list[str] = []
    out = build(tiny_exported, tmp_path / "out", config, lines.append)
    manifest = read_manifest(out)
    plan = entry_of(manifest, "unet", "tensorrt-int8")
    assert plan.machine == "sm80" and plan.latency_ms is None and plan.file is not None
    assert plan.layer_precisions["int8"] == manifest.quantization["unet"]["layers"]
    assert manifest.chosen["unet"] == "eager-fp32"
    assert any("not run here" in line for line in lines)
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependency, match="needs an NVIDIA GPU"):
            open_entry(out, "unet", plan, manifest, None, 1)


def test_int8_asked_for_and_not_there_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(engines=["eager", "openvino"], precisions=["int8"])
    with pytest.raises(RecipeError, match="int8"):
        build(tiny_folder, tmp_path / "out", config, print)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_was_not_exported_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(engines=["openvino"], precisions=["fp32"], components=["vae_decoder"])
    with pytest.raises(InvalidArtifact, match="hcf export"):
        build(tiny_folder, tmp_path / "out", config, print)
