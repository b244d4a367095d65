"""Builds every asked-for engine of every component, times them against each other, picks one.

The candidates of a component run in one process with equal threads, in rounds whose order rotates,
so that what else the machine does falls on all of them. The fastest one that computes the same as
eager fp32, within what its precision explains, is chosen (`hcf.engines.selection`). Nothing prefers
a quantised one: it has to win. TensorRT plans for the GPU here are candidates like the others;
plans for a GPU named in `compute_capabilities` are built and not run.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.artifact import EngineEntry, clone_artifact, staged_folder, write_manifest
from hcf.engines import FLOATING, ON_DEVICE, PRECISIONS, SIMULATED, Engine, is_floating
from hcf.engines.eager import provider_of
from hcf.engines.forms import (
    SUFFIXES,
    build_form,
    engine_version,
    entry_name,
    here,
    open_form,
    open_torch,
    source_graph,
)
from hcf.engines.products import graph_products
from hcf.engines.reduce_range import weights_in_7_bits
from hcf.engines.selection import choose as choose
from hcf.engines.tensorrt_profiles import ShapeRange, span
from hcf.engines.timing import record_latency
from hcf.engines.timing import time_interleaved as time_interleaved
from hcf.engines.timing import torch_threads as torch_threads
from hcf.errors import HcfError, RecipeError
from hcf.export.component import example_calls, example_inputs, relative_error
from hcf.settings import BuildConfig, ShapeProfile
from hcf.source import open_pipeline

Log = Callable[[str], None]
Inputs = dict[str, Tensor]

PARITY_STEPS = 4
SHAPE_FIELDS = ("min_shapes", "opt_shapes", "max_shapes")


@dataclass(frozen=True)
class Candidate:
    """One engine in one precision. `provider`: ONNX Runtime's; `target`: a GPU named for a plan."""

    engine: str
    precision: str
    device: str
    provider: str = ""
    target: str | None = None

    @property
    def simulated(self) -> bool:
        return self.engine == "eager" and not is_floating(self.precision)


REFERENCE = ("eager", "fp32")


def build(model: Path, output: Path, config: BuildConfig, log: Log = print) -> Path:
    """Artefact `model` with its ONNX graphs -> artefact `output` with engines, times and a choice.

    Raises as `build_components`.
    """
    pipe = open_pipeline(model)
    with staged_folder(output) as folder:
        manifest = clone_artifact(model, folder)
        shutil.rmtree(folder / "engines", ignore_errors=True)
        manifest.engines, manifest.chosen = build_components(pipe, folder, config, log)
        manifest.cache = config.cache.model_dump() if config.cache else {}
        write_manifest(folder, manifest)
    return output


def build_components(
    pipe: Any, folder: Path, config: BuildConfig, log: Log = print
) -> tuple[dict[str, list[EngineEntry]], dict[str, str]]:
    """Engines of `pipe`'s components into artefact `folder`, which holds their graphs.

    Returns the entries of each component, every one with the reason it was or was not chosen, and
    the name of the chosen one. Raises MissingDependency for an engine that is not installed,
    InvalidArtifact where a graph is missing, HcfError where an engine does not get the precision it
    was asked for (unless `config.keep_going`) or no candidate computes what torch does.
    """
    device = device_of(config)
    threads = config.threads or torch.get_num_threads()
    with torch_threads(threads):
        found = {c: candidates(folder, c, config, device, log) for c in config.components}
        asked = config.precisions if "precisions" in config.model_fields_set else []
        there = {one.precision for some in found.values() for one in some}
        if lost := [precision for precision in asked if precision not in there]:
            raise RecipeError(
                f"build.precisions asks for {', '.join(lost)}, which no component can have with "
                f"the engines {', '.join(config.engines)}",
                fix="run `hcf quantize` and `hcf export` first, or leave it out",
            )
        engines: dict[str, list[EngineEntry]] = {}
        chosen: dict[str, str] = {}
        for component in config.components:
            entries = _build_component(
                pipe, folder, component, found[component], device, threads, config, log
            )
            best = choose(component, entries, config.engines, log)
            engines[component], chosen[component] = entries, entry_name(entries[best])
    return engines, chosen


def device_of(config: BuildConfig) -> str:
    """ "cpu" or "cuda"; MissingDependency for a GPU that is asked for and not here."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    provider_of(torch.device(config.device))
    return config.device


def candidates(
    folder: Path, component: str, config: BuildConfig, device: str, log: Log
) -> list[Candidate]:
    """What can be built of `component` with the engines and precisions asked for.

    What cannot, and why, is logged. A format that no engine asked for runs is simulated by eager.
    Where only quantised precisions are asked for, a component that is not quantised (the decoder
    beside a U-Net in INT8) is tried in floating point.
    """
    found = _candidates(folder, component, config.precisions, config, device, log)
    if not found and not any(is_floating(precision) for precision in config.precisions):
        floating = FLOATING if device == "cuda" else ("fp32", "bf16")
        log(f"{component} has no {' or '.join(config.precisions)}: tried in {', '.join(floating)}")
        found = _candidates(folder, component, floating, config, device, log)
    return found


def _candidates(
    folder: Path,
    component: str,
    precisions: Sequence[str],
    config: BuildConfig,
    device: str,
    log: Log,
) -> list[Candidate]:
    found: list[Candidate] = []
    for engine in config.engines:
        engine_version(engine)  # raises for one that is not installed
        if engine == "openvino" and device != "cpu":
            log(f"{component}: openvino runs on the CPU, not on the GPU asked for: no candidate")
            continue
        providers: list[str] = [""]
        if engine == "onnxruntime":
            providers = list(config.providers) or ["cuda" if device == "cuda" else "cpu"]
        for provider in providers:
            own = "cpu" if provider == "cpu" else device
            known = ON_DEVICE.get((engine, provider), PRECISIONS[engine])
            for precision in precisions:
                one = Candidate(engine, precision, own, provider)
                if precision not in known or one.simulated:
                    continue
                if reason := _not_possible(folder, component, one):
                    log(f"{component}: {reason}: no {engine} {precision}")
                    continue
                found += _by_target(one, config)
    real = {one.precision for one in found}
    for precision in precisions:
        if "eager" in config.engines and precision in SIMULATED and precision not in real:
            if _has_scales(folder, component, precision):
                found.append(Candidate("eager", precision, "cpu"))
    return found


def profiles_of(
    pipe: Any, component: str, profiles: Sequence[ShapeProfile]
) -> tuple[ShapeRange, ...]:
    """The shapes of a component in each profile: at its resolutions, from a real call."""
    ranges: list[ShapeRange] = []
    for profile in profiles:
        if not profile.resolutions:
            names = set(example_inputs(pipe, component, batch=1))
            rows = [{n: s for n, s in getattr(profile, f).items() if n in names}
                    for f in SHAPE_FIELDS]  # fmt: skip
            ranges.append(ShapeRange(*rows))
            continue
        low, best, high = profile.batch
        examples: list[dict[str, list[int]]] = []
        for height, width in profile.resolutions:
            inputs = example_inputs(pipe, component, best, height=height, width=width)
            shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
            for rows_in in (best, low, high):
                examples.append({n: [rows_in, *s[1:]] for n, s in shapes.items()})
        ranges.append(span(examples))
    return tuple(ranges)


def with_shapes(inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Inputs:
    """Inputs repeated or cut along each axis to `shapes`; the batch follows the shapes given.

    Raises RecipeError for a shape of another rank.
    """
    given = {name: shape for name, shape in shapes.items() if name in inputs}
    batch = next((shape[0] for shape in given.values()), None)
    changed: Inputs = {}
    for name, tensor in inputs.items():
        wanted = list(given.get(name, [batch or len(tensor), *tensor.shape[1:]]))
        if len(wanted) != tensor.ndim:
            raise RecipeError(f"build.opt_shapes.{name} is {wanted}, needed {tensor.ndim} numbers")
        for axis, size in enumerate(wanted):
            index = torch.arange(size) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
        changed[name] = tensor.contiguous()
    return changed


def _not_possible(folder: Path, component: str, one: Candidate) -> str:
    """Why a candidate cannot be; "" if it can. A missing fp32 graph is an error, later."""
    if one.engine in ("eager", "compile"):
        if one.precision == "fp16" and one.device == "cpu" and not _cpu_has_fp16():
            return "this CPU has no fp16 arithmetic"
        return ""
    graph = source_graph(folder, component, one.engine, one.precision, one.device)
    if one.precision != "fp32" and not graph.is_file():
        way = "export.precisions" if is_floating(one.precision) else "quantize.format"
        return f"there is no {graph.name} ({way})"
    if one.engine == "openvino":
        from hcf.engines.openvino import runs_here

        if not runs_here(one.precision):
            return "this CPU has not the arithmetic"
    return ""


def _by_target(one: Candidate, config: BuildConfig) -> list[Candidate]:
    """A plan for every GPU named; every other candidate as it is."""
    if one.engine != "tensorrt" or not config.compute_capabilities:
        return [one]
    return [
        Candidate(one.engine, one.precision, "cuda", target=capability)
        for capability in config.compute_capabilities
    ]


def _has_scales(folder: Path, component: str, precision: str) -> bool:
    from hcf.quantize.scales import SCALES_FILE, read_scales

    file = folder / component / SCALES_FILE
    return file.is_file() and any(s.scheme == precision for s in read_scales(file).values())


def _cpu_has_fp16() -> bool:
    from hcf.engines import cpu_flags

    return bool({"avx512_fp16", "amx_fp16", "fphp"} & cpu_flags())


def _build_component(
    pipe: Any,
    folder: Path,
    component: str,
    found: Sequence[Candidate],
    device: str,
    threads: int,
    config: BuildConfig,
    log: Log,
) -> list[EngineEntry]:
    """Entries with error and latency of every candidate, eager fp32 (the reference) first."""
    calls = [
        with_shapes(inputs, config.opt_shapes)
        for inputs in example_calls(pipe, component, config.batch, PARITY_STEPS, config.seed)
    ]
    reference = Candidate(*REFERENCE, device)
    entries: list[EngineEntry] = []
    runners: list[tuple[EngineEntry, Engine]] = []
    wanted: Inputs = {}
    for one in dict.fromkeys([reference, *found]):
        entry = _entry(one, calls[0], threads, config)
        entries.append(entry)
        started = time.perf_counter()
        try:
            runner = _make(pipe, folder, component, one, entry, threads, config, calls[0])
            outputs = _outputs(runner, calls) if runner is not None else {}
        except HcfError as error:
            if not config.keep_going or one == reference:
                raise
            entry.reason = f"could not be built: {error.message}"
            log(f"{component}: {one.engine} {one.precision}: {entry.reason}")
            continue
        entry.build_s = round(time.perf_counter() - started, 3)
        if runner is None:
            continue  # a plan for a GPU that is not here
        entry.provider, entry.layer_precisions = (
            runner.report.provider if one.engine != "tensorrt" else entry.provider,
            runner.report.layer_precisions,
        )
        entry.details = {**entry.details, **runner.report.details}
        wanted = wanted or outputs
        entry.error = max(relative_error(outputs[name], wanted[name]) for name in wanted)
        if not one.simulated:
            runners.append((entry, runner))
    samples = time_interleaved([_timed(r, calls[0]) for _, r in runners], config.repeats)
    for (entry, _), some in zip(runners, samples, strict=True):
        record_latency(entry, some)
    return entries


def _entry(one: Candidate, inputs: Inputs, threads: int, config: BuildConfig) -> EngineEntry:
    return EngineEntry(
        engine=one.engine,
        precision=one.precision,
        device=one.device,
        version=engine_version(one.engine),
        machine=here(one.device),
        shapes={name: [list(tensor.shape)] for name, tensor in inputs.items()},
        threads=threads if one.device == "cpu" else None,
        notes=f"batch {config.batch}; median, 10th and 90th percentile",
    )


def _make(
    pipe: Any,
    folder: Path,
    component: str,
    one: Candidate,
    entry: EngineEntry,
    threads: int,
    config: BuildConfig,
    inputs: Inputs,
) -> Engine | None:
    """Builds a candidate, completes its entry and opens it; None for a plan of another GPU."""
    if one.engine == "tensorrt":
        _build_plan(pipe, folder, component, one, entry, config)
        if one.target is not None and entry.machine != here("cuda"):
            return None
        return open_form(folder, component, entry, threads)
    if one.engine in SUFFIXES:
        form = build_form(folder, component, one.engine, one.precision, threads, one.device)
        for field, value in form.items():
            setattr(entry, field, value)
        if one.provider:
            entry.details = {
                "provider": one.provider,
                "allow_cpu_fallback": config.allow_cpu_fallback,
            }
        if one.device == "cpu" and weights_in_7_bits(one.precision):
            entry.details = {**entry.details, "weight_bits": 7}
        asked = graph_products(folder / form["source"])
        return open_form(folder, component, entry, threads, asked)
    details = {"mode": config.compile_mode, "dynamic": config.compile_dynamic}
    return open_torch(
        pipe,
        component,
        one.engine,
        one.precision,
        list(inputs),
        device=one.device,
        details=details,
        folder=folder,
    )


def _build_plan(
    pipe: Any,
    folder: Path,
    component: str,
    one: Candidate,
    entry: EngineEntry,
    config: BuildConfig,
) -> None:
    """A TensorRT plan for the GPU here or the one named, into the entry."""
    from hcf.engines.tensorrt import plan_entry

    shapes = {name: rows[0] for name, rows in entry.shapes.items()}
    own = {
        field: {name: shape for name, shape in given.items() if name in shapes}
        for field in SHAPE_FIELDS
        for given in [getattr(config, field)]
    }
    made = plan_entry(
        folder,
        component,
        source_graph(folder, component, one.engine, one.precision, "cuda"),
        one.precision,
        config.model_copy(update=own),
        one.target,
        shapes,
        profiles_of(pipe, component, config.profiles),
        getattr(pipe, "vae_scale_factor", None),
    )
    for field, value in made:
        setattr(entry, field, value)
    entry.notes = f"{made.notes}; batch {config.batch}"


def _outputs(engine: Engine, calls: Sequence[Inputs]) -> Inputs:
    """Each output over all calls in one row, on the CPU.

    On a GPU torch's convolutions use TF32 unless they are told not to; a reference must not.
    """
    with contextlib.ExitStack() as stack:
        if engine.report.device == "cuda" and engine.report.precision == "fp32":
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        found = [engine(inputs) for inputs in calls]
    return {
        name: torch.cat([outputs[name].detach().cpu().flatten() for outputs in found])
        for name in found[0]
    }


def _timed(engine: Engine, inputs: Inputs) -> Callable[[], Any]:
    """One call to be timed; on a GPU from inputs that are there until the device is done."""
    if engine.report.device == "cpu":
        return lambda: engine(inputs)
    placed = {name: tensor.cuda() for name, tensor in inputs.items()}

    def run() -> None:
        engine(placed)
        torch.cuda.synchronize()

    return run
