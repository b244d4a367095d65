"""The calibration set: the model's own calls, kept once, checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hcf.errors import InvalidArtifact, RecipeError
from hcf.quantize.calibrate import (
    choose_prompts,
    collect,
    flat_inputs,
    load_calibration,
    save_calibration,
    spread,
)
from hcf.trace import DenoiserCall


def test_prompts_are_drawn_by_seed_without_repeats() -> None:
    prompts = [str(i) for i in range(10)]
    chosen = choose_prompts(prompts, 10, seed=3)
    assert sorted(chosen) == sorted(prompts) and chosen != prompts
    assert chosen == choose_prompts(prompts, 10, seed=3) != choose_prompts(prompts, 10, seed=4)
    assert choose_prompts(["a", "b"], 5, seed=0).count("a") in (2, 3)
    with pytest.raises(RecipeError, match="no calibration prompts"):
        choose_prompts([], 1, seed=0)


def test_spread_keeps_every_timestep() -> None:
    calls = [
        DenoiserCall(torch.zeros(1), torch.tensor([1000.0 - 20 * step]))
        for _ in range(8)
        for step in range(50)
    ]
    kept = spread(calls, 50)
    assert len(kept) == 50
    assert len({float(call.timestep) for call in kept}) == 50
    assert spread(calls[:3], 50) == calls[:3]


def test_collect_walks_the_models_own_trajectory(tiny_pipeline: Any) -> None:
    calls = collect(tiny_pipeline, ["a cat"] * 4, steps=3, guidance_scale=5.0, seed=0, batch_size=2)
    assert len(calls) == 6
    assert calls[0].sample.shape == (4, 4, 8, 8)  # guidance doubles the batch
    assert len({int(call.timestep[0]) for call in calls}) == 3


def test_the_file_is_small_exact_and_reproducible(tiny_pipeline: Any, tmp_path: Path) -> None:
    calls = collect(tiny_pipeline, ["a cat", "a dog"], steps=4, guidance_scale=1.0, seed=0)
    first = save_calibration(calls, tmp_path / "a.safetensors")
    assert first == save_calibration(calls, tmp_path / "b.safetensors")
    loaded = load_calibration(tmp_path / "a.safetensors", first)
    for call, copy in zip(calls, loaded, strict=True):
        assert flat_inputs(call).keys() == flat_inputs(copy).keys()
        for name, tensor in flat_inputs(call).items():
            assert torch.equal(tensor, flat_inputs(copy)[name])
            assert tensor.dtype == flat_inputs(copy)[name].dtype
    text = calls[0].kwargs["encoder_hidden_states"]
    samples = sum(call.sample.nbytes for call in calls)
    # the text of four steps is stored once
    assert (tmp_path / "a.safetensors").stat().st_size < samples + text.nbytes + 4000


def test_a_set_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(InvalidArtifact, match="does not exist"):
        load_calibration(path)
    calls = [DenoiserCall(torch.ones(1, 4, 8, 8), torch.tensor([999]), {"x": torch.ones(1, 2)})]
    sha256 = save_calibration(calls, path)
    with pytest.raises(InvalidArtifact, match="the manifest says"):
        load_calibration(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidArtifact, match="not a calibration set"):
        load_calibration(path)
    with pytest.raises(InvalidArtifact, match=sha256[:12]):
        load_calibration(path, sha256)
