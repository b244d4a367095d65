"""Builds every asked-for engine of every component, times them against each other, picks one.

The candidates of a component run in one process with equal threads, in rounds whose order rotates,
so that what else the machine does falls on all of them. The fastest one that computes the same as
eager fp32, within what its precision explains, is chosen. Nothing prefers INT8: it has to win.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.artifact import EngineEntry, clone_artifact, staged_folder, write_manifest
from hcf.engines import PRECISIONS, Engine, machine_kind
from hcf.engines.forms import (
    SUFFIXES,
    build_form,
    engine_version,
    entry_name,
    open_form,
    open_torch,
    source_graph,
    speed,
)
from hcf.errors import HcfError, RecipeError
from hcf.export.component import example_calls, relative_error
from hcf.recipe import BuildConfig
from hcf.source import open_pipeline

Log = Callable[[str], None]

# Relative L2 distance to eager fp32 that rounding explains; more means a wrong graph.
ERROR_LIMITS = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}
PARITY_STEPS = 4
TURN_MS = 20.0  # a fast call takes more than one sample in its turn


def build(model: Path, output: Path, config: BuildConfig, log: Log = print) -> Path:
    """Artefact `model` with its ONNX graphs -> artefact `output` with engines, times and a choice.

    Raises MissingDependency for an engine that is not installed, InvalidArtifact where a graph is
    missing, HcfError where no candidate of a component computes what torch does.
    """
    pipe = open_pipeline(model)
    threads = config.threads or torch.get_num_threads()
    with staged_folder(output) as folder, torch_threads(threads):
        manifest = clone_artifact(model, folder)
        shutil.rmtree(folder / "engines", ignore_errors=True)
        manifest.engines, manifest.chosen = {}, {}
        pairs = {c: _candidates(folder, c, config, log) for c in config.components}
        asked = config.precisions if "precisions" in config.model_fields_set else []
        found = {precision for some in pairs.values() for _, precision in some}
        if lost := [precision for precision in asked if precision not in found]:
            raise RecipeError(
                f"build.precisions asks for {', '.join(lost)}, which no component can have with "
                f"the engines {', '.join(config.engines)}",
                fix="run `hcf quantize` and `hcf export` first, or leave it out",
            )
        for component in config.components:
            entries = _build_component(pipe, folder, component, pairs[component], threads, config)
            if "tensorrt" in config.engines:
                entries += _build_plans(
                    folder, component, pairs[component], entries[0], config, log
                )
            manifest.engines[component] = entries
            best = choose(component, entries, config.engines, log)
            manifest.chosen[component] = entry_name(entries[best])
        write_manifest(folder, manifest)
    return output


def choose(component: str, entries: Sequence[EngineEntry], engines: Sequence[str], log: Log) -> int:
    """Index of the fastest entry of `engines` whose error its precision explains."""
    allowed = [
        i
        for i, e in enumerate(entries)
        if e.engine in engines
        and e.latency_ms is not None
        and e.error is not None
        and e.error <= ERROR_LIMITS[e.precision]
    ]
    if not allowed:
        raise HcfError(
            f"no engine of {component} computes what eager fp32 does: "
            + ", ".join(f"{e.engine} {e.precision} error {e.error}" for e in entries),
            fix="export again, or quantise fewer layers",
        )
    best = min(allowed, key=lambda i: speed(entries[i]))
    baseline = next(e for e in entries if e.engine == "eager" and e.precision == "fp32")
    for index, e in enumerate(entries):
        if e.latency_ms is None or baseline.latency_ms is None:
            continue
        log(
            f"{component}: {e.engine:<11} {e.precision} {e.latency_ms:8.2f} ms "
            f"[{e.latency_low_ms:.2f}, {e.latency_high_ms:.2f}] "
            f"{baseline.latency_ms / e.latency_ms:5.2f}x  error {e.error:.1e}  "
            f"{e.layer_precisions}{'  <- chosen' if index == best else ''}"
        )
        if e.error is not None and e.error > ERROR_LIMITS[e.precision]:
            log(f"{component}: {e.engine} {e.precision} is no candidate: its error is too large")
    int8 = [i for i in allowed if entries[i].precision == "int8"]
    if int8 and entries[best].precision != "int8":
        log(
            f"{component}: INT8 is not the fastest here; {entries[best].engine} "
            f"{entries[best].precision} is, and is chosen"
        )
    return best


def time_interleaved(
    calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 2
) -> list[list[float]]:
    """Milliseconds of each call, at least `repeats` samples, in rounds whose order rotates.

    In its turn a call runs once untimed (the threads of the one before it may still spin), then
    for about `TURN_MS`, every run a sample.
    """
    runs: list[int] = []
    for call in calls:
        for _ in range(warmup):
            call()
        start = time.perf_counter()
        call()
        took_ms = (time.perf_counter() - start) * 1e3
        runs.append(max(1, min(10, round(TURN_MS / max(took_ms, 1e-3)))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            calls[index]()
            for _ in range(runs[index]):
                start = time.perf_counter()
                calls[index]()
                samples[index].append((time.perf_counter() - start) * 1e3)
    return samples


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's number of threads inside; what it was, after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _candidates(
    folder: Path, component: str, config: BuildConfig, log: Log
) -> list[tuple[str, str]]:
    """(engine, precision) pairs that exist for `component`; what does not is logged."""
    pairs: list[tuple[str, str]] = []
    for engine in config.engines:
        engine_version(engine)  # raises for one that is not installed
        for precision in config.precisions:
            if precision not in PRECISIONS[engine]:
                continue
            if (
                precision == "int8"
                and not source_graph(folder, component, engine, precision).is_file()
            ):
                log(f"{component}: not quantised, so {engine} int8 is no candidate")
                continue
            if engine == "openvino" and precision == "bf16" and not _openvino_has_bf16():
                log(f"{component}: this CPU has no bf16 arithmetic: no openvino bf16")
                continue
            pairs.append((engine, precision))
    return pairs


def _build_component(
    pipe: Any,
    folder: Path,
    component: str,
    pairs: Sequence[tuple[str, str]],
    threads: int,
    config: BuildConfig,
) -> list[EngineEntry]:
    """Entries with error and latency of every pair, eager fp32 (the reference) first."""
    calls = [
        with_shapes(inputs, config.opt_shapes)
        for inputs in example_calls(pipe, component, config.batch, PARITY_STEPS, config.seed)
    ]
    names = list(calls[0])
    engines: list[Engine] = []
    entries: list[EngineEntry] = []
    outputs: list[Tensor] = []
    for engine, precision in dict.fromkeys([("eager", "fp32"), *pairs]):
        if engine == "tensorrt":
            continue
        started = time.perf_counter()
        entry = EngineEntry(
            engine=engine,
            precision=precision,
            version=engine_version(engine),
            machine=machine_kind(),
            shapes={name: [list(tensor.shape)] for name, tensor in calls[0].items()},
            threads=threads,
            notes=f"batch {config.batch}; median, 10th and 90th percentile",
        )
        if engine in SUFFIXES:
            form = build_form(folder, component, engine, precision, threads)
            entry = entry.model_copy(update=form)
            runner = open_form(folder, component, entry, threads)
        else:
            runner = open_torch(pipe, component, engine, precision, names)
        outputs.append(torch.cat([_only(runner(inputs)).flatten() for inputs in calls]))
        entry.provider = runner.report.provider
        entry.layer_precisions = runner.report.layer_precisions
        entry.build_s = round(time.perf_counter() - started, 3)
        entry.error = relative_error(outputs[-1], outputs[0])
        engines.append(runner)
        entries.append(entry)
    runs = [partial(engine, calls[0]) for engine in engines]
    for entry, samples in zip(entries, time_interleaved(runs, config.repeats), strict=True):
        ranked = statistics.quantiles([*samples, *samples], n=10, method="inclusive")
        entry.latency_ms = round(statistics.median(samples), 4)
        entry.latency_low_ms, entry.latency_high_ms = round(ranked[0], 4), round(ranked[-1], 4)
    return entries


def _build_plans(
    folder: Path,
    component: str,
    pairs: Sequence[tuple[str, str]],
    example: EngineEntry,
    config: BuildConfig,
    log: Log,
) -> list[EngineEntry]:
    """TensorRT plans for every named compute capability, or the GPU here. They are not timed."""
    from hcf.engines.tensorrt import plan_entry

    shapes = {name: rows[0] for name, rows in example.shapes.items()}
    own = {
        field: {name: shape for name, shape in given.items() if name in shapes}
        for field in ("min_shapes", "opt_shapes", "max_shapes")
        for given in [getattr(config, field)]
    }
    targets: list[str | None] = [*config.compute_capabilities] or [None]
    entries: list[EngineEntry] = []
    for engine, precision in pairs:
        if engine != "tensorrt":
            continue
        graph = source_graph(folder, component, engine, precision)
        for capability in targets:
            entry = plan_entry(
                folder,
                component,
                graph,
                precision,
                config.model_copy(update=own),
                capability,
                shapes,
            )
            log(
                f"{component}: tensorrt {precision} built for {entry.machine} in "
                f"{entry.build_s} s, not run here  {entry.layer_precisions}"
            )
            entries.append(entry)
    return entries


def with_shapes(
    inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Inputs repeated or cut along each axis to `shapes`; the batch follows the shapes given.

    Raises RecipeError for a shape of another rank.
    """
    given = {name: shape for name, shape in shapes.items() if name in inputs}
    batch = next((shape[0] for shape in given.values()), None)
    changed: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        wanted = list(given.get(name, [batch or len(tensor), *tensor.shape[1:]]))
        if len(wanted) != tensor.ndim:
            raise RecipeError(f"build.opt_shapes.{name} is {wanted}, needed {tensor.ndim} numbers")
        for axis, size in enumerate(wanted):
            index = torch.arange(size) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
        changed[name] = tensor.contiguous()
    return changed


def _only(outputs: Mapping[str, Tensor]) -> Tensor:
    (tensor,) = outputs.values()
    return tensor


def _openvino_has_bf16() -> bool:
    import openvino

    from hcf.engines.openvino import capabilities

    return "BF16" in capabilities(openvino.Core())
