"""JUnit, Markdown and the terminal table, read back."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_records import ENVIRONMENT, synthetic_record, synthetic_row

from hcf.errors import StorageError
from hcf_bench.pairs import Subject, compare_subjects
from hcf_bench.records import Row
from hcf_bench.report import (
    COMPARED,
    bounds_text,
    cell,
    junit,
    markdown,
    number_text,
    percent_text,
    precision_text,
    terminal_table,
    write_junit,
    write_markdown,
)
from hcf_bench.results import Bounds, Comparison, Stages
from hcf_bench.statistics import Verdict


def comparison(baseline_ms: float, candidate_ms: float, pairs: int = 12) -> Comparison:
    """A real comparison of samplers whose times are known."""
    rng = np.random.default_rng(7)

    def subject(name: str, ms: float) -> Subject:
        return Subject(
            name, lambda _: 1.0, sample=lambda _: float(ms * np.exp(rng.normal(0, 0.01)))
        )

    return compare_subjects(
        subject("old <1>", baseline_ms),
        subject("new|2", candidate_ms),
        workload="denoiser & co",
        pairs=pairs,
        budget_s=0.2 if pairs > 6 else 0.0,
        environment=ENVIRONMENT,
        notes=("weights are random",),
    )


def columns(line: str) -> int:
    return len(re.split(r"(?<!\\)\|", line)) - 2


def test_junit_says_slower_failed_missing_and_undecided() -> None:
    slower, faster, undecided = comparison(1, 2), comparison(2, 1), comparison(1, 1, pairs=1)
    assert [c.verdict for c in (slower, faster, undecided)] == ["SLOWER", "FASTER", "UNDECIDED"]
    root = ET.fromstring(junit([slower, faster, undecided, synthetic_record()]))
    assert root.tag == "testsuites" and [suite.tag for suite in root] == ["testsuite"] * 4
    cases = root.findall("testsuite/testcase")
    by_name = {case.get("name", "").split()[0]: case for case in cases}
    outcomes = [next((c.tag for c in case if c.tag != "system-out"), "passed") for case in cases]
    assert outcomes[:3] == ["failure", "passed", "skipped"]
    assert outcomes[3:] == ["passed"] * 5 + ["skipped", "error", "error"]
    assert root.get("tests") == str(len(cases)) == "11"
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("1", "2", "2")
    assert by_name["tensorrt"].find("skipped").get("message") == "no CUDA device"  # type: ignore[union-attr]
    assert by_name["sleeper"].find("error").get("type") == "timed_out"  # type: ignore[union-attr]
    assert all(float(case.get("time", "-1")) >= 0.0 for case in cases)
    found = {p.get("name"): p.get("value") for p in root[0].findall("properties/property")}
    assert found["package.torch"] == "2.13.0" and found["threads"] == "2"


def test_junit_escapes_and_drops_what_xml_cannot_hold() -> None:
    text = junit([comparison(1, 2), synthetic_record()])
    assert "\x1b" not in text and "\x00" not in text
    root = ET.fromstring(text)
    assert "old <1>" in root[0][1].get("name", "")
    error = root.find("testsuite/testcase/error")
    assert error is not None and "<bad> & worse" in (error.text or "")


def test_an_invalid_comparison_is_an_error() -> None:
    invalid = comparison(1, 1).model_copy(
        update={"verdict": Verdict.INVALID, "reason": "shapes differ", "speedup": None}
    )
    case = ET.fromstring(junit([invalid]))[0].find("testcase")
    assert case is not None
    error = case.find("error")
    assert error is not None and error.get("message") == "shapes differ"
    assert "INVALID" in markdown([invalid]) and "shapes differ" in markdown([invalid])


def test_markdown_keeps_its_columns_and_says_where_it_holds() -> None:
    stages = Stages(text_ms=1.0, denoise_ms=20.0, decode_ms=3.0, denoiser_calls=4)
    found = comparison(2, 1)
    found = found.model_copy(
        update={"candidate": found.candidate.model_copy(update={"stages": stages})}
    )
    text = markdown([found, synthetic_record()])
    table = text.split("\n\n")[0].splitlines()
    assert {columns(line) for line in table} == {len(COMPARED)}
    assert len(table) == 2 + 1 + 8
    assert "FASTER" in table[2] and "new\\|2" in table[2] and "1.0%" in table[2]
    assert "missing" in text and "no CUDA device" in text
    assert "| 20.00 | 3.00 | 4 |" in text
    assert "weights are random" in text and text.count("Environment: ") == 1
    assert "torch 2.13.0" in text


def test_a_verdict_on_processor_time_says_so() -> None:
    wall = Bounds(value=1.5, low=1.4, high=1.6)
    found = comparison(2, 1).model_copy(update={"clock": "cpu", "speedup_wall": wall})
    assert "of processor time; 1.500x [1.400, 1.600] of the clock on the wall" in markdown([found])


def test_the_terminal_table_fits_a_terminal() -> None:
    short = terminal_table(synthetic_record())
    assert "openvino" in short and "missing: sd15/unet tensorrt" in short
    assert " more in " not in short
    rng = np.random.default_rng(0)
    rows = [
        synthetic_row(rng, f"a peer with a very long name {i}", 1e5, baseline_ms=1e5)
        for i in range(70)
    ]
    rows += [
        Row(workload="sdxl/unet", subject=f"p{i}", status="failed", reason="why\n" * 99)
        for i in range(30)
    ]
    lines = terminal_table(synthetic_record(rows=tuple(rows)), "x/record.json").splitlines()
    assert len(lines) == 60 and max(map(len, lines)) <= 120
    timed = sum(line.startswith("sd15/unet") for line in lines)
    failed = sum(line.startswith("failed:") for line in lines)
    assert timed > 30 and failed >= 10
    assert lines[-1] == f"{100 - timed - failed} more in x/record.json"
    only_failures = terminal_table(synthetic_record(rows=tuple(rows[70:]))).splitlines()
    assert sum(line.startswith("failed:") for line in only_failures) == 30


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_junit(tmp_path / "new" / "junit.xml", [comparison(1, 2)])
    assert ET.parse(path).getroot().tag == "testsuites"
    assert write_markdown(tmp_path / "a.md", [comparison(1, 2)]).read_text().startswith("| workl")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.md", "junit.xml"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write_junit(tmp_path / "file" / "junit.xml", [])


def test_numbers_are_readable() -> None:
    values = (None, 0.0213, 0.5, 9.8071, 61.14, 426.16, 1283.2)
    assert [number_text(v) for v in values] == [
        "-", "0.0213", "0.500", "9.81", "61.14", "426.2", "1,283",
    ]  # fmt: skip
    assert percent_text(0.324) == "32.4 %" and percent_text(1.02) == "102 %"
    assert bounds_text(Bounds(value=1.021, low=1.018, high=1.024)) == "1.021x [1.018, 1.024]"
    assert bounds_text(Bounds(value=42.1, low=41.6, high=42.7)) == "42.1x [41.6, 42.7]"
    assert precision_text({"precision": "int8", "layer_precisions": {"FP32": 2, "INT8": 40}}) == (
        "int8 (40 INT8, 2 FP32)"
    )
    parts = {"unet": {"int8": 40, "fp32": 2}, "vae": {"fp32": 30}}
    assert precision_text({"precision": "int8", "layer_precisions": parts}) == (
        "int8 (40 int8, 32 fp32)"
    )
    assert precision_text({}) == "-" and precision_text({"precision": "bf16"}) == "bf16"
    assert cell("a|b\n<c>") == "a\\|b &lt;c>"
