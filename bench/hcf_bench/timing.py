"""Synchronised timing of a callable: warm-up apart, first call apart, percentiles of the rest.

On a GPU a call returns before the work is done, so the device is synchronised around every sample
and the time is that between two CUDA events (`clock="device"`) or of the host clock after the
synchronisation (`clock="host"`). On the CPU the host clock is the only one.

A kernel of a few microseconds is timed by `time_batches`: everything is queued before anything is
read, so that no launch is waited for. `before` says what it finds in the cache: by default what its
last call left (warm), with `cache_flusher` nothing (cold, as between the layers of a network).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from hcf_bench.statistics import percentile

Clock = Literal["host", "device"]
# A server's last level cache is shared with its other tenants and can reach 480 MiB; emptying it
# before each sample would cost more than the sample. This empties what belongs to a core (L1, L2).
FLUSH_CAP: Final = 64 * 2**20
UNKNOWN_CACHE: Final = 32 * 2**20
LAUNCH_S: Final = 10e-6  # generous time of one kernel launch on the host
LONGEST_HOLD_S: Final = 20e-3


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


def time_once(
    call: Callable[[], Any],
    device: str = "cpu",
    clock: Clock = "host",
    before: Callable[[], Any] | None = None,
) -> float:
    """Runs `call` once and returns its milliseconds; `before` runs first and is not counted.

    Raises:
        ValueError: `clock="device"` where there is no device clock.
    """
    if clock == "device":
        return _time_with_events(call, device, before)
    if before is not None:
        before()
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
    before: Callable[[], Any] | None = None,
) -> Timing:
    """First call, `warmup` calls that are thrown away, then `repeats` samples.

    Args:
        call: what is timed; its result is dropped.
        repeats: samples wanted; fewer are taken where `budget_s` runs out, at least one.
        warmup: calls after the first that do not count.
        device: "cpu" or "cuda[:n]".
        clock: "host" or, on a GPU, "device".
        budget_s: seconds for the samples.
        before: runs before each sample, uncounted; `cache_flusher(device)` makes samples cold.
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
            samples.append(time_once(call, device, clock, before))
            if budget_s is not None and time.perf_counter() - started > budget_s:
                break
    return Timing(first_ms, tuple(samples), warmup, device, clock)


def time_batches(
    call: Callable[[], Any],
    *,
    calls: int = 1,
    samples: int = 50,
    warmup: int = 3,
    device: str = "cpu",
    before: Callable[[], Any] | None = None,
) -> Timing:
    """Milliseconds per call over `samples` batches of `calls` calls each, for short kernels.

    On a GPU all batches are queued behind a kernel that waits, each between its own pair of
    events, and read after one synchronisation: the host's launches are hidden while
    samples * calls stays below the depth of the queue (about 1000). On the CPU a batch is timed by
    the host clock, so that reading the clock is spread over its calls.

    Args:
        call: what is timed; its result is dropped.
        calls: between one pair of events.
        samples: batches.
        warmup: calls after the first that do not count.
        device: "cpu" or "cuda[:n]".
        before: runs before each batch, uncounted, as `cache_flusher(device)`; needs calls=1, since
            the second call of a batch would find what the first one left.
    """
    if calls < 1 or samples < 1 or warmup < 0:
        raise ValueError(
            f"calls and samples must be >= 1 and warmup >= 0, not {calls}, {samples} and {warmup}"
        )
    if before is not None and calls > 1:
        raise ValueError(f"before each sample needs calls=1, not {calls}")
    queued = device.startswith("cuda")
    first_ms = time_once(call, device)
    for _ in range(warmup):
        call()
    with collection_paused():
        if queued:
            times = _queue_batches(call, calls, samples, device, before)
        else:
            times = [time_once(lambda: _repeat(call, calls), before=before) for _ in range(samples)]
    clock: Clock = "device" if queued else "host"
    return Timing(first_ms, tuple(ms / calls for ms in times), warmup, device, clock)


def last_cache_bytes(device: str = "cpu") -> int:
    """Size of the last cache before memory: a GPU's L2, a CPU's largest (32 MiB if unknown)."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_read_size(path) for path in sizes), default=0) or UNKNOWN_CACHE


def cache_flusher(device: str = "cpu") -> Callable[[], None]:
    """A callable that replaces what the caches hold by a buffer of its own.

    The buffer has twice the size of the last cache, on the CPU at most `FLUSH_CAP`; it is read and
    written, because a plain fill may go around the caches.
    """
    import torch

    size = 2 * last_cache_bytes(device)
    if not device.startswith("cuda"):
        size = min(size, FLUSH_CAP)
    buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)

    def flush() -> None:
        buffer.add_(1)

    return flush


@dataclass(frozen=True)
class Overhead:
    """What timing costs, microseconds per iteration, medians on a callable that does nothing.

    `inside_us` is part of every sample; `loop_us` is the whole loop: clocks, synchronisation,
    bookkeeping.
    """

    inside_us: float
    loop_us: float


def harness_overhead_us(
    device: str = "cpu", clock: Clock = "host", iterations: int = 5000
) -> Overhead:
    """Measures the cost of `time_callable` itself."""
    inside = time_callable(_nothing, repeats=iterations, warmup=10, device=device, clock=clock)
    samples: list[float] = []
    loop = loop_overhead_us(lambda: samples.append(time_once(_nothing, device, clock)), iterations)
    return Overhead(round(1e3 * inside.p50_ms, 3), round(loop, 3))


def loop_overhead_us(step: Callable[[], Any], iterations: int = 5000, block: int = 100) -> float:
    """Median microseconds per `step()`, over blocks of `block`: what a timing loop's body costs."""
    if iterations < 1 or block < 1:
        raise ValueError(f"iterations and block must be >= 1, not {iterations} and {block}")
    block = min(block, iterations)
    found: list[float] = []
    with collection_paused():
        for _ in range(iterations // block):
            start = time.perf_counter_ns()
            _repeat(step, block)
            found.append((time.perf_counter_ns() - start) / 1e3 / block)
    return median(found)


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


def _nothing() -> None:
    pass


def _repeat(call: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        call()


def _read_size(path: Path) -> int:
    """Bytes of a size as the kernel writes it ("491520K"); 0 where it cannot be read."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    try:
        text = path.read_text(encoding="utf-8").strip()
        return int(text.rstrip("KMG")) * units.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0


def _queue_batches(
    call: Callable[[], Any],
    calls: int,
    samples: int,
    device: str,
    before: Callable[[], Any] | None,
) -> list[float]:
    """Milliseconds of each batch, all launched before the first one runs."""
    import torch

    with torch.cuda.device(device):
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(samples)
        ]
        torch.cuda.synchronize()
        hold_device(samples * (calls + 3))
        for start, stop in marks:
            if before is not None:
                before()
            start.record()
            _repeat(call, calls)
            stop.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in marks]


def hold_device(launches: int) -> None:
    """Queues a kernel that keeps the current GPU waiting while the host launches `launches`."""
    import torch

    # `_sleep` counts clock cycles; at 2 GHz these are LAUNCH_S each, on a slower clock more.
    seconds = min(launches * LAUNCH_S, LONGEST_HOLD_S)
    torch.cuda._sleep(int(seconds * 2e9))


def _time_with_events(
    call: Callable[[], Any], device: str, before: Callable[[], Any] | None = None
) -> float:
    if not device.startswith("cuda"):
        raise ValueError(f"the device clock needs a CUDA device, not {device}; use clock='host'")
    import torch

    with torch.cuda.device(device):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if before is not None:
            before()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
