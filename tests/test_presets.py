"""Presets: found by the model's config, every rule with a reason, rules in their order."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import nn

from hcf.errors import RecipeError
from hcf.quantize.presets import (
    GENERAL,
    GENERIC,
    PRESETS,
    choose,
    choose_formats,
    preset_of,
    quantisable_layers,
)
from hcf.settings import ExcludeRule, LayerRule, QuantizeConfig


def meta_unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def published(name: str) -> dict[str, Any]:
    """Configs as they are published, the Taiji ones from the model family."""
    from hcf_bench import presets as bench
    from taiji import presets as taiji

    sdxl = bench.SDXL_UNET
    return {
        "sd15": bench.SD15_UNET,
        "sd21": bench.SD21_UNET,
        "sdxl": sdxl,
        "kolors": bench.KOLORS_UNET,
        "taiji-sd": taiji.SD_A_UNET,
        "mini": taiji.MINI_UNET,
        "taiji-imagen": taiji.A_TINY_UNET,
        "sr": taiji.SR_S_UNET,
    }[name]


@pytest.mark.parametrize("name", [*PRESETS, "mini"])
def test_published_models_are_recognised(name: str) -> None:
    unet = meta_unet(published(name))
    wanted = "taiji-sd" if name == "mini" else name
    assert preset_of(unet) == wanted
    lines: list[str] = []
    for form in ("int8", "fp8", "int8-weight", "int4"):
        choice = choose(unet, QuantizeConfig(format=form), lines.append)
        assert choice.preset == wanted and not lines
        assert {*choice.formats, *choice.excluded} == set(quantisable_layers(unet))
        assert {"conv_in", "conv_out"} <= set(choice.excluded)
        assert all({**choice.excluded, **choice.reasons}.values())
        kinds = {type(unet.get_submodule(layer)).__name__ for layer in choice.formats}
        if form == "int8-weight":  # no engine has such convolutions
            assert kinds == {"Linear"}
        else:
            assert len(choice.formats) > len(choice.excluded) and "Conv2d" in kinds
        if form == "int4" and name not in ("taiji-imagen",):
            feeds_back = fnmatch.filter(choice.formats, "*.ff.net.2")
            assert feeds_back and {choice.formats[n] for n in feeds_back} == {"int8"}


def test_every_rule_matches_a_layer_of_its_architecture() -> None:
    for name, preset in PRESETS.items():
        names = quantisable_layers(meta_unet(published(name)))
        last = {"sdxl": 2, "kolors": 2}.get(name, 3)
        for rule in preset.rules:
            pattern = rule.pattern.format(last=last)
            assert rule.reason and fnmatch.filter(names, pattern), (name, rule.pattern)
    assert all(rule.reason for rule in GENERAL)


def test_unknown_architectures_get_general_rules_and_a_line(tiny_pipeline: Any) -> None:
    lines: list[str] = []
    choice = choose(tiny_pipeline.unet, QuantizeConfig(), lines.append)
    assert choice.preset == GENERIC and "general rules only" in lines[0]
    named = choose(tiny_pipeline.unet, QuantizeConfig(preset="sd15", format="int4"), lines.append)
    assert named.preset == "sd15" and len(lines) == 1
    assert choose(nn.Sequential(nn.Linear(2, 2)), QuantizeConfig(), lines.append).formats
    with pytest.raises(RecipeError, match="preset 'sd16' is not known"):
        choose(tiny_pipeline.unet, QuantizeConfig(preset="sd16"), lines.append)


def test_rules_come_in_order_and_the_last_match_decides(tiny_pipeline: Any) -> None:
    config = QuantizeConfig(
        format="fp8",
        exclude=[ExcludeRule(pattern="mid_block.*", reason="sensitive")],
        rules=[
            LayerRule(pattern="mid_block.*.ff.*", format="int8", reason="fine", smooth=0.5),
            LayerRule(pattern="*.ff.net.2", format="int4-weight", reason="large"),
            LayerRule(pattern="up_blocks.0.*", format="none", reason="measured"),
        ],
    )
    choice = choose(tiny_pipeline.unet, config, lambda line: None)
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert choice.formats[f"{block}.ff.net.0.proj"] == "int8"
    assert choice.formats[f"{block}.ff.net.2"] == "int4-weight"
    assert choice.reasons[f"{block}.ff.net.2"] == "large"
    assert choice.excluded["mid_block.resnets.0.conv1"] == "sensitive"
    assert choice.excluded["up_blocks.0.resnets.0.conv1"] == "measured"
    assert choice.formats["up_blocks.1.resnets.0.conv1"] == "fp8"
    assert choice.alphas == {f"{block}.ff.net.0.proj": 0.5, f"{block}.ff.net.2": 0.5}
    assert choose_formats(tiny_pipeline.unet, config, lambda line: None) == (
        choice.formats,
        choice.excluded,
    )
    with pytest.raises(RecipeError, match="rule 'midblock.*' matches none"):
        rule = LayerRule(pattern="midblock.*", format="int8", reason="typo")
        choose(tiny_pipeline.unet, QuantizeConfig(rules=[rule]), lambda line: None)
