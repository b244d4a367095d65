"""The built form of an engine on disk, and opening one again where it may run.

`engines/<component>/<engine>-<precision>-<hash>.<onnx|xml>`: the hash is over the source graph, the
engine's version, the precision and the machine's instruction sets. Opening one that another version
or machine built, or whose source graph has changed since, is an error, never a rebuild in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hcf.artifact import EngineEntry, Manifest, hash_file
from hcf.engines import Engine, check_precision, machine_kind
from hcf.engines.compiled import CompiledEngine
from hcf.engines.eager import EagerEngine
from hcf.errors import EngineMismatch, InvalidArtifact
from hcf.export.onnx import FP32_GRAPH, INT8_GRAPH, INT8_ORT_GRAPH

SUFFIXES = {"onnxruntime": "onnx", "openvino": "xml"}


def entry_name(entry: EngineEntry) -> str:
    """How a manifest's `chosen` names an entry: "openvino-int8"."""
    return f"{entry.engine}-{entry.precision}"


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


def source_graph(folder: Path, component: str, engine: str, precision: str) -> Path:
    """The ONNX file of artefact `folder` that an engine of this precision is built from."""
    if precision != "int8":
        return folder / component / FP32_GRAPH
    return folder / component / (INT8_ORT_GRAPH if engine == "onnxruntime" else INT8_GRAPH)


def build_form(
    folder: Path, component: str, engine: str, precision: str, threads: int
) -> dict[str, str]:
    """Write the built form; returns the entry's `file`, `source` and `source_hash`.

    Raises InvalidArtifact where the component has no graph of this precision.
    """
    source = source_graph(folder, component, engine, precision)
    if not source.is_file():
        raise InvalidArtifact(
            f"{component} has no {source.name}, which the {engine} engine is built from",
            fix="run `hcf export` first",
        )
    source_hash = hash_file(source)
    key = {
        "graph": source_hash,
        "engine": engine,
        "version": engine_version(engine),
        "precision": precision,
        "machine": machine_kind(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    target = folder / "engines" / component / f"{engine}-{precision}-{digest}.{SUFFIXES[engine]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if engine == "onnxruntime":
        from hcf.engines.onnxruntime import optimise

        optimise(source, target, threads)
    else:
        from hcf.engines.openvino import convert

        convert(source, target)
    return {
        "file": target.relative_to(folder).as_posix(),
        "source": source.relative_to(folder).as_posix(),
        "source_hash": source_hash,
    }


def open_entry(
    folder: Path, component: str, entry: EngineEntry, manifest: Manifest, pipe: Any, threads: int
) -> Engine:
    """The engine of a manifest's entry, ready to run.

    Raises EngineMismatch if another version, machine or graph made it, InvalidArtifact if its file
    is gone, MissingDependency if the engine is not installed.
    """
    if entry.file is None:
        return open_torch(pipe, component, entry.engine, entry.precision, list(entry.shapes))
    rebuild = "build it again on this machine with `hcf build`"
    for what, built, here in (
        ("version", entry.version, engine_version(entry.engine, entry.provider)),
        ("machine", entry.machine, machine_kind() if entry.device == "cpu" else entry.machine),
        ("source graph", entry.source_hash, manifest.files.get(entry.source or "", "missing")),
    ):
        if built != here:
            raise EngineMismatch(
                f"the {entry.engine} {entry.precision} engine of {component} in {folder} was built "
                f"for {what} {built}; here it is {here}",
                fix=rebuild,
            )
    if not (folder / entry.file).is_file():
        raise InvalidArtifact(f"{folder / entry.file} is missing", fix=rebuild)
    return open_form(folder, component, entry, threads)


def open_form(folder: Path, component: str, entry: EngineEntry, threads: int) -> Engine:
    """The engine in the entry's file, which is known to fit this machine."""
    assert entry.file is not None
    path = folder / entry.file
    if entry.engine == "onnxruntime":
        from hcf.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, component, entry.precision, threads)
    if entry.engine == "openvino":
        from hcf.engines.openvino import OpenVinoEngine

        # one shape was timed; of a (min, opt, max) range it is the middle one
        shapes = {name: tuple(rows[len(rows) // 2]) for name, rows in entry.shapes.items()}
        return OpenVinoEngine(path, component, entry.precision, threads, shapes)
    from hcf.engines.tensorrt_runtime import TensorRTEngine

    return TensorRTEngine(path, component, entry.precision)


def open_torch(
    pipe: Any, component: str, engine: str, precision: str, names: Sequence[str]
) -> Engine:
    """An engine made from the torch module itself: eager or compile."""
    check_precision(engine, precision)
    kind = CompiledEngine if engine == "compile" else EagerEngine
    return kind(pipe, component, names, precision)
