"""The solver's grid and the consistency objective."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from hcf.distill.consistency import ConsistencyObjective
from hcf.distill.solver import SolverGrid, jump, noise_schedule
from hcf.distill.teacher import Guidance, Teacher
from hcf.errors import RecipeError
from hcf.settings import ConsistencyConfig
from taiji.presets import MINI_SCHEDULER

FIXED = Guidance(1.0, 1.0, None)


def test_grid_cuts_the_ode_into_phases() -> None:
    grid = SolverGrid(DDIMScheduler(**MINI_SCHEDULER), 8, 4)
    assert grid.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert grid.edge.tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    assert grid.alpha[-1] == 1
    with pytest.raises(RecipeError, match="no multiple"):
        SolverGrid(DDIMScheduler(), 10, 4)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    settings = {**MINI_SCHEDULER, "prediction_type": "epsilon"}
    with pytest.raises(RecipeError, match="zero terminal SNR"):
        SolverGrid(DDIMScheduler(**settings), 8, 4)


def test_a_scheduler_without_a_noise_schedule_is_refused() -> None:
    assert noise_schedule(EulerDiscreteScheduler())[1] == "epsilon"
    with pytest.raises(RecipeError, match="FlowMatchEulerDiscreteScheduler"):
        noise_schedule(FlowMatchEulerDiscreteScheduler())


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
    grid = SolverGrid(tiny_pipeline.scheduler, 4, 4)
    teacher = Teacher(tiny_pipeline.unet, None)
    objective = ConsistencyObjective(tiny_pipeline.unet, teacher, grid, FIXED, ConsistencyConfig())
    cond = {"encoder_hidden_states": torch.randn(8, 16, 32)}
    latents = torch.randn(8, 4, 8, 8)
    loss, _ = objective(latents, torch.Generator().manual_seed(0), **cond)
    assert loss.item() < 1e-5


def test_a_skip_of_a_whole_phase_has_the_teachers_solution_as_target(tiny_pipeline: Any) -> None:
    """The loss does not depend on the student's own later predictions then."""
    grid = SolverGrid(tiny_pipeline.scheduler, 6, 2)
    cond = {"encoder_hidden_states": torch.randn(8, 16, 32)}
    latents = torch.randn(8, 4, 8, 8)
    calls: list[int] = []
    student = copy.deepcopy(tiny_pipeline.unet)
    student.register_forward_hook(lambda *_: calls.append(1))
    teacher = Teacher(tiny_pipeline.unet, None)
    for skip, expected in ((3, 1), (1, 2)):
        config = ConsistencyConfig(skip=skip)
        objective = ConsistencyObjective(student, teacher, grid, FIXED, config)
        calls.clear()
        loss, _ = objective(latents, torch.Generator().manual_seed(0), **cond)
        assert len(calls) == expected and torch.isfinite(loss)
    with pytest.raises(RecipeError, match="does not divide the 3 solver steps"):
        ConsistencyObjective(student, teacher, grid, FIXED, ConsistencyConfig(skip=2))


def test_guidance_of_every_row_is_its_own(tiny_pipeline: Any) -> None:
    cond = {"encoder_hidden_states": torch.randn(3, 16, 32)}
    uncond = {"encoder_hidden_states": torch.randn(1, 16, 32)}
    teacher = Teacher(tiny_pipeline.unet, uncond)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([900, 500, 100])
    with torch.no_grad():
        c = tiny_pipeline.unet(x, t, cond["encoder_hidden_states"]).sample
        u = tiny_pipeline.unet(x, t, uncond["encoder_hidden_states"].expand(3, -1, -1)).sample
    scale = torch.tensor([1.0, 3.0, 7.5])
    expected = u + scale[:, None, None, None] * (c - u)
    assert torch.allclose(teacher.guided(x, t, cond, scale), expected, atol=1e-5)
