"""Engines run one component. They differ in how; the seam is one: named tensors in and out.

`report` says what really runs, read back from the runtime after it compiled. A precision that was
asked for and that the layers did not get is an error, in every engine, which names the layers.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hcf.errors import HcfError, MissingDependency

# what each engine really runs; tensorrt takes its precision from the graph
PRECISIONS: dict[str, tuple[str, ...]] = {
    "eager": ("fp32", "fp16", "bf16", "int8", "fp8", "int8-weight", "int4-weight", "int4"),
    "compile": ("fp32", "fp16", "bf16"),
    "onnxruntime": ("fp32", "fp16", "int8", "int8-weight", "int4-weight"),
    "openvino": ("fp32", "fp16", "bf16", "int8", "int8-bf16", "int8-weight", "int4-weight"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8", "int4-weight"),
}
# the same by device, where that is less
ON_DEVICE: dict[tuple[str, str], tuple[str, ...]] = {
    # its CPU kernels compute fp16 graphs in fp32
    ("onnxruntime", "cpu"): ("fp32", "int8", "int8-weight", "int4-weight"),
    # the CUDA provider dequantises and multiplies in floating point
    ("onnxruntime", "cuda"): ("fp32", "fp16"),
    ("onnxruntime", "tensorrt"): ("fp32", "fp16", "int8"),
}
# eager computes these as an engine would, in float32: what they do to the output, not their speed
SIMULATED = ("int8", "fp8", "int8-weight", "int4-weight", "int4")
FLOATING = ("fp32", "fp16", "bf16")
# under which name `layer_precisions` counts the layers of a precision
COUNTED_AS = {"int8-weight": "int8", "int4-weight": "int4", "int8-bf16": "int8"}
# the quantised graph an engine of a precision is built from
FORMATS = {"int8-bf16": "int8"}

# instruction sets that decide which kernels a runtime picks
CPU_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class EngineReport:
    """What runs `component`. `layer_precisions`: how many convolutions and matrix products run in
    which precision, counted from the runtime's own graph; `precision` is what was asked for.
    `details`: what the engine tells besides (compile mode, profiles, fallback nodes, ...)."""

    engine: str
    version: str
    component: str
    device: str
    provider: str
    precision: str
    layer_precisions: dict[str, int] = field(default_factory=dict)
    threads: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Runs one component: tensors by name, each (B, ...), to tensors by name.

    Floating tensors are float32, ids int64; outputs are on the engine's device and stay as they
    are when the engine is called again.
    """

    @property
    def report(self) -> EngineReport: ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def check_precision(engine: str, precision: str, device: str = "") -> None:
    """Raises HcfError if `engine` cannot run `precision` at all (on `device`, or by a provider)."""
    if engine not in PRECISIONS:
        raise HcfError(f"there is no engine {engine!r}", fix=f"use one of {', '.join(PRECISIONS)}")
    known = ON_DEVICE.get((engine, device), PRECISIONS[engine])
    if precision in known:
        return
    where = f" on {device}" if (engine, device) in ON_DEVICE else ""
    others = [e for e, p in PRECISIONS.items() if precision in p and e != engine]
    raise HcfError(
        f"the {engine} engine does not run {precision}{where}; it runs {' and '.join(known)}",
        fix=f"use one of {', '.join(others)}" if others else f"use {' or '.join(known)}",
    )


def is_floating(precision: str) -> bool:
    """Whether a precision quantises nothing."""
    return precision in FLOATING


def require_layers(
    report: EngineReport,
    asked: Mapping[str, str] | None = None,
    found: Mapping[str, str] | None = None,
    exact: bool = False,
) -> EngineReport:
    """The same report. Raises HcfError if the layers did not get the precision asked for.

    `asked` and `found`: products of the graph and of the runtime, name -> precision. A product may
    have gone from the runtime's graph (fused with another); one that is there in another precision
    than the graph gave it fell back. Unless `exact`, floating types may differ: a runtime may take
    them as a hint.
    """
    wanted = COUNTED_AS.get(report.precision, report.precision)
    fix = (
        "ask for a precision this machine runs (`hcf doctor`)"
        if is_floating(report.precision)
        else "leave these layers out of quantisation (quantize.rules), or use another engine"
    )
    if not report.layer_precisions.get(wanted):
        raise HcfError(
            f"{report.engine} {report.version} was asked for {report.precision} in "
            f"{report.component}, but runs {report.layer_precisions or 'nothing'}",
            fix=fix if is_floating(report.precision) else "export and build the artefact again",
        )
    if asked is None or found is None:
        return report
    quantised = {name: kind for name, kind in asked.items() if not is_floating(kind)}
    held = dict(asked) if exact else quantised
    fallen = [n for n, kind in held.items() if n in found and found[n] != kind]
    more = sum(map(is_floating, found.values())) - (len(asked) - len(quantised))
    if not fallen and more <= 0:
        return report
    names = ", ".join(fallen[:8]) + (f" and {len(fallen) - 8} more" if len(fallen) > 8 else "")
    raise HcfError(
        f"{report.engine} {report.version} was asked for {report.precision} in {report.component}: "
        f"the graph gives it to {len(held)} layers, but {max(len(fallen), more)} of them fell back "
        f"({names or 'renamed by the runtime'}); it runs {report.layer_precisions}",
        fix=fix,
    )


@cache
def machine_kind() -> str:
    """The processor family and those of its instruction sets that engines specialise for."""
    found = [name for name in CPU_FEATURES if name in cpu_flags()]
    return "-".join([platform.machine() or "unknown", *found])


@cache
def cpu_flags() -> frozenset[str]:
    """What the kernel says the CPU can do; empty where it says nothing."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def missing(engine: str, package: str, extra: str, error: ImportError) -> MissingDependency:
    """The error for an engine whose package is not installed."""
    return MissingDependency(
        f"the {engine} engine needs {package}: {error}", fix=f"pip install 'hcf-toolkit[{extra}]'"
    )
