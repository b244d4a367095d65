"""INT8 of a tiny random U-Net: ranges, what is left out, the error table, the artefact."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unit_calls

from hcf.artifact import read_manifest, verify
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.export.component import relative_error
from hcf.quantize.calibrate import CALIBRATION_FILE, load_calibration
from hcf.quantize.presets import GENERAL
from hcf.quantize.quantize import choose_layers, quantize, refuse_quantised_modules, sampling_of
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import fake_quantized, layer_errors
from hcf.quantize.report import relative_error as denoiser_error
from hcf.quantize.scales import REPORT_FILE, SCALES_FILE, LayerScale, read_scales, write_scales
from hcf.quantize.statistics import collect_statistics
from hcf.settings import ExcludeRule, QuantizeConfig
from hcf.trace import DenoiserCall, call_denoiser


@pytest.fixture
def calls() -> list[DenoiserCall]:
    return unit_calls(999, 666, 333)


def int8_scales(
    unet: torch.nn.Module, layers: list[str], calls: list[DenoiserCall], **settings: Any
) -> dict[str, LayerScale]:
    statistics = collect_statistics(unet, layers, calls)
    formats = dict.fromkeys(layers, "int8")
    return calibrate_scales(unet, formats, statistics, QuantizeConfig(**settings), calls)


def test_default_exclusions_have_reasons_and_embeddings_stay_float(tiny_xl_pipeline: Any) -> None:
    layers, excluded = choose_layers(tiny_xl_pipeline.unet, [])
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"} <= set(
        excluded
    )
    assert all(reason for reason in excluded.values())
    assert "down_blocks.0.resnets.0.time_emb_proj" in excluded
    assert "mid_block.attentions.0.proj_out" in layers  # modelopt's own defaults leave it out
    assert not set(layers) & set(excluded)


def test_later_rules_win(tiny_pipeline: Any) -> None:
    rules = [("mid_block.*", "sensitive", True), ("mid_block.*.ff.*", "is fine", False)]
    layers, excluded = choose_layers(tiny_pipeline.unet, rules)
    assert excluded["mid_block.resnets.0.conv1"] == "sensitive"
    assert "mid_block.attentions.0.transformer_blocks.0.ff.net.2" in layers
    assert "conv_in" in choose_layers(tiny_pipeline.unet, [("conv_in", "try it", False)])[0]


def test_a_rule_that_matches_nothing_is_an_error(tiny_pipeline: Any) -> None:
    with pytest.raises(RecipeError, match="matches none"):
        choose_layers(tiny_pipeline.unet, [("midblock.*", "typo", True)])
    with pytest.raises(RecipeError, match="every layer"):
        choose_layers(tiny_pipeline.unet, [("*", "all", True)])


def test_ranges_are_those_of_the_tensors(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    unet = tiny_pipeline.unet
    before = copy.deepcopy(unet.state_dict())
    name = "down_blocks.0.resnets.0.conv1"
    seen: list[float] = []
    hook = unet.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0].abs().max()))
    )
    for call in calls:
        call_denoiser(unet, call.sample, call.timestep, call.kwargs)
    hook.remove()
    scale = int8_scales(unet, [name], calls)[name]
    assert scale.input_amax == pytest.approx(max(seen))
    weight = unet.get_submodule(name).weight
    np.testing.assert_allclose(scale.weight_amax, weight.abs().amax((1, 2, 3)).numpy())
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert not any(name.endswith("quantizer") for name, _ in unet.named_modules())


def test_attention_inputs_share_one_range(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    names = [
        f"mid_block.attentions.0.transformer_blocks.0.attn1.{n}" for n in ("to_q", "to_k", "to_v")
    ]
    for algorithm in ("max", "percentile", "mse"):
        scales = int8_scales(tiny_pipeline.unet, names, calls, algorithm=algorithm, percentile=99.0)
        assert len({scale.input_amax for scale in scales.values()}) == 1


def test_unreached_layers_are_named(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.spare = torch.nn.Linear(4, 4)
    with pytest.raises(InvalidArtifact, match="never reached.*spare"):
        int8_scales(unet, ["spare", "mid_block.resnets.0.conv1"], calls)


def test_nan_weights_overflow_and_dead_inputs_are_named(
    tiny_pipeline: Any, calls: list[DenoiserCall]
) -> None:
    names = ["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"]
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidArtifact, match="NaN or infinite weights: mid_block.resnets.0.conv1"):
        int8_scales(unet, names, calls)
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].norm2.bias.data.fill_(float("inf"))
    with pytest.raises(InvalidArtifact, match="first in the input of mid_block.resnets.0.conv2"):
        int8_scales(unet, names, calls)
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].norm2.weight.data.zero_()
    unet.mid_block.resnets[0].norm2.bias.data.zero_()
    with pytest.raises(InvalidArtifact, match="zero: mid_block.resnets.0.conv2"):
        int8_scales(unet, names, calls)


def test_fake_quantised_model_is_modelopts(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    import modelopt.torch.quantization as mtq

    unet = tiny_pipeline.unet
    layers, _ = choose_layers(unet, [])
    scales = int8_scales(unet, layers, calls)

    def run(model: torch.nn.Module) -> list[torch.Tensor]:
        return [call_denoiser(model, c.sample, c.timestep, c.kwargs) for c in calls]

    # the default configuration leaves out `*proj_out.*` and quantises the inputs of norms
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in layers:
        for part, axis in (("weight", 0), ("input", None)):
            cfg = {"num_bits": 8, "axis": axis}
            entries.append({"quantizer_name": f"{name}.{part}_quantizer", "cfg": cfg})
    config = {"quant_cfg": entries, "algorithm": "max"}
    with torch.no_grad():
        wanted = run(mtq.quantize(copy.deepcopy(unet), config, forward_loop=run))
        plain = run(unet)
        with fake_quantized(unet, scales):
            found = run(unet)
        assert all(torch.equal(a, b) for a, b in zip(run(unet), plain, strict=True))  # restored
    # One value on a rounding boundary that goes the other way, which another CPU's kernels may do,
    # moves all that comes after it by about the quantisation error; calls without one agree.
    shares = [
        relative_error(ours, theirs) / relative_error(ours, fp)
        for ours, theirs, fp in zip(found, wanted, plain, strict=True)
    ]
    assert min(shares) < 1e-3 and max(shares) < 1.5, shares


def test_error_table_ranks_a_bad_layer_first(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    unet = tiny_pipeline.unet
    layers, _ = choose_layers(unet, [])
    scales = int8_scales(unet, layers, calls)
    rows = layer_errors(unet, scales, calls[:2])
    assert {row.layer for row in rows} == set(layers)
    assert all(20 < row.sqnr_db < 60 for row in rows)
    assert rows == sorted(rows, key=lambda row: row.sqnr_db)
    whole = denoiser_error(unet, scales, calls[:2])
    assert 0 < whole < 0.1
    bad = "up_blocks.1.resnets.0.conv1"
    scales[bad] = LayerScale(scales[bad].input_amax * 30, scales[bad].weight_amax)
    rows = layer_errors(unet, scales, calls[:2])
    assert rows[0].layer == bad and rows[0].sqnr_db < 15
    assert denoiser_error(unet, scales, calls[:2]) > whole


def test_scales_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / SCALES_FILE
    scales = {"a.b": LayerScale(1.5, np.array([0.0, 2.0], np.float32))}
    write_scales(path, scales)
    loaded = read_scales(path)
    assert loaded["a.b"].input_amax == 1.5
    np.testing.assert_array_equal(loaded["a.b"].weight_amax, scales["a.b"].weight_amax)
    assert (loaded["a.b"].weight_scale > 0).all()
    write_scales(path, {"a.b": LayerScale(float("nan"), np.ones(2, np.float32))})
    with pytest.raises(InvalidArtifact, match="NaN.*a.b"):
        read_scales(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        read_scales(path)
    with pytest.raises(InvalidArtifact, match="does not exist"):
        read_scales(tmp_path / "other.safetensors")


def test_quantize_adds_to_a_plain_diffusers_folder(tiny_folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = QuantizeConfig(
        calibration_prompts=["a cat", "a dog", "a red square"],
        calibration_samples=4,
        batch_size=2,
        exclude=[ExcludeRule(pattern="mid_block.*", reason="a test")],
    )
    tree = json.loads((tiny_folder / "model_index.json").read_text())
    output = quantize(tiny_folder, tmp_path / "int8", config, lines.append)
    assert lines and not verify(output)
    assert json.loads((output / "model_index.json").read_text()) == tree
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (output / weights).read_bytes() == (tiny_folder / weights).read_bytes()

    summary = read_manifest(output).quantization["unet"]
    assert read_manifest(output).parents[0].name == "tiny"
    calls = load_calibration(output / "unet" / CALIBRATION_FILE, summary["calibration_sha256"])
    assert len(calls) == summary["calibration_calls"] == 64
    report = json.loads((output / "unet" / REPORT_FILE).read_text())
    assert report["exclusions"]["mid_block.resnets.0.conv1"] == "a test"
    assert report["exclusions"]["conv_in"] == GENERAL[0].reason
    assert len(report["layer_errors"]) == len(read_scales(output / "unet" / SCALES_FILE))
    assert report["relative_error"] == summary["relative_error"] > 0
    assert report["versions"]["nvidia-modelopt"].startswith("0.47")
    assert report["preset"] == "generic" and any("general rules only" in line for line in lines)
    assert report["formats"] == {"int8": len(report["layer_errors"])}
    assert all(row["range"] == "input max, weight max" for row in report["layer_errors"])
    with pytest.raises(HcfError, match="quantised already.*quantization.json"):
        quantize(output, tmp_path / "again", config, lines.append)
    assert not (tmp_path / "again").exists()


def test_quantize_leaves_nothing_after_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(exclude=[ExcludeRule(pattern="nothing", reason="typo")])
    with pytest.raises(RecipeError):
        quantize(tiny_folder, tmp_path / "out" / "int8", config, lambda line: None)
    with pytest.raises(RecipeError, match="quantised to int8 only"):
        config = QuantizeConfig(attention=True, format="fp8")
        quantize(tiny_folder, tmp_path / "out" / "int8", config, lambda line: None)
    with pytest.raises(RecipeError, match="preset 'sd16' is not known"):
        config = QuantizeConfig(preset="sd16")
        quantize(tiny_folder, tmp_path / "out" / "int8", config, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_sampling_defaults(tiny_pipeline: Any, tiny_folder: Path) -> None:
    assert sampling_of(tiny_pipeline, tiny_folder) == (50, 7.5)  # diffusers' own


def test_weights_that_are_quantised_already_are_refused(
    tiny_pipeline: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    config = tiny_folder / "unet" / "config.json"
    entry = {"quantization_config": {"quant_method": "modelopt"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **entry}))
    with pytest.raises(HcfError, match=r"quantization_config \(modelopt\)"):
        quantize(tiny_folder, tmp_path / "out", QuantizeConfig(), lambda line: None)

    import modelopt.torch.quantization as mtq

    entries = [{"quantizer_name": "*", "enable": False}]
    unet = mtq.quantize(copy.deepcopy(tiny_pipeline.unet), {"quant_cfg": entries}, lambda m: None)
    refuse_quantised_modules(tiny_pipeline.unet, "unet")
    with pytest.raises(HcfError, match="unet.*is a modelopt.*quantised already"):
        refuse_quantised_modules(unet, "unet")


def test_scales_of_every_kind_survive_the_disk(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return (generator.random(shape) + 0.1).astype(np.float32)

    scales = {
        "a": LayerScale(2.0, np.float32(3.0) * np.ones((), np.float32), "fp8", smooth=some(5)),
        "b": LayerScale(None, some(4, 2), "int4", low_rank=(some(4, 2), some(2, 32))),
        "c": LayerScale(None, some(4), "int8-weight"),
        "d": LayerScale(1.0, some(4), bucket_amax=some(3), bucket_edges=some(4).cumsum()),
    }
    path = tmp_path / SCALES_FILE
    write_scales(path, scales)
    found = read_scales(path)
    assert list(found) == list(scales)
    for name, wanted in scales.items():
        for field in ("scheme", "input_amax"):
            assert getattr(found[name], field) == getattr(wanted, field)
        for field in ("weight_amax", "smooth", "low_rank", "bucket_amax", "bucket_edges"):
            ours, theirs = getattr(found[name], field), getattr(wanted, field)
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                pairs = zip(ours, theirs, strict=True) if field == "low_rank" else [(ours, theirs)]
                assert all(a.shape == b.shape and np.array_equal(a, b) for a, b in pairs)
    assert (found["d"].bucket_gain >= 1).all()

    from safetensors.numpy import save_file

    save_file({"a.weight_amax": some(4)}, path)
    with pytest.raises(InvalidArtifact, match="has a.weight_amax but no a.input_amax"):
        read_scales(path)
    save_file({"a.weight_amax": some(4)}, path, metadata={"schemes": '{"a": "int3"}'})
    with pytest.raises(InvalidArtifact, match="scheme 'int3'"):
        read_scales(path)
    # as older versions wrote
    save_file({"a.weight_amax": some(4), "a.input_amax": np.asarray(some())}, path)
    assert read_scales(path)["a"].scheme == "int8"
