"""Timing bookkeeping: what is counted, what is not, and what is refused. No assertion on speed."""

from __future__ import annotations

import gc
import time

import psutil
import pytest
import torch

from hcf_bench.timing import (
    FLUSH_CAP,
    Timing,
    cache_flusher,
    collection_paused,
    harness_overhead_us,
    last_cache_bytes,
    loop_overhead_us,
    time_batches,
    time_callable,
    time_once,
    torch_threads,
)


def test_first_call_and_warmup_are_kept_apart() -> None:
    calls: list[int] = []
    timing = time_callable(lambda: calls.append(1), repeats=5, warmup=3)
    assert len(calls) == 1 + 3 + 5
    assert len(timing.samples_ms) == 5
    assert timing.first_ms > 0
    assert timing.p50_ms <= timing.p90_ms <= timing.p99_ms


def test_budget_cuts_the_samples_but_leaves_one() -> None:
    timing = time_callable(lambda: None, repeats=1000, warmup=0, budget_s=0.0)
    assert len(timing.samples_ms) == 1


def test_percentiles_come_from_the_warm_samples() -> None:
    timing = Timing(first_ms=1000.0, samples_ms=tuple(float(ms) for ms in range(1, 102)), warmup=0)
    assert (timing.p50_ms, timing.p90_ms, timing.p99_ms) == pytest.approx((51.0, 91.0, 100.0))


def test_garbage_collection_is_paused_and_restored() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError), collection_paused():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    with torch_threads(1) as used:
        assert used == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with torch_threads(None) as used:
        assert used == before


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="device clock"):
        time_once(lambda: None, "cpu", "device")
    with pytest.raises(ValueError, match="repeats"):
        time_callable(lambda: None, repeats=0)
    with pytest.raises(ValueError, match="threads"), torch_threads(0):
        pass


def test_an_error_in_the_callable_is_not_hidden() -> None:
    def fails() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        time_callable(fails)


def test_what_runs_before_a_sample_is_not_counted() -> None:
    order: list[str] = []

    def before() -> None:
        order.append("before")
        time.sleep(0.2)

    assert time_once(lambda: order.append("call"), before=before) < 200.0
    assert order == ["before", "call"]
    timing = time_callable(lambda: None, repeats=2, warmup=1, before=before)
    assert order.count("before") == 1 + 2  # neither the first call nor the warm-up is a sample
    assert max(timing.samples_ms) < 200.0


def test_batches_give_the_time_of_one_call() -> None:
    calls: list[int] = []
    timing = time_batches(lambda: calls.append(1), calls=7, samples=3, warmup=2)
    assert len(calls) == 1 + 2 + 7 * 3
    assert len(timing.samples_ms) == 3
    sleepy = time_batches(lambda: time.sleep(0.02), calls=10, samples=2, warmup=0)
    assert 20.0 <= sleepy.p50_ms < 200.0  # 200 ms would be the whole batch


def test_batches_refuse_what_would_mislead() -> None:
    with pytest.raises(ValueError, match="calls=1"):
        time_batches(lambda: None, calls=2, before=lambda: None)
    with pytest.raises(ValueError, match="samples"):
        time_batches(lambda: None, samples=0)


def test_the_flush_covers_the_cache_up_to_its_cap() -> None:
    size = last_cache_bytes("cpu")
    assert size >= 2**16
    before = psutil.Process().memory_info().rss
    flush = cache_flusher("cpu")
    flush()
    grown = psutil.Process().memory_info().rss - before
    assert grown >= 0.5 * min(2 * size, FLUSH_CAP)
    samples: list[float] = []
    samples.append(time_once(lambda: None, before=flush))
    assert samples[0] >= 0.0


def test_the_harness_states_its_own_cost() -> None:
    overhead = harness_overhead_us(iterations=200)
    assert 0.0 < overhead.inside_us
    assert 0.0 < overhead.loop_us
    slept = loop_overhead_us(lambda: time.sleep(0.001), iterations=4, block=2)
    assert slept >= 1000.0
    with pytest.raises(ValueError, match="iterations"):
        loop_overhead_us(lambda: None, iterations=0)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_queued_and_cold_ones_slower() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    y = torch.empty_like(x)
    warm = time_batches(lambda: y.copy_(x), samples=100, device="cuda")
    cold = time_batches(
        lambda: y.copy_(x), samples=100, device="cuda", before=cache_flusher("cuda")
    )
    assert warm.clock == cold.clock == "device"
    assert 0.0 < warm.p50_ms < cold.p50_ms
    inside = harness_overhead_us("cuda", "device", iterations=200)
    assert inside.inside_us > 0.0


@pytest.mark.gpu
def test_device_clock_sees_queued_work() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    queued = time_callable(lambda: x @ x, repeats=5, device="cuda", clock="device")
    assert queued.p50_ms > 0
