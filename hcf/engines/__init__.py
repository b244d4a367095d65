"""Engines run one component. They differ in how; the seam is one: named tensors in and out.

`report` says what really runs, read back from the runtime after it compiled. A precision that was
asked for and that no layer got is an error, in every engine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hcf.errors import HcfError, MissingDependency

# what each engine can be asked for on a CPU; tensorrt takes its precision from the graph
PRECISIONS: dict[str, tuple[str, ...]] = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt": ("fp32", "int8"),
}

# instruction sets that decide which kernels a runtime picks
CPU_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class EngineReport:
    """What runs `component`. `layer_precisions`: how many convolutions and matrix products run in
    which precision, counted from the runtime's own graph; `precision` is what was asked for."""

    engine: str
    version: str
    component: str
    device: str
    provider: str
    precision: str
    layer_precisions: dict[str, int] = field(default_factory=dict)
    threads: int | None = None


class Engine(Protocol):
    """Runs one component: float32 tensors by name, each (B, ...), to tensors by name."""

    @property
    def report(self) -> EngineReport: ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def check_precision(engine: str, precision: str) -> None:
    """Raises HcfError if `engine` cannot run `precision` at all."""
    if engine not in PRECISIONS:
        raise HcfError(f"there is no engine {engine!r}", fix=f"use one of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[engine]:
        raise HcfError(
            f"the {engine} engine does not run {precision}; it runs "
            f"{' and '.join(PRECISIONS[engine])}",
            fix=f"use one of {', '.join(e for e, p in PRECISIONS.items() if precision in p)}"
            if any(precision in p for p in PRECISIONS.values())
            else f"use {' or '.join(PRECISIONS[engine])}",
        )


def require_layers(report: EngineReport) -> EngineReport:
    """The same report. Raises HcfError if no layer got the precision that was asked for."""
    if not report.layer_precisions.get(report.precision):
        raise HcfError(
            f"{report.engine} {report.version} was asked for {report.precision} in "
            f"{report.component}, but runs {report.layer_precisions or 'nothing'}",
            fix="ask for a precision this machine runs (`hcf doctor`)"
            if report.precision == "bf16"
            else "export and build the artefact again",
        )
    return report


@cache
def machine_kind() -> str:
    """The processor family and those of its instruction sets that engines specialise for."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    found = [name for name in CPU_FEATURES if name in flags]
    return "-".join([platform.machine() or "unknown", *found])


def missing(engine: str, package: str, extra: str, error: ImportError) -> MissingDependency:
    """The error for an engine whose package is not installed."""
    return MissingDependency(
        f"the {engine} engine needs {package}: {error}", fix=f"pip install 'hcf-toolkit[{extra}]'"
    )
