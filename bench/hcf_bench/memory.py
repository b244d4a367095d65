"""Peak memory inside a `with` block: of this process on the host, and of torch on a GPU.

The host's peak is the resident set's high-water mark (VmHWM), which Linux lets a process reset. It
includes what was resident on entry: interpreter, libraries, and what was built before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hcf_bench.records import Memory

MIB: Final = 2**20
STATUS: Final = Path("/proc/self/status")
CLEAR_REFS: Final = Path("/proc/self/clear_refs")
INSIDE: Final = "VmHWM, reset on entry"
SINCE_START: Final = "VmHWM since the process started"
RUSAGE: Final = "ru_maxrss since the process started"


@dataclass
class Peak:
    """What a `peak_memory` block reached; filled when the block ends, also by an exception.

    `host_source` says what the host's figure is: `INSIDE` the block, or only a bound from above.
    `device_reserved_mib` is what torch's allocator held at most; `device_grown_mib` is by how much
    the whole GPU's used memory grew, which alone sees what other runtimes (ONNX Runtime, TensorRT)
    allocate, and other processes too.
    """

    memory: Memory = Memory()
    host_source: str = ""
    device_reserved_mib: float | None = None
    device_grown_mib: float | None = None


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Peak]:
    """Measures the peaks of what runs inside; a block inside another resets the outer one's."""
    peak = Peak()
    on_gpu = device.startswith("cuda")
    free_before = _reset_device(device) if on_gpu else 0
    was_reset = _reset_host()
    try:
        yield peak
    finally:
        host, peak.host_source = _host_peak_mib(was_reset)
        allocated = None
        if on_gpu:
            allocated, peak.device_reserved_mib, free = _device_peak(device)
            peak.device_grown_mib = round((free_before - free) / MIB, 1)
        peak.memory = Memory(host_peak_mib=host, device_peak_mib=allocated)


def _reset_host() -> bool:
    """Sets VmHWM to what is resident now; False where the kernel does not allow it."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _host_peak_mib(was_reset: bool) -> tuple[float | None, str]:
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                kib = int(line.split()[1])
                return round(kib / 1024, 1), INSIDE if was_reset else SINCE_START
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None, "this system does not tell"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(peak * unit / MIB, 1), RUSAGE


def _reset_device(device: str) -> int:
    """Resets torch's peaks; the GPU's free bytes."""
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.mem_get_info(device)[0])


def _device_peak(device: str) -> tuple[float, float, int]:
    """Peak allocated and reserved MiB of torch, and the GPU's free bytes."""
    import torch

    torch.cuda.synchronize(device)
    allocated = torch.cuda.max_memory_allocated(device) / MIB
    reserved = torch.cuda.max_memory_reserved(device) / MIB
    return round(allocated, 1), round(reserved, 1), int(torch.cuda.mem_get_info(device)[0])
