"""The published figures: complete, converted by code, refused where something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hcf.errors import InvalidArtifact
from hcf_bench.published import (
    HOW,
    Published,
    estimated_rows,
    milliseconds,
    published_rows,
    read_published,
    with_floors,
)
from hcf_bench.records import Row
from hcf_bench.workloads import find_workload

COMMITTED = Path(__file__).parents[1] / "bench" / "results" / "published.yaml"


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(COMMITTED)


def one(rows: list[Row], workload: str, subject: str, **engine: Any) -> Row:
    found = [
        row for row in rows
        if row.workload == workload and row.subject == subject
        and all(row.engine.get(key) == value for key, value in engine.items())
    ]  # fmt: skip
    assert len(found) == 1, found
    return found[0]


def test_every_committed_figure_has_its_source_and_a_workload_of_ours(published: Published) -> None:
    rows = [row for chip in ("A100", "H100") for row in published_rows(published, chip)]
    assert len(rows) == sum(len(source.figures) for source in published.sources) > 50
    for row in rows:
        assert row.provenance == "published" and row.source and row.engine["how"] in HOW
        assert row.p50_ms and row.p50_ms > 0 and row.engine["machine"]
        assert find_workload(row.workload).name == row.workload
    assert {row.workload.split("/")[0] for row in rows} == {"sd15", "sd21", "sdxl", "kolors"}


def test_units_become_milliseconds(published: Published) -> None:
    assert milliseconds(76.02, "it/s") == pytest.approx(13.15, abs=0.005)
    assert milliseconds(27.7, "img/s") == pytest.approx(36.1, abs=0.05)
    assert milliseconds(33.5, "img/s", batch=4) == pytest.approx(119.4, abs=0.05)
    assert milliseconds(0.819, "s") == 819.0
    assert milliseconds(102.8, "ms", forwards=4) == pytest.approx(25.7)
    a100, h100 = published_rows(published, "A100"), published_rows(published, "H100")
    assert one(h100, "sdxl/unet", "stable-fast").p50_ms == pytest.approx(46.3, abs=0.05)
    assert one(h100, "sdxl/unet", "TensorRT, LCM").p50_ms == pytest.approx(25.7)
    nexfort = one(a100, "sdxl/unet", "onediff nexfort")
    assert nexfort.p50_ms == pytest.approx(73.4, abs=0.05) and nexfort.batch == 2
    tensorrt = one(a100, "sd15/pipeline", "TensorRT 9.0, CUDA graphs, static shapes")
    assert tensorrt.p50_ms == 819.0 and tensorrt.engine["steps"] == 50
    assert tensorrt.throughput_per_s == pytest.approx(1.221, abs=0.001)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"unit": "minutes"}, "unit"),
        ({"value": 0}, "value"),
        ({"machine": ""}, "machine"),
        ({"peak": 0.3}, "peak"),
        ({"workload": "SD 1.5"}, "workload"),
        ({"unit": "it/s"}, "rate of U-Net forwards"),
        ({"forwards": 4}, "forwards"),
    ],
)
def test_a_wrong_figure_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    figure = {
        "gpu": "A100", "machine": "A100", "workload": "sd15/pipeline", "subject": "x",
        "dtype": "fp16", "value": 1.0, "unit": "s",
    }  # fmt: skip
    path = tmp_path / "published.yaml"
    document = {
        "schema_version": 1,
        "sources": [{"source": "a page", "how": "R", "figures": [figure | change]}],
    }
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidArtifact) as caught:
        read_published(path)
    assert "published.yaml" in str(caught.value) and field in str(caught.value)


@pytest.mark.parametrize("drop", ["source", "how", "figures"])
def test_a_figure_without_provenance_is_refused(tmp_path: Path, drop: str) -> None:
    document = yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))
    del document["sources"][1][drop]
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidArtifact, match=rf"sources\.1\.{drop}"):
        read_published(path)
    path.write_text("a: [")
    with pytest.raises(InvalidArtifact, match="not YAML"):
        read_published(path)
    with pytest.raises(InvalidArtifact, match="cannot read"):
        read_published(tmp_path / "absent.yaml")


def test_floors_are_those_of_the_arithmetic(published: Published) -> None:
    """Against the sums that were counted by hand: 6.97 ms on A100 and 2.70 on H100 for SD1.5."""
    figures = {
        chip: [f for f in published.figures(chip) if f.workload == "sd15/unet"]
        for chip in ("A100", "H100")
    }
    a100 = estimated_rows("A100", figures["A100"])
    h100 = estimated_rows("H100", figures["H100"])
    assert [row.workload for row in a100 + h100] == ["sd15/unet"] * 2
    assert a100[0].p50_ms == pytest.approx(6.97, rel=0.1)
    assert h100[0].p50_ms == pytest.approx(2.70, rel=0.1)
    assert a100[0].tflop == pytest.approx(2 * 0.803, rel=0.02)
    assert a100[0].provenance == "estimated" and "floor, not a latency" in a100[0].source
    assert "271.2 TFLOP/s" in a100[0].source and "1750 GB/s" in a100[0].source
    reached = with_floors(published_rows(published, "A100"), a100)
    assert one(reached, "sd15/unet", "onediff nexfort").fraction_of_roofline == pytest.approx(
        0.53, abs=0.05
    )
    assert all(row.fraction_of_roofline is None for row in reached if row.dtype in ("fp32", "int8"))
