"""hcf.engines.build: candidates, every component, and a reason for every entry."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcf.artifact import EngineEntry, read_manifest
from hcf.engines.build import (
    Candidate,
    build,
    build_components,
    candidates,
    device_of,
    profiles_of,
)
from hcf.engines.eager import SimulatedEngine
from hcf.engines.forms import (
    available_engines,
    entry_name,
    open_entry,
    open_form,
    open_torch,
    refit_form,
    source_graph,
)
from hcf.engines.reduce_range import int8_saturates
from hcf.engines.selection import ERROR_LIMITS, choose
from hcf.errors import EngineMismatch, HcfError, InvalidArtifact, MissingDependency, RecipeError
from hcf.export.component import components_of, example_inputs, relative_error
from hcf.quantize.scales import read_scales
from hcf.settings import BuildConfig, ShapeProfile
from hcf.source import open_pipeline

ALL = (
    "unet", "controlnet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2"
)  # fmt: skip


def silent(line: str) -> None:
    pass


def entry_of(entries: list[EngineEntry], name: str) -> EngineEntry:
    return next(e for e in entries if entry_name(e) == name)


@pytest.mark.slow
def test_every_component_runs_on_every_engine(drop_in_artifacts: Any) -> None:
    folder: Path = drop_in_artifacts("xl")
    manifest, pipe = read_manifest(folder), open_pipeline(folder)
    assert sorted(manifest.engines) == sorted(ALL) == sorted(components_of(pipe))
    for component, entries in manifest.engines.items():
        names = [entry_name(e) for e in entries]
        assert names == ["eager-fp32", "openvino-fp32", "onnxruntime-fp32"]
        assert all(e.error is not None and e.error < 1e-4 for e in entries), component
        inputs = example_inputs(pipe, component, batch=3)
        wanted = open_torch(pipe, component, "eager", "fp32", list(inputs))(inputs)
        for entry in entries[1:]:
            engine = open_entry(folder, component, entry, manifest, pipe, threads=1)
            found = engine(inputs)
            assert list(found) == list(wanted)
            for name, tensor in wanted.items():
                assert found[name].dtype == torch.float32
                assert relative_error(found[name], tensor) < 1e-4, (component, name)
    assert len(manifest.engines["controlnet"][0].shapes) > 3


def test_a_pipeline_in_hand_is_built_into_a_folder(tiny_exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    shutil.copytree(tiny_exported, folder)
    pipe = open_pipeline(tiny_exported)
    config = BuildConfig(
        engines=["openvino"], precisions=["fp32", "int8"], components=["unet"], threads=1, repeats=2
    )
    lines: list[str] = []
    engines, chosen = build_components(pipe, folder, config, lines.append)
    names = [entry_name(e) for e in engines["unet"]]
    assert names == ["eager-fp32", "openvino-fp32", "openvino-int8"]
    assert chosen["unet"] in names[1:]
    assert engines["unet"][0].reason == "built as the reference; not asked for"
    winner = entry_of(engines["unet"], chosen["unet"])
    assert winner.reason.startswith("chosen: the fastest")
    for entry in engines["unet"]:
        assert entry.reason and any(entry.reason in line for line in lines)
        assert entry.file is None or (folder / entry.file).is_file()


def test_every_asked_for_format_is_there_or_simulated(tiny_exported: Path, tmp_path: Path) -> None:
    config = BuildConfig(engines=["eager"], precisions=["int8", "bf16"], components=["unet"])
    found = candidates(tiny_exported, "unet", config, "cpu", silent)
    assert Candidate("eager", "int8", "cpu") in found and found[-1].simulated
    with_engine = config.model_copy(update={"engines": ["eager", "openvino"]})
    real = candidates(tiny_exported, "unet", with_engine, "cpu", silent)
    assert not any(one.simulated for one in real)  # openvino really runs it

    lines: list[str] = []
    small = config.model_copy(update={"repeats": 1, "threads": 1})
    manifest = read_manifest(build(tiny_exported, tmp_path / "out", small, lines.append))
    entry = entry_of(manifest.engines["unet"], "eager-int8")
    assert entry.provider.startswith("simulated") and entry.latency_ms is None
    assert entry.reason.startswith("simulated") and manifest.chosen["unet"] != "eager-int8"
    assert entry.error is not None and 1e-3 < entry.error < ERROR_LIMITS["int8"]
    assert entry.layer_precisions["int8"] == manifest.quantization["unet"]["layers"]


@pytest.mark.skipif(int8_saturates(), reason="no VNNI: the engine has its weights in 7 bits")
def test_a_simulation_computes_what_the_engine_computes(tiny_built: Path) -> None:
    manifest, pipe = read_manifest(tiny_built), open_pipeline(tiny_built)
    inputs = example_inputs(pipe, "unet")
    entry = entry_of(manifest.engines["unet"], "openvino-int8")
    engine = open_entry(tiny_built, "unet", entry, manifest, pipe, 1)(inputs)["out_sample"]
    weight = pipe.unet.conv_in.weight.clone()
    simulated = open_torch(pipe, "unet", "eager", "int8", list(inputs), folder=tiny_built)
    plain = open_torch(pipe, "unet", "eager", "fp32", list(inputs))(inputs)["out_sample"]
    found = simulated(inputs)["out_sample"]
    assert relative_error(found, engine) < 0.5 * relative_error(plain, engine)
    assert torch.equal(pipe.unet.conv_in.weight, weight)
    again = open_torch(pipe, "unet", "eager", "fp32", list(inputs))(inputs)["out_sample"]
    assert torch.equal(plain, again)  # the rounding went with the call


def test_scales_that_are_not_there_are_named(tiny_built: Path, tiny_folder: Path) -> None:
    pipe = open_pipeline(tiny_built)
    schemes = {s.scheme for s in read_scales(tiny_built / "unet/quantization.safetensors").values()}
    assert schemes == {"int8"}
    with pytest.raises(InvalidArtifact, match="quantised to int8, not to fp8"):
        SimulatedEngine(pipe, "unet", [], "fp8", tiny_built / "unet")
    with pytest.raises(InvalidArtifact, match="not quantised"):
        SimulatedEngine(pipe, "unet", [], "int8", tiny_folder / "unet")
    with pytest.raises(HcfError, match="from the scales"):
        open_torch(pipe, "unet", "eager", "int8", [])


def candidate(engine: str, precision: str, low: float, median: float, **more: Any) -> EngineEntry:
    return EngineEntry(
        engine=engine,
        precision=precision,
        latency_ms=median,
        latency_low_ms=low,
        latency_high_ms=2 * median,
        error=more.pop("error", 0.0),
        **more,
    )


def test_a_quantised_engine_has_to_win_in_the_median_too() -> None:
    entries = [
        candidate("eager", "fp32", 9.0, 10.0),
        candidate("tensorrt", "fp16", 2.0, 2.1),
        candidate("tensorrt", "int8", 1.9, 2.2, error=0.05),
        candidate("openvino", "int8", 1.8, 2.3, error=0.05),
    ]
    lines: list[str] = []
    assert choose("unet", entries, ["tensorrt", "openvino"], lines.append) == 1
    assert "in the median not faster than tensorrt-fp16" in entries[2].reason
    assert "in the median not faster than tensorrt-fp16" in entries[3].reason
    assert any("INT8 is not the fastest" in line for line in lines)
    entries[2].latency_ms, entries[2].reason = 1.95, ""
    for entry in entries:
        entry.reason = ""
    assert choose("unet", entries, ["tensorrt"], silent) == 2


def test_every_loser_has_its_reason() -> None:
    entries = [
        candidate("eager", "fp32", 9.0, 10.0),
        candidate("openvino", "bf16", 2.0, 2.1, error=0.01),
        candidate("openvino", "int8", 1.0, 1.1, error=float("inf")),
        candidate("onnxruntime", "int8", 1.0, 1.1, error=0.75),
        candidate("onnxruntime", "fp32", 4.0, 4.1),
        EngineEntry(engine="tensorrt", precision="fp16", device="cuda", machine="sm89"),
        EngineEntry(engine="openvino", precision="fp16", reason="could not be built: no"),
        EngineEntry(engine="eager", precision="int4", provider="simulated in AVX2", error=0.1),
    ]
    engines = ["eager", "openvino", "onnxruntime", "tensorrt"]
    assert choose("unet", entries, engines, silent) == 1
    wanted = [
        "4.50x the time of openvino-bf16",
        "chosen: the fastest, 2.00x onnxruntime-fp32",
        "its output is not finite",
        "its error is too large: 0.75",
        "2.00x the time of",
        "built for sm89, not run here",
        "could not be built: no",
        "simulated",
    ]
    for entry, words in zip(entries, wanted, strict=True):
        assert words in entry.reason, (entry_name(entry), entry.reason)


def test_a_candidate_that_cannot_be_built_stops_the_build_or_loses(
    tiny_exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "artefact"
    shutil.copytree(tiny_exported, folder)
    # an INT8 graph that quantises nothing: what was asked for is not what would run
    shutil.copyfile(folder / "unet/model.onnx", folder / "unet/model.int8.onnx")
    config = BuildConfig(
        engines=["openvino"], precisions=["fp32", "int8"], components=["unet"], threads=1, repeats=1
    )
    pipe = open_pipeline(tiny_exported)
    with pytest.raises(HcfError, match="asked for int8"):
        build_components(pipe, folder, config, silent)
    going = config.model_copy(update={"keep_going": True})
    engines, chosen = build_components(pipe, folder, going, silent)
    lost = entry_of(engines["unet"], "openvino-int8")
    assert lost.reason.startswith("could not be built: openvino") and lost.latency_ms is None
    assert chosen["unet"] == "openvino-fp32"


def test_what_runs_less_than_when_it_was_built_is_refused(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    entry = entry_of(manifest.engines["unet"], "openvino-int8")
    more = entry.model_copy(update={"layer_precisions": {"int8": 1000}})
    with pytest.raises(EngineMismatch, match="was built with .*1000"):
        open_form(tiny_built, "unet", more, 1)


def test_new_weights_take_the_same_form(tiny_built: Path, tmp_path: Path) -> None:
    """A refitted artefact: the graph changed, the engine made again from it."""
    import onnx
    from onnx import numpy_helper

    manifest, pipe = read_manifest(tiny_built), open_pipeline(tiny_built)
    entry = entry_of(manifest.engines["unet"], "onnxruntime-fp32")
    assert entry.source is not None
    model = onnx.load(str(tiny_built / entry.source))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv_out.bias"):
            moved = numpy_helper.to_array(tensor) + 1
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    (tmp_path / "unet").mkdir()
    onnx.save(model, str(tmp_path / entry.source))
    form = refit_form(tiny_built, tmp_path, "unet", entry, 1)
    assert form["source_hash"] != entry.source_hash
    inputs = example_inputs(pipe, "unet")
    before = open_form(tiny_built, "unet", entry, 1)(inputs)["out_sample"]
    after = open_form(tmp_path, "unet", entry.model_copy(update=form), 1)(inputs)["out_sample"]
    assert torch.allclose(after, before + 1, atol=1e-4)


def test_graphs_of_gpu_engines_have_fp16_between_the_quantised_layers(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()

    def name(engine: str, precision: str, device: str) -> str:
        return source_graph(tmp_path, "unet", engine, precision, device).name

    assert name("tensorrt", "fp16", "cuda") == "model.fp16.onnx"
    assert name("openvino", "bf16", "cpu") == "model.onnx"
    assert name("openvino", "int8-bf16", "cpu") == "model.int8.onnx"
    assert name("onnxruntime", "int8", "cpu") == "model.int8.u8s8.onnx"
    assert name("tensorrt", "int8", "cuda") == "model.int8.onnx"
    (tmp_path / "unet/model.int8.fp16.onnx").touch()
    assert name("tensorrt", "int8", "cuda") == "model.int8.fp16.onnx"
    assert name("openvino", "int8", "cpu") == "model.int8.onnx"


def test_profiles_come_from_resolutions(tiny_pipeline: Any) -> None:
    profile = ShapeProfile(resolutions=[[16, 16], [32, 24]], batch=[1, 2, 4])
    (found,) = profiles_of(tiny_pipeline, "unet", [profile])
    assert found.min["sample"] == [1, 4, 8, 8] and found.opt["sample"] == [2, 4, 8, 8]
    assert found.max["sample"] == [4, 4, 16, 12]
    assert found.max["encoder_hidden_states"] == [4, 16, 32] and found.min["timestep"] == [1]
    (decoder,) = profiles_of(tiny_pipeline, "vae_decoder", [profile])
    assert decoder.max["latents"] == [4, 4, 16, 12]
    by_name = ShapeProfile(opt_shapes={"sample": [2, 4, 8, 8], "latents": [1, 4, 8, 8]})
    (own,) = profiles_of(tiny_pipeline, "vae_decoder", [by_name])
    assert own.opt == {"latents": [1, 4, 8, 8]}


def test_devices_and_engines_that_are_here() -> None:
    found = available_engines("cpu")
    assert found[0] == "eager" and {"onnxruntime", "openvino"} <= set(found)
    assert "tensorrt" not in found
    if torch.cuda.is_available():
        assert device_of(BuildConfig()) == "cuda"
        return
    assert device_of(BuildConfig()) == "cpu" and "tensorrt" not in available_engines("cuda")
    with pytest.raises(MissingDependency, match="finds no GPU"):
        device_of(BuildConfig(device="cuda"))


def test_engines_of_the_cpu_are_no_candidates_on_a_gpu(tiny_exported: Path) -> None:
    lines: list[str] = []
    config = BuildConfig(engines=["openvino"], precisions=["fp32"], components=["unet"])
    assert candidates(tiny_exported, "unet", config, "cuda", lines.append) == []
    assert "openvino runs on the CPU" in lines[0]


def test_a_precision_without_a_graph_is_an_error(tiny_exported: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = BuildConfig(
        engines=["openvino"], precisions=["int4-weight"], components=["unet"], threads=1
    )
    with pytest.raises(RecipeError, match="asks for int4-weight"):
        build(tiny_exported, tmp_path / "out", config, lines.append)
    assert any("there is no model.int4-weight.onnx (quantize.format)" in line for line in lines)


@pytest.mark.gpu
def test_plans_for_the_gpu_here_are_timed(tiny_exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    config = BuildConfig(
        engines=["eager", "tensorrt"],
        precisions=["fp32", "int8"],
        components=["unet"],
        tensorrt_driver="tensorrt",
        repeats=3,
        profiles=[ShapeProfile(resolutions=[[16, 16], [32, 32]])],
    )
    manifest = read_manifest(build(tiny_exported, tmp_path / "out", config, silent))
    for name in ("tensorrt-fp32", "tensorrt-int8"):
        entry = entry_of(manifest.engines["unet"], name)
        assert entry.latency_ms is not None and entry.error is not None
        assert entry.details["engine"]["kernels"] > 0 and entry.details["workspace"]
    inputs: dict[str, Tensor] = example_inputs(open_pipeline(tmp_path / "out"), "unet")
    assert inputs
