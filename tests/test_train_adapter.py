"""Training of adapters: what each kind changes and saves, exact resume, the records' numbers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from taiji.adapters.decoupled import WEIGHTS as IP_ADAPTER
from taiji.adapters.image_tokens import ImageTokens
from taiji.adapters.lora import WEIGHTS as LORA
from taiji.data import characters
from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.train.loop import LoopConfig, run
from taiji.train.phases import adapter
from taiji.train.phases.character_base import SETTINGS, CharactersConfig, make_packs
from taiji.train.recipe import read_recipe, train

ROOT = Path(__file__).parents[1]
MINI = ROOT / "models/weights/taiji-sd-mini"
RECIPES = ROOT / "recipes/train"
STEMS = ["tiny_adapter_image_tokens", "tiny_adapter_decoupled", "tiny_adapter_lora"]
LOOP = {"batch_size": 8, "warmup_steps": 1, "decay_share": 0.0, "log_every": 1}
IMAGE = {"width": 16, "depth": 1, "heads": 2, "scales": (0.0, 1.0)}
PLUS = {"width": 64, "tokens": 4, "scales": (0.0, 1.0), "align": {"steps": 2, **LOOP}}


def silent(message: str) -> None: ...


def config(folder: Path, name: str, base: Path, steps: int = 2, **changes: Any) -> adapter.Config:
    settings = {
        "start": MINI,
        "base_loop": {"steps": 1, **LOOP},
        "characters": {"heldout": 141, "variations": 1},
        "loop": {"steps": steps, **LOOP},
        "image": IMAGE,
        "dreambooth": {"lora": {"rank": 2}, "prior_images": 2},
        "steps": 1,
        "judged": 1,
        **changes,
    }
    return adapter.Config(model=folder / name, work=folder / f"{name}-work", base=base, **settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base that the first run makes and later ones read."""
    return tmp_path_factory.mktemp("adapter") / "base"


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_image_tokens_leave_the_base_and_become_a_file(base: Path, tmp_path: Path) -> None:
    metrics = adapter.train(config(tmp_path, "tokens", base, kind="image_tokens"), silent)
    kept = weights(base)
    assert metrics["base_loss"] > 0 and metrics["loss"] > 0
    assert {"identity", "pose", "clip_i_at_0.0", "all_at_1.0"} <= set(metrics)
    assert metrics["as_base_at_0.0"] == 1 and "align_loss" not in metrics
    projector = ImageTokens.from_pretrained(tmp_path / "tokens" / "image_tokens")
    assert sum(p.numel() for p in projector.parameters()) == metrics["trained_parameters"]
    assert json.loads((base / SETTINGS).read_text())["metrics"]["base_loss"] == metrics["base_loss"]

    metrics = adapter.train(config(tmp_path, "ip", base, kind="decoupled", image=PLUS), silent)
    assert set(load_file(tmp_path / "ip" / "ip_adapter" / IP_ADAPTER)) > {"image_proj.latents"}
    assert 0 <= metrics["identity_at_1.0"] <= 1 and metrics["as_base_at_0.0"] == 1
    assert metrics["align_loss"] > 0
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(base).items())

    with pytest.raises(ValueError, match="base was made with other settings.*seed: 0 -> 1"):
        other = {"heldout": 141, "variations": 1, "seed": 1}
        adapter.train(config(tmp_path, "x", base, kind="decoupled", characters=other), silent)


def test_a_lora_of_one_character(base: Path, tmp_path: Path) -> None:
    metrics = adapter.train(config(tmp_path, "lora", base, kind="lora"), silent)
    assert {"subject", "prior", "replay", "new_action_pose", "general_identity"} <= set(metrics)
    assert {"general_before_identity", "identity", "all"} <= set(metrics)
    saved = load_file(tmp_path / "lora" / "lora" / LORA)
    assert sum(t.numel() for t in saved.values()) == metrics["trained_parameters"]
    pipe = TaijiStableDiffusionPipeline.from_pretrained(base)
    folder = str(tmp_path / "lora" / "lora")
    pipe.unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    assert len(pipe.unet.active_adapters()) == 1
    with pytest.raises(ValueError, match="subject=141 of 141"):
        adapter.train(config(tmp_path, "x", base, kind="lora", dreambooth={"subject": 141}), silent)


@pytest.mark.parametrize("kind", ["image_tokens", "lora"])
def test_resume_ends_with_the_same_weights(kind: str, base: Path, tmp_path: Path) -> None:
    whole = config(tmp_path, "whole", base, 2, kind=kind)
    first, rest = (config(tmp_path, "parts", base, steps, kind=kind) for steps in (1, 2))
    for each in (whole, first, rest):
        adapter.train(each, silent)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_pair_is_of_one_pack_and_never_the_image_itself() -> None:
    pipe = TaijiStableDiffusionPipeline.from_pretrained(MINI)
    who, _ = characters.split(140, 0)
    packs = make_packs(who, CharactersConfig(variations=2), pipe)
    for index, image in list(enumerate(packs.images))[::5]:
        reading = characters.read(image)
        assert reading.pose == packs.pose(index)
        assert all(characters.agreement(reading, packs.character(index)).values())
    count = torch.arange(len(packs.images)).float()[:, None]
    draw = adapter.pair_draw(packs, count, pipe, 0.5)
    batch = draw(np.random.default_rng(0), 64)
    rows = [
        int((packs.latents == latent).flatten(1).all(1).nonzero()) for latent in batch["latents"]
    ]
    others = batch["features"][:, 0].long().tolist()
    assert all(a != b and a // 8 == b // 8 for a, b in zip(rows, others, strict=True))
    assert len(set(others)) > 20


def test_alignment_makes_an_image_read_like_the_words_for_it(tmp_path: Path) -> None:
    pipe = TaijiStableDiffusionPipeline.from_pretrained(MINI)
    who, _ = characters.split(138, 0)
    packs = make_packs(who, CharactersConfig(variations=1), pipe)
    words = adapter.words_of(pipe, who, 8)
    assert words.shape == (6, 8, 192) and words.std(0).max() > 0.01
    captions = [characters.caption(who[1], pose) for pose in characters.POSES]
    assert torch.allclose(words[1], pipe.encode_prompt(captions)[0].mean(0)[:8], atol=1e-5)
    with pytest.raises(ValueError, match="57 image tokens, 56 of the text"):
        adapter.words_of(pipe, who, 57)
    features = adapter.features_of(pipe, packs.images, "patches")
    torch.manual_seed(0)
    projector = ImageTokens(128, 192, 8, "patches", 32, 1, 2)
    objective = adapter.AlignObjective(projector)
    loop = LoopConfig(steps=120, **LOOP | {"learning_rate": 1e-2})
    run(objective, adapter.align_draw(packs, features, words), loop, tmp_path, silent)
    with torch.no_grad():
        tokens = projector(features)
    nearest = (tokens[:, None] - words).square().mean((2, 3)).argmin(1)
    assert (nearest == torch.arange(len(features)) // packs.per_pack).float().mean() >= 0.8


@pytest.mark.parametrize("stem", STEMS)
def test_recipes_have_tiny_twins(stem: str, base: Path, tmp_path: Path) -> None:
    said = read_recipe(RECIPES / f"{stem}.yaml")
    changes = config(tmp_path, "twin", base, kind=said.kind).model_dump(mode="json")
    changes["image"]["width"] = 64
    folder = train(RECIPES / f"{stem}.yaml", changes, silent)
    assert "adapter" in json.loads((folder / "training.json").read_text())


def recorded(stem: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((RECIPES / f"results/{stem}.json").read_text())["metrics"]
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_the_kept_records_meet_their_numbers(stem: str) -> None:
    metrics = recorded(stem)
    assert metrics["identity"] >= 0.9 and metrics["pose"] >= 0.9
    if "general_identity" in metrics:
        assert metrics["new_action_pose"] >= 0.9
        assert metrics["general_identity"] >= metrics["general_before_identity"] - 0.05
        return
    scales = read_recipe(RECIPES / f"{stem}.yaml").image.scales
    assert scales[0] == 0 and scales[-1] == 1 and metrics["as_base_at_0.0"] == 1
    assert metrics["identity"] - metrics["identity_error"] > metrics["identity_at_0.0"]
    for low, high in pairwise(scales):
        fall = metrics[f"identity_at_{low}"] - metrics[f"identity_at_{high}"]
        assert fall <= metrics[f"identity_error_at_{high}"], high
        assert metrics[f"clip_i_at_{low}"] < metrics[f"clip_i_at_{high}"], high
