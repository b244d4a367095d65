"""Every family that has a recipe, at tiny size: two or three steps, saved, opened, sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, VQModel
from safetensors.torch import save_file

from hcf.distill.trainer import distill
from hcf.errors import InvalidArtifact, RecipeError
from hcf.settings import DistillConfig
from hcf.source import open_pipeline
from taiji import presets
from taiji.diffusion.schedules import make_scheduler
from taiji.pipelines import TaijiImagenPipeline, TaijiSuperResolutionPipeline
from taiji.text import SandwichTextEncoder
from taiji.text.tokenizer import build_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))


def quiet(line: str) -> None: ...


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**changes: Any) -> DistillConfig:
    small = {
        "steps": 2, "solver_steps": 4, "guidance_scale": 2.0, "train_steps": 2, "batch_size": 2,
        "warmup_steps": 1, "check_memory": False,
    }  # fmt: skip
    return DistillConfig.model_validate({**small, **changes})


def write_data(folder: Path, captions: list[str], latents: Any, **own: Any) -> None:
    data = folder / "hcf_data"
    data.mkdir()
    tensors = {"latents": latents, "row": torch.arange(len(latents)), **own}
    save_file(tensors, data / "latents_distill.safetensors")
    (data / "captions_distill.json").write_text(json.dumps(captions))


def text_modules() -> dict[str, Any]:
    tokenizer = build_tokenizer(["红色的猫", "蓝色圆形"], max_length=12)
    encoder = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.TINY_SANDWICH)
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval()}


def imagen(folder: Path, thresholding: str = "dynamic") -> Path:
    torch.manual_seed(0)
    base = {"steps": 30, "guidance_scale": 7.5, "thresholding": thresholding}
    TaijiImagenPipeline(
        **text_modules(),
        unet=UNet2DConditionModel(**presets.A_TINY_UNET).eval(),
        scheduler=make_scheduler("cosine", "v_prediction"),
        sr1_unet=UNet2DConditionModel(**presets.TINY_SR_IF_UNET).eval(),
        sr1_scheduler=make_scheduler("cosine", "v_prediction"),
        settings=[base, {"steps": 2, "noise_level": 0.2}],
    ).save_pretrained(folder)
    pixels = torch.rand(4, 3, 16, 16, generator=seeded()) * 2 - 1
    write_data(folder, ["红色的猫", "蓝色圆形"] * 2, pixels)
    return folder


def super_resolution(folder: Path, image: bool = True) -> Path:
    torch.manual_seed(0)
    TaijiSuperResolutionPipeline(
        UNet2DConditionModel(**presets.TINY_SR_UNET).eval(),
        make_scheduler("linear", "v_prediction"),
        VQModel(**presets.TINY_VQ_F4).eval(),
        **text_modules(),
        settings={"steps": 20, "guidance_scale": 2.0, "noise_level": 0.02},
    ).save_pretrained(folder)
    small, low = torch.randn(2, 4, 3, 8, 8, generator=seeded())
    own = {"concatenated": low, "class_labels": torch.full((4,), 20)} if image else {}
    write_data(folder, ["红色的猫"] * 4, small, **own)
    return folder


def moved(before: Path, after: Path) -> bool:
    old, new = (open_pipeline(p).unet.state_dict() for p in (before, after))
    return sum(not torch.equal(old[k], new[k]) for k in old) > len(old) / 2


@pytest.mark.parametrize("method", ["consistency", "distribution_matching"])
def test_an_xl_student(tiny_xl_pipeline: Any, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "xl"
    tiny_xl_pipeline.save_pretrained(folder)
    write_data(folder, ["cat", "dog"] * 2, torch.randn(4, 4, 8, 8, generator=seeded()))
    out = distill(folder, tmp_path / "student", settings(method=method), quiet)
    student: Any = open_pipeline(out)
    assert isinstance(student.scheduler, DDIMScheduler) and moved(folder, out)
    calls: list[int] = []
    student.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    made = student("cat", num_inference_steps=2, guidance_scale=1.0, output_type="pt",
                   generator=seeded())  # fmt: skip
    assert calls == [1, 1] and torch.isfinite(made.images).all()


def test_the_base_of_a_cascade_in_pixels(tmp_path: Path) -> None:
    folder = imagen(tmp_path / "imagen")
    out = distill(folder, tmp_path / "student", settings(guidance_scale=7.5), quiet)
    student: Any = open_pipeline(out)
    base, upscaler = student.config.settings
    assert (base["steps"], base["guidance_scale"], base["thresholding"]) == (2, 1.0, "none")
    assert upscaler["steps"] == 2
    assert moved(folder, out)
    calls: list[int] = []
    student.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    image = student("红色的猫", generator=seeded(), output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and calls == [1, 1]


@pytest.mark.parametrize("student_kind", ["full", "lora"])
def test_a_super_resolution_student(tmp_path: Path, student_kind: str) -> None:
    folder = super_resolution(tmp_path / "sr")
    config = settings(student={"kind": student_kind, "rank": 2}, learning_rate=1e-2)
    out = distill(folder, tmp_path / "student", config, quiet)
    student: Any = open_pipeline(out)
    assert student.config.settings["steps"] == 2 and student.config.settings["noise_level"] == 0.02
    low = torch.rand(1, 3, 8, 8, generator=seeded())
    image = student(low, "红色的猫", generator=seeded(), output_type="pt").images
    assert image.shape == (1, 3, 32, 32) and moved(folder, out)


def test_an_image_that_is_missing_or_not_wanted_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    folder = super_resolution(tmp_path / "sr", image=False)
    with pytest.raises(InvalidArtifact, match="has 0 channels beside its latents .* takes 3"):
        distill(folder, tmp_path / "student", settings(), quiet)
    with pytest.raises(RecipeError, match="trajectories are of captions alone"):
        distill(folder, tmp_path / "student", settings(method="trajectory"), quiet)
    write_data(tiny_folder, ["a"], torch.zeros(1, 4, 8, 8), concatenated=torch.zeros(1, 3, 8, 8))
    with pytest.raises(InvalidArtifact, match="has 3 channels beside its latents .* takes 0"):
        distill(tiny_folder, tmp_path / "student", settings(), quiet)


def test_parts_of_different_models_are_refused(tiny_pipeline: Any, tmp_path: Path) -> None:
    def refused(match: str, error: Any = InvalidArtifact, **changes: Any) -> None:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        for name, value in changes.items():
            if name != "latents":
                setattr(tiny_pipeline, name, value)
        tiny_pipeline.save_pretrained(folder)
        apart = tmp_path / f"{folder.name}-data"  # a model's own files are checked before
        apart.mkdir()
        write_data(apart, ["a"], changes.get("latents", torch.zeros(1, 4, 8, 8)))
        with pytest.raises(error, match=match):
            distill(folder, tmp_path / "student", settings(data=apart / "hcf_data"), quiet)
        assert not (tmp_path / "student").exists()

    refused("not finite", latents=torch.full((1, 4, 8, 8), float("nan")))
    good, config = tiny_pipeline.unet, tiny_pipeline.unet.config
    wide = UNet2DConditionModel.from_config(config, cross_attention_dim=48)
    refused("states of width 32, the denoiser attends to 48", unet=wide)
    variance = UNet2DConditionModel.from_config(config, out_channels=8)
    refused("predicts its variance", RecipeError, unet=variance)
    flow = FlowMatchEulerDiscreteScheduler()
    refused("FlowMatchEulerDiscreteScheduler", RecipeError, unet=good, scheduler=flow)


def test_the_teacher_stays_in_the_bounds_of_the_pixels(tmp_path: Path) -> None:
    """Its ODE is the pipeline's own sampling, thresholding included."""
    from hcf.distill.solver import SolverGrid
    from hcf.distill.teacher import Bounds, Guidance, Teacher
    from hcf.distill.trajectory import solve
    from hcf.trace import conditioning

    pipe: Any = open_pipeline(imagen(tmp_path / "imagen"))
    cond, uncond = conditioning(pipe, ["红色的猫"], 7.5)
    assert uncond is not None
    grid = SolverGrid(pipe.scheduler, 4, 4)
    ends = []
    for bounds in (Bounds.of(pipe), None):
        kept, _ = solve(
            Teacher(pipe.unet, uncond, bounds), grid, Guidance(7.5, 7.5, None), cond,
            torch.arange(1), (3, 16, 16), 1, seed=0, batch_size=1, log=quiet,
        )  # fmt: skip
        ends.append(kept["points"][0, -1].float())
    noise = kept["points"][:, 0].float()
    from taiji.diffusion.sampling import Sampling, sample

    texts = {"condition": pipe.encode_prompt(["红色的猫"]), "null": pipe.encode_prompt([""])}
    pipe.scheduler.register_to_config(timestep_spacing="trailing")
    chosen = Sampling(steps=4, guidance_scale=7.5, thresholding="dynamic")
    wanted = sample(pipe.unet, pipe.scheduler, noise, texts, chosen, space="pixel")
    assert torch.allclose(ends[0], wanted[0], atol=5e-3) and ends[0].abs().max() <= 1
    assert not torch.allclose(ends[1], wanted[0], atol=5e-2)


RECIPES = Path(__file__).parents[1] / "recipes" / "distill"
SMALL = (
    "distill.train_steps=1", "distill.batch_size=2", "distill.micro_batches=1",
    "distill.optimizer=adamw", "distill.student.rank=2", "distill.check_memory=false",
)  # fmt: skip
TINY = {
    "sd15": "sd", "sdxl": "xl", "kolors": "xl", "taiji_sd_mini": "sd", "taiji_imagen": "imagen",
    "super_resolution": "sr",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_every_recipe_distils_a_tiny_model(
    name: str, tiny_folder: Path, tiny_xl_pipeline: Any, tmp_path: Path
) -> None:
    """With all of its settings but the sizes; and says in its header what it was not."""
    from hcf.recipe import load_recipe, stage_config

    path = RECIPES / f"{name}.yaml"
    load_recipe(path)
    header = path.read_text(encoding="utf-8").partition("\nname:")[0]
    assert all(word in header for word in ("hcf distill", "Hardware:", "ime", "should reach"))
    folder = tmp_path / "model"
    if TINY[name] == "imagen":
        imagen(folder)
    elif TINY[name] == "sr":
        super_resolution(folder)
    else:
        if TINY[name] == "xl":
            tiny_xl_pipeline.save_pretrained(folder)
        else:
            folder = tiny_folder
        write_data(folder, ["cat", "dog"] * 2, torch.randn(4, 4, 8, 8, generator=seeded()))
    config = stage_config(DistillConfig, "distill", path, SMALL)
    student: Any = open_pipeline(distill(folder, tmp_path / "student", config, quiet))
    assert isinstance(student.unet, UNet2DConditionModel)


def test_methods_are_known_by_their_other_names() -> None:
    from hcf.settings import METHOD_NAMES

    for name, method in METHOD_NAMES.items():
        extra = {"structure": {"variant": "small"}} if method == "structure" else {}
        assert settings(method=name, **extra).method == method
    assert settings(method="DMD2").method == "distribution_matching"
    with pytest.raises(ValueError, match="consistency"):
        settings(method="magic")
