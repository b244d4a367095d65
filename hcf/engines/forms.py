"""The built form of an engine on disk, and opening one again where it may run.

`engines/<component>/<engine>-<precision>-<hash>.<onnx|xml>`: the hash is over the source graph with
its weights, the engine's version, the precision and the machine's instruction sets. Opening one
that another version or machine built, or whose source graph has changed since, is an error, never a
rebuild in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hcf.artifact import EngineEntry, Manifest
from hcf.engines import FORMATS, Engine, check_precision, is_floating, machine_kind
from hcf.engines.compiled import CompiledEngine
from hcf.engines.eager import EagerEngine, SimulatedEngine
from hcf.engines.products import hash_graph, listed_hash
from hcf.engines.reduce_range import for_this_cpu, weights_in_7_bits
from hcf.errors import EngineMismatch, HcfError, InvalidArtifact, MissingDependency
from hcf.export.onnx import FP32_GRAPH, INT8_ORT_GRAPH

SUFFIXES = {"onnxruntime": "onnx", "openvino": "xml"}
REBUILD = "build it again on this machine with `hcf build`"


def entry_name(entry: EngineEntry) -> str:
    """How a manifest's `chosen` names an entry: "openvino-int8", "onnxruntime-fp16-tensorrt"."""
    provider = entry.details.get("provider", "cpu")
    suffix = "-tensorrt" if entry.engine == "onnxruntime" and provider == "tensorrt" else ""
    return f"{entry.engine}-{entry.precision}{suffix}"


def speed(entry: EngineEntry) -> float:
    """What engines are ranked by: the 10th percentile in ms, inf for one that was not timed.

    Not the median: whatever else the machine does only ever adds time, and adds it unevenly.
    """
    return entry.latency_low_ms if entry.latency_low_ms is not None else float("inf")


def engine_version(engine: str, provider: str = "") -> str:
    """Version of the runtime behind `engine`; MissingDependency where it is not installed.

    `provider` says which TensorRT package is meant; without it the first that is installed.
    """
    if engine == "onnxruntime":
        from hcf.engines import onnxruntime

        return onnxruntime.version()
    if engine == "openvino":
        from hcf.engines import openvino

        return openvino.version()
    if engine == "tensorrt":
        from hcf.engines import tensorrt

        return tensorrt.version(next((d for d in tensorrt.DRIVERS if d == provider), None))
    return str(torch.__version__)


def available_engines(device: str) -> list[str]:
    """Names of the engines that are installed and run on `device` ("cpu" or "cuda")."""
    from hcf.engines.compiled import require_compiler

    found = ["eager"]
    try:
        require_compiler()
        found.append("compile")
    except MissingDependency:
        pass
    names = ("onnxruntime", "openvino") if device == "cpu" else ("onnxruntime", "tensorrt")
    for name in names:
        try:
            engine_version(name)
            if name == "onnxruntime" and device == "cuda":
                from hcf.engines.onnxruntime import package
                from hcf.engines.onnxruntime_gpu import require_provider

                require_provider(package(), "cuda")
            if name == "tensorrt":
                from hcf.engines.tensorrt_package import package as tensorrt_package
                from hcf.engines.tensorrt_package import target_of

                target_of(*tensorrt_package(), None)
        except HcfError:
            continue
        found.append(name)
    return found


def here(device: str) -> str:
    """What an engine on `device` was built for: the CPU's instruction sets, or the GPU's SM."""
    if device == "cpu":
        return machine_kind()
    if not torch.cuda.is_available():
        return "no GPU"
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def source_graph(
    folder: Path, component: str, engine: str, precision: str, device: str = "cpu"
) -> Path:
    """The ONNX file of artefact `folder` that an engine of this precision is built from.

    On a GPU the layers a quantised graph leaves in floating point are fp16 where there is such a
    graph. OpenVINO takes fp16 and bf16 as a hint, from the fp32 graph.
    """
    own = folder / component
    if is_floating(precision):
        lowered = engine in ("onnxruntime", "tensorrt") and precision != "fp32"
        return own / (f"model.{precision}.onnx" if lowered else FP32_GRAPH)
    name = FORMATS.get(precision, precision)
    if engine == "onnxruntime" and precision == "int8" and device == "cpu":
        return own / INT8_ORT_GRAPH
    mixed = own / f"model.{name}.fp16.onnx"
    if (engine == "tensorrt" or device != "cpu") and mixed.is_file():
        return mixed
    return own / f"model.{name}.onnx"


def build_form(
    folder: Path,
    component: str,
    engine: str,
    precision: str,
    threads: int,
    device: str = "cpu",
) -> dict[str, str]:
    """Write the built form; returns the entry's `file`, `source` and `source_hash`.

    ONNX Runtime on a GPU partitions the graph when it loads it: its form is the graph. Raises
    InvalidArtifact where the component has no graph of this precision.
    """
    source = source_graph(folder, component, engine, precision, device)
    if not source.is_file():
        raise InvalidArtifact(
            f"{component} has no {source.name}, which the {engine} engine is built from",
            fix="run `hcf export` first",
        )
    source_hash = hash_graph(source)
    found = {"source": source.relative_to(folder).as_posix(), "source_hash": source_hash}
    if device != "cpu":
        return {"file": found["source"], **found}
    key = {
        "graph": source_hash,
        "engine": engine,
        "version": engine_version(engine),
        "precision": precision,
        "machine": machine_kind(),
        **({"weight_bits": 7} if weights_in_7_bits(precision) else {}),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    target = folder / "engines" / component / f"{engine}-{precision}-{digest}.{SUFFIXES[engine]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with for_this_cpu(source, precision, target.parent) as graph:
        if engine == "onnxruntime":
            from hcf.engines.onnxruntime import optimise

            optimise(graph, target, threads)
        else:
            from hcf.engines.openvino import convert

            convert(graph, target)
    return {"file": target.relative_to(folder).as_posix(), **found}


def refit_form(
    base: Path, target: Path, component: str, entry: EngineEntry, threads: int
) -> dict[str, str]:
    """The form of `entry`, built in artefact `base`, with the weights of the graph in `target`.

    `target` holds the graph `entry.source` with other weights. A TensorRT plan built with refit is
    taken as it is, and its weights are replaced when it is loaded; one without is built again with
    its own options, as is every other engine's form. Returns what `build_form` does.
    """
    if entry.engine != "tensorrt":
        return build_form(target, component, entry.engine, entry.precision, threads, entry.device)
    from hcf.engines.tensorrt import rebuild_plan
    from hcf.engines.tensorrt_refit import attach_weights

    assert entry.file is not None and entry.source is not None
    graph, folder = target / entry.source, target / "engines" / component
    if entry.details.get("options", {}).get("refit"):
        plan = attach_weights(base / entry.file, folder, graph)
    else:
        plan = rebuild_plan(base / entry.file, graph, folder)
    return {
        "file": plan.relative_to(target).as_posix(),
        "source": entry.source,
        "source_hash": hash_graph(graph),
    }


def open_entry(
    folder: Path, component: str, entry: EngineEntry, manifest: Manifest, pipe: Any, threads: int
) -> Engine:
    """The engine of a manifest's entry, ready to run.

    Raises EngineMismatch if another version, machine or graph made it, InvalidArtifact if its file
    is gone, MissingDependency if the engine is not installed.
    """
    if entry.file is None:
        return open_torch(
            pipe,
            component,
            entry.engine,
            entry.precision,
            list(entry.shapes),
            device=entry.device,
            details=entry.details,
            folder=folder,
        )
    # a plan's own key says more: it may be compatible with other versions or GPUs
    told = entry.engine == "tensorrt"
    version = entry.version if told else engine_version(entry.engine, entry.provider)
    for what, built, found in (
        ("version", entry.version, version),
        ("machine", entry.machine, entry.machine if told else here(entry.device)),
        ("source graph", entry.source_hash, listed_hash(manifest.files, entry.source or "")),
    ):
        if built != found:
            raise EngineMismatch(
                f"the {entry.engine} {entry.precision} engine of {component} in {folder} was built "
                f"for {what} {built}; here it is {found}",
                fix=REBUILD,
            )
    if not (folder / entry.file).is_file():
        raise InvalidArtifact(f"{folder / entry.file} is missing", fix=REBUILD)
    return open_form(folder, component, entry, threads)


def open_form(
    folder: Path,
    component: str,
    entry: EngineEntry,
    threads: int,
    asked: Mapping[str, str] | None = None,
) -> Engine:
    """The engine in the entry's file, which is known to fit this machine.

    `asked`: the products of its graph, to hold the layers to; without it their number is held to
    what the entry says was read back when it was built.
    """
    assert entry.file is not None
    path = folder / entry.file
    engine: Engine
    if entry.engine == "onnxruntime" and entry.device == "cuda":
        from hcf.engines.onnxruntime_gpu import OnnxRuntimeGpuEngine

        provider = str(entry.details.get("provider", "cuda"))
        allowed = bool(entry.details.get("allow_cpu_fallback", False))
        cache = engine_cache(entry) if provider == "tensorrt" else None
        engine = OnnxRuntimeGpuEngine(path, component, entry.precision, provider, allowed, cache)
    elif entry.engine == "onnxruntime":
        from hcf.engines.onnxruntime import OnnxRuntimeEngine

        engine = OnnxRuntimeEngine(path, component, entry.precision, threads, asked)
    elif entry.engine == "openvino":
        from hcf.engines.openvino import OpenVinoEngine

        # one shape was timed; of a (min, opt, max) range it is the middle one
        shapes = {name: tuple(rows[len(rows) // 2]) for name, rows in entry.shapes.items()}
        engine = OpenVinoEngine(path, component, entry.precision, threads, shapes, asked)
    else:
        from hcf.engines.tensorrt_runtime import TensorRTEngine

        graphs = bool(entry.details.get("cuda_graphs", True))
        engine = TensorRTEngine(path, component, entry.precision, cuda_graphs=graphs)
    found = engine.report.layer_precisions
    lost = [
        kind
        for kind, count in entry.layer_precisions.items()
        if not is_floating(kind) and found.get(kind, 0) < count
    ]
    if asked is None and lost:
        raise EngineMismatch(
            f"the {entry.engine} {entry.precision} engine of {component} was built with "
            f"{entry.layer_precisions}; here it runs {found}",
            fix=REBUILD,
        )
    return engine


def engine_cache(entry: EngineEntry) -> Path:
    """Where ONNX Runtime's TensorRT provider keeps what it builds when it loads a graph: beside no
    artefact, whose files would change."""
    from hcf.artifact import hcf_home

    name = f"{entry.source_hash[:16]}-{entry.version}-{here(entry.device)}-{entry.precision}"
    return hcf_home() / "onnxruntime-tensorrt" / name


def open_torch(
    pipe: Any,
    component: str,
    engine: str,
    precision: str,
    names: Sequence[str],
    *,
    device: str = "cpu",
    details: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Engine:
    """An engine made from the torch module itself: eager or compile.

    `details` are a compiled engine's `mode` and `dynamic`. A quantised precision is simulated from
    the scales in artefact `folder`.
    """
    check_precision(engine, precision)
    if not is_floating(precision):
        if folder is None:
            raise HcfError(
                f"eager simulates {precision} from the scales of a quantised artefact",
                fix="load the folder that `hcf quantize` wrote",
            )
        return SimulatedEngine(pipe, component, names, precision, folder / component)
    if engine == "compile":
        told = details or {}
        return CompiledEngine(
            pipe,
            component,
            names,
            precision,
            device,
            mode=str(told.get("mode", "full")),
            dynamic=bool(told.get("dynamic", False)),
        )
    return EagerEngine(pipe, component, names, precision, device)
