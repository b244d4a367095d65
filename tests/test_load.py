"""hcf.load: an ordinary pipeline on the engines that were built, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hcf
from hcf.artifact import Sampling, read_manifest
from hcf.engines.build import build
from hcf.engines.forms import entry_name, speed
from hcf.errors import EngineMismatch, HcfError, RecipeError
from hcf.export.component import cached_components, example_inputs, relative_error
from hcf.export.onnx import export
from hcf.load import accelerate, load, pick_entry
from hcf.routing import routes_of
from hcf.settings import BuildConfig, ExportConfig, FeatureCacheConfig
from hcf.trace import record_calls


def latents_of(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", num_inference_steps=2, generator=generator, output_type="latent").images


def test_auto_takes_the_chosen_engines_and_draws(tiny_built: Path) -> None:
    pipe = hcf.load(tiny_built)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    chosen = read_manifest(tiny_built).chosen
    found = {r.component: f"{r.engine}-{r.precision}" for r in pipe.hcf_report}
    assert found == chosen
    assert pipe.hcf_sampling == {"steps": 4, "guidance_scale": 1.0}
    images = pipe("red cat", num_inference_steps=2).images
    assert images[0].size == (16, 16)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_fp32_engines_give_the_latents_and_images_of_eager(tiny_built: Path, engine: str) -> None:
    wanted, pipe = load(tiny_built, engine="eager"), load(tiny_built, engine, "fp32")
    assert set(routes_of(pipe)) == {"unet", "vae_decoder"}
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert relative_error(latents_of(pipe), latents_of(wanted)) < 1e-4
    z = torch.randn(1, 4, 8, 8)
    precision = next(r.precision for r in pipe.hcf_report if r.component == "vae_decoder")
    error = relative_error(pipe.vae.decode(z).sample, wanted.vae.decode(z).sample)
    assert error < (1e-4 if precision == "fp32" else 0.05)
    assert pipe.vae.config.scaling_factor == wanted.vae.config.scaling_factor


def test_int8_is_close_and_reported(tiny_built: Path) -> None:
    pipe = load(tiny_built, engine="openvino", precision="int8")
    report = next(r for r in pipe.hcf_report if r.component == "unet")
    assert report.layer_precisions["int8"] > report.layer_precisions["fp32"]
    wanted = latents_of(load(tiny_built, engine="eager"))
    assert relative_error(latents_of(pipe), wanted) < 0.3


def test_eager_is_the_plain_module_and_bf16_is_not(tiny_built: Path) -> None:
    pipe = load(tiny_built, engine="eager")
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    low = load(tiny_built, engine="eager", precision="bf16")
    error = relative_error(latents_of(low), latents_of(pipe))
    assert 1e-4 < error < 0.1


def test_eager_simulates_the_rounding_of_the_artefact(tiny_built: Path) -> None:
    pipe = load(tiny_built, engine="eager", precision="int8")
    unet, decoder = pipe.hcf_report
    assert unet.provider.startswith("simulated") and unet.layer_precisions["int8"] > 50
    assert decoder.precision == "fp32" and set(routes_of(pipe)) == {"unet"}
    wanted = latents_of(load(tiny_built, engine="eager"))
    assert 1e-3 < relative_error(latents_of(pipe), wanted) < 0.3


def test_calls_can_be_recorded_from_an_engine(tiny_built: Path) -> None:
    pipe = load(tiny_built, engine="onnxruntime", precision="fp32")
    calls = record_calls(pipe, ["cat"], steps=2, guidance_scale=3.0, seed=0)
    assert len(calls) == 2 and calls[0].sample.shape == (2, 4, 8, 8)


def test_plain_folders_load_eager_and_name_the_build(tiny_folder: Path) -> None:
    pipe = load(tiny_folder)
    assert [r.engine for r in pipe.hcf_report] == ["eager", "eager"]
    with pytest.raises(RecipeError, match="hcf build"):
        load(tiny_folder, engine="openvino")


def test_what_was_not_built_is_an_error_that_lists_what_was(tiny_built: Path) -> None:
    with pytest.raises(HcfError, match="onnxruntime engine does not run bf16"):
        load(tiny_built, engine="onnxruntime", precision="bf16")
    with pytest.raises(RecipeError, match="'tensorflow'"):
        load(tiny_built, engine="tensorflow")
    with pytest.raises(RecipeError, match="openvino-int8"):
        load(tiny_built, engine="tensorrt")
    with pytest.raises(RecipeError, match="threads=0"):
        load(tiny_built, threads=0)


def test_an_engine_of_another_machine_is_refused(
    tiny_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcf.engines.forms.machine_kind", lambda: "riscv64")
    with pytest.raises(EngineMismatch, match="riscv64"):
        load(tiny_built, engine="openvino")


def test_named_engine_takes_its_fastest_precision(tiny_built: Path) -> None:
    manifest = read_manifest(tiny_built)
    entry = pick_entry(tiny_built, "unet", manifest, "openvino", None)
    others = [e for e in manifest.engines["unet"] if e.engine == "openvino"]
    assert speed(entry) == min(speed(e) for e in others)
    auto = pick_entry(tiny_built, "unet", manifest, "auto", None)
    assert entry_name(auto) == manifest.chosen["unet"]


def test_accelerate_changes_a_pipeline_in_hand(tiny_built: Path, tiny_pipeline: Any) -> None:
    wanted = latents_of(tiny_pipeline)
    pipe = accelerate(tiny_pipeline, tiny_built, engine="openvino", precision="fp32")
    assert pipe is tiny_pipeline and "unet" in routes_of(pipe)
    assert relative_error(latents_of(pipe), wanted) < 1e-4
    assert Sampling(**pipe.hcf_sampling).steps == 4


def test_conditioning_the_engine_was_not_built_with_is_refused(tiny_built: Path) -> None:
    pipe = load(tiny_built, engine="onnxruntime", precision="fp32")
    inputs = example_inputs(load(tiny_built, engine="eager"), "unet", batch=1)
    with pytest.raises(HcfError, match="timestep_cond"):
        pipe.unet(**inputs, timestep_cond=torch.zeros(1, 8))
    sample = pipe.unet(**inputs).sample
    assert torch.equal(sample, pipe.unet(**inputs, return_dict=False)[0])


@pytest.mark.filterwarnings("ignore:.*step")
def test_a_folder_built_with_a_cache_loads_with_it(tiny_quantized: Path) -> None:
    cache = FeatureCacheConfig(interval=2)
    steps = list(cached_components(0))
    exported, built = (tiny_quantized.with_name(f"cache-{name}") for name in ("graphs", "engines"))
    export(tiny_quantized, exported, ExportConfig(components=steps), lambda line: None)
    config = BuildConfig(
        engines=["openvino"],
        precisions=["fp32", "int8"],
        components=steps,
        cache=cache,
        threads=1,
        repeats=2,
    )
    build(exported, built, config, lambda line: None)
    pipe = load(built, engine="openvino", precision="int8")
    assert [r.component for r in pipe.hcf_report] == [*steps, "vae_decoder"]
    assert pipe.hcf_report[0].layer_precisions["int8"] > pipe.hcf_report[1].layer_precisions["int8"]
    images = pipe("red cat", num_inference_steps=6).images
    assert images[0].size == (16, 16)
    plain = load(built, engine="eager")
    assert not routes_of(plain)
