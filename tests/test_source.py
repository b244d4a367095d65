"""Models opened from folders and from the hub's cache, each from a real tiny pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hcf.errors import InvalidArtifact
from hcf.source import find_variant, open_pipeline
from hcf.weights import read_header


def assert_equal_weights(found: Any, wanted: Any) -> None:
    for name, module in wanted.components.items():
        if isinstance(module, nn.Module):
            states = getattr(found, name).state_dict(), module.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


@pytest.mark.parametrize("prefixed", [False, True])
def test_old_and_new_names_of_clip_load_the_same(
    tiny_pipeline: Any, tiny_folder: Path, prefixed: bool
) -> None:
    file = tiny_folder / "text_encoder" / "model.safetensors"
    prefix = "text_model." if prefixed else ""
    state = {prefix + k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, file, {"format": "pt"})
    assert_equal_weights(open_pipeline(tiny_folder), tiny_pipeline)


def test_old_names_of_a_first_stage_load_the_same(tiny_pipeline: Any, tiny_folder: Path) -> None:
    file = tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    state = {}
    for key, value in load_file(file).items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = value
    save_file(state, file, {"format": "pt"})
    assert any(".query." in key for key in read_header(file))
    assert_equal_weights(open_pipeline(tiny_folder), tiny_pipeline)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_there_are_not_drawn_at_random(
    tiny_folder: Path, component: str
) -> None:
    file = next((tiny_folder / component).glob("*.safetensors"))
    gone = next(name for name in read_header(file) if name.endswith("weight"))
    state = load_file(file)
    del state[gone]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InvalidArtifact, match="no weights for 1 of its tensors"):
        open_pipeline(tiny_folder)


def test_variants_and_shards_are_found(tiny_pipeline: Any, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "a", variant="fp16", max_shard_size="60KB")
    assert len(list((tmp_path / "a" / "unet").glob("*.fp16-*.safetensors"))) > 1
    assert find_variant(tmp_path / "a", None) == "fp16"
    assert_equal_weights(open_pipeline(tmp_path / "a"), tiny_pipeline)
    assert_equal_weights(open_pipeline(tmp_path / "a", variant="fp16"), tiny_pipeline)
    with pytest.raises(InvalidArtifact, match="no weights of variant 'bf16'"):
        open_pipeline(tmp_path / "a", variant="bf16")
    next((tmp_path / "a" / "unet").glob("*00002-of*")).unlink()
    with pytest.raises(InvalidArtifact, match="00002-of|lacks"):
        open_pipeline(tmp_path / "a")
    # plain files are taken where both are there
    tiny_pipeline.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    other = tiny_pipeline.unet.state_dict()
    assert find_variant(tmp_path / "b", None) is None
    tiny_pipeline.unet.save_pretrained(tmp_path / "b" / "unet", variant="fp16")
    with torch.no_grad():
        tiny_pipeline.unet.conv_in.weight.add_(0)
    assert find_variant(tmp_path / "b", None) is None
    assert torch.equal(open_pipeline(tmp_path / "b").unet.conv_in.weight, other["conv_in.weight"])


def test_two_variants_have_to_be_chosen_from(tiny_pipeline: Any, tmp_path: Path) -> None:
    for variant in ("ema", "full"):
        tiny_pipeline.save_pretrained(tmp_path / "a", variant=variant)
    with pytest.raises(InvalidArtifact, match="ema, full"):
        open_pipeline(tmp_path / "a")
    assert_equal_weights(open_pipeline(tmp_path / "a", variant="ema"), tiny_pipeline)


def hub_cache(folder: Path, home: Path, name: str) -> Path:
    """`folder` as the hub's client keeps model `name` under HF_HOME=home."""
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    return snapshot


OPEN = """
import sys, torch
from hcf.source import open_pipeline
from hcf.errors import HcfError
for name in sys.argv[1:]:
    try:
        pipe = open_pipeline(name)
        print(type(pipe).__name__, float(pipe.unet.conv_in.weight.sum()))
    except HcfError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_hub_ids_come_from_the_cache_and_are_explained_without(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    whole, half, pickled = tmp_path / "whole", tmp_path / "half", tmp_path / "pickled"
    tiny_pipeline.save_pretrained(whole)
    tiny_pipeline.save_pretrained(half, variant="fp16")
    tiny_pipeline.save_pretrained(pickled)
    # what lies beside is not read; what would have to be, is refused
    (whole / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\\x80\\x02")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    home = tmp_path / "hf"
    for folder in (whole, half, pickled):
        hub_cache(folder, home, f"owner/{folder.name}")
    found = subprocess.run(
        [sys.executable, "-c", OPEN, "owner/whole", "owner/half", "owner/pickled", "owner/none"],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    lines = found.stdout.splitlines()
    wanted = f"StableDiffusionPipeline {float(tiny_pipeline.unet.conv_in.weight.sum())}"
    assert lines[:2] == [wanted, wanted], found.stderr
    assert lines[2].startswith("InvalidArtifact no model at owner/pickled")
    assert "pickled ones (*.bin) are not read" in lines[2] or "no *.safetensors" in lines[2]
    assert lines[3].startswith("InvalidArtifact no model at owner/none")
    assert "HF_HUB_OFFLINE is set" in lines[3] and "fix: hf download owner/none" in lines[3]


def test_paths_that_cannot_be_hub_ids_are_local(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="no model at"):
        open_pipeline(tmp_path / "nothing")
    with pytest.raises(InvalidArtifact, match="no model at out/model.safetensors"):
        open_pipeline("out/model.safetensors")


def test_pipelines_of_absent_packages_are_named(tiny_folder: Path) -> None:
    index = json.loads((tiny_folder / "model_index.json").read_text())
    (tiny_folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "NoSuchPipeline"})
    )
    with pytest.raises(InvalidArtifact, match="NoSuchPipeline"):
        open_pipeline(tiny_folder)
