"""Clocks, heat, limits and other users of a GPU, read before and after timing; nothing is set.

NVML is asked where its Python binding is installed, `nvidia-smi` where not. A container often
hides the processes of others, so use and memory are judged too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

import psutil

from hcf.errors import MissingDependency

MIB: Final = 2**20
BUSY_PERCENT: Final = 10.0
# What drivers reserve on an idle card (up to 0.7 GiB) and a context of our own fit below this.
BUSY_MIB: Final = 1536.0
SLOWER: Final = 0.9  # an SM clock below this share of the one before is worth a note
SMI_TIMEOUT_S: Final = 20.0

# Bits of nvmlClocksEventReasons; the last column: whether the clock was cut against our will.
REASONS: Final[tuple[tuple[int, str, bool], ...]] = (
    (0x1, "idle", False),
    (0x2, "application clocks", False),
    (0x4, "power cap", True),
    (0x8, "hardware slowdown", True),
    (0x10, "sync boost", True),
    (0x20, "thermal slowdown", True),
    (0x40, "hardware thermal slowdown", True),
    (0x80, "power brake", True),
    (0x100, "display clocks", False),
)
CUTS: Final = frozenset(name for _, name, cut in REASONS if cut)
SMI_FIELDS: Final = (
    "index", "name", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw",
    "power.limit", "utilization.gpu", "memory.used", "memory.total",
)  # fmt: skip
# The same mask under its present and its former name.
SMI_REASONS: Final = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; its id is the host's where a container hides its own."""

    pid: int
    name: str = ""
    memory_mib: float | None = None


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU; None where the card or driver does not tell.

    `cut_ms` counts, since the driver was loaded, for how long a reason held the clock down.
    """

    index: str
    name: str
    sm_clock_mhz: float | None = None
    sm_clock_max_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    utilisation_percent: float | None = None
    memory_used_mib: float | None = None
    memory_total_mib: float | None = None
    reasons: tuple[str, ...] = ()
    processes: tuple[GpuProcess, ...] | None = None
    cut_ms: Mapping[str, float] = field(default_factory=dict)


def read_gpu_state(device: str = "cuda") -> GpuState | None:
    """Reads the GPU that torch calls `device`; None on the CPU and where nothing can be asked."""
    if not device.startswith("cuda"):
        return None
    chosen = visible_gpu(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return _read_nvml(chosen) or read_smi(chosen)


def require_exclusive(device: str = "cuda", *, patience_s: float = 3.0) -> GpuState | None:
    """Refuses to time on a GPU that somebody else uses.

    This process, its parents and its children are not somebody else. A card that looks busy is
    looked at again for `patience_s` seconds: use is averaged over up to a second, ours included.

    Returns:
        The state that was accepted; None where it cannot be read, which is worth a note.

    Raises:
        MissingDependency: another process, use or memory; all are named.
    """
    deadline = time.monotonic() + patience_s
    while True:
        state = read_gpu_state(device)
        if state is None:
            return None
        busy = busy_reasons(
            state, own_pids=own_process_tree(), held_mib=_held_mib(device), exists=psutil.pid_exists
        )
        if not busy:
            return state
        if time.monotonic() >= deadline:
            raise MissingDependency(
                f"GPU {state.index} ({state.name}) is in use: {'; '.join(busy)}",
                "wait for it, stop it, or choose another card with CUDA_VISIBLE_DEVICES; "
                "nothing was timed",
            )
        time.sleep(min(1.0, patience_s))


def busy_reasons(
    state: GpuState,
    *,
    own_pids: Collection[int],
    held_mib: float | None = None,
    exists: Callable[[int], bool] = lambda pid: True,
) -> list[str]:
    """Signs that somebody else uses the GPU.

    Args:
        state: a look at the card.
        own_pids: processes that are ours.
        held_mib: what torch holds in this process; None without a CUDA context.
        exists: whether an id belongs to a process that we can see. One that we cannot see, while
            we have a context and none of ours is listed, is our own under its id on the host.
    """
    listed = state.processes or ()
    ours = [process for process in listed if process.pid in own_pids]
    others = [process for process in listed if process.pid not in own_pids]
    if held_mib is not None and not ours and len(others) == 1 and not exists(others[0].pid):
        ours, others = others, []
    found = [_describe(process) for process in others]
    if (state.utilisation_percent or 0.0) > BUSY_PERCENT:
        found.append(f"{state.utilisation_percent:.0f} % utilised, more than {BUSY_PERCENT:.0f} %")
    listed_mib = sum(process.memory_mib or 0.0 for process in ours)
    allowed = BUSY_MIB + max(held_mib or 0.0, listed_mib)
    if (state.memory_used_mib or 0.0) > allowed:
        found.append(f"{state.memory_used_mib:.0f} MiB used, more than {allowed:.0f} MiB")
    return found


def throttled(before: GpuState | None, after: GpuState | None) -> list[str]:
    """Why a row timed between two looks should carry a note; empty where nothing is known."""
    states = [state for state in (before, after) if state is not None]
    found = list(dict.fromkeys(r for state in states for r in state.reasons if r in CUTS))
    if before is None or after is None:
        return found
    for reason, total in after.cut_ms.items():
        spent = total - before.cut_ms.get(reason, total)
        if spent > 0.0:
            found = [name for name in found if name != reason]
            found.append(f"{reason} for {spent:.0f} ms")
    idle = "idle" in before.reasons + after.reasons
    if not idle and before.sm_clock_mhz and after.sm_clock_mhz:
        if after.sm_clock_mhz < SLOWER * before.sm_clock_mhz:
            found.append(
                f"SM clock fell from {before.sm_clock_mhz:g} to {after.sm_clock_mhz:g} MHz"
            )
    return found


def decode_reasons(mask: int) -> tuple[str, ...]:
    """Names of the bits of a clocks event mask; unknown bits in hexadecimal."""
    names = [name for bit, name, _ in REASONS if mask & bit]
    rest = mask & ~sum(bit for bit, _, _ in REASONS)
    return (*names, f"reason {rest:#x}") if rest else tuple(names)


def visible_gpu(device: str, visible: str | None) -> str:
    """Index or UUID, as the driver knows it, of torch's `device` under CUDA_VISIBLE_DEVICES."""
    number = int(device.partition(":")[2] or 0)
    listed = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    return listed[number] if number < len(listed) else str(number)


def own_process_tree() -> frozenset[int]:
    """This process, its parents and its children at any depth."""
    me = psutil.Process()
    try:
        family = [*me.parents(), *me.children(recursive=True)]
    except psutil.Error:  # one of them ended while we looked
        family = []
    return frozenset({me.pid, *(process.pid for process in family)})


def read_smi(chosen: str, tool: str = "nvidia-smi") -> GpuState | None:
    """Asks `nvidia-smi` about one GPU; None where it is missing, fails or says nothing."""
    for reasons in SMI_REASONS:
        text = _run_smi(tool, chosen, f"--query-gpu={','.join((*SMI_FIELDS, reasons))}")
        if text is not None:
            break
    else:
        return None
    processes = _run_smi(tool, chosen, "--query-compute-apps=pid,process_name,used_memory")
    return parse_smi(text, processes)


def parse_smi(text: str, processes: str | None = None) -> GpuState | None:
    """First GPU of the CSV that `SMI_FIELDS` and a mask of reasons give; None if there is none."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(SMI_FIELDS) + 1:
            continue
        sm, sm_max, memory_clock, heat, power, limit, use, used, total = map(_number, cells[2:-1])
        try:
            mask = int(cells[-1], 16)
        except ValueError:
            mask = 0
        listed = None if processes is None else parse_smi_processes(processes)
        return GpuState(
            index=cells[0],
            name=cells[1],
            sm_clock_mhz=sm,
            sm_clock_max_mhz=sm_max,
            memory_clock_mhz=memory_clock,
            temperature_c=heat,
            power_w=power,
            power_limit_w=limit,
            utilisation_percent=use,
            memory_used_mib=used,
            memory_total_mib=total,
            reasons=decode_reasons(mask),
            processes=listed,
        )
    return None


def parse_smi_processes(text: str) -> tuple[GpuProcess, ...]:
    """Processes of the CSV `pid, process_name, used_memory`; a name may hold commas."""
    found = []
    for line in text.splitlines():
        pid, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        if pid.strip().isdigit():
            found.append(GpuProcess(int(pid), _program(name), _number(memory.strip())))
    return tuple(found)


def _describe(process: GpuProcess) -> str:
    memory = "" if process.memory_mib is None else f", {process.memory_mib:.0f} MiB"
    return f"process {process.pid} ({process.name or 'name hidden'}{memory})"


def _program(name: str) -> str:
    """Last part of a path; "" where the driver hides it ("[Not Found]")."""
    name = name.strip()
    return "" if name.startswith("[") else name.replace("\\", "/").rpartition("/")[2]


def _number(cell: str) -> float | None:
    """A figure, or None for "[N/A]", "[Not Supported]" and the like."""
    try:
        return float(cell)
    except ValueError:
        return None


def _run_smi(tool: str, chosen: str, query: str) -> str | None:
    path = shutil.which(tool)
    if path is None:
        return None
    command = [path, f"--id={chosen}", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _held_mib(device: str) -> float | None:
    """What torch's allocator holds in this process; None before it made a CUDA context."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.memory_reserved(device)) / MIB


def _read_nvml(chosen: str) -> GpuState | None:
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver
        return None
    try:
        if chosen.isdigit():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(chosen))
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(chosen)
        return _nvml_state(nvml, chosen, handle)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _nvml_state(nvml: Any, chosen: str, handle: Any) -> GpuState:
    def ask(names: Sequence[str], *arguments: Any, scale: float = 1.0) -> float | None:
        for name in names:
            try:
                return float(getattr(nvml, name)(handle, *arguments)) * scale
            except (nvml.NVMLError, AttributeError):
                continue  # an older binding or driver lacks it, or the card does not tell
        return None

    def ask_object(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    memory = ask_object("nvmlDeviceGetMemoryInfo", getattr(nvml, "nvmlMemory_v2", None))
    memory = memory or ask_object("nvmlDeviceGetMemoryInfo")
    use = ask_object("nvmlDeviceGetUtilizationRates")
    listed = ask_object("nvmlDeviceGetComputeRunningProcesses")
    mask = ask(
        ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    )
    cuts = {
        "power cap": ask_object("nvmlDeviceGetViolationStatus", nvml.NVML_PERF_POLICY_POWER),
        "thermal slowdown": ask_object(
            "nvmlDeviceGetViolationStatus", nvml.NVML_PERF_POLICY_THERMAL
        ),
    }
    return GpuState(
        index=chosen,
        name=str(ask_object("nvmlDeviceGetName") or "unknown"),
        sm_clock_mhz=ask(["nvmlDeviceGetClockInfo"], nvml.NVML_CLOCK_SM),
        sm_clock_max_mhz=ask(["nvmlDeviceGetMaxClockInfo"], nvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask(["nvmlDeviceGetClockInfo"], nvml.NVML_CLOCK_MEM),
        temperature_c=ask(["nvmlDeviceGetTemperature"], nvml.NVML_TEMPERATURE_GPU),
        power_w=ask(["nvmlDeviceGetPowerUsage"], scale=1e-3),
        power_limit_w=ask(["nvmlDeviceGetEnforcedPowerLimit"], scale=1e-3),
        utilisation_percent=None if use is None else float(use.gpu),
        memory_used_mib=None if memory is None else float(memory.used) / MIB,
        memory_total_mib=None if memory is None else float(memory.total) / MIB,
        reasons=decode_reasons(int(mask or 0)),
        processes=None if listed is None else tuple(_nvml_process(p) for p in listed),
        cut_ms={name: cut.violationTime / 1e6 for name, cut in cuts.items() if cut is not None},
    )


def _nvml_process(process: Any) -> GpuProcess:
    used = process.usedGpuMemory
    try:
        name = psutil.Process(int(process.pid)).name()
    except psutil.Error:
        name = ""
    return GpuProcess(int(process.pid), name, None if used is None else float(used) / MIB)
