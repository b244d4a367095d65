import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import save_file

from hcf.distill.consistency import (
    ConsistencyObjective,
    distill,
    jump,
    read_distillation_set,
    solver_schedule,
)
from hcf.errors import InvalidArtifact, RecipeError
from hcf.settings import DistillConfig
from taiji.presets import MINI_SCHEDULER


def test_schedule_cuts_the_ode_into_phases() -> None:
    schedule = solver_schedule(DDIMScheduler(**MINI_SCHEDULER), solver_steps=8, steps=4)
    assert schedule.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert schedule.edge.tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    assert schedule.alpha[-1] == 1
    with pytest.raises(RecipeError, match="no multiple"):
        solver_schedule(DDIMScheduler(), solver_steps=10, steps=4)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    settings = {**MINI_SCHEDULER, "prediction_type": "epsilon"}
    with pytest.raises(RecipeError, match="zero terminal SNR"):
        solver_schedule(DDIMScheduler(**settings), solver_steps=8, steps=4)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_jump_is_a_ddim_step(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(4)
    x_t, prediction = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = scheduler.step(prediction, 749, x_t).prev_sample
    alpha = scheduler.alphas_cumprod[[749, 499]]
    ours = jump(prediction, x_t, alpha[:1].expand(2), alpha[1:].expand(2), kind)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_perfect_student_has_zero_loss_on_one_step_phases(tiny_pipeline: Any) -> None:
    """With phases of one solver step and no guidance the teacher itself is the student."""
    schedule = solver_schedule(tiny_pipeline.scheduler, solver_steps=4, steps=4)
    objective = ConsistencyObjective(
        tiny_pipeline.unet, tiny_pipeline.unet, schedule, guidance_scale=1.0, huber_c=1e-3,
        uncond=None,
    )  # fmt: skip
    cond = {"encoder_hidden_states": torch.randn(8, 16, 32)}
    latents = torch.randn(8, 4, 8, 8)
    loss, _ = objective(latents, torch.Generator().manual_seed(0), **cond)
    assert loss.item() < 1e-5


def prepare(folder: Path) -> None:
    (folder / "hcf_data").mkdir()
    save_file(
        {"latents": torch.randn(12, 4, 8, 8).half(), "row": torch.arange(12)},
        folder / "hcf_data" / "latents_distill.safetensors",
    )
    captions = json.dumps(["cat" if i % 2 else "dog" for i in range(12)])
    (folder / "hcf_data" / "captions_distill.json").write_text(captions)


def test_a_skip_of_a_whole_phase_has_the_teachers_solution_as_target(tiny_pipeline: Any) -> None:
    """The loss does not depend on the student's own later predictions then."""
    schedule = solver_schedule(tiny_pipeline.scheduler, solver_steps=6, steps=2)
    cond = {"encoder_hidden_states": torch.randn(8, 16, 32)}
    latents = torch.randn(8, 4, 8, 8)
    calls: list[int] = []
    student = copy.deepcopy(tiny_pipeline.unet)
    student.register_forward_hook(lambda *_: calls.append(1))
    for skip, expected in ((3, 1), (1, 2)):
        objective = ConsistencyObjective(
            student, tiny_pipeline.unet, schedule, guidance_scale=1.0, huber_c=1e-3, uncond=None,
            skip=skip,
        )  # fmt: skip
        calls.clear()
        loss, _ = objective(latents, torch.Generator().manual_seed(0), **cond)
        assert len(calls) == expected and torch.isfinite(loss)


def test_distilled_folder_is_an_ordinary_few_step_pipeline(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prepare(tiny_folder)
    before = {p: p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()}
    config = DistillConfig(steps=2, solver_steps=4, train_steps=6, batch_size=4, warmup_steps=1)
    out = distill(tiny_folder, tmp_path / "student", config, lambda message: None)
    assert {p: p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()} == before
    student = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    teacher = DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    moved = [
        not torch.equal(a.half(), b.half())
        for a, b in zip(student.unet.parameters(), teacher.unet.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert student.scheduler.config.timestep_spacing == "trailing"
    manifest = json.loads((out / "hcf_manifest.json").read_text())
    assert manifest["sampling"] == {"steps": 2, "guidance_scale": 1.0}
    assert not list(tmp_path.glob("*.tmp*"))


def test_missing_or_unequal_data_is_named(tiny_folder: Path) -> None:
    with pytest.raises(InvalidArtifact, match="latents_distill"):
        read_distillation_set(tiny_folder)
    prepare(tiny_folder)
    (tiny_folder / "hcf_data" / "captions_distill.json").write_text('["cat"]')
    with pytest.raises(InvalidArtifact, match="1 captions, 12 rows and 12 latents"):
        read_distillation_set(tiny_folder)
