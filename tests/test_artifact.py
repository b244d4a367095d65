from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from hcf.artifact import (
    LINK_FROM_BYTES,
    MANIFEST,
    Manifest,
    check_model_folder,
    clean_leftovers,
    clone_artifact,
    content_hash,
    hash_file,
    read_manifest,
    staged_folder,
    verify,
    write_manifest,
)
from hcf.errors import InvalidArtifact, RecipeError, StorageError, UnsafeFile
from hcf.weights import check_weights, read_header


def artifact(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (folder / "unet/config.json").write_text("{}")
    weights = np.arange(LINK_FROM_BYTES // 4, dtype=np.float32)
    save_file({"a.weight": weights}, folder / "unet/model.safetensors")
    write_manifest(folder, Manifest(name="first"))
    return folder


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".hcf-")]


def test_content_not_names_decides_the_hash(tmp_path: Path) -> None:
    a, b = artifact(tmp_path / "a"), artifact(tmp_path / "b")
    assert content_hash(a) == content_hash(b) == read_manifest(a).content_hash
    (a / "report.html").write_text("page")
    (a / "grid.png").write_bytes(b"png")
    assert content_hash(a) == content_hash(b) and verify(a) == []
    (a / "unet/config.json").write_text('{"x": 1}')
    assert content_hash(a) != content_hash(b)


def test_verify_names_every_kind_of_damage(tmp_path: Path) -> None:
    path = artifact(tmp_path / "a")
    weights = path / "unet/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (path / "unet/config.json").write_text("{} ")
    (path / "model_index.json").unlink()
    (path / "more.txt").write_text("x")
    found = {problem.path: problem.kind for problem in verify(path)}
    assert found == {
        "unet/model.safetensors": "truncated",
        "unet/config.json": "edited",
        "model_index.json": "missing",
        "more.txt": "extra",
    }


def test_verify_notices_an_edited_manifest(tmp_path: Path) -> None:
    path = artifact(tmp_path / "a")
    tree = json.loads((path / MANIFEST).read_text())
    tree["content_hash"] = "0" * 64
    (path / MANIFEST).write_text(json.dumps(tree))
    assert [p.path for p in verify(path)] == [MANIFEST]


def test_manifest_is_strict_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="has no hcf_manifest.json"):
        read_manifest(tmp_path)
    for text in ("{", "[]", '{"name": "x", "color": 3}', '{"name": "x", "schema_version": 99}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(InvalidArtifact):
            read_manifest(tmp_path)


def test_clone_links_large_files_copies_small_ones_and_keeps_lineage(tmp_path: Path) -> None:
    a = artifact(tmp_path / "a")
    clone_artifact(a, tmp_path / "b")
    last = clone_artifact(tmp_path / "b", tmp_path / "c")
    assert content_hash(tmp_path / "c") == content_hash(a) and verify(tmp_path / "c") == []
    assert (tmp_path / "c/unet/model.safetensors").samefile(a / "unet/model.safetensors")
    assert not (tmp_path / "c/unet/config.json").samefile(a / "unet/config.json")
    assert [p.content_hash for p in last.parents] == [content_hash(a)] * 2


def test_clone_of_a_plain_folder_takes_its_sampling(tmp_path: Path) -> None:
    a = artifact(tmp_path / "plain")
    (a / MANIFEST).unlink()
    (a / "model_index.json").write_text('{"default_steps": 50, "default_guidance_scale": 3.0}')
    manifest = clone_artifact(a, tmp_path / "b")
    assert (manifest.sampling.steps, manifest.sampling.guidance_scale) == (50, 3.0)
    assert manifest.parents[0].name == "plain"
    assert manifest.parents[0].content_hash == content_hash(a)


def test_staged_folder_replaces_only_on_success(tmp_path: Path) -> None:
    target = artifact(tmp_path / "out")
    before = content_hash(target)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), staged_folder(target) as folder:
            (folder / "half").write_text("x")
            raise error
        assert content_hash(target) == before and leftovers(tmp_path) == []
    with staged_folder(target) as folder:
        (folder / MANIFEST).write_text("{}")
    assert [p.name for p in target.iterdir()] == [MANIFEST] and leftovers(tmp_path) == []


def test_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="filled up"), staged_folder(tmp_path / "out") as folder:
        (folder / "weights").symlink_to("/dev/full")
        with open(folder / "weights", "wb", buffering=0) as file:
            file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_bytes(b"x")
    with pytest.raises(RecipeError, match="not replaced"), staged_folder(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos/holiday.jpg").exists()


def test_killed_writer_leaves_only_what_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hcf.artifact import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    clean_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 1, "a living writer's folder stays"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and len(leftovers(tmp_path)) == 1
    clean_leftovers(tmp_path)
    assert leftovers(tmp_path) == []


def test_output_set_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    time.sleep(0.01)
    (tmp_path / f".hcf-{process.pid}-abc.old.out").mkdir()
    (tmp_path / f".hcf-{process.pid}-abc").mkdir()
    clean_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_nan_is_found_in_every_type_without_torch(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    good = torch.linspace(-3, 3, 7).to(kind)
    bad = torch.tensor([1.0, float("nan"), 2.0]).to(kind)
    save_torch(
        {"pad.weight": torch.ones(1), "good.weight": good}, str(tmp_path / "good.safetensors")
    )
    save_torch({"bad.weight": bad}, str(tmp_path / "bad.safetensors"))
    assert len(check_weights(tmp_path / "good.safetensors")) == 2
    with pytest.raises(InvalidArtifact, match=r"bad.weight has 1 NaN or infinite of 3"):
        check_weights(tmp_path / "bad.safetensors")


def test_broken_safetensors_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a.weight": np.ones((4, 4), np.float32)}, whole)
    data = whole.read_bytes()
    bad = tmp_path / "bad.safetensors"
    wrong_shape = data.replace(b"[4,4]", b"[4,5]")
    for content in (b"", data[:4], data[:20], data[:-1], data + b"x", wrong_shape, b"\0" * 99):
        bad.write_bytes(content)
        with pytest.raises(InvalidArtifact, match="bad.safetensors"):
            read_header(bad)
    save_file({"a.weight": np.ones(3, np.int32)}, bad)
    with pytest.raises(InvalidArtifact, match="I32, not floating point"):
        check_weights(bad)
    save_file({"position_ids": np.ones(3, np.int64)}, bad)
    assert check_weights(bad)["position_ids"].shape == (3,)


def test_a_real_pipeline_passes_and_its_damage_is_named(tiny_folder: Path) -> None:
    check_model_folder(tiny_folder)
    weights = tiny_folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArtifact, match="truncated"):
        check_model_folder(tiny_folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, weights)
    with pytest.raises(InvalidArtifact, match="NaN"):
        check_model_folder(tiny_folder)
    weights.unlink()
    with pytest.raises(InvalidArtifact, match="no \\*.safetensors"):
        check_model_folder(tiny_folder)
    shutil.rmtree(tiny_folder / "unet")
    with pytest.raises(InvalidArtifact, match="'unet'"):
        check_model_folder(tiny_folder)


def test_pickles_are_refused_unread(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "vae/x.pt", "a.pkl", "w.pth"):
        file = tiny_folder / name
        file.write_bytes(b"\x80\x04 would run code")
        with pytest.raises(UnsafeFile, match=file.name):
            check_model_folder(tiny_folder)
        file.unlink()
    checkpoint = tmp_path / "sd.ckpt"
    checkpoint.write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeFile):
        check_model_folder(checkpoint)
    (tiny_folder / "engine.xml").write_text("<net/>")
    (tiny_folder / "engine.bin").write_bytes(np.ones(8, np.float32).tobytes())
    check_model_folder(tiny_folder)
    (tiny_folder / "engine.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeFile):
        check_model_folder(tiny_folder)


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="no model at"):
        check_model_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidArtifact, match="has no model_index.json"):
        check_model_folder(tmp_path)
    (tmp_path / "x.txt").write_text("abc")
    assert hash_file(tmp_path / "x.txt").startswith("ba7816bf")
