"""The command as a user meets it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny_pipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

from hcf.artifact import clone_artifact
from hcf.cli import main

Hcf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hcf(capsys: pytest.CaptureFixture[str]) -> Hcf:
    def run(*arguments: object) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run


def test_usage_errors_exit_with_2_and_suggest(hcf: Hcf, tmp_path: Path) -> None:
    code, _, err = hcf("distil")
    assert code == 2 and "distill" in err
    assert hcf("run")[0] == 2
    code, _, err = hcf("run", tmp_path / "none.yaml")
    assert code == 2 and "no recipe" in err and "fix:" in err
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\nmodel: m\noutput: o\ndistil: {}\n")
    code, _, err = hcf("run", recipe)
    assert code == 2 and "did you mean distill?" in err
    code, _, err = hcf("build", "-m", "m", "-o", "o", "--opt-shapes", "sample=1,2")
    assert code == 2 and "name:1x4x64x64" in err
    code, _, err = hcf("build", "-m", "m", "-o", "o", "--engine", "tensorflow")
    assert code == 2 and "build.engines.0" in err


def test_empty_prompt_is_refused_before_anything_is_loaded(hcf: Hcf, tmp_path: Path) -> None:
    for prompt in ("", "  "):
        code, _, err = hcf("generate", "-m", tmp_path / "none", "-p", prompt, "-o", "x.png")
        assert code == 2 and "prompt is empty" in err


def test_dry_run_of_one_stage_prints_its_settings(hcf: Hcf, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("quantize: {algorithm: mse}\n")
    code, out, _ = hcf(
        "quantize", "-m", "m", "-o", tmp_path / "o", "--recipe", recipe, "--seed", 3, "--dry-run",
        "--set", "quantize.calibration_samples=8", "--format", "json",
    )  # fmt: skip
    config = json.loads(out.splitlines()[-1])["config"]
    assert code == 0 and not (tmp_path / "o").exists()
    assert (config["algorithm"], config["calibration_samples"], config["seed"]) == ("mse", 8, 3)
    code, out, _ = hcf(
        "build", "-m", "m", "-o", "o", "--min-shapes", "sample:1x4x8x8,timestep:1", "--dry-run",
        "--format", "json",
    )  # fmt: skip
    shapes = json.loads(out.splitlines()[-1])["config"]["min_shapes"]
    assert shapes == {"sample": [1, 4, 8, 8], "timestep": [1]}


def test_errors_have_their_codes_and_one_json_line(hcf: Hcf, tiny_folder: Path) -> None:
    weights = tiny_folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    generate = ("generate", "-m", tiny_folder, "-p", "a cat", "-o", tiny_folder / "x.png")
    pickle = tiny_folder / "unet/diffusion_pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04")
    code, _, err = hcf(*generate)
    assert code == 6 and "is a pickle" in err
    pickle.unlink()
    weights.write_bytes(whole[:-100])
    code, out, err = hcf(*generate, "--format", "json")
    report = json.loads(out.splitlines()[-1])
    assert code == 5 and report["exit_code"] == 5 and "truncated" in report["error"]["message"]
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["conv_in.weight"] = np.full_like(tensors["conv_in.weight"], np.nan)
    save_file(tensors, weights)
    code, _, err = hcf(*generate)
    assert code == 5 and "conv_in.weight" in err and "NaN" in err
    tensors["conv_in.weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, weights)
    code, _, err = hcf(*generate)
    assert code == 5 and "conv_in.weight" in err
    assert not (tiny_folder / "x.png").exists()


def test_generate_writes_the_same_image_for_a_seed(hcf: Hcf, tiny_folder: Path) -> None:
    def draw(name: str, *more: object) -> Any:
        code, out, err = hcf(
            "generate", "-m", tiny_folder, "-p", "一只红色的猫", "--steps", 2, "-o",
            tiny_folder / name, *more, "--format", "json",
        )  # fmt: skip
        assert code == 0, err
        return [np.asarray(Image.open(f)) for f in json.loads(out.splitlines()[-1])["files"]]

    (first,), (again,), (other,) = draw("a.png"), draw("b.png"), draw("c.png", "--seed", 1)
    assert first.shape == (16, 16, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    several = draw("d.png", "-n", 2)
    assert len(several) == 2 and (tiny_folder / "d-1.png").is_file()
    np.testing.assert_allclose(several[1].astype(int), other.astype(int), atol=1)
    (grid,) = draw("e.png", "-n", 2, "--grid", 2)
    assert grid.shape[1] > 2 * 16


def test_inspect_shows_folders_and_files(hcf: Hcf, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, _ = hcf("inspect", tiny_folder, "--format", "json")
    unet = json.loads(out.splitlines()[-1])["components"]["unet"]
    assert code == 0 and unet["class"] == "UNet2DConditionModel" and unet["parameters"] > 10_000
    clone_artifact(tiny_folder, tmp_path / "artefact")
    code, out, _ = hcf("inspect", tmp_path / "artefact")
    assert code == 0 and "made from" in out and "scheduler" in out
    code, out, _ = hcf("inspect", tiny_folder / "unet/diffusion_pytorch_model.safetensors")
    assert code == 0 and "mid_block.resnets.1.time_emb_proj.weight" in out
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    assert hcf("inspect", tmp_path / "x.ckpt")[0] == 6
    assert hcf("inspect", tmp_path / "nothing")[0] == 5


def test_inspect_counts_the_operators_of_a_graph(hcf: Hcf, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    kinds = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4).flatten())
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(nodes, "g", kinds[:1], kinds[1:], [weight])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset]), tmp_path / "g.onnx")
    code, out, _ = hcf("inspect", tmp_path / "g.onnx", "--format", "json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["operators"] == {"MatMul": 1, "Relu": 1} and found["opset"] == 20


def test_verify_says_which_file_was_touched(hcf: Hcf, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "artefact"
    clone_artifact(tiny_folder, path)
    code, out, _ = hcf("verify", path)
    assert code == 0 and "files as written" in out
    (path / "unet/config.json").write_text("{}")
    code, out, err = hcf("verify", path, "--format", "json")
    assert code == 5 and "unet/config.json: edited" in err
    assert hcf("verify", tiny_folder)[0] == 5


def test_doctor_and_version(hcf: Hcf) -> None:
    code, out, _ = hcf("doctor", "--format", "json")
    assert code == 0 and json.loads(out.splitlines()[-1])["cores"] >= 1
    code, out, _ = hcf("--version")
    assert code == 0 and out.strip().count(".") == 2


def test_data_build_shapes_is_deterministic(hcf: Hcf, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for name in ("a", "b"):
        code, _, err = hcf("data", "build", "shapes", "-o", tmp_path / name, "--count", 6)
        assert code == 0, err
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = pq.read_table(tmp_path / "a/metadata.parquet").to_pylist()
    assert {row["split"] for row in rows} == {"train", "heldout"} and len(rows) == 12
    assert all(row["licence"] and json.loads(row["truth"])["objects"] for row in rows)
    (tmp_path / "mine").mkdir()
    assert hcf("data", "build", "shapes", "-o", tmp_path / "mine", "--count", 6)[0] == 2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_and_leave_nothing(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom hcf import cli\n"
        "from hcf.artifact import staged_folder\n"
        "@cli.app.command()\n"
        "def wait(target: Path) -> None:\n"
        "    with staged_folder(target):\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "cli.main(['wait', sys.argv[1]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE,
        # a shell starts what is in the background with interrupts ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    os.kill(process.pid, sent)
    assert process.wait(20) == code
    assert list(tmp_path.iterdir()) == []


def test_judge_without_a_data_set_says_how_to_make_one(hcf: Hcf, tmp_path: Path) -> None:
    code, _, err = hcf("data", "judge", tmp_path / "none", "-o", tmp_path / "judge")
    assert code == 5 and "hcf data build emoji" in err
    assert not (tmp_path / "judge").exists()


def test_decoder_says_what_a_tiny_one_costs(hcf: Hcf, tiny_folder: Path, tmp_path: Path) -> None:
    make_tiny_pipeline().vae.save_pretrained(tmp_path / "same")
    arguments = ["decoder", "-m", tiny_folder, "--tiny", tmp_path / "same", "--images", 1]
    code, out, err = hcf(*arguments, "--format", "json")
    assert code == 0, err
    found = json.loads(out.strip().splitlines()[-1])
    assert found["psnr_db"] == 100.0 and found["flop_ratio"] == 1.0 and found["lpips"] is None
    code, _, err = hcf("decoder", "-m", tiny_folder, "--tiny", tmp_path / "none")
    assert code == 5 and "none" in err
