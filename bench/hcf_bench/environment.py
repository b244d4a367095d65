"""The fingerprint stored with every timing, and the rule for when two timings may be compared.

It holds what changes speed (processor, instruction sets, threads, packages, GPU, driver) and
nothing that names a machine or a person: no host name, no path, no user.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# Import name -> distributions that may carry it; the first one installed is reported.
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "modelopt": ("nvidia-modelopt",),
    "numpy": ("numpy",),
}
# Instruction sets that decide which CPU kernels run.
ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
# Differs from one minute to the next and is recorded only to be read.
NOT_COMPARED = frozenset({"load_average"})


class Gpu(BaseModel):
    """One GPU as its driver names it; memory in MiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    driver: str
    memory_mib: int
    compute_capability: str


class Environment(BaseModel):
    """Everything about the machine and its packages that a timing depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu_model: str
    cpu_cores: int
    cpu_isa: tuple[str, ...]
    cpu_governor: str
    memory_gib: int
    threads: int
    os: str
    python: str
    packages: dict[str, str]
    gpus: tuple[Gpu, ...]
    load_average: float


def read_environment(threads: int | None = None) -> Environment:
    """Reads the fingerprint; `threads` is what the timed code uses (default: the usable cores)."""
    cpu_model, flags = _read_cpuinfo()
    cores = usable_cores()
    return Environment(
        cpu_model=cpu_model,
        cpu_cores=cores,
        cpu_isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        cpu_governor=_read_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
        or "unknown",
        memory_gib=_memory_gib(),
        threads=cores if threads is None else threads,
        os=_operating_system(),
        python=platform.python_version(),
        packages=installed_versions(),
        gpus=_read_gpus(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


def same_environment(a: Environment, b: Environment) -> list[str]:
    """Differences that forbid comparing a timing of `a` with one of `b`; empty where none do."""
    differences: list[str] = []
    for name in Environment.model_fields:
        if name in NOT_COMPARED:
            continue
        left, right = getattr(a, name), getattr(b, name)
        if name == "packages":
            for package in sorted(left.keys() | right.keys()):
                ours, theirs = left.get(package, "absent"), right.get(package, "absent")
                if ours != theirs:
                    differences.append(f"{package}: {ours} and {theirs}")
        elif left != right:
            differences.append(f"{name}: {_show(left)} and {_show(right)}")
    return differences


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide speed, from their metadata; nothing is imported."""
    versions: dict[str, str] = {}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                versions[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return versions


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by a container's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    quota = _read_text(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def describe(environment: Environment) -> str:
    """One line for people: processor, cores, threads, system, GPU."""
    gpu = ", ".join(g.name for g in environment.gpus) or "no GPU"
    return (
        f"{environment.cpu_model}, {environment.cpu_cores} cores, {environment.threads} threads, "
        f"{environment.memory_gib} GiB, {environment.os}, {gpu}"
    )


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(getattr(item, "name", item)) for item in value) + "]"
    return str(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_cpuinfo() -> tuple[str, frozenset[str]]:
    text = _read_text(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    family = [
        re.search(rf"^{key}\s*:\s*(\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")
    ]
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    # Clouds hide the exact model behind a brand name; family and model tell generations apart.
    numbers = "/".join(match.group(1) for match in family if match)
    return f"{name} ({numbers})" if numbers else name, frozenset(
        flags.group(1).split() if flags else ()
    )


def _memory_gib() -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read_text(Path("/proc/meminfo")), re.MULTILINE)
    return round(int(found.group(1)) / 2**20) if found else 0


def _operating_system() -> str:
    kernel = ".".join(platform.release().split(".")[:2])
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    return f"{name}, kernel {kernel}"


def _read_gpus() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        out = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()  # the tool is there but no driver answers: no GPU this process could use
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]
    return tuple(
        Gpu(name=r[0], driver=r[1], memory_mib=int(float(r[2])) if r[2][:1].isdigit() else 0,
            compute_capability=r[3])
        for r in rows if len(r) == 4
    )  # fmt: skip
