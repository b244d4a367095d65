"""The cost table of a training run, and precomputed latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from hcf.cli import app
from taiji import presets
from taiji.train.latents import (
    Images,
    first_stage_hash,
    latents_path,
    load_or_encode,
    read_latents,
    write_latents,
)
from taiji.train.plan import (
    Plan,
    PlanConfig,
    count,
    find_preset,
    memory_per_gpu,
    plan,
    preset_names,
    text_macs,
)

# the published table: 32 A100 at 27 %, 14 days in billions of samples, passes over 100M images
TABLE = {
    "A-300M": (312_817_667, 0.68, 3_940, 4.8, 48),
    "A-1.3B": (1_292_364_803, 2.69, 1_000, 1.2, 12),
    "SD-A": (872_139_204, 2.44, 1_100, 1.3, 13),
    "SR-S": (192_985_763, 0.35, 7_700, None, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_that_of_the_specification(name: str) -> None:
    params, tflop, rate, samples, passes = TABLE[name]
    found = plan(name)
    assert found.params == params
    assert round(found.tflop_per_sample, 2) == tflop
    assert found.img_per_s == pytest.approx(rate, rel=0.005)
    if samples is not None:
        assert round(found.samples / 1e9, 1) == samples and round(found.passes) == passes


def test_the_largest_takes_295_thousand_steps_and_23_gb_of_state() -> None:
    found = plan("A-1.3B")
    assert found.steps == pytest.approx(295_000, rel=0.005)
    gradients = 2 * found.params / 1e9
    assert found.memory_gb["ddp"] - gradients == pytest.approx(23, abs=0.5)
    assert found.checkpoint_gb == pytest.approx(16 * found.params / 1e9)
    assert plan("A-1.3B", PlanConfig(resolution=128)).gmacs > 3.9 * found.gmacs


def test_text_costs_what_its_encoder_does() -> None:
    assert text_macs() / 1e9 == pytest.approx(39.5, abs=0.05)
    base, frozen, trained = (
        plan("A-1.3B", PlanConfig(text=text)).tflop_per_sample
        for text in ("none", "frozen", "trained")
    )
    assert frozen - base == pytest.approx(2 * 0.0395, rel=0.01)
    assert trained / base == pytest.approx(1.09, abs=0.005)  # section 1.4: +9 %


def test_division_among_gpus_lowers_memory_in_order() -> None:
    found = memory_per_gpu(10**9, 8)
    assert found == {"ddp": 20.0, "zero1": 9.5, "zero2": 7.75, "fsdp2": 2.5}


@pytest.mark.parametrize("name", ["MINI", "LDM-SR", "TINY-B", "TINY-EFFICIENT", "SD-A3", "SD-A4"])
def test_every_class_of_unet_is_counted(name: str) -> None:
    found = plan(name, PlanConfig(gpus=1, device="h100"))
    assert found.gmacs > 0 and found.img_per_s > 0


def test_counts_are_those_of_the_specification() -> None:
    assert count(presets.A_300M_UNET, grid=64, tokens=128)[1] / 1e9 == pytest.approx(112.8, abs=0.1)
    assert count(presets.SR_S_UNET, grid=128, tokens=128)[1] / 1e9 == pytest.approx(225.7, abs=0.1)


def test_names_are_found_however_they_are_written() -> None:
    assert find_preset("a_1.3b")[0] == find_preset("A-1.3B")[0] == "A-1.3B"
    assert {"A-300M", "SD-A", "SR-S", "B-1.3B"} <= set(preset_names())
    with pytest.raises(ValueError, match="A-300M"):
        find_preset("A-7B")
    with pytest.raises(ValueError, match="divides by 8, not 500"):
        plan("SD-A", PlanConfig(resolution=500))
    with pytest.raises(ValueError, match="known are A100"):
        plan("MINI", PlanConfig(device="abacus"))


def test_the_command_prints_the_table_and_a_recipe_is_still_trained(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["train", "plan", "MINI", "A-tiny", "--gpus", "2"])
    assert "estimated, not measured: 2 A100" in shown.output and "A-TINY" in shown.output
    data = runner.invoke(app, ["train", "plan", "MINI", "--hours", "1", "--format", "json"])
    (row,) = json.loads(data.output)["plans"]
    assert Plan(**row).kind == "estimated" and row["config"]["hours"] == 1
    absent = tmp_path / "absent.yaml"
    for words in (["train", str(absent)], ["train", "--set", "loop.steps=0", str(absent)]):
        assert f"no recipe at {absent}" in str(runner.invoke(app, words).exception)


def test_latents_are_encoded_once_and_belong_to_their_first_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage, other = tiny_vae(), tiny_vae()
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    calls = []

    def encode(pixels: Images) -> Tensor:
        calls.append(len(pixels))
        return torch.ones(len(pixels), 4, 8, 8)

    first = load_or_encode(tmp_path, stage, images, encode)
    assert torch.equal(load_or_encode(tmp_path, stage, images, encode), first) and calls == [3]
    load_or_encode(tmp_path, stage, images[:2], encode)  # other images
    load_or_encode(tmp_path, other, images, encode)  # another stage
    assert calls == [3, 2, 3]
    path = latents_path(tmp_path, first_stage_hash(stage))
    with pytest.raises(ValueError, match="encode again, or train on the stage"):
        read_latents(path, first_stage_hash(other))
    assert first_stage_hash(stage.half()) == path.parent.name + first_stage_hash(stage)[16:]


def test_latents_that_do_not_name_their_stage_are_refused(tmp_path: Path) -> None:
    save_file({"latents": torch.ones(1, 4, 8, 8)}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="does not say which first stage"):
        read_latents(tmp_path / "old.safetensors", "abc")
    with pytest.raises(ValueError, match="need the hash"):
        write_latents(tmp_path / "new.safetensors", torch.ones(1, 4, 8, 8), stage_hash="")
    assert not (tmp_path / "new.safetensors").exists()
