"""Training under quantisation: smaller error than rounding alone, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hcf.errors import HcfError
from hcf.quantize.qat import train_quantised
from hcf.quantize.quantize import choose_layers, quantize
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import outputs_of, relative_to
from hcf.quantize.scales import REPORT_FILE, LayerScale
from hcf.quantize.statistics import collect_statistics
from hcf.settings import QatConfig, QuantizeConfig
from hcf.trace import DenoiserCall


@pytest.fixture
def calls() -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(0)
    return [
        DenoiserCall(
            torch.randn(4, 4, 8, 8, generator=generator),
            torch.full((4,), timestep),
            {"encoder_hidden_states": torch.randn(4, 7, 32, generator=generator)},
        )
        for timestep in range(999, 0, -40)
    ]


def scales_of(unet: torch.nn.Module, calls: list[DenoiserCall], form: Any) -> dict[str, LayerScale]:
    layers, _ = choose_layers(unet)
    config = QuantizeConfig(format=form, smooth="none", low_rank=0)
    statistics = collect_statistics(unet, layers, calls)
    return calibrate_scales(unet, dict.fromkeys(layers, form), statistics, config, calls)


@pytest.mark.parametrize(
    ("form", "settings", "gain"),
    [
        ("int4", {"learning_rate": 3e-5}, 0.98),
        ("int4-weight", {"learning_rate": 1e-4, "learn_scales": True}, 0.9),
        ("int4-weight", {"learning_rate": 3e-5, "feature_weight": 0.5, "precision": "bf16"}, 0.97),
    ],
)
def test_training_cuts_the_error_against_the_teacher(
    tiny_pipeline: Any, calls: list[DenoiserCall], form: str, settings: Any, gain: float
) -> None:
    unet = tiny_pipeline.unet
    scales = scales_of(unet, calls, form)
    held_out = calls[1::4]
    training = [call for i, call in enumerate(calls) if i % 4 != 1]
    wanted = outputs_of(unet, held_out)
    before = relative_to(unet, scales, held_out, wanted)
    lines: list[str] = []
    config = QatConfig(steps=40, batch_size=4, **settings)
    trained = train_quantised(unet, scales, training, config, log=lines.append)
    after = relative_to(unet, trained, held_out, wanted)
    assert after < gain * before, (before, after)
    assert "step 40/40" in lines[-1]
    assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
    moved = any((trained[n].weight_amax != scales[n].weight_amax).any() for n in scales)
    assert moved == bool(settings.get("learn_scales"))


def test_a_training_that_diverges_leaves_the_weights(
    tiny_pipeline: Any, calls: list[DenoiserCall]
) -> None:
    unet = tiny_pipeline.unet
    before = {name: p.clone() for name, p in unet.named_parameters()}
    scales = scales_of(unet, calls, "int8")
    broken = DenoiserCall(calls[0].sample * float("inf"), calls[0].timestep, calls[0].kwargs)
    with pytest.raises(HcfError, match="QAT: the loss is nan"):
        train_quantised(unet, scales, [broken], QatConfig(steps=3))
    config = QatConfig(steps=50, learning_rate=1e6)
    with pytest.raises(HcfError, match="lower quantize.qat.learning_rate"):
        train_quantised(unet, scales, calls, config)
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters())


def test_trained_weights_are_saved_beside_their_scales(tiny_folder: Path, tmp_path: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    original = (tiny_folder / weights).read_bytes()
    config = QuantizeConfig(
        format="int4",
        calibration_prompts=["a cat", "a dog"],
        calibration_samples=2,
        calibration_steps=2,
        qat=QatConfig(steps=4, learning_rate=1e-3),
    )
    lines: list[str] = []
    output = quantize(tiny_folder, tmp_path / "int4", config, lines.append)
    assert (tiny_folder / weights).read_bytes() == original  # not through a hard link
    assert (output / weights).read_bytes() != original
    report = json.loads((output / "unet" / REPORT_FILE).read_text())
    assert report["settings"]["qat"]["steps"] == 4 and report["formats"] == {
        "int4": report["layers"]
    }
    assert any("before training" in line for line in lines)
