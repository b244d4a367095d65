"""hcf.accelerate on a pipeline in hand: built once for its content, right after every LoRA swap."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_pipeline
from torch import Tensor, nn

import hcf
from hcf import code_hash as code_hash_module
from hcf.artifact import read_manifest
from hcf.code_hash import code_hash
from hcf.errors import HcfError, RecipeError
from hcf.export.component import relative_error
from hcf.load import accelerate, decelerate
from hcf.routing import routes_of
from hcf.settings import FeatureCacheConfig, QuantizeConfig
from hcf.store import engines_folder, trim

SHORT = QuantizeConfig(calibration_samples=2, calibration_steps=4)
QUICK = {"engine": "openvino", "precision": "fp32", "components": ["unet"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: what one test built, another finds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(home))


def latents_of(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", num_inference_steps=2, generator=generator, output_type="latent").images


def lora_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random LoRA of every attention projection, under the keys diffusers loads."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_v")):
            outs, ins = layer.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(4, ins, generator=generator) * 0.2
            state[f"unet.{name}.lora_B.weight"] = torch.randn(outs, 4, generator=generator) * 0.2
    return state


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "engines").iterdir())


def test_the_second_time_the_engines_are_found(tiny_pipeline: Any, home: Path) -> None:
    wanted, lines = latents_of(tiny_pipeline), list[str]()
    accelerate(tiny_pipeline, **QUICK, log=lines.append)
    assert any(line.startswith("building engines of unet") for line in lines)
    assert relative_error(latents_of(tiny_pipeline), wanted) < 1e-4
    before, lines = folders(home), []
    again = make_tiny_pipeline()
    accelerate(again, **QUICK, log=lines.append)
    assert lines == [] and folders(home) == before
    (report,) = again.hcf_report
    assert (report.engine, report.precision, report.component) == ("openvino", "fp32", "unet")
    # another weight is another content
    with torch.no_grad():
        again.unet.conv_out.bias += 0.5
    wanted = latents_of(decelerate(again))
    accelerate(again, **QUICK, log=lines.append)
    assert len(folders(home)) == len(before) + 1
    assert relative_error(latents_of(again), wanted) < 1e-4


def test_int8_by_name_leaves_the_decoder_in_floating_point(tiny_pipeline: Any) -> None:
    asked = {"engine": "openvino", "precision": "int8", "quantize": SHORT}
    accelerate(tiny_pipeline, **asked)
    ran = {r.component: (r.engine, r.precision) for r in tiny_pipeline.hcf_report}
    assert ran.pop("unet") == ("openvino", "int8")
    assert ran.keys() == {"vae_decoder"} and ran["vae_decoder"][0] == "openvino"
    assert ran["vae_decoder"][1] in ("fp32", "bf16")


def test_engines_of_other_code_are_made_again(
    tiny_pipeline: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate(tiny_pipeline, **QUICK)
    before, lines = folders(home), list[str]()
    monkeypatch.setattr("hcf.store.code_hash", lambda sources: "another commit")
    accelerate(make_tiny_pipeline(), **QUICK, log=lines.append)
    assert len(folders(home)) == len(before) + 1
    assert any(line.startswith("building engines of unet") for line in lines)


def test_a_code_hash_follows_files_and_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somewhere"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("somewhere/one.py", "somewhere/inner")

    def in_a_new_process() -> str:
        code_hash_module._hash_once.cache_clear()
        return code_hash(names)

    hashes = [in_a_new_process()]
    (package / "inner" / "page.jinja").write_text("a page")
    hashes.append(in_a_new_process())
    (package / "one.py").write_text("x = 2")
    hashes.append(in_a_new_process())
    assert len(set(hashes)) == 3 and in_a_new_process() == hashes[-1]
    (package / "two.py").write_text("not named")
    assert in_a_new_process() == hashes[-1]
    with pytest.raises(FileNotFoundError, match="three.py"):
        code_hash(("somewhere/three.py",))


def test_auto_takes_what_was_fastest_and_says_why(tiny_pipeline: Any, home: Path) -> None:
    wanted = latents_of(tiny_pipeline)
    hcf.accelerate(tiny_pipeline)
    assert relative_error(latents_of(tiny_pipeline), wanted) < 0.1
    manifest = max(
        (read_manifest(p) for p in (home / "engines").iterdir()),
        key=lambda m: len(m.engines.get("unet", [])),
    )
    entries = manifest.engines["unet"]
    assert {e.engine for e in entries} >= {"eager", "onnxruntime", "openvino"}
    assert all(entry.reason for entry in entries)
    assert sum(e.reason.startswith("chosen") for e in entries) == 1


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_named_engine_needs_no_precision(
    tiny_pipeline: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor without bf16, which neither engine then is asked for."""
    # hcf.load is a function, and a module of the same name
    monkeypatch.setattr(sys.modules["hcf.load"], "cpu_flags", lambda: {"avx2"})
    wanted = latents_of(tiny_pipeline)
    accelerate(tiny_pipeline, engine=engine, components=["unet"])
    (report,) = tiny_pipeline.hcf_report
    assert (report.engine, report.precision) == (engine, "fp32")
    assert relative_error(latents_of(tiny_pipeline), wanted) < 1e-4


def test_int8_in_hand(tiny_pipeline: Any) -> None:
    wanted = latents_of(tiny_pipeline)
    accelerate(
        tiny_pipeline,
        engine="openvino",
        precision="int8",
        quantize=SHORT,
        prompts=["red cat", "blue dog"],
        components=["unet"],
    )
    (report,) = tiny_pipeline.hcf_report
    assert report.precision == "int8" and report.layer_precisions["int8"] > 50
    assert relative_error(latents_of(tiny_pipeline), wanted) < 0.3


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_loras_a_b_a_and_none(tiny_pipeline: Any, engine: str) -> None:
    pipe, lines = tiny_pipeline, list[str]()
    plain = latents_of(pipe)
    a, b = lora_state(pipe.unet, 1), lora_state(pipe.unet, 2)
    wanted: dict[str, Tensor] = {}
    pipe.load_lora_weights(dict(a), adapter_name="a")
    pipe.load_lora_weights(dict(b), adapter_name="b")
    for name, weight in (("a", 1.0), ("b", 1.0), ("a", 0.3)):
        pipe.set_adapters(name, weight)
        wanted[f"{name}{weight}"] = latents_of(pipe)
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    wanted["both"] = latents_of(pipe)
    pipe.unload_lora_weights()
    accelerate(pipe, **{**QUICK, "engine": engine}, log=lines.append)
    assert relative_error(latents_of(pipe), plain) < 1e-4
    pipe.load_lora_weights(dict(a), adapter_name="a")
    first = latents_of(pipe)
    assert any("refitted" in line for line in lines)
    assert relative_error(first, wanted["a1.0"]) < 1e-4
    assert relative_error(wanted["a1.0"], plain) > 1e-2, "the LoRA must matter"
    pipe.load_lora_weights(dict(b), adapter_name="b")
    pipe.set_adapters("b")
    assert relative_error(latents_of(pipe), wanted["b1.0"]) < 1e-4
    lines.clear()
    pipe.set_adapters("a")
    assert torch.equal(latents_of(pipe), first)
    assert lines == [], "the first refit is found again"
    pipe.set_adapters("a", 0.3)
    assert relative_error(latents_of(pipe), wanted["a0.3"]) < 1e-4
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    assert relative_error(latents_of(pipe), wanted["both"]) < 1e-4
    pipe.unload_lora_weights()
    assert relative_error(latents_of(pipe), plain) < 1e-4


def test_a_lora_that_is_there_already_is_part_of_the_key(tiny_pipeline: Any, home: Path) -> None:
    pipe = tiny_pipeline
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_state(pipe.unet, 1), adapter_name="a")
    wanted = latents_of(pipe)
    accelerate(pipe, **QUICK)
    assert relative_error(latents_of(pipe), wanted) < 1e-4
    assert hasattr(pipe.unet, "peft_config"), "the adapters stay loaded"
    pipe.unload_lora_weights()
    assert relative_error(latents_of(pipe), plain) < 1e-4


def test_int8_engines_follow_a_lora(tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline
    prompts = ["red cat", "blue dog"]
    pipe.load_lora_weights(lora_state(pipe.unet, 1), adapter_name="a")
    wanted = latents_of(pipe)
    pipe.unload_lora_weights()
    options: dict[str, Any] = {"quantize": SHORT, "prompts": prompts, "components": ["unet"]}
    accelerate(pipe, engine="openvino", precision="int8", **options)
    pipe.load_lora_weights(lora_state(pipe.unet, 1), adapter_name="a")
    assert relative_error(latents_of(pipe), wanted) < 0.3


def test_torch_engines_follow_a_lora_too(tiny_pipeline: Any) -> None:
    pipe, lines = tiny_pipeline, list[str]()
    accelerate(pipe, engine="eager", precision="bf16", components=["unet"], log=lines.append)
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_state(pipe.unet, 1), adapter_name="a")
    assert relative_error(latents_of(pipe), plain) > 1e-2
    assert any("is made again" in line for line in lines)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_half_precision_pipelines_stay_what_they_were(tiny_pipeline: Any) -> None:
    wanted = latents_of(tiny_pipeline)
    low = make_tiny_pipeline().to(torch.bfloat16)
    before = {name: value.clone() for name, value in low.unet.state_dict().items()}
    accelerate(low, **QUICK)
    assert low.unet.dtype is torch.bfloat16 and low.text_encoder.dtype is torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in low.unet.state_dict().items())
    found = latents_of(low)
    assert found.dtype is torch.bfloat16
    assert relative_error(found.float(), wanted) < 0.05


def test_eager_reports_the_type_that_the_pipeline_has(tiny_pipeline: Any) -> None:
    pipe = accelerate(tiny_pipeline.to(torch.bfloat16), engine="eager")
    assert [r.precision for r in pipe.hcf_report] == ["bf16", "bf16"]
    assert not routes_of(pipe)
    wanted = latents_of(pipe)
    pipe = accelerate(pipe, engine="eager", precision="fp32", components=["unet"])
    (report,) = pipe.hcf_report
    assert report.precision == "fp32" and set(report.layer_precisions) == {"fp32"}
    assert relative_error(latents_of(pipe).float(), wanted.float()) < 0.1


def test_a_failed_build_leaves_pipeline_and_store_as_they_were(
    tiny_pipeline: Any, home: Path
) -> None:
    wanted, before = latents_of(tiny_pipeline), folders(home)
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(HcfError):
        accelerate(tiny_pipeline, **QUICK)
    assert folders(home) == before and not routes_of(tiny_pipeline)
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias[0] = make_tiny_pipeline().unet.conv_out.bias[0]
    assert torch.equal(latents_of(tiny_pipeline), wanted)


def test_what_cannot_be_meant(tiny_pipeline: Any, tmp_path: Path) -> None:
    for arguments, message in (
        ({"components": ["unet", "controlnet"]}, "controlnet"),
        ({"prompts": ["cat"]}, "quantize is None"),
        ({"quantize": "int7"}, "int7"),
        ({"cache": "teacache"}, "teacache"),
        ({"path": tmp_path, "quantize": "int8"}, "built already"),
    ):
        with pytest.raises(RecipeError, match=message):
            accelerate(tiny_pipeline, **arguments)
    assert not routes_of(tiny_pipeline)


def test_the_store_stays_under_its_limit(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Any
) -> None:
    accelerate(tiny_pipeline, **QUICK)
    root = engines_folder()
    kept = root / folders(home)[0]
    monkeypatch.setenv("HCF_ENGINE_CACHE_GB", "0.0001")
    assert trim(root, keep=kept)
    assert folders(home) == [kept.name]
    assert json.loads((kept / "hcf_manifest.json").read_text())["engines"]
    monkeypatch.setenv("HCF_ENGINE_CACHE_GB", "lots")
    with pytest.raises(RecipeError, match="lots"):
        trim(root, keep=kept)


def six_steps(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", num_inference_steps=6, generator=generator, output_type="latent").images


@pytest.mark.filterwarnings("ignore:.*step")
def test_a_feature_cache_on_engines_does_what_it_does_in_torch(home: Path) -> None:
    config = FeatureCacheConfig(interval=2)
    plain = six_steps(make_tiny_pipeline())
    pipe = accelerate(make_tiny_pipeline(), engine="eager", cache=config)
    wanted = six_steps(pipe)
    assert relative_error(wanted, plain) > 1e-4, "the cache must matter"
    assert torch.equal(six_steps(decelerate(pipe)), plain)

    pipe = make_tiny_pipeline()
    accelerate(pipe, **QUICK, cache=config)
    assert [r.component for r in pipe.hcf_report] == ["unet_full_0", "unet_shallow_0"]
    assert relative_error(six_steps(pipe), wanted) < 1e-4
    assert relative_error(six_steps(pipe), wanted) < 1e-4, "each image starts afresh"
    pipe.load_lora_weights(lora_state(pipe.unet, 1), adapter_name="a")
    with_lora = six_steps(pipe)
    assert relative_error(with_lora, wanted) > 1e-2
    assert torch.equal(six_steps(decelerate(pipe)), six_steps(pipe))
    pipe = accelerate(pipe, engine="eager", cache=config)
    assert relative_error(six_steps(pipe), with_lora) < 1e-4


@pytest.mark.filterwarnings("ignore:.*step")
def test_an_int8_u_net_with_a_cache(tiny_pipeline: Any) -> None:
    wanted = six_steps(tiny_pipeline)
    accelerate(
        tiny_pipeline,
        engine="openvino",
        precision="int8",
        quantize=SHORT,
        prompts=["red cat", "blue dog"],
        components=["unet"],
        cache=2,
    )
    full, shallow = tiny_pipeline.hcf_report
    assert full.layer_precisions["int8"] > shallow.layer_precisions["int8"] > 0
    assert relative_error(six_steps(tiny_pipeline), wanted) < 0.3
