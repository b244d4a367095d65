"""Estimates before a stage starts, held against what it takes, and offload where it must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hcf.errors import HcfError
from hcf.export.estimate import (
    LIBRARIES,
    SCORE_COPIES,
    TRACE_S,
    AttentionScores,
    ExportProbe,
    estimate_export,
)
from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration
from hcf.quantize.estimate import (
    GIB,
    Estimate,
    available_memory,
    component_bytes,
    estimate_calibration,
    estimate_quantization,
    estimate_sensitivity,
    fitted,
    measure_process,
    peak_memory,
    plan_offload,
    probe,
    require_disk,
    resident_bytes,
    scaled,
)

NEED = Estimate("a stage", 10.0, 12 * GIB, GIB, {"text_encoder": 2 * GIB, "unet": 4 * GIB})


def test_a_probe_tells_sizes(tiny_pipeline: Any) -> None:
    found = probe(tiny_pipeline, ["a cat", "a dog"], steps=5, guidance_scale=5.0)
    assert (found.batch, found.component, found.calls) == (2, "unet", 5)
    assert found.call_bytes == 4 * 4 * 8 * 8 * 4 + 4 * 8  # guidance doubles it; int64 timesteps
    assert found.shared_bytes == 4 * 16 * 32 * 4
    assert found.step_s > 0 and found.setup_s > 0 and found.resident > 0
    weights = sum(p.numel() for p in tiny_pipeline.unet.parameters()) * 4
    assert found.weights["unet"] == weights == component_bytes(tiny_pipeline)["unet"]
    one = probe(tiny_pipeline, ["a cat"], steps=1, guidance_scale=1.0)
    assert one.calls == 1 and one.step_s > 0


def test_estimates_follow_the_work(tiny_pipeline: Any) -> None:
    found = replace(
        probe(tiny_pipeline, ["a cat"] * 2, steps=4, guidance_scale=1.0), setup_s=1.0, step_s=2.0
    )
    once, twice = estimate_calibration(found, 2), estimate_calibration(found, 3)
    assert once.seconds == 1 + 4 * 2 and twice.seconds == 2 * once.seconds
    assert twice.disk_bytes == 2 * once.disk_bytes
    assert scaled(twice, 0.5).seconds == once.seconds
    assert "about 18 s" in str(twice) and "GiB of memory" in str(twice)
    assert estimate_quantization(found, 64, 8).seconds == 2.0 * (2 * 64 + 4 * 8)
    big = replace(found, weights={"unet": 3 * GIB}, largest=GIB // 8)
    assert estimate_quantization(big).host_bytes < found.resident + GIB
    assert estimate_quantization(big).seconds > estimate_quantization(found).seconds
    by_output = estimate_sensitivity(found, 100, 2, 8, 4, 10, "output")
    by_layer = estimate_sensitivity(found, 100, 2, 8, 4, 10, "layer")
    assert by_output.seconds == 2.0 * (800 + 8 + 4 * 12) > by_layer.seconds
    assert "unet" in once.movable and "unet" not in by_output.movable
    assert "about 2 min" in str(scaled(once, 10)) and "h," in str(scaled(once, 1000))


def test_an_export_is_estimated_by_where_its_weights_lie() -> None:
    weights = {"unet": GIB // 2, "vae": GIB // 4}
    found = ExportProbe("unet", "unet", weights, 100, 2.0, 100, 5 * GIB, 0)
    one, both = estimate_export(found), estimate_export(found, ("fp32", "fp16"))
    assert one.seconds == 100 * TRACE_S + 6 * 2.0 and both.seconds == one.seconds + 3 * 2.0
    assert one.disk_bytes == GIB // 2 and both.disk_bytes == 1.5 * one.disk_bytes
    base = found.resident + LIBRARIES + 100
    assert one.host_bytes == base + GIB and both.host_bytes == base + GIB * 5 // 4
    assert one.movable == {"vae": GIB // 4} and one.stage == "export of unet"
    mapped = replace(found, weights={"unet": 3 * GIB // 2}, scores=10)
    assert estimate_export(mapped).host_bytes == base + 3 * GIB // 2 + SCORE_COPIES * 10
    offloaded = estimate_export(replace(found, weights={"unet": 10 * GIB}))
    assert offloaded.host_bytes == base and offloaded.disk_bytes == 20 * GIB


def test_attention_scores_are_those_of_the_largest(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    with AttentionScores() as seen, torch.no_grad():
        unet(torch.randn(3, 4, 16, 16), 1, torch.randn(3, 16, 32))
    heads = unet.config.attention_head_dim[1]  # the first level has no attention
    assert seen.bytes == 4 * 3 * heads * (8 * 8) ** 2


def test_disk_is_what_the_cache_takes(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path))
    # large enough that file headers do not count
    request = CalibrationRequest(("a cat",) * 8, 6, 1.0, batch_size=4, height=64, width=64)
    found = probe(tiny_pipeline, ["a cat"] * 4, steps=6, guidance_scale=1.0, height=64, width=64)
    with open_calibration(tiny_pipeline, request) as calibration:
        size = sum(path.stat().st_size for path in calibration.folder.glob("part-*.safetensors"))
    assert estimate_calibration(found, 8).disk_bytes == pytest.approx(size, rel=0.2)


def test_memory_is_what_a_process_takes(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "os.environ['HCF_HOME'] = sys.argv[2]\n"
        "from hcf.source import open_pipeline\n"
        "from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration\n"
        "from hcf.quantize.estimate import estimate_calibration, probe\n"
        "pipe = open_pipeline(Path(sys.argv[1]))\n"
        "request = CalibrationRequest(('a cat',) * 8, 4, 1.0, height=128, width=128)\n"
        "found = probe(pipe, request.prompts, steps=4, guidance_scale=1.0, height=128, width=128)\n"
        "Path(sys.argv[3]).write_text(str(estimate_calibration(found, 8).host_bytes))\n"
        "with open_calibration(pipe, request): pass\n"
    )
    note = tmp_path / "note"
    measured = measure_process(code, [str(tiny_folder), str(tmp_path / "home"), str(note)])
    assert measured.seconds > 0
    assert int(note.read_text()) == pytest.approx(measured.peak_bytes, rel=0.2)


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        measure_process("raise ValueError('no such thing')")
    small = measure_process("pass").peak_bytes
    assert measure_process("x = bytearray(200 * 2**20)").peak_bytes > small + 150 * 2**20


def test_peak_memory_is_above_what_was_there() -> None:
    with peak_memory() as peak:
        held = torch.ones(64 * 2**20 // 4)
    assert peak[0] - peak[1] > 48 * 2**20 and held.numel()
    assert 0 < resident_bytes() < psutil.virtual_memory().total
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_offload_moves_as_little_as_it_takes() -> None:
    assert plan_offload(NEED, 12 * GIB, "auto") == ()
    assert plan_offload(NEED, 11 * GIB, "auto") == ("text_encoder",)
    assert plan_offload(NEED, 7 * GIB, "auto") == ("text_encoder", "unet")
    assert plan_offload(NEED, 99 * GIB, "disk") == ("text_encoder", "unet")
    with pytest.raises(HcfError, match="12.00 GiB of memory, 8.00 GiB more than there is") as told:
        plan_offload(NEED, 4 * GIB, "auto")
    assert "smaller batch_size" in told.value.fix
    with pytest.raises(HcfError, match="offloading nothing leaves 1.00 GiB") as told:
        plan_offload(NEED, 11 * GIB, "none")
    assert "offload: auto" in told.value.fix


def test_a_stage_that_fits_moves_nothing(tiny_pipeline: Any) -> None:
    lines: list[str] = []
    with fitted(tiny_pipeline, replace(NEED, host_bytes=1), "auto", lines.append) as moved:
        assert moved == () and not next(tiny_pipeline.unet.parameters()).is_meta
    assert len(lines) == 1 and lines[0].startswith("a stage: about 10 s")
    with pytest.raises(HcfError, match="needs about"):
        with fitted(tiny_pipeline, replace(NEED, host_bytes=10**18), "auto"):
            raise AssertionError("it cannot fit")


def test_on_the_disk_a_pipeline_computes_the_same(tiny_pipeline: Any) -> None:
    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return tiny_pipeline(
            "a cat", num_inference_steps=2, output_type="pt", generator=generator
        ).images

    wanted = image()
    before = {k: v.clone() for k, v in tiny_pipeline.unet.state_dict().items()}
    need = replace(NEED, host_bytes=1, movable={"unet": 1, "vae": 1, "text_encoder": 1})
    lines: list[str] = []
    with fitted(tiny_pipeline, need, "disk", lines.append) as moved:
        assert moved == ("unet", "vae", "text_encoder")
        assert all(p.is_meta for p in tiny_pipeline.unet.parameters())
        assert torch.equal(image(), wanted)
    assert "the weights of unet wait on the disk" in lines[1]
    after = tiny_pipeline.unet.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(image(), wanted)
    with pytest.raises(HcfError, match="for a pipeline on a GPU"):
        with fitted(tiny_pipeline, need, "cpu"):
            pass


@pytest.mark.gpu
def test_on_a_gpu_weights_can_wait_on_the_cpu(tiny_pipeline: Any) -> None:
    tiny_pipeline.to("cuda")
    need = replace(NEED, host_bytes=1, movable={"unet": 1})
    with fitted(tiny_pipeline, need, "cpu"):
        assert all(p.is_meta for p in tiny_pipeline.unet.parameters())
        tiny_pipeline("a cat", num_inference_steps=1)
    assert all(p.is_cuda for p in tiny_pipeline.unet.parameters())


def test_a_full_disk_is_told_first(tmp_path: Path) -> None:
    require_disk(NEED, tmp_path / "not" / "there")
    with pytest.raises(HcfError, match="GiB free"):
        require_disk(replace(NEED, disk_bytes=10**18), tmp_path)
