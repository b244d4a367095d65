"""Peaks inside a block: real allocations, seen and forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from hcf_bench.memory import INSIDE, RUSAGE, SINCE_START, peak_memory

BLOCK_MIB = 192


def hold(mib: int) -> None:
    """Touches memory that the allocator gives back to the system at once."""
    block = np.ones(mib * 2**20, dtype=np.uint8)
    assert block[-1] == 1


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def test_a_short_peak_inside_is_seen() -> None:
    before = resident_mib()
    with peak_memory() as peak:
        assert peak.memory.host_peak_mib is None  # filled when the block ends
        hold(BLOCK_MIB)
    assert peak.memory.host_peak_mib is not None
    assert peak.memory.host_peak_mib >= before + 0.9 * BLOCK_MIB
    assert peak.host_source in (INSIDE, SINCE_START, RUSAGE)
    assert peak.memory.device_peak_mib is None
    assert peak.device_reserved_mib is None and peak.device_grown_mib is None


def test_a_peak_before_does_not_count_where_the_mark_can_be_reset() -> None:
    hold(2 * BLOCK_MIB)
    with peak_memory() as peak:
        hold(1)
    assert peak.memory.host_peak_mib is not None
    if peak.host_source == INSIDE:
        assert peak.memory.host_peak_mib < resident_mib() + BLOCK_MIB
    else:  # a mark that cannot be reset is a bound from above, and says so
        assert peak.memory.host_peak_mib >= 2 * BLOCK_MIB


def test_an_error_inside_still_leaves_the_figures() -> None:
    with pytest.raises(KeyError), peak_memory() as peak:
        raise KeyError
    assert peak.memory.host_peak_mib and peak.host_source


def test_where_the_mark_cannot_be_read_the_fallback_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "missing" / "file"
    monkeypatch.setattr("hcf_bench.memory.CLEAR_REFS", missing)
    with peak_memory() as peak:
        pass
    assert peak.host_source == SINCE_START
    monkeypatch.setattr("hcf_bench.memory.STATUS", missing)
    with peak_memory() as peak:
        pass
    assert peak.host_source == RUSAGE
    assert peak.memory.host_peak_mib and peak.memory.host_peak_mib > 50


@pytest.mark.gpu
def test_device_peaks_are_torch_s_own() -> None:
    with peak_memory("cuda") as peak:
        block = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert peak.memory.device_peak_mib is not None and peak.memory.device_peak_mib >= 64
    assert peak.device_reserved_mib is not None and peak.device_reserved_mib >= 64
    assert peak.device_grown_mib is not None
