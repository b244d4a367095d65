"""The harness measured by itself: its bounds, its load, and a short form beside other work."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hcf_bench.records import SelfTest
from hcf_bench.selftest import (
    BLOCKS,
    Blocks,
    SelfTestConfig,
    describe,
    failures,
    run_selftest,
    synthetic_load,
)


def flops(module: torch.nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        module()
    return counter.get_total_flops()


def result(slowdown: float = 0.0, **changes: Any) -> SelfTest:
    """200 comparisons without an error, but for `changes`."""
    fields = {
        "name": "slower" if slowdown else "same", "slowdown": slowdown, "comparisons": 200,
        "alarms": 0, "right": 200, "undecided": 0, "pairs_p50": 100.0, "seconds_p50": 2.0,
        "seconds_max": 9.0, "load": 4, "overhead_us": 1.0, **changes,
    }  # fmt: skip
    return SelfTest(**fields)


def living_children() -> int:
    children = psutil.Process().children(recursive=True)
    return sum(child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"comparisons": 0}, "comparisons must be >= 1"),
        ({"load": -1}, "load >= 0"),
        ({"processes": 3}, "processes 1 or 2"),
        ({"slowdown": 0.01, "threshold": 0.01}, "cannot pass a threshold"),
        ({"slowdown": 0.01, "threshold": 0.02}, "cannot pass a threshold"),
        ({"threshold": 0.0}, "between 0 and the slowdown"),
    ],
)
def test_a_test_that_can_show_nothing_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SelfTestConfig(**wrong)


def test_more_blocks_are_more_of_the_same_work() -> None:
    base, slower = Blocks(BLOCKS), Blocks(BLOCKS + 1)
    assert (base.blocks, slower.blocks) == (50, 51)
    assert flops(slower) * BLOCKS == flops(base) * (BLOCKS + 1)  # 2 % more, exactly
    weights = zip(base.parameters(), slower.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(
        base.parameters(), slower.parameters(), strict=True
    ))  # fmt: skip
    assert base().shape == slower().shape and torch.isfinite(slower()).all()
    assert not torch.equal(base(), Blocks(BLOCKS, seed=1)())


def test_the_default_slowdown_is_one_block_of_fifty() -> None:
    config = SelfTestConfig()
    assert config.comparisons == 200 and config.load == 4
    assert round(config.blocks * (1.0 + config.slowdown)) == config.blocks + 1
    assert config.threshold < config.slowdown


@pytest.mark.parametrize(
    ("test", "missed"),
    [
        (result(), ""),
        (result(alarms=1, right=199), ""),
        (result(alarms=2, right=198), "2 false alarms in 200, at most 1"),
        (result(undecided=10, right=190), ""),
        (result(undecided=11, right=189), "11 of 200 undecided, at most 10"),
        (result(0.02, right=198), ""),
        (result(0.02, right=197), "197 of 200 slowdowns of 2.0% caught, at least 198"),
        (result(0.02, undecided=2, right=198), ""),
        (result(seconds_max=299.0), ""),
        (result(seconds_max=330.0), "330 s"),
        (result(0.02, seconds_max=330.0), "330 s"),
    ],
)
def test_bounds_are_exact(test: SelfTest, missed: str) -> None:
    found = failures([test])
    if missed:
        assert len(found) == 1 and missed in found[0]
    else:
        assert found == []


def test_a_shortened_form_may_allow_an_error() -> None:
    alarm = result(comparisons=20, right=19, alarms=1)
    miss = result(0.02, comparisons=20, right=19)
    assert len(failures((alarm, miss))) == 2
    assert failures((alarm, miss), allowance=1) == []
    worse = result(comparisons=20, right=18, alarms=2)
    assert len(failures((worse, miss), allowance=1)) == 1


def test_a_self_test_in_words() -> None:
    same = describe(result(alarms=1, right=196, undecided=3))
    assert "1 false alarms of 200" in same and "3 undecided" in same and "load 4" in same
    slower = describe(result(0.02, right=199))
    assert "2.0% more work" in slower and "199 caught of 200" in slower


def test_the_load_ends_with_its_block() -> None:
    before = living_children()
    with synthetic_load(3):
        assert living_children() == before + 3
        load = psutil.Process().children()[-3:]
        used = [sum(child.cpu_times()[:2]) for child in load]
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            time.sleep(0.1)
            if all(sum(c.cpu_times()[:2]) > u for c, u in zip(load, used, strict=True)):
                break
        else:
            pytest.fail("the load does not work")
    assert living_children() == before
    with pytest.raises(KeyboardInterrupt), synthetic_load(2):
        raise KeyboardInterrupt
    assert living_children() == before
    with synthetic_load(0):
        assert living_children() == before


def short(**options: Any) -> SelfTestConfig:
    """Margins that noise does not reach: 8 % more work against a threshold of 3 %."""
    settings: dict[str, Any] = {
        "comparisons": 4, "slowdown": 0.08, "threshold": 0.03, "load": 2, "budget_s": 8.0,
    }  # fmt: skip
    return SelfTestConfig(**{**settings, **options})


def test_beside_other_work_nothing_is_alarmed_and_slowdowns_are_caught() -> None:
    threads, lines = torch.get_num_threads(), list[str]()
    before = living_children()
    same, slower = run_selftest(short(), lines.append)
    assert living_children() == before and torch.get_num_threads() == threads
    assert (same.slowdown, same.comparisons) == (0.0, 4)
    assert (slower.slowdown, slower.comparisons) == (0.08, 4)
    assert same.name != slower.name
    assert same.alarms == 0, lines
    assert slower.right >= 3, lines
    for test in (same, slower):
        assert test.right + test.undecided + test.alarms <= 4
        assert test.pairs_p50 >= 6 and 0.0 < test.seconds_p50 <= test.seconds_max < 16.0
        assert (test.load, test.processes) == (2, 1)
        assert test.overhead_us is not None and test.overhead_us > 0.0
        assert test.call_ms is not None and test.call_ms > 0.0
    assert any("waiting" in line for line in lines)


def test_two_processes_take_turns() -> None:
    config = short(comparisons=1, slowdown=0.5, threshold=0.2, load=0, processes=2)
    same, slower = run_selftest(config, lambda line: None)
    assert same.processes == slower.processes == 2
    assert same.alarms == 0 and slower.right == 1
