"""The training recipes' tiny twin: every phase for two steps on generated shapes."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from taiji.data import shapes
from taiji.data.corpus import Corpus, CorpusConfig, choose, emoji_caption, load, sampler
from taiji.data.release import ReleaseConfig, distillation_captions
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.train.recipe import read_recipe, train

ROW = {
    "label": "苹果", "tags": ["水果", "苹果"], "vendor": "noto", "concept_split": "train",
    "codepoint": "1F34E",
}  # fmt: skip
RECIPES = Path(__file__).parents[1] / "recipes" / "train"


def silent(message: str) -> None: ...


def test_captions_name_the_concept_mostly_and_the_style_often() -> None:
    rng = Random(0)
    captions = [emoji_caption(ROW, rng) for _ in range(400)]
    assert 0.7 < np.mean(["苹果" in c for c in captions]) < 0.95
    assert 0.65 < np.mean([c.startswith("谷歌风格") for c in captions]) < 0.85
    assert all("苹果" in c or "水果" in c for c in captions)


def test_held_out_concepts_are_never_chosen_and_unknown_names_are_refused() -> None:
    rows: list[dict[str, Any]] = [ROW, {**ROW, "label": "梨", "concept_split": "heldout"}]
    assert choose(rows, ["苹果", "梨"]) == [0]
    with pytest.raises(ValueError, match="桃"):
        choose(rows, ["桃"])


def test_a_batch_has_its_share_of_emoji() -> None:
    corpus = Corpus(np.zeros((10, 1, 1, 3), np.uint8), np.zeros(10, np.int64), (ROW,) * 4, ())
    index = sampler(corpus, 0.25)(np.random.default_rng(0), 8)
    assert (index < 4).sum() == 2


def test_shapes_corpus_is_train_split_only_and_repeats() -> None:
    first, second = (load(CorpusConfig(shapes=30, seed=1)) for _ in range(2))
    assert first.scenes == second.scenes and np.array_equal(first.images, second.images)
    assert all(shapes.split_of(scene) == "train" for scene in first.scenes)


def test_shipped_recipes_are_valid() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert read_recipe(path).phase in path.stem
    with pytest.raises(ValidationError, match="stepz"):
        read_recipe(RECIPES / "mini_unet.yaml", {"loop.stepz": 3})


def test_released_pairs_have_the_share_of_emoji_that_training_draws() -> None:
    corpus: Any = SimpleNamespace(
        rows=[{}] * 5, scenes=[None] * 30,
        caption=lambda i, rng: f"{i} {rng.randrange(100)}",
    )  # fmt: skip
    config = ReleaseConfig(scenes=20, captions_per_latent=2)
    positions, captions, row = distillation_captions(corpus, config, 0.7)
    emoji = [r for r in row if positions[r] < 5]
    assert len(captions) == len(row) and len(emoji) / len(row) == pytest.approx(0.7, abs=0.03)
    assert {len([r for r in row if r == i]) for i in range(5)} == {2 * len(emoji) // 10}
    assert all(c.split()[0] == str(positions[r]) for c, r in zip(captions, row, strict=True))


def test_every_phase_in_order_makes_a_pipeline_and_its_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = {
        "model": str(tmp_path / "model"),
        "data": {"shapes": 24, "colours": ["red", "blue"], "kinds": ["circle", "star"]},
        "loop": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
    }
    frozen = {}
    for phase in ("first_stage", "image_clip", "unet", "release"):
        recipe = tmp_path / f"{phase}.yaml"
        prompts = {"release": {"scenes": 6, "emoji_prompts": 0, "shape_prompts": 4}}
        extra = prompts if phase == "release" else {}
        recipe.write_text(
            yaml.safe_dump({**common, **extra, "phase": phase, "work": str(tmp_path / phase)})
        )
        folder = train(recipe, log=silent)
        if phase == "image_clip":
            frozen = load_file(folder / "image_clip" / "model.safetensors")
    after = load_file(folder / "image_clip" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())

    assert not [p for p in folder.rglob("*.json") if str(tmp_path / "model") in p.read_text()
                and p.name != "training.json"]  # fmt: skip
    pipe = TaijiStableDiffusionPipeline.from_pretrained(folder)
    assert pipe("一个红色的圆形", num_inference_steps=1).images[0].size == (64, 64)
    runs = json.loads((folder / "training.json").read_text())
    assert set(runs) == {"first_stage", "image_clip", "unet", "release"}
    assert runs["unet"]["metrics"]["loss"] > 0
    data = load_file(folder / "hcf_data" / "latents_distill.safetensors")
    captions = json.loads((folder / "hcf_data" / "captions_distill.json").read_text())
    assert data["latents"].shape == (6, 8, 16, 16) and len(captions) == len(data["row"])
    assert data["latents"].float().std() == pytest.approx(1.0, abs=0.4)
    prompts = json.loads((folder / "hcf_data" / "check_prompts.json").read_text())
    assert [p["split"] for p in prompts] == ["heldout"] * 4 and prompts[0]["truth"]["objects"]
