"""The mini weights in the repository: complete, safe to load, and trained."""

import json
from pathlib import Path

from safetensors import safe_open

from hcf.artifact import Sampling, check_model_folder
from hcf.distill.data import FOLDER, read_captions, read_latents
from hcf.quality.clip_score import ClipZh
from hcf.quality.rules import rule_accuracy
from hcf.quality.sampling import generate_images, load_prompts
from hcf.source import open_pipeline

MODEL = Path(__file__).parents[1] / "models" / "weights" / "taiji-sd-mini"


def test_it_is_small_and_without_pickles() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60e6
    assert max(file.stat().st_size for file in files) < 30e6
    assert not {".bin", ".ckpt", ".pt", ".pkl"} & {file.suffix for file in files}
    check_model_folder(MODEL)


def test_its_data_fits_it() -> None:
    captions = read_captions(MODEL / FOLDER)
    latents, row, _ = read_latents(MODEL / FOLDER, captions)
    assert latents.shape[1:] == (8, 16, 16) and len(row) == len(captions)
    prompts = load_prompts(MODEL / "hcf_data" / "check_prompts.json")
    assert {prompt.kind for prompt in prompts} == {"emoji", "shapes"}
    accuracy = ClipZh.load(MODEL / "hcf_data").info["accuracy"]["unseen"]
    assert accuracy["r_at_5_of_64"] > 0.9
    with safe_open(MODEL / "hcf_data" / "judge.safetensors", "pt") as file:
        assert list(file.keys())
    trained = json.loads((MODEL / "training.json").read_text())
    assert {"first_stage", "image_clip", "unet", "release"} <= set(trained)


def test_it_draws_held_out_compositions() -> None:
    """Far below the figures of its card, which take more steps and all prompts: a broken load."""
    prompts = load_prompts(MODEL / "hcf_data" / "check_prompts.json")
    scenes = [p for p in prompts if p.truth and p.truth["relation"] is None][:24]
    images = generate_images(
        open_pipeline(MODEL),
        [p.text for p in scenes],
        list(range(24)),
        batch_size=24,
        sampling=Sampling(steps=15, guidance_scale=2.0),
    )
    found = rule_accuracy(images, [p.truth or {} for p in scenes])
    assert found["colour"] > 0.8 and found["shape"] > 0.6 and found["count"] > 0.7
