"""`bench/README.md` is what the records render to."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from test_records import ENVIRONMENT, GPU, store, synthetic_record, synthetic_row

from hcf.errors import InvalidArtifact
from hcf_bench.records import Row, record_path
from hcf_bench.render import is_rendered, newest, render, write_readme

BENCH = Path(__file__).parents[1] / "bench"


def tables(text: str) -> list[list[str]]:
    """Blocks of lines that begin with a bar."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def test_the_page_has_every_part_and_its_tables_are_straight(tmp_path: Path) -> None:
    store(tmp_path, synthetic_record())
    text = render(tmp_path)
    for part in (
        "hcf bench selftest", "## example-fast-9-6-999-2c", "torch 2.13.0", "Ceilings",
        "9.80 GB/s", "baseline", "FASTER", "SLOWER",
        "int8 (40 INT8, 12 FP32)", "38.0 %", "40.0 %", "Not timed:", "tensorrt, missing on "
        "sd15/unet: no CUDA device", "sleeper, timed out", "<details>", "none (A/A)", "a note",
        "2026-11-24 0000000", "peers](results/example", "Stages of a pipeline",
        "slow\\|peer", "down.0\\|conv",
    ):  # fmt: skip
        assert part in text, part
    for table in tables(text):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table}) == 1, table[0]
    rows = next(table for table in tables(text) if "speed-up" in table[0])
    order = [line.split("|")[2].strip() for line in rows[2:] if "sd15/unet" in line]
    assert order == ["eager", "openvino", "compile", "slow\\"]
    assert "A100" not in text
    assert "<bad>" not in text and "\x1b" not in text


def test_it_is_deterministic_and_checked(tmp_path: Path) -> None:
    results, target = tmp_path / "results", tmp_path / "README.md"
    records = [synthetic_record(i, days=i) for i in range(3)]
    store(results, *records)
    assert not is_rendered(results, target)
    write_readme(results, target)
    first = target.read_text(encoding="utf-8")
    assert is_rendered(results, target) and render(results) == first
    for path in results.rglob("*.json"):
        path.unlink()
    store(results, *reversed(records))
    assert render(results) == first
    target.write_text(first + "edited by hand\n", encoding="utf-8")
    assert not is_rendered(results, target)


def test_the_newest_row_of_a_subject_is_shown_with_its_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = synthetic_record(
        1, rows=(synthetic_row(rng, "eager", 11.0), synthetic_row(rng, "x", 7.0))
    )
    broken = Row(workload="sd15/unet", subject="x", batch=2, status="failed", reason="no more")
    other = ENVIRONMENT.model_copy(update={"packages": {"torch": "2.14.0", "diffusers": "0.42.1"}})
    new = synthetic_record(
        2, days=1, rows=(synthetic_row(rng, "eager", 12.0), broken), environment=other,
        finished=False,
    )  # fmt: skip
    assert [row.status for _, row in newest([old, new])] == ["ok", "failed"]
    store(tmp_path, new, old)
    text = render(tmp_path)
    (table,) = [table for table in tables(text) if "speed-up" in table[0]]
    assert len(table) == 3 and "2026-11-25 0000002" in table[2]
    assert "x, failed on sd15/unet: no more" in text and "cut off" in text
    assert "ran in another environment: torch: 2.14.0 and 2.13.0" in text


def test_a_subject_has_a_row_for_each_baseline(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = (
        synthetic_row(rng, "eager", 11.0),
        synthetic_row(rng, "x", 7.0, baseline_ms=11.0),
        synthetic_row(rng, "x", 9.0, baseline_ms=8.0).model_copy(update={"baseline": "rival"}),
    )
    store(tmp_path, synthetic_record(1, rows=rows))
    (table,) = [table for table in tables(render(tmp_path)) if "speed-up" in table[0]]
    plain, against = (line for line in table[2:] if "| x |" in line)
    assert "] over" not in plain and "] over rival" in against


def test_what_failed_and_was_timed_later_is_no_longer_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    broken = Row(workload="sd15/unet", subject="x", batch=2, status="failed", reason="no more")
    old = synthetic_record(1, rows=(synthetic_row(rng, "eager", 11.0), broken))
    new = synthetic_record(2, days=1, rows=(synthetic_row(rng, "x", 7.0),))
    assert [row.status for _, row in newest([old, new])] == ["ok", "ok"]
    store(tmp_path, old, new)
    assert "no more" not in render(tmp_path)


def test_machines_have_a_section_each(tmp_path: Path) -> None:
    gpu = ENVIRONMENT.model_copy(update={"gpus": (GPU,)})
    rng = np.random.default_rng(0)
    row = synthetic_row(rng, "eager", 9.0, device="cuda")
    store(tmp_path, synthetic_record(), synthetic_record(1, rows=(row,), environment=gpu))
    text = render(tmp_path)
    assert text.index("## example-fast-9-6-999-2c") < text.index("## nvidia-h100-80gb-hbm3")
    assert "eager (cuda)" in text and "driver 580.1" in text


PUBLISHED = """
schema_version: 1
sources:
  - source: a README (2024-01-01)
    how: R
    figures:
      - {gpu: H100, machine: H100 SXM, workload: sd15/vae_decoder, subject: engine, dtype: fp16,
         value: 20, unit: ms}
"""


def test_measured_published_and_estimated_rows_of_a_chip_are_labelled(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(PUBLISHED)
    row = synthetic_row(
        np.random.default_rng(0), "eager", 30.0, workload="sd15/vae_decoder", device="cuda", batch=1
    )
    gpu = ENVIRONMENT.model_copy(update={"gpus": (GPU,)})
    store(tmp_path, synthetic_record(rows=(row,), environment=gpu))
    section = render(tmp_path).split("## H100")[1]
    (table,) = tables(section)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [(line[3], line[7], line[10]) for line in cells] == [
        ("floor", "estimated", "2"),
        ("engine", "published", "1"),
        ("eager", "measured", "2026-11-24 0000000"),
    ]
    assert cells[1][5] == "20.00" and cells[1][6].endswith("%") and cells[1][9] == "20 ms"
    assert "1. a README (2024-01-01) (read in the repository file named)" in section
    assert "a floor, not a latency" in section and "## A100" not in render(tmp_path)


def test_an_empty_folder_renders_and_another_schema_is_named(tmp_path: Path) -> None:
    assert render(tmp_path).startswith("# Benchmarks")
    record = synthetic_record()
    store(tmp_path, record)
    path = record_path(tmp_path, record)
    text = path.read_text().replace('"schema_version": 1', '"schema_version": 7')
    path.write_text(text)
    with pytest.raises(InvalidArtifact) as caught:
        render(tmp_path)
    assert path.name in str(caught.value) and "schema_version" in str(caught.value)


def test_the_committed_readme_is_rendered() -> None:
    """Whatever is committed was rendered; before the first render there is nothing to check."""
    readme = BENCH / "README.md"
    assert not readme.is_file() or is_rendered(BENCH / "results", readme)
