"""The history of a workload: points, the picture and the page."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_records import ENVIRONMENT, GPU, store, synthetic_record, synthetic_row

from hcf.errors import RecipeError
from hcf_bench.history import MARKERS, History, history_html, read_history, write_history
from hcf_bench.records import Record, machine_name


def a_history(tmp_path: Path, runs: int = 5) -> Path:
    """Runs on a machine that gets slower and faster as a whole; the last one has another torch."""
    rng = np.random.default_rng(0)
    records: list[Record] = []
    for i in range(runs):
        scale = float(np.exp(rng.normal(0, 0.2)))
        other = {"torch": "2.14.0", "diffusers": "0.42.1"} if i == runs - 1 else None
        environment = ENVIRONMENT.model_copy(update={"packages": other} if other else {})
        records.append(synthetic_record(i, days=3 * i, scale=scale, environment=environment))
    store(tmp_path, *records)
    return tmp_path


def test_points_are_in_order_with_their_spread_and_what_changed(tmp_path: Path) -> None:
    history = read_history(a_history(tmp_path), "sd15/unet")
    assert history.machine == machine_name(ENVIRONMENT)
    assert [run.date for run in history.runs] == [
        "2026-11-24", "2026-11-27", "2026-11-30", "2026-12-03", "2026-12-06",
    ]  # fmt: skip
    assert [run.changed for run in history.runs] == [(), (), (), (), ("torch: 2.13.0 and 2.14.0",)]
    assert sorted(history.series) == [
        f"{name} fp32, batch 2" for name in ("compile", "eager", "openvino", "slow|peer")
    ]
    for point in history.series["compile fp32, batch 2"]:
        assert point.low_ms is not None and point.high_ms is not None
        assert point.low_ms < point.p50_ms < point.high_ms
        assert point.speedup is not None and point.speedup.value == pytest.approx(4 / 3, rel=0.05)
    assert all(point.speedup is None for point in history.series["eager fp32, batch 2"])


def test_png_and_html_are_written_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    history = read_history(a_history(tmp_path), "sd15/unet", subjects=["eager", "openvino"])
    picture, page = write_history(history, tmp_path / "plots")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24])[0] == 1200
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 1 and "<script" not in text
    assert 'src="http' not in text and "@import" not in text and "<link" not in text
    assert text.count('<tr class="changed">') == 2 and "torch: 2.13.0 and 2.14.0" in text
    assert "panel to trust" in text and "time of one call, ms" in text
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert history_html(history) == text


@pytest.mark.parametrize("runs", [1, 40])
def test_one_run_and_many_runs_draw(tmp_path: Path, runs: int) -> None:
    picture, _ = write_history(read_history(a_history(tmp_path, runs), "sd15/unet"), tmp_path)
    assert picture.stat().st_size > 10_000


def test_a_workload_without_ratios_or_samples_and_many_subjects_draws(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = tuple(
        synthetic_row(
            rng, f"s{i} <&>", 10.0 * 3**i, device="cuda", latency=None, p50_ms=10.0 * 3**i
        )
        for i in range(len(MARKERS) + 2)
    )
    environment = ENVIRONMENT.model_copy(update={"gpus": (GPU,)})
    store(tmp_path, synthetic_record(rows=rows, environment=environment))
    history = read_history(tmp_path, "sd15/unet")
    assert history.machine == "nvidia-h100-80gb-hbm3" and len(history.series) == len(rows)
    picture, page = write_history(history, tmp_path)
    assert picture.is_file() and "s1 &lt;&amp;&gt; fp32, batch 2, cuda" in page.read_text()


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no records"):
        read_history(tmp_path, "sd15/unet")
    a_history(tmp_path, 2)
    with pytest.raises(RecipeError, match="did you mean sd15/unet"):
        read_history(tmp_path, "sd15/unett")
    with pytest.raises(RecipeError, match="did you mean openvino"):
        read_history(tmp_path, "sd15/unet", subjects=["openvno"])
    environment = ENVIRONMENT.model_copy(update={"gpus": (GPU,)})
    store(tmp_path, synthetic_record(9, environment=environment))
    with pytest.raises(RecipeError, match="nvidia-h100-80gb-hbm3"):
        read_history(tmp_path, "sd15/unet")
    chosen = read_history(tmp_path, "sd15/unet", machine="nvidia-h100-80gb-hbm3")
    assert isinstance(chosen, History) and len(chosen.runs) == 1
