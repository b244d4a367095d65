"""Synchronised timing of a callable: warm-up apart, first call apart, percentiles of the rest.

On a GPU a call returns before the work is done, so the device is synchronised around every sample
and the time is that between two CUDA events (`clock="device"`) or of the host clock after the
synchronisation (`clock="host"`). On the CPU the host clock is the only one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from hcf_bench.statistics import percentile

Clock = Literal["host", "device"]


@dataclass(frozen=True)
class Timing:
    """Times of one callable in milliseconds; `first_ms` is the very first call, before warm-up."""

    first_ms: float
    samples_ms: tuple[float, ...]
    warmup: int
    device: str = "cpu"
    clock: Clock = "host"

    @property
    def p50_ms(self) -> float:
        """Median of the warm samples."""
        return percentile(self.samples_ms, 50)

    @property
    def p90_ms(self) -> float:
        """90th percentile of the warm samples."""
        return percentile(self.samples_ms, 90)

    @property
    def p99_ms(self) -> float:
        """99th percentile of the warm samples."""
        return percentile(self.samples_ms, 99)


def synchronise(device: str = "cpu") -> None:
    """Waits until the device has finished what was queued; nothing to do on the CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def time_once(call: Callable[[], Any], device: str = "cpu", clock: Clock = "host") -> float:
    """Runs `call` once and returns its milliseconds.

    Raises:
        ValueError: `clock="device"` where there is no device clock.
    """
    if clock == "device":
        return _time_with_events(call, device)
    synchronise(device)
    start = time.perf_counter_ns()
    call()
    synchronise(device)
    return (time.perf_counter_ns() - start) / 1e6


def time_callable(
    call: Callable[[], Any],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: str = "cpu",
    clock: Clock = "host",
    budget_s: float | None = None,
) -> Timing:
    """First call, `warmup` calls that are thrown away, then `repeats` samples.

    Args:
        call: what is timed; its result is dropped.
        repeats: samples wanted; fewer are taken where `budget_s` runs out, at least one.
        warmup: calls after the first that do not count.
        device: "cpu" or "cuda[:n]".
        clock: "host" or, on a GPU, "device".
        budget_s: seconds for the samples.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, not {repeats} and {warmup}")
    first_ms = time_once(call, device, clock)
    for _ in range(warmup):
        call()
    samples: list[float] = []
    started = time.perf_counter()
    with collection_paused():
        while len(samples) < repeats:
            samples.append(time_once(call, device, clock))
            if budget_s is not None and time.perf_counter() - started > budget_s:
                break
    return Timing(first_ms, tuple(samples), warmup, device, clock)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collects garbage, then keeps the collector out of the samples taken inside."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Sets torch's CPU threads inside, restores them after; yields the number in force."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _time_with_events(call: Callable[[], Any], device: str) -> float:
    if not device.startswith("cuda"):
        raise ValueError(f"the device clock needs a CUDA device, not {device}; use clock='host'")
    import torch

    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
