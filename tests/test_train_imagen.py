"""Training of the cascade: what each phase changes, exact resume, tiny twins of its recipes.

The numbers that the recipes must reach are asserted on their committed records.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel
from safetensors.torch import load_file
from torch import Tensor

from taiji import presets
from taiji.data.corpus import CorpusConfig, load
from taiji.diffusion.schedules import make_scheduler
from taiji.pipelines import TaijiImagenPipeline, TaijiSuperResolutionPipeline
from taiji.text import SandwichTextEncoder
from taiji.text.tokenizer import build_tokenizer
from taiji.train.phases import imagen, super_resolution
from taiji.train.phases.denoiser import encoder_groups
from taiji.train.recipe import read_recipe

RECORDS = Path(__file__).parents[1] / "recipes" / "train" / "results"
DATA = {"shapes": 12, "colours": ["red", "blue"], "kinds": ["circle", "star"], "counts": [1]}
SAMPLING = {"steps": 2, "guidance_scale": 2.0, "thresholding": "dynamic"}


def silent(message: str) -> None: ...


def loop(steps: int, **changes: Any) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 4, "warmup_steps": 1, "decay_share": 0.0, "log_every": 1,
            **changes}  # fmt: skip


def base(folder: Path, name: str, steps: int = 2, **changes: Any) -> imagen.Config:
    settings = {"data": DATA, "loop": loop(steps), "judged": 0, "sampling": SAMPLING, **changes}
    return imagen.Config(model=folder / name, work=folder / f"{name}-work", **settings)


def encoder_of(folder: Path) -> dict[str, Tensor]:
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def phase_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagen")
    imagen.train(base(folder, "one", judged=2), silent)
    return folder / "one"


def test_phase_1_leaves_the_encoder_and_phase_2_changes_it(phase_1: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)  # the phase's own seed: the encoder is made first
    config = SandwichTextEncoder.load_config(phase_1 / "text_encoder")
    fresh = SandwichTextEncoder.from_config(config).state_dict()
    first = encoder_of(phase_1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in fresh.items())

    metrics = imagen.train(base(tmp_path, "still", start=phase_1), silent)
    assert "encoder_moved" not in metrics
    still = encoder_of(tmp_path / "still")
    assert all(torch.equal(tensor, still[name]) for name, tensor in first.items())

    metrics = imagen.train(base(tmp_path, "two", start=phase_1, freeze_encoder=False), silent)
    second = encoder_of(tmp_path / "two")
    a, b = (torch.cat([t.flatten() for t in tree.values()]) for tree in (first, second))
    moved = ((b - a).norm() / a.norm()).item()
    assert metrics["encoder_moved"] == pytest.approx(moved, rel=1e-3) and moved > 0
    assert not any(
        torch.equal(tensor, second[name]) for name, tensor in first.items() if "branch" in name
    )
    pipe = TaijiImagenPipeline.from_pretrained(tmp_path / "two")
    assert pipe.config.settings[0]["steps"] == 2
    assert pipe("一个红色的圆形", generator=torch.Generator().manual_seed(0)).images[0].size == (
        16,
        16,
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_resume_repeats_the_loss_curve(tmp_path: Path, frozen: bool) -> None:
    def losses(name: str) -> list[float]:
        lines = (tmp_path / f"{name}-work" / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    imagen.train(base(tmp_path, "whole", 6, freeze_encoder=frozen), silent)
    imagen.train(base(tmp_path, "parts", 3, freeze_encoder=frozen), silent)
    imagen.train(base(tmp_path, "parts", 6, freeze_encoder=frozen), silent)
    assert len(losses("whole")) == 6
    assert losses("parts") == pytest.approx(losses("whole"), abs=1e-6)


def test_the_encoder_learns_slower_the_deeper_a_layer_is() -> None:
    encoder = SandwichTextEncoder(vocab_size=9, **presets.TINY_SANDWICH)
    groups = encoder_groups(encoder, 0.1, 0.9)
    assert [g["lr_scale"] for g in groups] == pytest.approx([0.081, 0.09, 0.1])
    assert sum(len(g["params"]) for g in groups) == len(list(encoder.parameters()))
    assert any(p is encoder.word.weight for p in groups[0]["params"])


@pytest.mark.parametrize("changes", [{"base": "b-tiny"}, {"schedule": "edm"}])
def test_other_bases_and_processes(tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = imagen.train(base(tmp_path, "other", judged=2, **changes), silent)
    assert metrics["loss"] > 0 and 0 <= metrics["colour"] <= 1


def test_wrong_folders_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer/.*tiny_imagen.yaml"):
        imagen.train(base(tmp_path, "x", start=tmp_path), silent)
    with pytest.raises(ValueError, match="40 pixels do not reduce to the U-Net's 16"):
        imagen.train(base(tmp_path, "x", data={**DATA, "size": 40}), silent)


def upscaler(folder: Path, name: str, **changes: Any) -> super_resolution.Config:
    settings = {"data": DATA, "loop": loop(2), "measured": 2, "levels": (0.0,),
                "compared_steps": (1,), "sampling": {"steps": 2}, **changes}  # fmt: skip
    return super_resolution.Config(model=folder / name, work=folder / f"{name}-work", **settings)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("first_stage") / "vqvae"
    VQModel(**presets.TINY_VQ_F4).save_pretrained(folder)
    return folder


def test_latent_super_resolution_becomes_a_pipeline(
    phase_1: Path, first_stage: Path, tmp_path: Path
) -> None:
    changes = {"levels": (0.0, 0.1), "text_guidance": (2.0,), "tiled_pixels": 128}
    config = upscaler(tmp_path, "sr", first_stage=first_stage, text=phase_1, **changes)
    metrics = super_resolution.train(config, silent)
    assert metrics["loss"] > 0 and metrics["low_psnr_0"] > 0
    assert {"low_psnr_steps_1", "high_psnr_0_without_text"} <= metrics.keys()
    assert metrics["text_effect_0.1_guidance_2"] > 0 and "text_effect_0_guidance_2" not in metrics
    assert metrics["tiled_psnr"] > 0 and metrics["seam_ratio"] > 0
    pipe = TaijiSuperResolutionPipeline.from_pretrained(tmp_path / "sr")
    # measured on these images, not diffusers' default
    assert pipe.vae.config.scaling_factor == pytest.approx(metrics["scaling_factor"])
    assert pipe.vae.config.scaling_factor != 0.18215
    out = pipe(torch.rand(1, 3, 24, 40), output_type="pt", num_inference_steps=1).images
    assert out.shape == (1, 3, 96, 160)
    cascade = TaijiImagenPipeline(
        **TaijiImagenPipeline.from_pretrained(phase_1).components
        | {"sr1_unet": pipe.unet, "sr1_scheduler": pipe.scheduler, "sr1_vae": pipe.vae}
    )
    assert cascade("红色", num_inference_steps=1).images[0].size == (64, 64)


def test_the_effect_of_the_text_is_measured_against_the_seed(first_stage: Path) -> None:
    vae = VQModel.from_pretrained(first_stage)
    images = load(CorpusConfig(**DATA)).images[:2]

    def effect(captions: list[str]) -> float:
        return super_resolution.text_effect(pipe, images, captions, 0.1, 1.0, 0)

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**presets.TINY_SR_UNET).eval()
    tokenizer = build_tokenizer(["红色圆形", "蓝色五角星"], max_length=8)
    text = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.TINY_SANDWICH).eval()
    parts = (unet, make_scheduler("linear", "v_prediction"), vae, tokenizer, text)
    pipe = TaijiSuperResolutionPipeline(*parts, settings={"steps": 1})
    assert effect(["红色圆形"] * 2) == 0 and effect(["红色圆形", "蓝色五角星"]) > 0


def test_what_is_measured_is_not_trained_on() -> None:
    config = super_resolution.Config(
        model=Path("m"), work=Path("w"), data=DATA, measured=4, loop=loop(1)
    )
    corpus = load(config.data)
    blank = replace(corpus, images=corpus.images.copy())
    blank.images[:4] = 0
    tokenizer = build_tokenizer(corpus.texts(), max_length=8)
    draw = super_resolution.make_draw(blank, config, 4, tokenizer)
    batch = draw(np.random.default_rng(0), 64)
    assert batch["images"].flatten(1).max(1).values.min() == 1  # every one has white
    with pytest.raises(ValueError, match="measured=7 images are kept out of training, of only 12"):
        changed = config.model_copy(update={"measured": 7})
        super_resolution.make_draw(corpus, changed, 4, tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "tiny-efficient", "crop": 32, "back_projection": 1.0},
        {"architecture": "tiny-x2"},
    ],
)
def test_pixel_space_and_half_the_enlargement(
    first_stage: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stage = {"first_stage": first_stage} if changes["architecture"] == "tiny-x2" else {}
    metrics = super_resolution.train(upscaler(tmp_path, "sr", **stage, **changes), silent)
    assert metrics["loss"] > 0
    if "back_projection" in changes:
        assert metrics["low_psnr_0"] > metrics["low_psnr_0_uncorrected"]


def test_a_first_stage_where_it_is_needed_and_only_there(tmp_path: Path, first_stage: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="hcf train recipes/train/tiny_vqgan.yaml"):
            super_resolution.train(upscaler(tmp_path, "x", first_stage=folder), silent)
    with pytest.raises(ValueError, match="leave first_stage out"):
        pixel = {"architecture": "tiny-efficient", "first_stage": first_stage}
        super_resolution.train(upscaler(tmp_path, "x", **pixel), silent)
    with pytest.raises(ValueError, match="crop=128 is larger"):
        super_resolution.train(upscaler(tmp_path, "x", first_stage=first_stage, crop=128), silent)


def metrics_of(recipe: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((RECORDS / f"{recipe}.json").read_text())["metrics"]
    return found


def test_the_recorded_base_reaches_its_numbers() -> None:
    metrics = metrics_of("tiny_imagen")
    assert metrics["colour"] >= 0.95
    assert metrics["saturated_none"] >= 5 * metrics["saturated_dynamic"]


def test_the_recorded_joint_phase_keeps_what_the_base_draws() -> None:
    metrics = metrics_of("tiny_imagen_joint")
    assert metrics["colour"] >= 0.95 and metrics["encoder_moved"] > 1e-3


@pytest.mark.parametrize(
    ("recipe", "least"), [("tiny_super_resolution", 28), ("tiny_super_resolution_pixel", 30)]
)
def test_the_recorded_super_resolution_meets_its_numbers(recipe: str, least: float) -> None:
    metrics = metrics_of(recipe)
    config = read_recipe(RECORDS.parent / f"{recipe}.yaml")
    assert config.sampling.steps >= 4 and metrics["low_psnr_0"] >= least
    tracked = [metrics[f"low_psnr_{level:g}"] for level in config.levels]
    assert tracked == sorted(tracked, reverse=True)
    assert metrics["text_effect_0.1_guidance_4"] > 1
    assert metrics["tiled_psnr"] >= 35 and metrics["seam_ratio"] <= 1.1
