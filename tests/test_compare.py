"""Comparisons of samplers whose ratio is known, and of tiny real pipelines; no speed asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hcf.artifact import Manifest, Sampling, write_manifest
from hcf.errors import InvalidArtifact, StorageError
from hcf.settings import BenchConfig
from hcf.trace import record_calls
from hcf_bench.compare import (
    compare_artifacts,
    compare_callables,
    compare_components,
    compare_denoisers,
    compare_pipelines,
    run_benchmark,
)
from hcf_bench.environment import read_environment
from hcf_bench.pairs import (
    SHORT_CALLS,
    output_distance,
)
from hcf_bench.results import (
    Latency,
    Measurement,
    Side,
    compare_measurements,
    read_result,
    write_result,
)
from hcf_bench.stages import run_staged
from hcf_bench.statistics import Verdict


def measurement(ms: float, seed: int = 0, **environment: Any) -> Measurement:
    samples = ms * np.exp(np.random.default_rng(seed).normal(0, 0.01, 40))
    return Measurement(
        workload="pipeline end to end, batch 1",
        subject=Side(name="stored", latency=Latency.of(samples.tolist(), 3 * ms)),
        seed=0,
        environment=read_environment(threads=2).model_copy(update=environment),
    )


def test_a_comparison_says_everything_and_round_trips(tmp_path: Path) -> None:
    found = compare_callables(
        lambda: sum(range(2000)),
        lambda: sum(range(2000)),
        pairs=6,
        threshold=20.0,
        threads=1,
    )
    assert found.paired and found.pairs >= 6
    assert found.speedup is not None and found.speedup.low <= found.speedup.value
    assert found.baseline.latency is not None and found.baseline.latency.first_ms is not None
    assert found.candidate.latency is not None
    assert len(found.candidate.latency.samples_ms) in (found.pairs, found.pairs * SHORT_CALLS)
    assert found.environment.threads == 1
    assert read_result(write_result(tmp_path / "deep" / "r.json", found)) == found
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]
    assert found.verdict in found.headline()


def test_a_stored_run_is_compared_only_on_its_machine(tmp_path: Path) -> None:
    stored = read_result(write_result(tmp_path / "a.json", measurement(10.0)))
    assert isinstance(stored, Measurement)
    found = compare_measurements(stored, measurement(5.0, seed=1), threshold=0.01, floor_ms=0.0)
    assert found.verdict is Verdict.FASTER
    assert not found.paired and "weaker" in found.reason
    elsewhere = measurement(5.0, cpu_model="Another CPU", packages={"torch": "0.0"})
    found = compare_measurements(stored, elsewhere, threshold=0.01, floor_ms=0.0)
    assert found.verdict is Verdict.INVALID and found.speedup is None
    assert "Another CPU" in found.reason and "torch" in found.reason
    other = measurement(5.0).model_copy(update={"workload": "denoiser forward"})
    assert (
        compare_measurements(stored, other, threshold=0.01, floor_ms=0).verdict is Verdict.INVALID
    )


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", measurement(10.0))
    good = json.loads(path.read_text())
    for change, named in (({"schema_version": 99}, "schema 99"), ({"surprise": 1}, "surprise")):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InvalidArtifact, match=named):
            read_result(path)
    path.write_text("[]")
    with pytest.raises(InvalidArtifact):
        read_result(path)
    path.write_text('{"schema_version": 1, "kind"')
    with pytest.raises(InvalidArtifact, match="not a JSON"):
        read_result(path)
    with pytest.raises(InvalidArtifact, match="cannot read"):
        read_result(tmp_path / "missing.json")


def test_a_result_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        write_result(tmp_path / "file" / "r.json", measurement(1.0))


def test_output_distance_in_decibels() -> None:
    a = np.ones(1000)
    assert output_distance(a, a * 1.1)["sqnr_db"] == pytest.approx(20.0, abs=0.01)
    assert output_distance(a, a)["max_abs_error"] == 0.0


def test_stages_of_a_real_pipeline(tiny_pipeline: Any) -> None:
    run = run_staged(tiny_pipeline, ["红色的猫"], Sampling(steps=3, guidance_scale=1.0), seed=0)
    assert run.images.shape == (1, 3, 16, 16)
    assert run.denoiser_calls == 3
    assert min(run.text_ms, run.denoise_ms, run.decode_ms) > 0
    assert run.total_ms == pytest.approx(run.text_ms + run.denoise_ms + run.decode_ms)
    assert "decode" not in vars(tiny_pipeline.vae)  # the marks are gone
    assert not tiny_pipeline.unet._forward_pre_hooks
    again = run_staged(tiny_pipeline, ["红色的猫"], Sampling(steps=3, guidance_scale=1.0), seed=0)
    assert torch.equal(run.images, again.images)


def test_marks_are_removed_after_an_error(tiny_pipeline: Any) -> None:
    with pytest.raises(ValueError):
        run_staged(tiny_pipeline, [3], Sampling(steps=1), seed=0)  # type: ignore[list-item]
    assert "decode" not in vars(tiny_pipeline.vae)
    assert not tiny_pipeline.unet._forward_pre_hooks


def test_pipelines_end_to_end_with_stages(tiny_pipeline: Any) -> None:
    threads = torch.get_num_threads()
    found = compare_pipelines(
        tiny_pipeline,
        tiny_pipeline,
        ["红色的猫", "蓝色的圆形", "绿色的树"],
        BenchConfig(pairs=6, batch=2, threshold=20.0),
        sampling=(
            Sampling(steps=6, guidance_scale=3.0),
            Sampling(steps=1, guidance_scale=1.0),
        ),
        names=("teacher", "student"),
        threads=1,
    )
    assert torch.get_num_threads() == threads
    assert found.environment.threads == 1
    assert found.baseline.stages is not None and found.candidate.stages is not None
    assert found.baseline.stages.denoiser_calls == 6
    assert found.candidate.stages.denoiser_calls == 1
    assert found.baseline.sampling == {"num_inference_steps": 6, "guidance_scale": 3.0}
    assert found.pairs >= 6 and found.speedup is not None
    assert "batch 2" in found.workload


def test_components_on_a_recorded_call(tiny_pipeline: Any) -> None:
    call = record_calls(tiny_pipeline, ["红色的猫"], steps=2, guidance_scale=1.0, seed=0)[1]
    found = compare_components(
        tiny_pipeline.unet,
        tiny_pipeline.unet,
        call,
        BenchConfig(pairs=6, threshold=20.0),
        threads=1,
    )
    assert found.workload == "denoiser forward 1x4x8x8"
    assert found.fidelity["max_abs_error"] == 0.0
    assert found.pairs >= 6 and found.verdict is not Verdict.INVALID


def test_folders_run_and_compare(tiny_folder: Path, tmp_path: Path) -> None:
    sampling = Sampling(steps=2, guidance_scale=1.0)
    write_manifest(tiny_folder, Manifest(name="tiny", sampling=sampling))
    config = BenchConfig(pairs=6, budget_s=20, threshold=20.0, threads=1)
    lines: list[str] = []
    stored = run_benchmark(tiny_folder, config, engine="eager", log=lines.append)
    assert stored.subject.name == "tiny, 2 steps, eager fp32"
    assert stored.subject.stages is not None and stored.subject.latency is not None
    assert stored.environment.threads == 1 and lines
    paired = compare_artifacts(
        tiny_folder, tiny_folder, config, engines=("eager", "eager"), log=lines.append
    )
    assert paired.paired and paired.pairs >= 6 and paired.verdict is not Verdict.INVALID
    assert [row["component"] for row in paired.candidate.engines] == ["unet", "vae_decoder"]
    result = write_result(tmp_path / "stored.json", stored)
    unpaired = compare_artifacts(result, tiny_folder, config, log=lines.append)
    assert not unpaired.paired and unpaired.verdict is not Verdict.INVALID
    with pytest.raises(InvalidArtifact, match="holds a comparison"):
        compare_artifacts(write_result(tmp_path / "c.json", paired), tiny_folder, config)


def test_the_denoiser_of_a_folder_alone(tiny_folder: Path) -> None:
    config = BenchConfig(pairs=6, budget_s=20, threshold=20.0, threads=1)
    found = compare_denoisers(tiny_folder, config, engine="eager", log=lambda _: None)
    assert found.workload.startswith("denoiser forward 1x4x8x8")
    assert found.fidelity["max_abs_error"] == 0.0
    assert found.baseline.name == "eager fp32"
