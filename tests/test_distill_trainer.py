"""`hcf distill` from folder to folder: what a student is on disk, resume, probes, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from hcf.distill.data import read_captions, read_latents
from hcf.distill.trainer import distill
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.settings import DistillConfig, DistributionMatchingConfig

SMALL: dict[str, Any] = {
    "steps": 2, "solver_steps": 4, "guidance_scale": 2.0, "train_steps": 6, "batch_size": 4,
    "warmup_steps": 1, "checkpoint_every": 2, "check_memory": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))


def quiet(line: str) -> None: ...


def prepare(folder: Path, channels: int = 4, images: bool = True) -> None:
    data = folder / "hcf_data"
    data.mkdir()
    if images:
        latents = torch.randn(12, channels, 8, 8, generator=torch.Generator().manual_seed(0))
        tensors = {"latents": latents.half(), "row": torch.arange(12)}
        save_file(tensors, data / "latents_distill.safetensors")
    captions = [("cat", "dog", "bird")[i % 3] for i in range(12)]
    (data / "captions_distill.json").write_text(json.dumps(captions))


def config(**changes: Any) -> DistillConfig:
    return DistillConfig.model_validate({**SMALL, **changes})


def images(pipe: Any, **given: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("cat", generator=generator, output_type="np", **given).images


METHODS = {
    "consistency": {},
    "progressive": {"progressive": {"halvings": 2}},
    "guidance": {"guidance_embedding": {"width": 16}},
    "trajectory": {"trajectory": {"count": 5}},
    "distribution_matching": {"distribution_matching": {"fake_updates": 2}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_an_ordinary_pipeline(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    prepare(tiny_folder, images=method != "trajectory")
    before = {p: p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()}
    out = distill(
        tiny_folder, tmp_path / "student", config(method=method, **METHODS[method]), quiet
    )
    assert {p: p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()} == before
    student = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    teacher = DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    student.set_progress_bar_config(disable=True)
    weights, old = student.unet.state_dict(), teacher.unet.state_dict()
    moved = [not torch.equal(weights[k].half(), old[k].half()) for k in old]
    assert sum(moved) > len(moved) / 2
    manifest = json.loads((out / "hcf_manifest.json").read_text())
    assert manifest["distillation"]["method"] == method and manifest["parents"][0]["name"] == "tiny"
    assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob("*.training-*"))
    calls: list[int] = []
    student.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    if method == "guidance":
        assert manifest["sampling"] == {"guidance_scale": 2.0}
        weak, strong = (images(student, num_inference_steps=3, guidance_scale=w) for w in (1.5, 7))
        assert calls == [1] * 6 and abs(weak - strong).max() > 1e-4
        return
    assert manifest["sampling"] == {"steps": 2, "guidance_scale": 1.0}
    assert student.scheduler.config.timestep_spacing == "trailing"
    images(student, num_inference_steps=2, guidance_scale=1.0)
    assert calls == [1, 1]


def test_lcm_sampling_and_lora_are_saved_for_plain_diffusers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prepare(tiny_folder, images=False)
    out = distill(
        tiny_folder,
        tmp_path / "student",
        config(
            method="distribution_matching",
            student={"kind": "lora", "rank": 2},
            learning_rate=1e-2,
            distribution_matching={"gan_weight": 0, "fake_updates": 1, "sampler": "lcm"},
        ),
        quiet,
    )
    student = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert type(student.scheduler).__name__ == "LCMScheduler"
    assert not any("lora" in name for name in student.unet.state_dict())
    teacher = DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    teacher.load_lora_weights(out / "lora")
    teacher.scheduler = student.scheduler
    for pipe in (student, teacher):
        pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert abs(images(student, **given) - images(teacher, **given)).max() < 0.02
    recorded = json.loads((out / "hcf_manifest.json").read_text())["distillation"]
    assert recorded["trained_share"] < 0.2


@pytest.mark.parametrize("method", ["progressive", "distribution_matching"])
def test_a_seed_makes_the_same_student_again(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """LoRA, merged and begun anew in every halving, and a discriminator begin at random."""
    prepare(tiny_folder)
    section = {"halvings": 2} if method == "progressive" else {"gan_weight": 0.1}
    chosen = config(method=method, student={"kind": "lora", "rank": 2}, **{method: section})
    made = []
    for name in ("first", "second"):
        torch.rand(3)  # what ran before in the process is no part of it
        distill(tiny_folder, tmp_path / name, chosen, quiet)
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.safetensors")})
    assert made[0] == made[1]


def test_a_killed_run_goes_on_where_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    prepare(tiny_folder)
    settings = config(method="progressive", progressive={"halvings": 2}, train_steps=8)
    whole = distill(tiny_folder, tmp_path / "whole", settings, quiet)

    class Killed(BaseException): ...

    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("step 3/4") and "stage 2 of 2" in lines:
            raise Killed

    with pytest.raises(Killed):
        distill(tiny_folder, tmp_path / "cut", settings, log)
    assert not (tmp_path / "cut").exists() and len(list(tmp_path.glob("cut.training-*"))) == 1
    lines.clear()
    cut = distill(tiny_folder, tmp_path / "cut", settings, lines.append)
    assert "resumed at step 4" in lines and "resumed at step 2" in lines
    name = "unet/diffusion_pytorch_model.safetensors"
    for key, value in load_file(whole / name).items():
        assert torch.equal(value, load_file(cut / name)[key]), key


def test_trajectories_and_captions_are_computed_once(tiny_folder: Path, tmp_path: Path) -> None:
    prepare(tiny_folder, images=False)
    said: list[str] = []
    settings = config(method="trajectory", trajectory={"count": 5})
    distill(tiny_folder, tmp_path / "a", settings, said.append)
    assert any("teacher trajectories" in line for line in said)
    said.clear()
    distill(
        tiny_folder, tmp_path / "b", settings.model_copy(update={"train_steps": 4}), said.append
    )
    assert not any("teacher trajectories" in line for line in said)


def test_distribution_matching_may_begin_with_regression(tiny_folder: Path, tmp_path: Path) -> None:
    """Of its own rate, on trajectories that the other method finds kept."""
    prepare(tiny_folder)
    said: list[str] = []
    name = "unet/diffusion_pytorch_model.safetensors"
    matching = {"fake_updates": 1, "gan_weight": 0.0, "regression_learning_rate": 1e-2}
    settings = config(
        method="distribution_matching", learning_rate=1e-9, ema_decay=0.0,
        distribution_matching={**matching, "regression_steps": 2},
    )  # fmt: skip
    out = distill(tiny_folder, tmp_path / "regressed", settings, said.append)
    assert "2 steps of regression on the teacher's trajectories" in said
    plain = settings.model_copy(
        update={"distribution_matching": DistributionMatchingConfig(**matching)}
    )
    other = distill(tiny_folder, tmp_path / "plain", plain, quiet)
    teacher = load_file(tiny_folder / name)

    def change(folder: Path) -> float:
        weights = load_file(folder / name)
        return max(float((weights[k].float() - v.float()).abs().max()) for k, v in teacher.items())

    moved = {folder: change(folder) for folder in (out, other)}
    assert moved[out] > 5e-3 > 1e-3 > moved[other]  # the rate of the regression is its own
    said.clear()
    count = 2 * settings.batch_size
    distill(
        tiny_folder, tmp_path / "trajectory",
        config(method="trajectory", trajectory={"count": count}), said.append,
    )  # fmt: skip
    assert not any("teacher trajectories" in line for line in said)


def test_conditioning_is_kept_for_the_same_text_side_alone(tiny_pipeline: Any) -> None:
    from hcf.artifact import hcf_home
    from hcf.distill.data import cached_conditioning

    def kept() -> int:
        cached_conditioning(tiny_pipeline, ["a cat"], 2.0)
        return len(list((hcf_home() / "conditioning").iterdir()))

    assert [kept(), kept()] == [1, 1]
    tiny_pipeline.tokenizer.model_max_length = 12
    assert kept() == 2
    tiny_pipeline.text_encoder.config.layer_norm_eps = 1e-3
    assert kept() == 3


def test_a_probe_keeps_grids_and_ends_a_run_that_is_good_enough(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prepare(tiny_folder)
    prompts = [{"id": str(i), "prompt": text} for i, text in enumerate(("cat", "dog"))]
    (tiny_folder / "hcf_data" / "check_prompts.json").write_text(json.dumps(prompts))
    said: list[str] = []
    probe = {"every": 2, "prompts": 2, "images": 2, "thresholds": {"psnr_db": {"min": 1.0}}}
    out = distill(tiny_folder, tmp_path / "student", config(probe=probe), said.append)
    assert "ended at step 2 of 6" in said
    assert (out / "grids" / "step-000002.png").stat().st_size > 100
    probe["thresholds"] = {"psnr_db": {"min": 99.0}}
    said.clear()
    distill(tiny_folder, tmp_path / "other", config(probe=probe), said.append)
    assert not any("ended at" in line for line in said)


def test_divergence_names_the_checkpoint_and_leaves_the_output(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prepare(tiny_folder)
    settings = config(train_steps=30, learning_rate=1e30)
    with pytest.raises(HcfError, match="diverged") as caught:
        distill(tiny_folder, tmp_path / "student", settings, quiet)
    assert "student.training-" in caught.value.fix and not (tmp_path / "student").exists()


def test_bad_data_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="captions_distill"):
        read_captions(tiny_folder / "hcf_data")
    prepare(tiny_folder, channels=8)
    with pytest.raises(InvalidArtifact, match="latents of 8 channels, the denoiser takes 4"):
        distill(tiny_folder, tmp_path / "student", config(), quiet)
    (tiny_folder / "hcf_data" / "captions_distill.json").write_text('["cat"]')
    with pytest.raises(InvalidArtifact, match="1 captions, 12 rows and 12 latents"):
        read_latents(tiny_folder / "hcf_data", ["cat"])
    shutil.rmtree(tiny_folder / "hcf_data")
    prepare(tiny_folder, images=False)
    with pytest.raises(InvalidArtifact, match="prompts alone"):
        distill(tiny_folder, tmp_path / "student", config(), quiet)


def test_bad_recipes_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="is for method=trajectory, not consistency"):
        config(trajectory={})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(RecipeError, match="not an artefact"):
        distill(tiny_folder, tmp_path / "mine", config(), quiet)
