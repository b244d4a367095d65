"""`hcf bench training`: both loops train the same U-Net, and what is kept of a comparison."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hcf.cli import app
from hcf.errors import RecipeError
from hcf_bench.records import Record
from hcf_bench.training import (
    OURS,
    PEER,
    TrainingConfig,
    compare_training,
    comparison_rows,
    describe,
    loss_falls,
    make_batch,
    make_objective,
    measure_training,
    our_step,
    peer_step,
)
from taiji.train.plan import plan
from taiji.train.throughput import FlopCounter


def test_both_sides_start_from_the_same_weights_and_train(tmp_path: Path) -> None:
    first, second = (make_objective("A-TINY")[0].unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    batch = make_batch("A-TINY", 4)
    assert loss_falls(peer_step("A-TINY", batch, "fp32"))
    assert loss_falls(our_step("A-TINY", batch, "fp32", tmp_path))
    constant = iter([1.0] * 8)
    assert not loss_falls(lambda index: torch.tensor(next(constant)))


def test_a_comparison_is_kept_as_two_rows() -> None:
    config = TrainingConfig(presets=("A-TINY",), batch=2, budget_s=0.2, threads=1)
    found = compare_training("A-TINY", config)
    peer, ours = comparison_rows(found, "A-TINY", config)
    assert (peer.subject, ours.subject, ours.baseline) == (PEER, OURS, PEER)
    assert ours.speedup is not None and ours.pairs >= 1 and ours.throughput_per_s
    assert found.baseline.latency and found.workload == "training step A-TINY batch 2 fp32"


def test_the_work_of_a_step_is_six_flops_a_multiply_accumulate() -> None:
    objective, _ = make_objective("MINI")
    counter = FlopCounter()
    with counter:
        objective(**make_batch("MINI", 1), generator=torch.Generator())[0].backward()
    assert counter.flops / 1e12 == pytest.approx(plan("MINI").tflop_per_sample, rel=0.02)


def test_a_measured_preset_has_its_mfu() -> None:
    config = TrainingConfig(presets=("MINI",), measure=True, batch=2, pieces=2, threads=1)
    row = measure_training("MINI", config, lambda line: None)
    assert row.throughput_per_s and row.fraction_of_peak and row.tflop
    assert row.tflop / 2 == pytest.approx(plan("MINI").tflop_per_sample)
    assert "extrapolated linearly, not measured" in describe(row)


def test_the_command_writes_a_record_and_names_a_wrong_preset(tmp_path: Path) -> None:
    target = tmp_path / "training.json"
    words = ["bench", "training", "A-tiny", "--measure", "--batch", "2", "--threads", "1"]
    shown = CliRunner().invoke(app, [*words, "-o", str(target), "--format", "json"])
    record = Record(**json.loads(target.read_text()))
    assert json.loads(shown.output.splitlines()[-1])["rows"] and record.rows[0].fraction_of_peak
    with pytest.raises(RecipeError, match="no preset is called 'A-7B'"):
        CliRunner().invoke(app, ["bench", "training", "A-7B"], catch_exceptions=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["A-300M", "A-1.3B", "SD-A", "SR-S"])
def test_ten_steps_of_a_full_preset_on_a_gpu(preset: str) -> None:
    config = TrainingConfig(presets=(preset,), measure=True, batch=16, dtype="bf16", recompute=True)
    row = measure_training(preset, config)
    print(describe(row))
    assert row.throughput_per_s and row.fraction_of_peak and row.memory
