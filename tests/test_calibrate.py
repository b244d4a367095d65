"""The calibration set: the model's own calls, recorded once for all that ask, checked when read."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hcf.artifact import hcf_home
from hcf.errors import InvalidArtifact, RecipeError, StorageError
from hcf.quantize.calibrate import (
    CAPTIONS,
    calibration_prompts,
    choose_prompts,
    collect,
    flat_inputs,
    load_calibration,
    save_calibration,
    spread,
)
from hcf.quantize.calibration_cache import (
    CalibrationRequest,
    calibration_key,
    make_room,
    open_calibration,
)
from hcf.quantize.prompts import CALIBRATION_PROMPTS
from hcf.trace import DenoiserCall

REQUEST = CalibrationRequest(("a cat", "一只狗", "a red bus"), 3, 1.0, batch_size=2)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HCF_CALIBRATION_CACHE_GB", raising=False)
    return tmp_path / "home"


def record(pipe: Any, request: CalibrationRequest = REQUEST) -> tuple[list[str], Path]:
    """The log of opening `request`, and its folder."""
    lines: list[str] = []
    with open_calibration(pipe, request, lines.append) as calibration:
        return lines, calibration.folder


def test_prompts_are_drawn_by_seed_without_repeats() -> None:
    prompts = [str(i) for i in range(10)]
    chosen = choose_prompts(prompts, 10, seed=3)
    assert sorted(chosen) == sorted(prompts) and chosen != prompts
    assert chosen == choose_prompts(prompts, 10, seed=3) != choose_prompts(prompts, 10, seed=4)
    assert choose_prompts(["a", "b"], 5, seed=0).count("a") in (2, 3)
    with pytest.raises(RecipeError, match="no calibration prompts"):
        choose_prompts([], 1, seed=0)


def test_spread_keeps_every_timestep() -> None:
    calls = [
        DenoiserCall(torch.zeros(1), torch.tensor([1000.0 - 20 * step]))
        for _ in range(8)
        for step in range(50)
    ]
    kept = spread(calls, 50)
    assert len(kept) == 50
    assert len({float(call.timestep) for call in kept}) == 50
    assert spread(calls[:3], 50) == calls[:3]


def test_collect_walks_the_models_own_trajectory(tiny_pipeline: Any) -> None:
    calls = collect(tiny_pipeline, ["a cat"] * 4, steps=3, guidance_scale=5.0, seed=0, batch_size=2)
    assert len(calls) == 6
    assert calls[0].sample.shape == (4, 4, 8, 8)  # guidance doubles the batch
    assert len({int(call.timestep[0]) for call in calls}) == 3


def test_the_file_is_small_exact_and_reproducible(tiny_pipeline: Any, tmp_path: Path) -> None:
    calls = collect(tiny_pipeline, ["a cat", "a dog"], steps=4, guidance_scale=1.0, seed=0)
    first = save_calibration(calls, tmp_path / "a.safetensors")
    assert first == save_calibration(calls, tmp_path / "b.safetensors")
    loaded = load_calibration(tmp_path / "a.safetensors", first)
    for call, again in zip(calls, loaded, strict=True):
        assert flat_inputs(call).keys() == flat_inputs(again).keys()
        for name, tensor in flat_inputs(call).items():
            assert torch.equal(tensor, flat_inputs(again)[name])
            assert tensor.dtype == flat_inputs(again)[name].dtype
    text = calls[0].kwargs["encoder_hidden_states"]
    samples = sum(call.sample.nbytes for call in calls)
    # the text of four steps is stored once
    assert (tmp_path / "a.safetensors").stat().st_size < samples + text.nbytes + 4000


def test_a_set_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(InvalidArtifact, match="does not exist"):
        load_calibration(path)
    calls = [DenoiserCall(torch.ones(1, 4, 8, 8), torch.tensor([999]), {"x": torch.ones(1, 2)})]
    sha256 = save_calibration(calls, path)
    with pytest.raises(InvalidArtifact, match="the manifest says"):
        load_calibration(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidArtifact, match="not a calibration set"):
        load_calibration(path)
    with pytest.raises(InvalidArtifact, match=sha256[:12]):
        load_calibration(path, sha256)


def test_part_of_a_set_is_read_alone(tiny_pipeline: Any, tmp_path: Path) -> None:
    calls = collect(tiny_pipeline, ["a cat"], steps=4, guidance_scale=1.0, seed=0)
    save_calibration(calls, tmp_path / "a.safetensors")
    found = load_calibration(tmp_path / "a.safetensors", only=[2, 0])
    assert torch.equal(found[0].sample, calls[2].sample)
    assert torch.equal(found[1].sample, calls[0].sample)
    times = load_calibration(tmp_path / "a.safetensors", names=["timestep"])
    assert [int(c.timestep[0]) for c in times] == [int(c.timestep[0]) for c in calls]
    assert times[0].sample.numel() == 0 and not times[0].kwargs
    with pytest.raises(InvalidArtifact, match="not a calibration set"):
        load_calibration(tmp_path / "a.safetensors", only=[4])


def test_built_in_prompts_are_varied_and_bilingual(tmp_path: Path) -> None:
    assert len(set(CALIBRATION_PROMPTS)) == 64
    chinese = [p for p in CALIBRATION_PROMPTS if any("一" <= c <= "鿿" for c in p)]
    assert len(chinese) == 32
    assert calibration_prompts([]) == list(CALIBRATION_PROMPTS) == calibration_prompts([], tmp_path)
    assert calibration_prompts(["x"], tmp_path) == ["x"]
    (tmp_path / CAPTIONS).parent.mkdir()
    (tmp_path / CAPTIONS).write_text('["own"]')
    assert calibration_prompts([], tmp_path) == ["own"] == calibration_prompts(tmp_path / CAPTIONS)
    for text, what in (("[1]", "not a list of strings"), ("[", "not JSON")):
        (tmp_path / CAPTIONS).write_text(text)
        with pytest.raises(RecipeError, match=what):
            calibration_prompts([], tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        calibration_prompts(tmp_path / "none.json")


def test_home_follows_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hcf_home() == home
    monkeypatch.delenv("HCF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert hcf_home() == home / "xdg" / "hcf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hcf_home() == Path.home() / ".cache" / "hcf"


def test_the_same_is_recorded_once(tiny_pipeline: Any) -> None:
    lines, folder = record(tiny_pipeline)
    assert "0 of 2 parts are there" in lines[0] and "of memory" in lines[1] and len(lines) == 4
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.safetensors")}
    assert len(stamps) == 2
    lines, again = record(copy.deepcopy(tiny_pipeline))
    assert again == folder and "2 of 2 parts are there" in lines[0] and len(lines) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with open_calibration(tiny_pipeline, REQUEST) as calibration:
        cached = calibration.calls(None)
    from hcf.trace import record_calls

    plain = record_calls(
        tiny_pipeline, list(REQUEST.prompts), steps=3, guidance_scale=1.0, seed=0, batch_size=2
    )
    for found, wanted in zip(cached, plain, strict=True):
        assert torch.equal(found.sample, wanted.sample)
        for name, value in wanted.kwargs.items():
            assert torch.equal(found.kwargs[name], value)


def test_the_key_is_content(tiny_pipeline: Any, tiny_folder: Path) -> None:
    from hcf.source import open_pipeline

    key = calibration_key(tiny_pipeline, REQUEST)
    # the same model from a folder: a path is no content
    assert calibration_key(open_pipeline(tiny_folder), REQUEST) == calibration_key(
        open_pipeline(tiny_folder.rename(tiny_folder.with_name("moved"))), REQUEST
    )
    for change in (
        {"prompts": ("a cat",)}, {"steps": 4}, {"guidance_scale": 2.0}, {"seed": 1},
        {"batch_size": 3}, {"height": 16}, {"width": 32},
    ):  # fmt: skip
        assert calibration_key(tiny_pipeline, replace(REQUEST, **change)) != key
    changed = copy.deepcopy(tiny_pipeline)
    changed.unet.conv_in.bias.data[0] += 1e-3
    assert calibration_key(changed, REQUEST) != key
    changed = copy.deepcopy(tiny_pipeline)
    changed.scheduler = type(changed.scheduler).from_config(
        changed.scheduler.config, beta_start=0.001
    )
    assert calibration_key(changed, REQUEST) != key
    assert calibration_key(copy.deepcopy(tiny_pipeline), REQUEST) == key


def test_a_damaged_or_missing_part_is_made_again(tiny_pipeline: Any) -> None:
    _, folder = record(tiny_pipeline)
    first, second = sorted(folder.glob("part-*.safetensors"))
    wanted = [path.read_bytes() for path in (first, second)]
    second.write_bytes(second.read_bytes()[:-40])
    stamp = first.stat().st_mtime_ns
    lines, _ = record(tiny_pipeline)
    assert "part-0001.safetensors is damaged" in lines[0] and "1 of 2 parts" in lines[1]
    assert [path.read_bytes() for path in (first, second)] == wanted
    assert first.stat().st_mtime_ns == stamp
    first.with_suffix(".sha256").unlink()  # killed between the file and its hash
    lines, _ = record(tiny_pipeline)
    assert "1 of 2 parts are there" in lines[0]


def test_a_killed_run_goes_on(tiny_folder: Path, home: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from hcf.source import open_pipeline\n"
        "from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration\n"
        "request = CalibrationRequest(('a cat',) * 24, 10, 1.0, batch_size=1)\n"
        "with open_calibration(open_pipeline(Path(sys.argv[1])), request): pass"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tiny_folder)])
    deadline = time.monotonic() + 60
    while len(list(home.rglob("part-*.sha256"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = len(list(home.rglob("part-*.sha256")))
    assert 2 <= done < 24
    from hcf.source import open_pipeline

    lines: list[str] = []
    request = CalibrationRequest(("a cat",) * 24, 10, 1.0, batch_size=1)
    with open_calibration(open_pipeline(tiny_folder), request, lines.append) as calibration:
        assert f"{done} of 24 parts are there" in lines[0]
        assert len(calibration.index) == 24 * 10


def test_calls_are_spread_and_others_are_held_out(tiny_pipeline: Any) -> None:
    with open_calibration(tiny_pipeline, replace(REQUEST, steps=6)) as calibration:
        kept, others = calibration.calls(4), calibration.calls(4, besides=4)
        samples = [call.sample for call in [*kept, *others]]
        assert len(kept) == len(others) == 4
        assert not any(
            a.shape == b.shape and torch.equal(a, b)
            for i, a in enumerate(samples)
            for b in samples[i + 1 :]
        )
        assert len({int(call.timestep[0]) for call in kept}) == 4
        everything = calibration.calls(None)
        assert all(
            torch.equal(a.sample, b.sample)
            for a, b in zip(kept, spread(everything, 4), strict=True)
        )


def test_statistics_are_shared_and_follow_the_weights(tiny_pipeline: Any) -> None:
    layers, lines = ["mid_block.resnets.0.conv1", "conv_out"], list[str]()
    unet = tiny_pipeline.unet
    with open_calibration(tiny_pipeline, REQUEST) as calibration:
        first = calibration.statistics(unet, layers, log=lines.append)
        second = calibration.statistics(unet, layers[::-1], log=lines.append)
        assert len(lines) == 1 and list(second) == layers[::-1]
        wider = calibration.statistics(unet, ["conv_in", *layers], log=lines.append)
        assert "statistics of 1 layers" in lines.pop() and len(wider) == 3
        assert len(list(calibration.folder.glob("statistics-*.sha256"))) == 1
        assert first["conv_out"].amax == second["conv_out"].amax
        changed = copy.deepcopy(unet)
        changed.conv_norm_out.weight.data *= 3
        third = calibration.statistics(changed, layers, log=lines.append)
        assert len(lines) == 2 and third["conv_out"].amax != first["conv_out"].amax


def test_the_oldest_goes_and_what_is_open_stays(tiny_pipeline: Any, home: Path) -> None:
    root, folders = home / "calibration", []
    for seed in range(3):
        _, folder = record(tiny_pipeline, replace(REQUEST, seed=seed))
        os.utime(folder / "request.json", (seed, seed))
        folders.append(folder)
    size = sum(f.stat().st_size for f in folders[0].iterdir())
    with open_calibration(tiny_pipeline, REQUEST):
        os.utime(folders[0] / "request.json", (0, 0))  # the oldest, but open
        lines: list[str] = []
        make_room(root, 2.5 * size, lines.append)
        assert [folder.is_dir() for folder in folders] == [True, False, True]
        assert "removed" in lines[0]
        make_room(root, 0.5 * size, lines.append)
        assert [folder.is_dir() for folder in folders] == [True, False, False]
        assert "more than the limit" in lines[-1]
    make_room(root, 0.5 * size)
    assert not folders[0].is_dir()


def test_opening_keeps_the_limit(
    tiny_pipeline: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = record(tiny_pipeline)
    monkeypatch.setenv("HCF_CALIBRATION_CACHE_GB", "0.000001")
    _, second = record(tiny_pipeline, replace(REQUEST, seed=1))
    assert second.is_dir() and not first.is_dir()
    monkeypatch.setenv("HCF_CALIBRATION_CACHE_GB", "lots")
    with pytest.raises(RecipeError, match="no positive number"):
        record(tiny_pipeline)


def test_requests_and_folders_that_cannot_be(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="no calibration prompts"):
        record(tiny_pipeline, replace(REQUEST, prompts=()))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set HCF_HOME"):
        record(tiny_pipeline)
    monkeypatch.undo()
    tiny_pipeline.unet.to("meta")
    with pytest.raises(Exception, match="offloaded"):
        calibration_key(tiny_pipeline, REQUEST)
