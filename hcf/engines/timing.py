"""Latencies of several engines against each other, in rounds whose order rotates."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hcf.artifact import EngineEntry

TURN_MS = 20.0  # a fast call takes more than one sample in its turn


def time_interleaved(
    calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 2
) -> list[list[float]]:
    """Milliseconds of each call, at least `repeats` samples, in rounds whose order rotates.

    In its turn a call runs once untimed (the threads of the one before it may still spin), then
    for about `TURN_MS`, every run a sample.
    """
    runs: list[int] = []
    for call in calls:
        for _ in range(warmup):
            call()
        start = time.perf_counter()
        call()
        took_ms = (time.perf_counter() - start) * 1e3
        runs.append(max(1, min(10, round(TURN_MS / max(took_ms, 1e-3)))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        for offset in range(len(calls)):
            index = (turn + offset) % len(calls)
            calls[index]()
            for _ in range(runs[index]):
                start = time.perf_counter()
                calls[index]()
                samples[index].append((time.perf_counter() - start) * 1e3)
    return samples


def record_latency(entry: EngineEntry, samples: Sequence[float]) -> None:
    """Median, 10th and 90th percentile of `samples` (ms) into the entry."""
    ranked = statistics.quantiles([*samples, *samples], n=10, method="inclusive")
    entry.latency_ms = round(statistics.median(samples), 4)
    entry.latency_low_ms, entry.latency_high_ms = round(ranked[0], 4), round(ranked[-1], 4)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's number of threads inside; what it was, after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
