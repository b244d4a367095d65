"""The page is whole, self-contained and right; the grid, the table, the card are what they say."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hcf.artifact import EngineEntry, Manifest
from hcf.errors import StorageError
from hcf.quality.gate import MetricResult, Verdict
from hcf.report.card import model_card, write_card
from hcf.report.charts import interval_bar, log_axis
from hcf.report.grid import as_image, image_grid, save_grid
from hcf.report.page import (
    EngineRow,
    Figure,
    GateRow,
    ImageColumn,
    LayerRow,
    SpeedRow,
    engine_rows,
    gate_rows,
    layer_row,
    speed_row,
    write_report,
)
from hcf.report.table import Rung, final_table, ladder_markdown, ladder_text, speedup_text

PROMPTS = ["一只红色的猫", "左边三个蓝色的圆形，右边一个绿色的三角形", "a <b>cat</b> & 'dog'"]
RUNGS = [
    Rung("teacher", 50, "eager", "fp32", 4210.31, 1.0, 1.0, 1.0, 0.2871, 12.41),
    Rung("student, INT8", 4, "openvino", "int8", 96.1, 43.8, 43.1, 44.6, 0.285, 13.0, 31.42, True),
]
GATE = [
    GateRow("PSNR", 31.42, ">= 28", True, digits=2),
    GateRow("colour accuracy", 0.9, ">= 0.95", False, 0.96),
    GateRow("SSIM", None, "", None),
]
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "name": "result",
    "content_hash": "3f" * 32,
    "parents": [{"name": "taiji-sd-mini", "content_hash": "ab" * 32}],
    "files": {"unet/model.safetensors": "0a" * 32},
    "recipe": {"name": "快速", "distill": {"steps": 4}},
    "sampling": {"steps": 4, "guidance_scale": 1.0},
    "distillation": {"method": "consistency", "train_steps": 600},
    "quantization": {"unet": {"format": "int8"}},
    "environment": {"python": "3.11.7", "torch": "2.13.0"},
}
COMPARISON: dict[str, Any] = {
    "verdict": "FASTER",
    "reason": "outside the margin",
    "paired": True,
    "pairs": 10,
    "baseline": {
        "name": "teacher",
        "latency": {"p50_ms": 4210.0},
        "stages": {"text_ms": 8.0, "denoise_ms": 4180.0, "decode_ms": 22.0, "denoiser_calls": 50},
    },
    "candidate": {"name": "result", "latency": {"p50_ms": 96.1}, "stages": None},
    "speedup": {"value": 43.8, "low": 43.1, "high": 44.6, "confidence": 0.95},
    "environment": {"threads": 2},
}


def images(count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]


class Tags(HTMLParser):
    """Every tag with its attributes, all text, and whether tags close in order."""

    VOID = {"meta", "img", "br", "link", "rect", "line"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def full_page(tmp_path: Path) -> str:
    layers = [LayerRow(f"down.{i}.conv", "Conv2d", "8 x 8", 20.0 + i, 1.5) for i in range(40)]
    layers.append(LayerRow("exact.one", "Linear", "8 x 8", math.inf))
    path = write_report(
        tmp_path / "report.html",
        title="Taiji <mini>",
        passed=False,
        summary="4 steps instead of 50.",
        figures=[Figure("end to end", "43.8x", "goal 40x", True)],
        rungs=RUNGS,
        prompts=PROMPTS,
        images=[ImageColumn("teacher", images(3)), ImageColumn("INT8", images(3, 1))],
        gate=GATE,
        judge={"R@1, unseen vendor": 0.452, "vendors": ["twemoji"]},
        speeds=[
            speed_row("end to end", COMPARISON, goal=40.0),
            SpeedRow("old run", "stored", "result", "INVALID", "the environment differs"),
        ],
        layers=layers,
        quantization_note="Calibrated on 64 trajectories.",
        engines=[EngineRow("unet", "openvino", "int8", 7.4, runs="int8 88", chosen=True)],
        manifest=MANIFEST,
        environment="a CPU, 2 cores",
        notes=["colour accuracy fell short"],
    )
    return path.read_text(encoding="utf-8")


def test_the_page_is_self_contained(full_page: str) -> None:
    assert "http" not in full_page and "<script" not in full_page and "@import" not in full_page
    assert "url(" not in full_page
    for tag, attributes in Tags(full_page).found:
        assert tag not in ("link", "script", "iframe")
        for name in ("src", "href", "srcset"):
            if attributes.get(name):
                assert str(attributes[name]).startswith("data:image/png;base64,")


def test_the_page_is_well_formed_and_holds_everything(full_page: str) -> None:
    tags = Tags(full_page)
    assert tags.open == []
    text = " ".join(" ".join(tags.text).split())
    for prompt in PROMPTS:
        assert prompt in text
    for expected in (
        "Taiji <mini>", "quality gate failed", "43.8x", "[43.1, 44.6]", "4,210.3", "PSNR", "≥ 28",
        "colour accuracy fell short", "0.452", "twemoji", "goal 40x met", "the environment differs",
        "down.0.conv", "All 41 layers", "exact", "int8 88", "3f" * 32, "ab" * 32, "快速",
        "unet/model.safetensors", "a CPU, 2 cores", "Calibrated on 64 trajectories.",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<b>cat</b>" not in full_page  # a prompt is text, never markup


def test_every_image_is_in_the_page_pixel_for_pixel(full_page: str) -> None:
    found = [a for tag, a in Tags(full_page).found if tag == "img"]
    assert len(found) == 2 * len(PROMPTS)
    wanted = [image for pair in zip(images(3), images(3, 1), strict=True) for image in pair]
    for attributes, array in zip(found, wanted, strict=True):
        data = base64.b64decode(str(attributes["src"]).split(",", 1)[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), array)
        assert attributes["alt"]


def test_both_colour_schemes_define_the_same_colours(full_page: str) -> None:
    style = full_page.split("<style>")[1].split("</style>")[0]
    light, dark = (set(re.findall(r"--[\w-]+(?=:)", block)) for block in
                   re.findall(r":root \{(.*?)\}", style, re.DOTALL))  # fmt: skip
    assert light == dark
    assert set(re.findall(r"var\((--[\w-]+)\)", full_page)) <= light


def test_the_worst_layers_come_first_and_weak_ones_are_marked(full_page: str) -> None:
    worst = full_page.split("Quantisation error by layer")[1].split("<details>")[0]
    assert re.findall(r"down\.(\d+)\.conv", worst) == [str(i) for i in range(15)]
    assert worst.count('class="weak"') == 5  # 20 to 24 dB


def test_a_page_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    html = write_report(tmp_path / "r.html", title="空", passed=None).read_text(encoding="utf-8")
    assert Tags(html).open == []
    assert "quality not checked" in html and "<section" not in html


def test_bad_input_leaves_no_page(tmp_path: Path) -> None:
    for column in (
        ImageColumn("short", images(1)),
        ImageColumn("nan", [np.full((4, 4, 3), np.nan)] * 3),
    ):
        with pytest.raises(ValueError):
            write_report(
                tmp_path / "r.html", title="x", passed=None, prompts=PROMPTS, images=[column]
            )
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_report(tmp_path / "file" / "r.html", title="x", passed=None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_rows_from_stored_data() -> None:
    row = speed_row("end to end", COMPARISON, goal=50.0)
    assert (row.speedup, row.low, row.high, row.threads) == (43.8, 43.1, 44.6, 2)
    assert row.baseline_stages == {"text": 8.0, "denoise": 4180.0, "decode": 22.0}
    assert row.candidate_stages == {}
    layer = layer_row({"layer": "a.b", "kind": "Linear", "shape": [4, 2], "sqnr_db": 31.0})
    assert (layer.shape, layer.sqnr_db) == ("4 x 2", 31.0)
    manifest = Manifest(
        name="x",
        engines={
            "unet": [
                EngineEntry(engine="eager", precision="fp32", latency_ms=38.0),
                EngineEntry(engine="openvino", precision="fp32", latency_ms=24.0),
                EngineEntry(engine="openvino", precision="int8", latency_ms=7.0,
                            layer_precisions={"fp32": 3, "int8": 80}),
                EngineEntry(engine="tensorrt", precision="int8", notes="no GPU"),
            ]
        },
        chosen={"unet": "openvino-int8"},
    )  # fmt: skip
    rows = engine_rows(manifest)
    assert [r.chosen for r in rows] == [False, False, True, False]
    assert rows[2].runs == "int8 80, fp32 3"
    assert rows[3].p50_ms is None and rows[3].note == "no GPU"


def test_gate_rows_keep_every_gated_metric() -> None:
    metrics = (
        MetricResult(name="psnr_db", value=31.4, threshold=">= 28", passed=True),
        MetricResult(
            name="fed", value=None, threshold="ratio <= 1.1", passed=False, reason="no judge"
        ),
        MetricResult(name="ssim", value=None),
    )
    verdict = Verdict(name="quality", passed=False, reasons=("fed",), metrics=metrics)
    rows = gate_rows(verdict)
    assert [row.metric for row in rows] == ["PSNR over all pixels, dB", "Fréchet distance (FED)"]
    assert rows[1].passed is False and rows[1].note == "no judge"


def test_grid_places_every_image(tmp_path: Path) -> None:
    tiles = images(5)
    grid = np.asarray(image_grid(tiles, 3, gap=2))
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    for i, tile in enumerate(tiles):
        y, x = 2 + i // 3 * 18, 2 + i % 3 * 18
        assert np.array_equal(grid[y : y + 16, x : x + 16], tile)
    path = save_grid(tmp_path / "grid.png", tiles, 3, captions=["红"] * 5)
    saved = Image.open(path)
    assert json.loads(saved.text["captions"]) == ["红"] * 5  # type: ignore[attr-defined]
    for broken in ([], [tiles[0], np.zeros((8, 8, 3), np.uint8)]):
        with pytest.raises(ValueError):
            image_grid(broken, 2)
    with pytest.raises(ValueError, match="captions"):
        save_grid(tmp_path / "g.png", tiles, 3, captions=["红"])


def test_images_of_every_kind_become_the_same() -> None:
    array = images(1)[0]
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    for image in (array, Image.fromarray(array), array.astype(np.float32) / 255, tensor):
        assert np.array_equal(np.asarray(as_image(image)), array)
    assert as_image(array[:, :, 0]).mode == "RGB"
    with pytest.raises(ValueError, match="not finite"):
        as_image(np.full((4, 4, 3), np.inf))
    with pytest.raises(ValueError):
        as_image(np.zeros((4, 4, 7)))


def test_the_table_is_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    final_table(RUNGS, title="taiji", notes=["PSNR held"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "taiji" and lines[-1] == "PSNR held"
    assert "43.8x [43.1, 44.6]" in out and "4,210.3" in out
    table = ladder_text(RUNGS).splitlines()
    assert len(table) == 4 and len(set(map(len, table))) == 1


def test_the_table_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    final_table(RUNGS, title="taiji", notes=["[held]"], file=terminal)
    assert "teacher" in terminal.getvalue() and "[held]" in terminal.getvalue()


def test_speedups_are_never_bare() -> None:
    assert speedup_text(None, None, None) == "-"
    assert speedup_text(2.0, None, None) == "2.00x (no interval)"
    assert speedup_text(0.94, 0.931, 0.95) == "0.94x [0.93, 0.95]"
    assert speedup_text(118.2, 110.0, 125.0) == "118x [110, 125]"


def test_markdown_ladder_and_card(tmp_path: Path) -> None:
    assert ladder_markdown(RUNGS).splitlines()[-1].startswith("| **student, INT8** | **4** |")
    card = model_card(
        name="result",
        manifest=MANIFEST,
        rungs=RUNGS,
        gate=GATE,
        speeds=[speed_row("end to end", COMPARISON)],
        licence="apache-2.0",
        environment="a CPU",
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-to-image" and front["language"] == ["zh"]
    assert front["license"] == "apache-2.0" and "int8" in front["tags"]
    for expected in (
        "taiji-sd-mini",
        "4 steps without guidance",
        "**43.8x** [43.1, 44.6]",
        "**fail**",
    ):
        assert expected in card
    assert write_card(tmp_path / "README.md", card).read_text(encoding="utf-8") == card


def test_bars_stay_inside_their_axis() -> None:
    axis = log_axis([0.5, 44.6])
    assert axis[0] < 0.5 and axis[1] > 44.6
    for x in re.findall(
        r'x1?="([\d.-]+)"', str(interval_bar(0.5, 0.45, 44.6, log_axis([0.45, 44.6]), 40.0))
    ):
        assert -0.1 <= float(x) <= 1000.1
    assert log_axis([])[0] == 1.0
