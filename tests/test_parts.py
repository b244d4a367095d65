"""Parts of a suite on tiny workloads: what each measures, and what it says when it cannot."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hcf.errors import RecipeError
from hcf_bench.opcount import count_workload
from hcf_bench.parts import PARTS
from hcf_bench.peers import PEERS
from hcf_bench.records import Row
from hcf_bench.roofline import floor_ms
from hcf_bench.rows import PartRun
from hcf_bench.statistics import Verdict
from hcf_bench.suite_recipe import Part, SuiteConfig
from hcf_bench.workloads import find_workload

KERNEL = "kernel/group_norm_silu_1x32x16x16"
# as a slow machine would have measured them
CEILINGS = {"copy": 2.0, "gemm-fp32": 0.02, "gemm-int8": 0.06}
BOX_S = 240.0
BAD = ("crashing", "wrong", "not-finite")

# Peers that no one should meet, for this process and, through sitecustomize, for every worker's.
BAD_PEERS = """
import os, signal
from hcf_bench.peers import PEERS, Peer, Prepared

FINE = {"engine": "fine", "precision": "int8-bf16"}

def add(name, prepare):
    PEERS[name] = Peer(name, "fp32", 60.0, ("cpu",), ("kernel",), lambda device: "", prepare)

def crash(case, options):
    os.kill(os.getpid(), signal.SIGSEGV)

add("crashing", crash)
add("wrong", lambda case, options: Prepared(lambda: 1.1 * case.run()))
add("not-finite", lambda case, options: Prepared(lambda: case.run() * float("nan")))
add("fine", lambda case, options: Prepared(case.run, report=FINE))
"""
AFTER_PEERS = """
import sys
from importlib.machinery import PathFinder

class After:
    def find_spec(self, name, path=None, target=None):
        if name != "hcf_bench.peers":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), __import__("bad_peers"))
        return spec

sys.meta_path.insert(0, After())
"""


def run_part(
    part: Part,
    ceilings: dict[str, float] | None = None,
    *,
    done: frozenset[tuple[str, str, int]] = frozenset(),
    seconds: float = BOX_S,
) -> dict[str, list[Any]]:
    """What a part emitted, by kind."""
    emitted: dict[str, list[Any]] = defaultdict(list)
    run = PartRun(
        suite=SuiteConfig(name="test", threads=1, parts=[part]),
        part=part,
        deadline=time.monotonic() + seconds,
        ceilings=ceilings or {},
        done=done,
        emit=lambda kind, item: emitted[kind].append(item),
        log=lambda line: None,
    )
    PARTS[part.kind](run)
    return emitted


def small(kind: Any, workload: str = KERNEL, **options: Any) -> Part:
    """A part of six short pairs that calls nothing a change below twentyfold."""
    settings = {"pairs": 6, "pairs_s": 1.0, "threshold": 20.0, "box_s": BOX_S, **options}
    return Part(name="part", kind=kind, workload=workload, **settings)


def by_name(rows: list[Row]) -> dict[str, Row]:
    assert len({row.subject for row in rows}) == len(rows)
    return {row.subject: row for row in rows}


@pytest.fixture(scope="module")
def unet_row() -> Row:
    """A tiny U-Net alone, under ceilings."""
    (row,) = run_part(small("batches", "tiny/unet", peers=["eager"], batches=[2]), CEILINGS)["rows"]
    return row


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Row]]:
    """A kernel by eager, by peers that crash and lie, and by one that does not."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "bad_peers.py").write_text(BAD_PEERS)
    (folder / "sitecustomize.py").write_text(AFTER_PEERS)
    before = dict(PEERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        __import__("bad_peers")
        part = small("peers", baseline="eager", peers=[*BAD, "fine"], pairs_s=4.0)
        yield by_name(run_part(part, CEILINGS)["rows"])
    del sys.modules["bad_peers"]
    PEERS.clear()
    PEERS.update(before)


def test_a_row_holds_time_cost_and_what_ran(unet_row: Row) -> None:
    row = unet_row
    assert row.status == "ok" and not row.reason and row.provenance == "measured"
    assert row.latency is not None and len(row.latency.samples_ms) >= 5
    assert row.latency.first_ms is not None
    assert row.batch == 2 and row.throughput_per_s == pytest.approx(2e3 / row.latency.p50_ms)
    assert row.memory is not None and row.memory.host_peak_mib is not None
    assert row.engine["engine"] == "eager" and row.engine["threads"] == 1
    assert row.speedup is None and not row.baseline


def test_a_row_is_held_against_the_ceilings_of_its_dtype(unet_row: Row) -> None:
    row = unet_row
    ops = count_workload(find_workload("tiny/unet"), 2, "fp32")
    tflop = sum(op.flops for op in ops) / 1e12
    assert row.latency is not None
    seconds = row.latency.p50_ms / 1e3
    assert row.tflop == pytest.approx(tflop) and tflop > 0.0
    assert row.gbyte == pytest.approx(sum(op.bytes for op in ops) / 1e9)
    assert row.roofline_ms == pytest.approx(floor_ms(ops, CEILINGS, "fp32"))
    assert row.fraction_of_peak == pytest.approx(tflop / seconds / CEILINGS["gemm-fp32"])
    assert row.fraction_of_roofline == pytest.approx(row.roofline_ms / row.latency.p50_ms)


def test_int8_in_mixed_arithmetic_is_held_against_the_ceiling_of_int8(rows: dict[str, Row]) -> None:
    ops = count_workload(find_workload(KERNEL), 1, "fp32")
    row = rows["fine"]
    assert row.dtype == "int8-bf16"
    assert row.roofline_ms == pytest.approx(floor_ms(ops, CEILINGS, "int8"))


def test_a_peer_is_paired_with_the_baseline(rows: dict[str, Row]) -> None:
    row = rows["fine"]
    assert row.status == "ok" and row.baseline == "eager"
    # within a factor of twenty, unless the seconds did not do for six pairs
    assert row.verdict is (Verdict.SAME if row.pairs >= 6 else Verdict.UNDECIDED)
    assert row.speedup is not None and row.speedup.low <= row.speedup.value <= row.speedup.high
    assert row.latency is not None and len(row.latency.samples_ms) >= row.pairs
    assert row.clock in ("wall", "cpu")
    assert row.engine == {"engine": "fine", "precision": "int8-bf16"}
    assert row.fidelity == {"sqnr_db": 999.0, "max_abs_error": 0.0}  # to eager fp32
    assert row.fraction_of_roofline is not None
    assert rows["eager"].status == "ok" and rows["eager"].speedup is None
    assert rows["eager"].fidelity == row.fidelity


def test_bad_peers_are_named_and_the_others_are_timed(rows: dict[str, Row]) -> None:
    assert [(name, row.status) for name, row in rows.items()] == [
        ("eager", "ok"), ("crashing", "failed"), ("wrong", "invalid"), ("not-finite", "invalid"),
        ("fine", "ok"),
    ]  # fmt: skip
    assert "SIGSEGV" in rows["crashing"].reason
    assert "20.0 dB" in rows["wrong"].reason and "60" in rows["wrong"].reason
    assert "not-finite's output is not finite" in rows["not-finite"].reason
    for name in BAD:  # nothing that would look like a time
        assert rows[name].latency is None and rows[name].speedup is None
        assert rows[name].throughput_per_s is None


def test_what_does_not_answer_is_timed_out_and_the_next_is_tried() -> None:
    part = small("batches", peers=["eager"], batches=[1, 2, 3], subject_s=0.1)
    began = time.monotonic()
    rows = run_part(part)["rows"]
    assert time.monotonic() - began < 20.0
    assert [(row.batch, row.status) for row in rows] == [(n, "timed_out") for n in (1, 2, 3)]
    assert all("time box" in row.reason and row.latency is None for row in rows)


def test_what_was_done_before_is_not_measured_again() -> None:
    done = frozenset({(KERNEL, "eager", 1), (KERNEL, "eager", 2)})
    part = small("batches", peers=["eager"], batches=[1, 2, 4], subject_s=0.1)
    rows = run_part(part, done=done)["rows"]
    assert [(row.batch, row.status) for row in rows] == [(4, "timed_out")]


def test_nothing_is_begun_after_the_time_box() -> None:
    assert run_part(small("batches", peers=["eager"], batches=[1]), seconds=0.0) == {}
    assert run_part(small("profile", dtypes=["fp32"]), CEILINGS, seconds=0.0) == {}


def test_a_profile_of_the_layers() -> None:
    found = run_part(small("profile", dtypes=["fp32", "bf16"]), CEILINGS)
    (profile,) = found["profiles"]
    assert profile.workload == KERNEL and profile.dtype == "fp32" and profile.batch == 1
    assert profile.layers and profile.total_ms > 0.0 and profile.floor_ms > 0.0
    assert found["notes"] == ["part: no ceiling for bf16, so no profile"]


def test_an_artefact_from_prompt_to_pixels(tiny_folder: Path) -> None:
    folder = f"{tiny_folder}@eager-fp32"
    part = small("artifacts", "", baseline=folder, peers=["no/such/folder"], steps=2, subject_s=0.1)
    row, late = run_part(part)["rows"]
    assert row.status == "ok" and row.subject == "tiny, 2 steps, eager fp32", row.reason
    assert row.stages is not None and row.stages.denoiser_calls == 2
    assert row.latency is not None
    stages = (row.stages.text_ms, row.stages.denoise_ms, row.stages.decode_ms)
    assert min(stages) > 0.0 and max(stages) < max(row.latency.samples_ms)
    assert row.throughput_per_s == pytest.approx(1e3 / row.latency.p50_ms)
    assert row.tflop is None and row.fraction_of_peak is None
    assert late.status == "timed_out" and "no/such/folder" in late.reason


def test_names_are_looked_up_when_a_part_is_made() -> None:
    with pytest.raises(RecipeError, match="tiny/unett") as caught:
        small("peers", "tiny/unett", baseline="eager")
    assert "tiny/unet" in caught.value.fix
    for change in ({"baseline": "eagre"}, {"peers": ["eagre"]}):
        with pytest.raises(RecipeError, match="eagre") as caught:
            small("peers", **{"baseline": "eager", **change})
        assert "eager" in caught.value.fix
    with pytest.raises(ValidationError, match="kind profile needs dtypes"):
        small("profile")
    with pytest.raises(ValidationError, match="name"):
        Part(name="Not A File Name", kind="ceilings")
    two = [small("batches", batches=[1]), small("batches", batches=[1])]
    with pytest.raises(ValidationError, match="two parts are called part"):
        SuiteConfig(name="test", parts=two)
