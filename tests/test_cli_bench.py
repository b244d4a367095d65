"""`hcf bench` as it is typed: the rehearsed GPU suite, the short self-test, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hcf.cli import main
from hcf_bench.peers import find_peer
from hcf_bench.records import read_record

ROOT = Path(__file__).parents[1]
BF16 = not find_peer("eager-bf16").missing("cpu")


def run(*words: object) -> int:
    """The exit code of `hcf bench WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *map(str, words)])
    return int(ended.value.code or 0)


def test_the_gpu_suite_is_rehearsed_from_the_sources(tmp_path: Path) -> None:
    """As on a host where nothing is installed: four roots on the path and `python -m`."""
    roots = [str(ROOT / root) for root in (".", "kernels", "models", "bench")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    command = ["-m", "hcf_bench", "gpu", "--rehearsal", "--out", str(tmp_path), "--budget", "1500"]
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(tmp_path / "rehearsal.json")
    assert record.finished, record.notes
    ok = {(row.workload, row.subject) for row in record.rows if row.status == "ok"}
    assert {("tiny/unet", name) for name in ("eager", "onnxruntime", "openvino")} <= ok
    assert ("tiny/unet", "deepcache-3") in ok and (("tiny/pipeline", "eager-bf16") in ok) == BF16
    missing = {row.subject for row in record.rows if row.status == "missing"}
    without_gpu = {"torchao-int8", "onnxruntime-cuda-fp16"}
    assert missing == (without_gpu if BF16 else without_gpu | {"eager-bf16"})
    timed = [row for row in record.rows if row.status == "ok"]
    assert all(row.latency and row.throughput_per_s for row in timed)
    # what skips work is not rated by work it does not do
    assert {row.subject for row in timed if row.tflop is None} == {"deepcache-3"}
    assert all(row.engine for row in timed)
    fp32 = [row for row in timed if row.dtype == "fp32" and row.tflop]
    assert fp32 and all(row.fraction_of_peak and row.fraction_of_roofline for row in fp32)
    pairs = [row for row in timed if row.baseline]
    assert pairs and all(row.speedup and row.verdict and row.fidelity for row in pairs)
    assert all(row.stages for row in timed if row.workload == "tiny/pipeline")
    assert {ceiling.name for ceiling in record.ceilings} >= {"copy", "gemm-fp32", "gemm-bf16"}
    assert record.profiles and record.profiles[0].layers
    assert sorted(p.name for p in (tmp_path / "parts").iterdir())[0] == "00-ceilings.json"
    assert len((tmp_path / "table.txt").read_text().splitlines()) <= 60


def test_the_selftest_prints_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    """What it finds under a load is tests/test_selftest.py's: here every verdict is allowed."""
    code = run("selftest", "--comparisons", 2, "--load", 0, "--budget-s", 15, "--allow", 2,
               "--format", "json")  # fmt: skip
    tests = json.loads(capsys.readouterr().out.splitlines()[-1])["tests"]
    assert code == 0, tests
    assert [test["slowdown"] for test in tests] == [0.0, 0.02]
    assert all(test["comparisons"] == 2 and test["overhead_us"] <= 20.0 for test in tests)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("peers", "sd15/unett"), "sd15/unet"),
        (("peers", "tiny/unet", "--peer", "openvin"), "openvino"),
        (("profile", "tiny/pipeline", "--dtype", "fp32"), "tiny/unet"),
        (("compare", "-b", "no-such-name", "-c", "."), "no-such-name"),
        (("suite", "recipes/bench/rehearsall.yaml", "-o", "x"), "rehearsal.yaml"),
    ],
)
def test_a_name_that_is_none_is_usage_and_offers_the_nearest(
    words: tuple[str, ...],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    output = () if words[0] == "compare" or "-o" in words else ("-o", tmp_path / "x")
    assert run(*words, *output) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_gpu_that_is_not_here_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run("gpu", "--out", tmp_path / "gpu") == 4
    assert "rehears" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


def test_peers_leave_a_record_junit_and_markdown(tmp_path: Path) -> None:
    code = run("peers", "tiny/unet", "--peer", "eager-bf16", "--peer", "torchao-fp8",
               "--pairs", 6, "--pairs-s", 2, "--threads", 1, "-o", tmp_path,
               "--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md",
               "--store", "--results", tmp_path / "results")  # fmt: skip
    assert code == 0
    record = read_record(tmp_path / "tiny-unet" / "tiny-unet.json")
    assert [row.subject for row in record.rows] == ["eager", "eager-bf16", "torchao-fp8"]
    (stored,) = (tmp_path / "results").rglob("*.json")
    assert read_record(stored) == record
    assert stored.name == f"{record.date}-{record.commit[:12]}-tiny-unet.json"
    cases = ET.parse(tmp_path / "j.xml").getroot().findall(".//testcase")
    assert len(cases) == 3
    assert sum(c.find("skipped") is not None for c in cases) == (1 if BF16 else 2)
    assert "eager-bf16" in (tmp_path / "m.md").read_text()
    assert run("history", "tiny/unet", "--results", tmp_path / "results", "-o", tmp_path / "h") == 0
    assert {p.suffix for p in (tmp_path / "h").iterdir()} == {".png", ".html"}
    readme = tmp_path / "README.md"
    for check in ((), ("--check",)):
        assert run("render", "--results", tmp_path / "results", "-o", readme, *check) == 0
    readme.write_text("by hand")
    assert run("render", "--results", tmp_path / "results", "-o", readme, "--check") == 1


def test_verdicts_have_exit_codes(tmp_path: Path, tiny_folder: Path) -> None:
    shared = ("-b", tiny_folder, "-c", tiny_folder, "--pairs", 6, "--budget-s", 20, "--threads", 1,
              "--baseline-engine", "eager", "--candidate-engine", "eager")  # fmt: skip
    assert run("compare", *shared, "--threshold", 20) == 0
    output = tmp_path / "c.json"
    # no interval is narrow enough for a margin of nothing
    assert run("compare", *shared, "--threshold", 0, "-o", output) in (9, 10, 0)
    assert json.loads(output.read_text())["verdict"] in ("UNDECIDED", "SLOWER", "FASTER")


def test_list_names_workloads_and_what_keeps_peers_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "sdxl/unet" in out and "6.761 TFLOP" in out
    assert "eager                      ready" in out
