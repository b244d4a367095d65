"""Timing bookkeeping: what is counted, what is not, and what is refused. No assertion on speed."""

from __future__ import annotations

import gc

import pytest
import torch

from hcf_bench.timing import Timing, collection_paused, time_callable, time_once, torch_threads


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


@pytest.mark.gpu
def test_device_clock_sees_queued_work() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    queued = time_callable(lambda: x @ x, repeats=5, device="cuda", clock="device")
    assert queued.p50_ms > 0
