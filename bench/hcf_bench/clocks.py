"""Two clocks a sample: how long it took, and how much processor time it used.

On a quiet machine the wall clock is what a user waits for. On a busy one it measures the others:
a call longer than a slice of the scheduler is put aside while they run, by whole slices, so 2 %
more work may take the same time or 10 % more. Processor time (user and system, all threads of the
process) leaves the waiting out. How much of it there is, the kernel counts per thread: time spent
runnable but not running (`/proc/<pid>/task/*/schedstat`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcf_bench.timing import Clock, synchronise, time_once

# Above this share of waiting, the wall clock says more about the machine's other work.
CONTENDED = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed call, milliseconds. `cpu_ms` is None where only one clock makes sense (a GPU)."""

    wall_ms: float
    cpu_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Since its start, nanoseconds: what the process's threads ran and, ready to run, waited."""

    cpu_ns: int
    waiting_ns: int


def sample_call(call: Callable[[], Any], device: str = "cpu", clock: Clock = "host") -> Sample:
    """Runs `call` once between synchronisations. Raises ValueError as `time_once` does."""
    if clock == "device":
        return Sample(time_once(call, device, clock))
    if device != "cpu":
        synchronise(device)
    start, cpu = time.perf_counter_ns(), time.process_time_ns()
    call()
    if device != "cpu":
        synchronise(device)
        return Sample((time.perf_counter_ns() - start) / 1e6)
    used = time.process_time_ns() - cpu
    return Sample((time.perf_counter_ns() - start) / 1e6, used / 1e6)


def read_usage(pid: int | None = None) -> Usage | None:
    """Of a process's living threads; None where the kernel does not tell."""
    tasks = Path(f"/proc/{pid or 'self'}/task")
    ran = waited = 0
    try:
        for task in tasks.iterdir():
            try:
                cells = (task / "schedstat").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread ended while it was listed
            ran += int(cells[0])
            waited += int(cells[1])
    except (OSError, ValueError, IndexError):
        return None
    return Usage(ran, waited)


def contention(before: Usage | None, after: Usage | None) -> float | None:
    """Share of the time between two readings that threads waited for a processor; 0 is quiet.

    None where nothing was read. Threads that ended in between can only make it smaller.
    """
    if before is None or after is None:
        return None
    ran = max(after.cpu_ns - before.cpu_ns, 0)
    waited = max(after.waiting_ns - before.waiting_ns, 0)
    return waited / (ran + waited) if ran + waited > 0 else None
