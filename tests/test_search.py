"""The sensitivity search end to end on a tiny U-Net, and the costs it reads from engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hcf.engines.layer_cost import (
    attribute,
    check_attributed,
    modelled_costs,
    openvino_times,
    operations,
    tensorrt_times,
)
from hcf.engines.search import recipe_rules, search
from hcf.engines.search_compare import compare
from hcf.errors import HcfError, MissingDependency, RecipeError
from hcf.export.component import example_inputs
from hcf.export.onnx import export_component
from hcf.export.passes import insert_qdq
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.sensitivity_choice import Option
from hcf.quantize.statistics import collect_statistics
from hcf.recipe import stage_config
from hcf.settings import ExportConfig, QuantizeConfig, SensitivityConfig
from hcf.trace import DenoiserCall, record_calls

SMALL: dict[str, Any] = {
    "calibration_prompts": ["a cat", "一只狗"],
    "calibration_samples": 2,
    "calibration_steps": 3,
    "calibration_guidance": 1.0,
    "calls": 1,
    "held_out_calls": 1,
    "exchange_rounds": 1,
    "repeats": 2,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))


@pytest.fixture
def call(tiny_pipeline: Any) -> DenoiserCall:
    return record_calls(tiny_pipeline, ["a cat"], steps=1, guidance_scale=1.0, seed=0)[0]


def layers_of(unet: Any) -> list[str]:
    from torch import nn

    return [n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_a_search_without_an_engine(tiny_folder: Path, tmp_path: Path) -> None:
    output, lines = tmp_path / "out" / "recipe.yaml", list[str]()
    config = SensitivityConfig(**SMALL, target="macs", latency_ratio=1.1)
    assert search(tiny_folder, output, config, lines.append) == output
    assert len([line for line in lines if "of memory at the peak" in line]) == 2
    section = stage_config(QuantizeConfig, "quantize", output)
    assert section.rules[0].pattern == "*" and all(rule.reason for rule in section.rules)
    assert section.calibration_prompts == ["a cat", "一只狗"] and section.calibration_steps == 3
    result = json.loads(output.with_suffix(".pareto.json").read_text())
    assert result["chosen"]["cost"] <= 1.1 * result["default"]["cost"] * (1 + 1e-6)
    # with more time than the default rules take the choice is at least as good
    assert result["chosen"]["predicted_error"] <= result["default"]["predicted_error"]
    assert result["unit"] == "byte times" and result["chosen"]["latency_ratio"] is None
    costs = [point["cost"] for point in result["front"]]
    assert costs == sorted(costs) and result["front"][-1]["error"] == 0
    assert output.with_suffix(".pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.parent.glob(".hcf-*"))
    rows = output.with_suffix(".layers.jsonl").read_text()
    search(tiny_folder, output, config, lambda line: None)
    assert output.with_suffix(".layers.jsonl").read_text() == rows  # nothing measured again


@pytest.mark.slow
def test_openvino_is_timed_and_floating_point_is_no_recipe(
    tiny_folder: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    # so much time that no clock decides: everything stays as it is
    config = SensitivityConfig(**SMALL, latency_ratio=9.0)
    with pytest.raises(RecipeError, match="floating point meets the target on openvino"):
        search(tiny_folder, tmp_path / "recipe.yaml", config, lines.append)
    assert any("all layers in int8" in line for line in lines)
    assert any("of the default rules'" in line and "true error 0.00000" in line for line in lines)
    assert not (tmp_path / "recipe.yaml").exists() and not list(tmp_path.glob(".hcf-*"))


@pytest.mark.slow
def test_two_recipes_are_compared_on_fresh_prompts(tiny_folder: Path) -> None:
    kept = {"pattern": "*.resnets.*", "format": "none", "reason": "a test"}
    recipes = {
        "default": QuantizeConfig(),
        "exact": QuantizeConfig.model_validate({"rules": [kept]}),
    }
    config = SensitivityConfig(**SMALL)
    default, exact = compare(
        tiny_folder, recipes, config, images=1, fresh_prompts=2, log=lambda line: None
    )
    assert (default.name, default.ratio) == ("default", 1.0)
    assert exact.error < default.error and exact.formats["int8"] < default.formats["int8"]
    assert exact.psnr_db is not None and exact.latency_ms > 0


def test_a_quantised_model_is_refused(tiny_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(HcfError, match="quantised already"):
        search(tiny_quantized, tmp_path / "r.yaml", SensitivityConfig(), lambda line: None)


def test_a_bound_on_the_error_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "recipe.yaml"
    given = {**SMALL, "target": "macs", "mode": "layer"}
    search(tiny_folder, output, SensitivityConfig(**given, max_error=1.0), lambda line: None)
    loose = json.loads(output.with_suffix(".pareto.json").read_text())
    bound = 0.5 * loose["chosen"]["true_error"]
    search(tiny_folder, output, SensitivityConfig(**given, max_error=bound), lambda line: None)
    tight = json.loads(output.with_suffix(".pareto.json").read_text())
    assert tight["chosen"]["true_error"] <= bound
    assert tight["chosen"]["cost"] > loose["chosen"]["cost"]


def test_targets_that_cannot_be(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the cheapest costs"):
        search(
            tiny_folder,
            tmp_path / "r.yaml",
            SensitivityConfig(**SMALL, target="macs", latency_ratio=0.01),
            lambda line: None,
        )
    assert not (tmp_path / "r.yaml").exists()
    with pytest.raises(RecipeError, match="is no recipe"):
        search(tiny_folder, tmp_path / "r", SensitivityConfig(), lambda line: None)
    with pytest.raises(ValueError, match="not both"):
        SensitivityConfig(latency_ratio=1.0, max_error=0.1)


def test_openvino_times_go_to_layers(
    tiny_pipeline: Any, call: DenoiserCall, tmp_path: Path
) -> None:
    import onnx

    unet, layers = tiny_pipeline.unet, layers_of(tiny_pipeline.unet)
    inputs = example_inputs(tiny_pipeline, "unet", batch=2)
    graph, int8 = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    export_component(tiny_pipeline, "unet", inputs, graph, ExportConfig(dynamic=False))
    seen = collect_statistics(unet, layers, [call])
    scales = calibrate_scales(unet, dict.fromkeys(layers, "int8"), seen)
    onnx.save(insert_qdq(onnx.load(str(graph)), scales)[0], str(int8))
    weights = operations(unet, layers, call)
    graphs = {"none": graph, "int8": int8}
    each = openvino_times(graphs, {"none": "fp32", "int8": "int8"}, inputs, threads=1, repeats=3)
    for name, times in each.items():
        found, rest = attribute(onnx.load(str(graphs[name])), times, layers, weights)
        check_attributed(found, rest, name)
        assert sum(found.values()) + rest == pytest.approx(sum(t.ms for t in times))
        assert sum(value > 0 for value in found.values()) > 0.8 * len(layers)
        assert rest < 0.8 * sum(found.values()) + rest


def test_a_profile_that_names_no_layer_is_refused() -> None:
    found = {**dict.fromkeys("bcdefghi", 0.0), "a": 1.0}
    with pytest.raises(HcfError, match="names 1 of 9 layers"):
        check_attributed(found, 10.0, "an engine")


def test_modelled_costs_follow_operations_and_bytes(tiny_pipeline: Any, call: DenoiserCall) -> None:
    unet = tiny_pipeline.unet
    name = "mid_block.resnets.0.conv1"
    weight = unet.get_submodule(name).weight
    assert operations(unet, [name], call)[name] == weight.numel() * 4 * 4  # one image, 4x4 latents
    costs = modelled_costs(unet, [name, "conv_in"], ["none", "int8", "int8-weight"], call)
    assert costs["int8"][name] < costs["int8-weight"][name] < costs["none"][name]
    # its weights are what takes the time here: two bytes each, or one
    assert costs["none"][name] - costs["int8-weight"][name] == pytest.approx(weight.numel())


def test_tensorrt_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MissingDependency, match="needs an NVIDIA GPU"):
        tensorrt_times(tmp_path / "model.onnx", "int8", {}, 3)


@pytest.mark.gpu
def test_tensorrt_times_go_to_layers(
    tiny_pipeline: Any, call: DenoiserCall, tmp_path: Path
) -> None:
    import onnx

    unet, layers = tiny_pipeline.unet, layers_of(tiny_pipeline.unet)
    inputs = example_inputs(tiny_pipeline, "unet", batch=2)
    graph = tmp_path / "model.onnx"
    export_component(tiny_pipeline, "unet", inputs, graph, ExportConfig(dynamic=False))
    times = tensorrt_times(graph, "fp32", inputs, 5)
    found, rest = attribute(onnx.load(str(graph)), times, layers, operations(unet, layers, call))
    check_attributed(found, rest, "tensorrt")


def test_rules_name_what_is_not_common() -> None:
    choice = {
        "a": Option(("a",), "int8", 0.1, 1.0),
        "b": Option(("b",), "int8", 0.1, 1.0),
        "c": Option(("c",), "none", 0.0, 2.0),
    }
    rules = recipe_rules(choice, [], "ms")
    assert [(r["pattern"], r["format"]) for r in rules] == [("*", "int8"), ("c", "none")]
    text = yaml.safe_dump({"rules": rules})
    assert yaml.safe_load(text)["rules"] == rules
