"""The phase `vqgan` on generated shapes, a few steps each: components, records, exact resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, VQModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from taiji.autoencoder.kl import latents, to_tensor
from taiji.data.corpus import load
from taiji.train.phases import vqgan
from taiji.train.recipe import read_recipe, train
from taiji.train.results import cpu_name, record

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/train/tiny_vqgan.yaml"
IMAGE_CLIP = ROOT / "models/weights/taiji-sd-mini/image_clip"


def silent(message: str) -> None: ...


def recipe(folder: Path, **changes: Any) -> Path:
    """A small run; a key changed to None is left out."""
    tree: dict[str, Any] = {
        "phase": "vqgan",
        "model": str(folder / "model"),
        "work": str(folder / "work"),
        "architecture": "tiny-vq-f4",
        "data": {"shapes": 24, "size": 32},
        "objective": {"disc_start": 2, "disc_width": 8, "disc_layers": 2},
        "perceptual": {"network": str(IMAGE_CLIP)},
        "codebook": {"update": "ema", "restart_after": 2},
        "evaluation": {"scenes": 8},
        "loop": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every": 1},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    given = {key: value for key, value in (tree | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(given))
    return path


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "vqvae" / "diffusion_pytorch_model.safetensors")


def test_it_makes_a_plain_vqmodel_with_its_scale_card_and_record(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path), log=silent)
    model = VQModel.from_pretrained(folder / "vqvae").eval()
    config = read_recipe(tmp_path / "recipe.yaml")
    corpus = to_tensor(load(config.data).images)
    with torch.no_grad():
        scaled = latents(model, corpus) * model.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1.0, abs=0.02)
    record = json.loads((folder / "training.json").read_text())["vqgan"]
    assert {
        "heldout_psnr", "heldout_usage", "heldout_perplexity", "heldout_frechet", "psnr", "usage",
        "perplexity", "generator", "adaptive", "told_apart", "cpu_seconds", "scaling_factor",
    } <= record["metrics"].keys()  # fmt: skip
    card = (folder / "vqvae" / "README.md").read_text()
    assert "ChineseCLIPVisionModel" in card and '"learned_weights": false' in card
    assert "heldout_psnr" in card and "ema" in card
    lines = (tmp_path / "work" / "log.jsonl").read_text().splitlines()
    with_gan = ["generator" in json.loads(line) for line in lines]
    assert with_gan == [False, False, True, True]  # from step 2 on, which is the third


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_resume_repeats_the_uninterrupted_run_exactly(tmp_path: Path, update: str) -> None:
    common = {
        "codebook": {"update": update, "restart_after": 2},
        "evaluation": {"scenes": 0},
    }
    loop = {"batch_size": 4, "warmup_steps": 1, "decay_share": 0.0}
    whole = train(recipe(tmp_path / "whole", loop={"steps": 6, **loop}, **common), log=silent)
    half = recipe(tmp_path / "half", loop={"steps": 3, **loop}, **common)
    train(half, log=silent)
    resumed = train(half, {"loop.steps": 6}, log=silent)
    expected = weights(whole)
    assert all(torch.equal(t, expected[n]) for n, t in weights(resumed).items())


def test_the_discriminator_stands_still_until_its_step(tmp_path: Path) -> None:
    """Without weight decay, which the published recipes do not have either."""
    changes = {"evaluation": {"scenes": 0}, "objective": {
        "disc_start": 3, "disc_width": 8, "disc_layers": 2, "perceptual_weight": 0.0,
    }}  # fmt: skip
    loop = {"batch_size": 4, "warmup_steps": 1, "decay_share": 0.0, "weight_decay": 0.0}
    states = []
    for steps in (1, 3, 4):
        path = recipe(tmp_path / str(steps), loop={"steps": steps, **loop}, **changes)
        train(path, log=silent)
        newest = sorted((tmp_path / str(steps) / "work").rglob("model.safetensors"))[-1]
        saved = load_file(newest)
        states.append({n: t for n, t in saved.items() if n.startswith("discriminator")})
    assert states[0] and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert not any(torch.equal(t, states[2][n]) for n, t in states[1].items())


def test_kl_has_the_same_objective_and_another_component(tmp_path: Path) -> None:
    changes = {"codebook": None, "evaluation": {"scenes": 4, "frechet": False}}
    folder = train(recipe(tmp_path, architecture="tiny-kl-f4", **changes), log=silent)
    AutoencoderKL.from_pretrained(folder / "vae")
    metrics = json.loads((folder / "training.json").read_text())["vqgan"]["metrics"]
    assert metrics["kl"] > 0 and "heldout_psnr" in metrics and "heldout_usage" not in metrics
    assert "KL weight: 1e-06" in (folder / "vae" / "README.md").read_text()


def test_the_record_of_a_run_is_copied_beside_its_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, evaluation={"scenes": 0})
    with pytest.raises(FileNotFoundError, match="no run"):
        record(path)
    folder = train(path, log=silent)
    found = json.loads(record(path).read_text())
    run = json.loads((folder / "training.json").read_text())["vqgan"]
    assert found["metrics"] == run["metrics"] and found["seconds"] == run["metrics"]["seconds"]
    assert list(found) == ["command", "date", "cpu", "threads", "torch", "seconds", "metrics"]
    assert cpu_name(tmp_path / "none") == "unknown"
    recipe(tmp_path, evaluation={"scenes": 4})
    with pytest.raises(ValueError, match="another evaluation"):
        record(path)


def test_keys_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="kl_weight means nothing to tiny-vq-f4"):
        read_recipe(recipe(tmp_path, kl_weight=1e-6))
    with pytest.raises(ValidationError, match="codebook means nothing to tiny-kl-f4"):
        read_recipe(recipe(tmp_path, architecture="tiny-kl-f4"))
    with pytest.raises(FileNotFoundError, match="feature network"):
        train(recipe(tmp_path, perceptual={"network": str(tmp_path / "none")}), log=silent)


def test_an_objective_left_out_is_the_published_one(tmp_path: Path) -> None:
    def objective(architecture: str, **given: Any) -> tuple[float, int, int, float]:
        codebook = {} if architecture in vqgan.VQ else None
        path = recipe(tmp_path, architecture=architecture, objective=given, codebook=codebook)
        found = read_recipe(path).objective
        return found.gan_weight, found.disc_start, found.disc_layers, found.perceptual_weight

    assert objective("vq-f4") == (0.75, 0, 3, 1.0)
    assert objective("vq-f8") == (0.6, 1, 2, 1.0)
    assert objective("vq-f16") == (0.8, 250_001, 3, 1.0)
    assert objective("kl-f8") == objective("kl-f4") == (0.5, 50_001, 3, 1.0)
    assert objective("kl-f8", disc_start=7) == (0.5, 7, 3, 1.0)
    unsaid = read_recipe(recipe(tmp_path, architecture="vq-f8", objective=None))
    assert unsaid.objective.gan_weight == 0.6 and unsaid.kl_weight == 1e-6


def test_every_architecture_of_the_recipes_is_a_preset() -> None:
    config = read_recipe(RECIPE)
    names = {*vqgan.VQ, *vqgan.KL}
    assert config.architecture in names and not {*vqgan.VQ} & {*vqgan.KL}
    assert names == set(vqgan.Architecture.__args__)  # type: ignore[attr-defined]


def test_the_kept_record_of_the_recipe_meets_its_numbers() -> None:
    kept = json.loads((RECIPE.parent / "results" / "tiny_vqgan.json").read_text())
    metrics = kept["metrics"]
    assert metrics["heldout_psnr"] >= 25 and metrics["heldout_usage"] >= 0.8
    assert metrics["cpu_seconds"] < 600 and metrics["heldout_perplexity"] > 1
