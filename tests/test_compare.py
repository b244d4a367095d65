"""Comparisons of samplers whose ratio is known, and of tiny real pipelines; no speed asserted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hcf.artifact import Manifest, Sampling, write_manifest
from hcf.errors import InvalidArtifact, StorageError
from hcf.recipe import BenchConfig
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
    Subject,
    compare_subjects,
    interleave,
    output_distance,
    output_problems,
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


def sampler(ms: float, noise: float, seed: int) -> Any:
    """Times of pair i: a drift both sides share, and noise of its own."""
    rng = np.random.default_rng(seed)
    return lambda i: float(ms * (1.0 + 0.5 * np.sin(i / 3)) * np.exp(rng.normal(0, noise)))


def measurement(ms: float, seed: int = 0, **environment: Any) -> Measurement:
    samples = ms * np.exp(np.random.default_rng(seed).normal(0, 0.01, 40))
    return Measurement(
        workload="pipeline end to end, batch 1",
        subject=Side(name="stored", latency=Latency.of(samples.tolist(), 3 * ms)),
        seed=0,
        environment=read_environment(threads=2).model_copy(update=environment),
    )


def test_a_clear_ratio_is_decided_at_the_first_look() -> None:
    found = interleave(sampler(40.0, 0.02, 0), sampler(1.0, 0.02, 1), pairs=8)
    assert found.verdict is Verdict.FASTER
    assert len(found.baseline) == len(found.candidate) == 8
    assert found.statistics.speedup.value == pytest.approx(40.0, rel=0.05)
    assert found.statistics.speedup.low <= found.statistics.speedup.value


def test_more_pairs_are_taken_until_decided() -> None:
    settings: dict[str, Any] = {"pairs": 8, "threshold": 0.01, "most_pairs": 4000}
    slower = interleave(sampler(1.0, 0.05, 0), sampler(1.05, 0.05, 1), **settings)
    assert slower.verdict is Verdict.SLOWER
    assert 8 < len(slower.baseline) < 4000
    same = interleave(sampler(1.0, 0.02, 2), sampler(1.0, 0.02, 3), **settings)
    assert same.verdict is Verdict.SAME
    assert same.decision_confidence > 0.95


def test_a_spent_budget_leaves_it_undecided() -> None:
    found = interleave(sampler(1.0, 0.3, 0), sampler(1.0, 0.3, 1), pairs=8, most_pairs=12)
    assert found.verdict is Verdict.UNDECIDED
    assert len(found.baseline) == 12
    short = interleave(sampler(9.0, 0.01, 0), sampler(1.0, 0.01, 1), pairs=8, budget_s=0.0)
    assert short.verdict is Verdict.UNDECIDED  # one pair cannot carry an interval
    assert len(short.baseline) == 1


def test_the_same_against_itself_raises_no_false_alarm() -> None:
    verdicts = []
    for i in range(20):
        sides = (sampler(5.0, 0.02, 2 * i), sampler(5.0, 0.02, 2 * i + 1))
        verdicts.append(interleave(*sides, pairs=10, seed=i % 2, most_pairs=40).verdict)
    assert sum(verdict in (Verdict.FASTER, Verdict.SLOWER) for verdict in verdicts) <= 1


def test_pairs_alternate_abba_in_random_order() -> None:
    def orders(seed: int) -> list[str]:
        ran: list[str] = []
        interleave(
            lambda i: ran.append(f"a{i}") or 1.0,
            lambda i: ran.append(f"b{i}") or 1.0,
            pairs=40,
            seed=seed,
            most_pairs=40,
        )
        assert sorted(ran[:2]) == ["a0", "b0"]
        return [ran[2 * i][0] for i in range(40)]

    firsts = orders(0)
    assert all(firsts[i] != firsts[i + 1] for i in range(0, 40, 2))  # within each block
    assert any(a == b for a, b in pairwise(firsts))  # blocks are drawn, not alternating
    assert firsts == orders(0) != orders(1)


def test_outputs_are_checked_before_anything_is_timed() -> None:
    ran: list[int] = []

    def broken() -> torch.Tensor:
        ran.append(1)
        return torch.tensor([1.0, float("nan")])

    found = compare_callables(lambda: torch.ones(2), broken, pairs=6)
    assert found.verdict is Verdict.INVALID
    assert "candidate's output is not finite" in found.reason
    assert found.speedup is None and found.baseline.latency is None
    assert len(ran) == 1


def test_doing_less_is_not_faster() -> None:
    found = compare_callables(lambda: torch.ones(4, 3), lambda: torch.ones(1, 3), pairs=6)
    assert found.verdict is Verdict.INVALID
    assert "shapes differ" in found.reason
    assert output_problems({"x": np.ones(3)}, {"x": np.ones(3)}) == []


def test_unequal_threads_are_invalid() -> None:
    sides = [
        Subject(name, lambda _: torch.ones(1), engines=({"component": "unet", "threads": threads},))
        for name, threads in (("a", 1), ("b", 2))
    ]
    found = compare_subjects(*sides, workload="w", threads=1)
    assert found.verdict is Verdict.INVALID
    assert "b runs unet on 2 threads, not 1" in found.reason


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
    assert len(found.candidate.latency.samples_ms) == found.pairs  # type: ignore[union-attr]
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
