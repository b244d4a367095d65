"""What `hcf bench` compares: functions, denoisers, pipelines end to end, artefacts, stored results.

Everything ends in `hcf_bench.pairs`: outputs checked, interleaved pairs, an interval, one verdict.
Both sides get the same prompts, the same noise and the same number of threads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hcf.artifact import MANIFEST, Sampling, default_sampling, read_manifest
from hcf.errors import HcfError, InvalidArtifact
from hcf_bench.clocks import Sample
from hcf_bench.environment import read_environment
from hcf_bench.pairs import SETTLE_S, Subject, compare_subjects, output_distance, output_problems
from hcf_bench.results import (
    Comparison,
    Latency,
    Measurement,
    Side,
    Stages,
    compare_measurements,
    read_result,
)
from hcf_bench.stages import StagedRun, run_staged, sampling_arguments
from hcf_bench.statistics import percentile
from hcf_bench.timing import Clock, synchronise, time_once, torch_threads

if TYPE_CHECKING:
    from torch import nn

    from hcf.settings import BenchConfig
    from hcf.trace import DenoiserCall

Log = Callable[[str], None]
PROMPTS = ("一只红色的猫", "三个蓝色的圆形", "一个绿色的三角形", "黄色的太阳")


def compare_callables(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    workload: str = "callable",
    **settings: Any,
) -> Comparison:
    """Compares two functions without arguments; the settings are those of `compare_subjects`."""
    return compare_subjects(
        Subject("baseline", lambda _: baseline()),
        Subject("candidate", lambda _: candidate()),
        workload=workload,
        **settings,
    )


def compare_components(
    baseline: nn.Module,
    candidate: nn.Module,
    call: DenoiserCall,
    config: BenchConfig,
    *,
    names: tuple[str, str] = ("eager fp32", "engine"),
    engines: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    threads: int | None = None,
) -> Comparison:
    """The denoiser alone, both sides on one recorded call (B, C, H, W), at equal threads.

    Args:
        baseline, candidate: modules with the call signature of a diffusers U-Net.
        call: from `hcf.trace.record_calls`.
        config: pairs, budget, seed and thresholds.
        names: of the sides.
        engines: reports of the engines behind each side (`pipe.hcf_report`).
        threads: for both sides; engines were loaded with the same number.
    """
    import torch

    from hcf.trace import call_denoiser

    def forward(module: nn.Module) -> Callable[[int], Any]:
        def run(_: int) -> Any:
            with torch.no_grad():
                return call_denoiser(module, call.sample, call.timestep, call.kwargs)

        return run

    device = str(call.sample.device)
    shape = "x".join(str(n) for n in call.sample.shape)
    with torch_threads(threads) as used:
        return compare_subjects(
            Subject(names[0], forward(baseline), engines=_as_rows(engines[0])),
            Subject(names[1], forward(candidate), engines=_as_rows(engines[1])),
            workload=f"denoiser forward {shape}",
            warmup=3,
            settle_s=SETTLE_S,
            device=device,
            clock=_clock(device),
            threads=used,
            fidelity=output_distance,
            **_settings(config),
        )


def compare_pipelines(
    baseline: Any,
    candidate: Any,
    prompts: Sequence[str],
    config: BenchConfig,
    *,
    sampling: tuple[Sampling, Sampling] = (Sampling(), Sampling()),
    names: tuple[str, str] = ("baseline", "candidate"),
    content_hashes: tuple[str, str] = ("", ""),
    threads: int | None = None,
) -> Comparison:
    """Two diffusers pipelines, prompt to pixels, and their stages; pair i shares prompts and noise.

    Args:
        baseline, candidate: pipelines in hand; `hcf_report` is kept where they have one.
        prompts: taken in turn, `config.batch` a call.
        config: pairs, budget, batch, seed and thresholds.
        sampling: steps and guidance of each side.
        names: of the sides.
        content_hashes: of the artefacts behind them.
        threads: for both sides; engines were loaded with the same number.
    """
    batches = _batches(prompts, config.batch)
    device = str(getattr(baseline, "device", "cpu"))
    stages: dict[str, list[StagedRun]] = {name: [] for name in ("baseline", "candidate")}
    sides = dict(zip(stages, (baseline, candidate), strict=True))
    settings = dict(zip(stages, sampling, strict=True))

    def staged(side: str, index: int) -> StagedRun:
        return run_staged(
            sides[side], batches[index % len(batches)], settings[side], config.seed + index
        )

    def subject(side: str, name: str, content_hash: str) -> Subject:
        def sample(index: int) -> Sample:
            used = time.process_time_ns()
            run = staged(side, index)
            used = time.process_time_ns() - used
            stages[side].append(dataclasses.replace(run, images=None))
            return Sample(run.total_ms, used / 1e6 if device == "cpu" else None)

        return Subject(
            name,
            lambda index: staged(side, index).images,
            content_hash=content_hash,
            sampling=sampling_arguments(settings[side]),
            engines=_as_rows(getattr(sides[side], "hcf_report", ())),
            sample=sample,
        )

    subjects = [
        subject(side, names[i], content_hashes[i])
        for i, side in enumerate(("baseline", "candidate"))
    ]

    with torch_threads(threads) as used:
        found = compare_subjects(
            subjects[0],
            subjects[1],
            workload=f"pipeline end to end, batch {config.batch}",
            warmup=0,  # the checked first call has warmed both sides up
            settle_s=SETTLE_S,
            device=device,
            threads=used,
            **_settings(config),
        )
    if not stages["baseline"] or not stages["candidate"]:
        return found
    return found.model_copy(
        update={
            "baseline": found.baseline.model_copy(update={"stages": _stages(stages["baseline"])}),
            "candidate": found.candidate.model_copy(
                update={"stages": _stages(stages["candidate"])}
            ),
        }
    )


def compare_artifacts(
    baseline: Path,
    candidate: Path,
    config: BenchConfig,
    *,
    engines: tuple[str, str] = ("auto", "auto"),
    precisions: tuple[str | None, str | None] = (None, None),
    log: Log = print,
) -> Comparison:
    """Loads two artefacts at equal threads and compares them end to end.

    Args:
        baseline: artefact folder, or the JSON of an earlier `run_benchmark` (weaker: not paired).
        candidate: artefact folder.
        config: pairs, budget, batch, prompts, seed, threads and thresholds.
        engines: what each side is loaded with, see `hcf.load`.
        precisions: of each side.
        log: progress lines.
    """
    if baseline.is_file():
        stored = read_result(baseline)
        if not isinstance(stored, Measurement):
            raise InvalidArtifact(
                f"{baseline} holds a comparison, not the times of one artefact",
                "store one with `hcf bench run`",
            )
        measured = run_benchmark(
            candidate, config, engine=engines[1], precision=precisions[1], log=log
        )
        threshold, floor_ms = _settings(config)["threshold"], _settings(config)["floor_ms"]
        return compare_measurements(stored, measured, threshold=threshold, floor_ms=floor_ms)
    import hcf

    threads = read_environment(config.threads).threads
    pipes, samplings, hashes, names = [], [], [], []
    for path, engine, precision in zip((baseline, candidate), engines, precisions, strict=True):
        log(f"load {path.name} on {engine}")
        pipes.append(hcf.load(path, engine=engine, precision=precision, threads=threads))
        name, sampling, content_hash = _manifest_facts(path)
        samplings.append(sampling)
        hashes.append(content_hash)
        names.append(_describe(name, pipes[-1], sampling))
    log("time interleaved pairs")
    found = compare_pipelines(
        pipes[0],
        pipes[1],
        config.prompts or PROMPTS,
        config,
        sampling=(samplings[0], samplings[1]),
        names=(names[0], names[1]),
        content_hashes=(hashes[0], hashes[1]),
        threads=threads,
    )
    log(found.headline())
    return found


def compare_denoisers(
    path: Path,
    config: BenchConfig,
    *,
    engine: str = "auto",
    precision: str | None = None,
    log: Log = print,
) -> Comparison:
    """The artefact's denoiser alone: eager fp32 against the chosen engine on a recorded call."""
    import hcf
    from hcf.trace import denoiser_name, record_calls

    threads = read_environment(config.threads).threads
    eager = hcf.load(path, engine="eager", precision="fp32", threads=threads)
    chosen = hcf.load(path, engine=engine, precision=precision, threads=threads)
    _, sampling, _ = _manifest_facts(path)
    prompts = _batches(config.prompts or PROMPTS, config.batch)[0]
    steps = sampling.steps or 4
    calls = record_calls(
        eager,
        prompts,
        steps=steps,
        guidance_scale=sampling.guidance_scale or 1.0,
        seed=config.seed,
        batch_size=config.batch,
    )
    name = denoiser_name(eager)
    log(f"time the {name} alone, call {len(calls) // 2 + 1} of {len(calls)}")
    found = compare_components(
        getattr(eager, name),
        getattr(chosen, name),
        calls[len(calls) // 2],
        config,
        names=(_running(eager) or "eager fp32", _running(chosen) or engine),
        engines=(
            [r for r in getattr(eager, "hcf_report", ()) if r.component == name],
            [r for r in getattr(chosen, "hcf_report", ()) if r.component == name],
        ),
        threads=threads,
    )
    log(found.headline())
    return found


def run_benchmark(
    path: Path,
    config: BenchConfig,
    *,
    engine: str = "auto",
    precision: str | None = None,
    log: Log = print,
) -> Measurement:
    """Times one artefact end to end with its stages: first call, then `config.pairs` warm calls.

    Raises:
        HcfError: the output is not finite.
    """
    import hcf

    environment = read_environment(config.threads)
    threads = environment.threads
    log(f"load {path.name} on {engine}")
    pipe = hcf.load(path, engine=engine, precision=precision, threads=threads)
    label, sampling, content_hash = _manifest_facts(path)
    batches = _batches(config.prompts or PROMPTS, config.batch)
    device = str(getattr(pipe, "device", "cpu"))
    kept: list[StagedRun] = []
    with torch_threads(threads):
        first_ms = time_once(
            lambda: kept.append(run_staged(pipe, batches[0], sampling, config.seed)), device
        )
        problems = output_problems(kept[0].images, kept[0].images)
        if problems:
            raise HcfError(
                f"{path.name}: images are not finite, nothing was timed", "check its weights"
            )
        runs: list[StagedRun] = []
        for index in range(max(1, config.pairs)):
            synchronise(device)
            run = run_staged(pipe, batches[index % len(batches)], sampling, config.seed + index)
            runs.append(dataclasses.replace(run, images=None))
            if sum(r.total_ms for r in runs) > config.budget_s * 1e3:
                break
    found = Measurement(
        workload=f"pipeline end to end, batch {config.batch}",
        subject=Side(
            name=_describe(label, pipe, sampling),
            content_hash=content_hash,
            sampling=sampling_arguments(sampling),
            engines=_as_rows(getattr(pipe, "hcf_report", ())),
            latency=Latency.of([run.total_ms for run in runs], first_ms),
            stages=_stages(runs),
        ),
        seed=config.seed,
        environment=environment,
    )
    p50_ms = percentile([run.total_ms for run in runs], 50)
    log(
        f"{found.subject.name}: p50 {p50_ms:.1f} ms over {len(runs)} calls, first {first_ms:.0f} ms"
    )
    return found


def _settings(config: BenchConfig) -> dict[str, Any]:
    return {
        "pairs": config.pairs,
        "budget_s": config.budget_s,
        "seed": config.seed,
        "threshold": config.threshold,
        "floor_ms": config.floor_ms,
    }


def _batches(prompts: Sequence[str], batch: int) -> list[list[str]]:
    """Batches of exactly `batch` prompts, repeating the list where it does not divide."""
    count = max(1, -(-len(prompts) // batch))
    return [[prompts[(i * batch + j) % len(prompts)] for j in range(batch)] for i in range(count)]


def _stages(runs: Sequence[StagedRun]) -> Stages:
    def median(name: str) -> float:
        return float(np.median([getattr(run, name) for run in runs]))

    return Stages(
        text_ms=median("text_ms"),
        denoise_ms=median("denoise_ms"),
        decode_ms=median("decode_ms"),
        denoiser_calls=runs[0].denoiser_calls,
    )


def _manifest_facts(path: Path) -> tuple[str, Sampling, str]:
    """Name, sampling and content hash; a plain diffusers folder has its own name and no hash."""
    if not (path / MANIFEST).is_file():
        return path.name, default_sampling(path), ""
    manifest = read_manifest(path)
    return manifest.name, manifest.sampling, manifest.content_hash


def _running(pipe: Any) -> str:
    """Engine and precision of the denoiser, the first component a loaded pipeline reports."""
    reports = getattr(pipe, "hcf_report", ())
    return f"{reports[0].engine} {reports[0].precision}" if reports else ""


def _describe(name: str, pipe: Any, sampling: Sampling) -> str:
    """ "taiji-sd-mini, 50 steps, eager fp32": what a person must know about a side."""
    steps = f"{sampling.steps} steps" if sampling.steps else ""
    return ", ".join(part for part in (name, steps, _running(pipe)) if part)


def _as_rows(reports: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Engine reports (frozen dataclasses) as plain data for the JSON."""
    return tuple(
        dict(report) if isinstance(report, Mapping) else dataclasses.asdict(report)
        for report in reports
    )


def _clock(device: str) -> Clock:
    return "device" if device.startswith("cuda") else "host"
