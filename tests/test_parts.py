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
from hcf_bench.parts import PARTS, Part, PartRun, SuiteConfig
from hcf_bench.peers import PEERS
from hcf_bench.records import Row
from hcf_bench.roofline import floor_ms
from hcf_bench.statistics import Verdict
from hcf_bench.workloads import find_workload

KERNEL = "kernel/group_norm_silu_1x32x16x16"
NOT_HERE = "onnxruntime-cuda-fp16"  # a GPU's
# as a slow machine would have measured them
CEILINGS = {"copy": 2.0, "gemm-fp32": 0.02}
BOX_S = 240.0

# Peers that no one should meet, for this process and, through sitecustomize, for every worker's.
BAD_PEERS = """
import os, signal
from hcf_bench.peers import PEERS, Peer, Prepared

def add(name, prepare):
    PEERS[name] = Peer(name, "fp32", 60.0, ("cpu",), ("kernel",), lambda device: "", prepare)

def crash(case, options):
    os.kill(os.getpid(), signal.SIGSEGV)

add("crashing", crash)
add("wrong", lambda case, options: Prepared(lambda: 1.1 * case.run()))
add("not-finite", lambda case, options: Prepared(lambda: case.run() * float("nan")))
add("fine", lambda case, options: Prepared(case.run, report={"engine": "fine"}))
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
    *,
    ceilings: dict[str, float] | None = None,
    done: frozenset[tuple[str, str, int]] = frozenset(),
    seconds: float = BOX_S,
    found: dict[str, list[Any]] | None = None,
) -> dict[str, list[Any]]:
    """What a part emitted, by kind."""
    emitted: dict[str, list[Any]] = defaultdict(list) if found is None else found
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
def unet_rows() -> dict[str, Row]:
    """A tiny U-Net by eager, by another way to run it here, and by one that is not here."""
    part = small("peers", "tiny/unet", baseline="eager", peers=[NOT_HERE, "deepcache-3"])
    return by_name(run_part(part, ceilings=CEILINGS)["rows"])


@pytest.fixture
def bad_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers that crash and lie."""
    (tmp_path / "bad_peers.py").write_text(BAD_PEERS)
    (tmp_path / "sitecustomize.py").write_text(AFTER_PEERS)
    before = dict(PEERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    __import__("bad_peers")
    yield
    del sys.modules["bad_peers"]
    PEERS.clear()
    PEERS.update(before)


def test_a_row_holds_time_cost_and_what_ran(unet_rows: dict[str, Row]) -> None:
    row = unet_rows["eager"]
    assert row.status == "ok" and not row.reason and row.provenance == "measured"
    assert row.latency is not None and len(row.latency.samples_ms) >= 5
    assert row.latency.first_ms is not None
    assert row.batch == find_workload("tiny/unet").batch == 2
    assert row.throughput_per_s == pytest.approx(2e3 / row.latency.p50_ms)
    assert row.memory is not None and row.memory.host_peak_mib is not None
    assert row.engine["engine"] == "eager" and row.engine["threads"] == 1
    assert row.fidelity == {"sqnr_db": 999.0, "max_abs_error": 0.0}  # held against itself
    assert row.speedup is None and not row.baseline


def test_a_row_is_held_against_the_ceilings_of_its_dtype(unet_rows: dict[str, Row]) -> None:
    ops = count_workload(find_workload("tiny/unet"), 2, "fp32")
    tflop = sum(op.flops for op in ops) / 1e12
    for row in (unet_rows["eager"], unet_rows["deepcache-3"]):
        assert row.latency is not None
        seconds = row.latency.p50_ms / 1e3
        assert row.tflop == pytest.approx(tflop) and tflop > 0.0
        assert row.gbyte == pytest.approx(sum(op.bytes for op in ops) / 1e9)
        assert row.roofline_ms == pytest.approx(floor_ms(ops, CEILINGS, "fp32"))
        assert row.fraction_of_peak == pytest.approx(tflop / seconds / CEILINGS["gemm-fp32"])
        assert row.fraction_of_roofline == pytest.approx(row.roofline_ms / row.latency.p50_ms)


def test_a_peer_is_paired_with_the_baseline(unet_rows: dict[str, Row]) -> None:
    row = unet_rows["deepcache-3"]
    assert row.status == "ok" and row.baseline == "eager"
    assert row.verdict is Verdict.SAME and row.pairs >= 6  # within a factor of twenty
    assert row.speedup is not None and row.speedup.low <= row.speedup.value <= row.speedup.high
    assert row.latency is not None and len(row.latency.samples_ms) >= row.pairs
    assert row.clock in ("wall", "cpu")
    assert row.engine["engine"] == "deepcache"
    assert 0.0 < row.fidelity["sqnr_db"] < 999.0  # it leaves layers out


def test_a_peer_that_is_not_here_is_a_row_among_the_others(unet_rows: dict[str, Row]) -> None:
    row = unet_rows[NOT_HERE]
    assert row.status == "missing" and "cuda" in row.reason
    assert row.dtype == "fp16"
    assert row.latency is None and row.speedup is None
    assert list(unet_rows) == ["eager", NOT_HERE, "deepcache-3"]  # in the order asked for


def test_bad_peers_are_named_and_the_good_one_is_timed(bad_peers: None) -> None:
    peers = ["crashing", "wrong", "not-finite", "fine"]
    part = small("peers", baseline="eager", peers=peers)
    rows = by_name(run_part(part)["rows"])
    assert list(rows) == ["eager", *peers]
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok", "crashing": "failed", "wrong": "invalid", "not-finite": "invalid",
        "fine": "ok",
    }  # fmt: skip
    assert "SIGSEGV" in rows["crashing"].reason
    assert "20.0 dB" in rows["wrong"].reason and "60" in rows["wrong"].reason
    assert "not-finite's output is not finite" in rows["not-finite"].reason
    for name in peers[:3]:  # nothing that would look like a time
        assert rows[name].latency is None and rows[name].speedup is None
    assert rows["fine"].engine == {"engine": "fine"}
    assert rows["fine"].speedup is not None


def test_what_does_not_answer_is_timed_out_and_the_next_is_tried() -> None:
    part = small("batches", peers=["eager"], batches=[1, 2, 3], subject_s=0.1)
    began = time.monotonic()
    rows = run_part(part)["rows"]
    assert time.monotonic() - began < 20.0
    assert [(row.batch, row.status) for row in rows] == [(n, "timed_out") for n in (1, 2, 3)]
    assert all("time box" in row.reason and row.latency is None for row in rows)


def test_what_was_done_before_is_not_measured_again() -> None:
    done = frozenset({(KERNEL, "eager", 1)})
    rows = run_part(small("peers", baseline="eager", peers=[NOT_HERE]), done=done)["rows"]
    assert [row.subject for row in rows] == [NOT_HERE]


def test_nothing_is_begun_after_the_time_box() -> None:
    assert run_part(small("batches", peers=["eager"], batches=[1]), seconds=0.0) == {}
    assert run_part(small("profile", dtypes=["fp32"]), ceilings=CEILINGS, seconds=0.0) == {}


def test_a_profile_of_the_layers() -> None:
    found = run_part(small("profile", dtypes=["fp32", "bf16"]), ceilings=CEILINGS)
    (profile,) = found["profiles"]
    assert profile.workload == KERNEL and profile.dtype == "fp32" and profile.batch == 1
    assert profile.layers and profile.total_ms > 0.0 and profile.floor_ms > 0.0
    assert found["notes"] == ["part: no ceiling for bf16, so no profile"]


def test_an_artefact_from_prompt_to_pixels(tiny_folder: Path) -> None:
    folder = f"{tiny_folder}@eager-fp32"
    part = small("artifacts", "", baseline=folder, peers=["no/such/folder"], steps=2)
    row, absent = run_part(part)["rows"]
    assert row.status == "ok" and row.subject == "tiny, 2 steps, eager fp32", row.reason
    assert row.stages is not None and row.stages.denoiser_calls == 2
    assert row.latency is not None
    stages = (row.stages.text_ms, row.stages.denoise_ms, row.stages.decode_ms)
    assert min(stages) > 0.0 and max(stages) < max(row.latency.samples_ms)
    assert row.throughput_per_s == pytest.approx(1e3 / row.latency.p50_ms)
    assert row.tflop is None and row.fraction_of_peak is None
    assert absent.status == "failed" and "no/such/folder" in absent.reason


def test_names_are_looked_up_when_a_part_is_made() -> None:
    with pytest.raises(RecipeError, match="tiny/unett") as caught:
        small("peers", "tiny/unett", baseline="eager")
    assert "tiny/unet" in caught.value.fix
    for change in ({"baseline": "eagre"}, {"peers": ["eagre"]}):
        with pytest.raises(RecipeError, match="eagre") as caught:
            small("peers", **{"baseline": "eager", **change})
        assert "eager" in caught.value.fix
    with pytest.raises(ValidationError, match="a profile needs dtypes"):
        small("profile")
    with pytest.raises(ValidationError, match="name"):
        Part(name="Not A File Name", kind="ceilings")
    two = [small("batches"), small("batches")]
    with pytest.raises(ValidationError, match="two parts are called part"):
        SuiteConfig(name="test", parts=two)
