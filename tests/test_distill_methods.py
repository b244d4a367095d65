"""The objectives of the other methods, each held against its paper where a case can be computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hcf.distill.distribution_matching import DistributionMatchingObjective
from hcf.distill.guidance import GuidanceObjective
from hcf.distill.progressive import ProgressiveObjective, _clean_image
from hcf.distill.solver import SolverGrid, jump, noise_schedule
from hcf.distill.student import make_student, merged, trainable, trained_share, with_guidance_input
from hcf.distill.teacher import Guidance, Teacher
from hcf.distill.trajectory import TrajectoryObjective, solve
from hcf.errors import RecipeError
from hcf.settings import (
    DistillConfig,
    DistributionMatchingConfig,
    GuidanceEmbedding,
    StudentConfig,
)

FIXED = Guidance(1.0, 1.0, None)
SHAPE = (4, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditioning(count: int = 4) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(count, 16, 32, generator=seeded(1))}


def latents(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=seeded(2))


def test_the_progressive_target_is_the_image_one_step_would_need() -> None:
    """Salimans and Ho, equation 8: a DDIM step with it ends where the teacher's two end."""
    alpha_t, alpha_s = torch.tensor([0.2, 0.6]), torch.tensor([0.5, 1.0])
    x_t, x_s = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    x_0 = _clean_image(x_t, x_s, alpha_t, alpha_s)
    assert torch.allclose(jump(x_0, x_t, alpha_t, alpha_s, "sample"), x_s, atol=1e-5)


def test_progressive_asks_for_the_teachers_two_steps(tiny_pipeline: Any) -> None:
    """A student that makes two teacher steps inside one call has no loss."""
    grid = SolverGrid(tiny_pipeline.scheduler, 4, 2)
    teacher = Teacher(tiny_pipeline.unet, None)

    class TwoSteps(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
            index = (grid.timesteps[None] == timestep[:, None]).int().argmax(1)
            x, cond = sample, {"encoder_hidden_states": kwargs["encoder_hidden_states"]}
            for at in (index, index + 1):
                x = grid.step(
                    teacher.guided(x, grid.timesteps[at], cond, torch.ones(len(x))), x, at, at + 1
                )
            x_0 = _clean_image(sample, x, grid.alpha[index], grid.alpha[index + 2])
            a = grid.alpha[index][:, None, None, None]
            return ((a.sqrt() * sample - x_0) / (1 - a).sqrt(),)

    def loss(student: torch.nn.Module) -> float:
        objective = ProgressiveObjective(student, teacher, grid, FIXED, teacher_is_student=False)
        return float(objective(latents(), seeded(), **conditioning())[0])

    class Named(TwoSteps):
        def forward(  # type: ignore[override]
            self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            return super().forward(sample, timestep, encoder_hidden_states=encoder_hidden_states)

    assert loss(Named()) < 1e-6 < loss(tiny_pipeline.unet)


def test_a_new_guidance_input_changes_nothing_until_it_is_trained(tiny_pipeline: Any) -> None:
    told = with_guidance_input(tiny_pipeline.unet, 32)
    x, t, cond = latents(), torch.tensor([10, 200, 600, 999]), conditioning()
    words = Guidance(1.0, 8.0, 32).told(torch.tensor([1.0, 3.0, 5.0, 7.5]))
    with torch.no_grad():
        before = tiny_pipeline.unet(x, t, **cond).sample
        assert torch.equal(told(x, t, **cond, **words).sample, before)
        told.time_embedding.cond_proj.weight.fill_(0.1)  # type: ignore[union-attr, operator]
        assert not torch.allclose(told(x, t, **cond, **words).sample, before, atol=1e-4)
    with pytest.raises(RecipeError, match="embedding of 32, not 64"):
        with_guidance_input(told, 64)
    with pytest.raises(RecipeError, match="no input for its guidance scale"):
        with_guidance_input(tiny_pipeline.vae, 64)


def test_the_embedding_is_the_one_diffusers_pipelines_give() -> None:
    from diffusers import LatentConsistencyModelPipeline

    scale = torch.tensor([1.0, 2.0, 7.5])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scale - 1, embedding_dim=32
    )
    ours = Guidance(1.0, 8.0, 32).told(scale)["timestep_cond"]
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_guidance_distillation_learns_the_guided_prediction(tiny_pipeline: Any) -> None:
    uncond = {"encoder_hidden_states": torch.randn(1, 16, 32, generator=seeded(3))}
    teacher = Teacher(tiny_pipeline.unet, uncond)
    config = DistillConfig(method="guidance", guidance_embedding=GuidanceEmbedding(width=32))
    student = make_student(tiny_pipeline.unet, config)
    unguided = GuidanceObjective(student, teacher, tiny_pipeline.scheduler, FIXED)
    assert unguided(latents(), seeded(), **conditioning())[0] < 1e-8
    guidance = Guidance.of(config, teacher)
    objective = GuidanceObjective(student, teacher, tiny_pipeline.scheduler, guidance)
    optimiser = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss, _ = objective(latents(), seeded(), **conditioning())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_pipeline_without_guidance_cannot_teach_it(tiny_pipeline: Any) -> None:
    teacher = Teacher(tiny_pipeline.unet, None)
    with pytest.raises(RecipeError, match="does not guide"):
        Guidance.of(DistillConfig(guidance_scale=3.0), teacher)
    assert Guidance.of(DistillConfig(guidance_scale=1.0), teacher).high == 1


def test_trajectories_are_those_of_the_pipeline(tiny_pipeline: Any) -> None:
    """The kept points end where the guided DDIM pipeline ends, from the same noise."""
    from hcf.trace import conditioning as encode

    scale, steps = 3.0, 8  # divides 1000: else DDIM rounds its grid in two ways
    cond, uncond = encode(tiny_pipeline, ["a cat", "a dog"], scale)
    assert uncond is not None
    teacher = Teacher(tiny_pipeline.unet, {k: v[:1] for k, v in uncond.items()})
    grid = SolverGrid(tiny_pipeline.scheduler, steps, 4)
    kept, caption = solve(
        teacher, grid, Guidance(scale, scale, None), cond, torch.tensor([1, 0]), SHAPE, 3,
        seed=0, batch_size=2, log=lambda line: None,
    )  # fmt: skip
    assert kept["points"].shape == (3, 5, *SHAPE) and sorted(caption[:2].tolist()) == [0, 1]
    expected = tiny_pipeline(
        prompt=[["a cat", "a dog"][i] for i in caption],
        num_inference_steps=steps, guidance_scale=scale,
        latents=kept["points"][:, 0].float(), output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(kept["points"][:, -1].float(), expected, atol=2e-2)
    objective = TrajectoryObjective(tiny_pipeline.unet, grid, FIXED, 1e-3)
    rows = {k: v[caption] for k, v in cond.items()}
    loss, _ = objective(kept["points"], kept["scale"], seeded(), **rows)
    assert loss > 0


def test_trajectories_start_from_other_noise_than_the_images_a_student_is_judged_by(
    tiny_pipeline: Any,
) -> None:
    """Image i of a check has the seed `seed + i`; captions are drawn as often as they are given."""
    from hcf.trace import conditioning as encode

    cond, _ = encode(tiny_pipeline, ["a cat", "a dog"], 1.0)
    teacher, grid = Teacher(tiny_pipeline.unet, None), SolverGrid(tiny_pipeline.scheduler, 2, 1)
    given = torch.tensor([0, 1, 1, 1])
    kept, caption = solve(
        teacher, grid, Guidance(1, 1, None), cond, given, SHAPE, 8,
        seed=0, batch_size=4, log=lambda line: None,
    )  # fmt: skip
    assert caption.bincount().tolist() == [2, 6]
    starts = kept["points"][:, 0].float().flatten(1)
    judged = torch.stack(
        [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    ).flatten(1)
    assert torch.cdist(starts, judged).min() > 1


def matching(pipe: Any, gan_weight: float, guidance: Guidance = FIXED) -> Any:
    settings = DistributionMatchingConfig(gan_weight=gan_weight, fake_updates=3)
    config = DistillConfig(method="distribution_matching", steps=2, guidance_scale=1.0)
    scheduler = pipe.scheduler
    return DistributionMatchingObjective(
        make_student(pipe.unet, config),
        trainable(copy.deepcopy(pipe.unet), config.student),
        Teacher(pipe.unet, None),
        SolverGrid(scheduler, 2, 2),
        noise_schedule(scheduler)[0],
        guidance,
        settings,
        SHAPE,
    )


def test_a_fake_score_that_equals_the_teacher_moves_nothing(tiny_pipeline: Any) -> None:
    """DMD, equation 7: the gradient is the difference of both scores."""
    objective = matching(tiny_pipeline, 0.0)
    loss, parts = objective(seeded(), "student", 0, **conditioning())
    assert loss == 0 and parts == {"matching": 0.0}
    with torch.no_grad():
        for p in objective.fake.parameters():
            p.mul_(1.02)
    loss, parts = objective(seeded(), "student", 0, **conditioning())
    loss.backward()
    assert parts["matching"] > 0
    assert all(p.grad is None for p in objective.fake.parameters())
    assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters())


def test_a_teacher_that_breaks_down_is_not_taken_for_a_perfect_one(tiny_pipeline: Any) -> None:
    """Its NaN reaches the loss, which the loop then skips; as a zero it would train on nothing."""
    objective = matching(tiny_pipeline, 0.0)
    with torch.no_grad():
        objective.teacher.denoiser.conv_out.bias.fill_(float("nan"))
    loss, _ = objective(seeded(), "student", 0, **conditioning())
    assert not torch.isfinite(loss)


def test_the_student_is_moved_against_the_fake_score(tiny_pipeline: Any) -> None:
    """The gradient on x is (x_fake - x_real) over the student's distance to the teacher's x."""
    objective = matching(tiny_pipeline, 0.0)
    with torch.no_grad():
        for p in objective.fake.parameters():
            p.mul_(1.02)
    kept: list[Tensor] = []

    def sample(*_: Any) -> Tensor:
        kept.append(latents().requires_grad_())
        return kept[0]

    objective.sample = sample
    loss, _ = objective(seeded(), "student", 0, **conditioning())
    loss.backward()
    x = kept[0]
    draw = seeded()
    timestep = objective._timesteps(4, draw)
    x_t, _ = objective._noised(x.detach(), timestep, draw)
    alpha = objective.alpha[timestep][:, None, None, None]

    def clean(network: Any) -> Tensor:
        with torch.no_grad():
            v = network(x_t, timestep, **conditioning()).sample
        return alpha.sqrt() * x_t - (1 - alpha).sqrt() * v

    fake, real = clean(objective.fake), clean(tiny_pipeline.unet)
    expected = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert x.grad is not None
    assert torch.allclose(x.grad * x.numel(), expected, rtol=1e-3, atol=1e-4)


def test_the_fake_turn_trains_the_fake_score_and_its_head(tiny_pipeline: Any) -> None:
    objective = matching(tiny_pipeline, 0.1)
    assert objective.turns == ("student", "fake") and objective.turn_periods == {"student": 3}
    loss, parts = objective(seeded(), "fake", 0, latents=latents(), **conditioning())
    loss.backward()
    assert {"denoising", "discriminator", "told_apart"} <= parts.keys()
    assert all(p.grad is None for p in objective.student.parameters())
    trained = list(objective.parameters_of("fake"))
    assert any(p.grad is not None and p.grad.any() for p in objective.head.parameters())
    assert len(trained) == len(list(objective.fake.parameters())) + len(
        list(objective.head.parameters())
    )
    with pytest.raises(ValueError, match="latents of real images"):
        objective(seeded(), "fake", 0, **conditioning())


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_backward_simulation_is_the_sampling_of_the_saved_pipeline(
    tiny_pipeline: Any, sampler: Any
) -> None:
    """The last of the student's steps in training makes what the pipeline makes (arXiv 2405.14867,
    section 4.5); with `lcm` from the same first step on, its noise is the scheduler's own."""
    from hcf.distill.save import student_scheduler

    config = DistillConfig(
        method="distribution_matching", steps=2,
        distribution_matching=DistributionMatchingConfig(sampler=sampler, gan_weight=0),
    )  # fmt: skip
    scheduler = student_scheduler(config, tiny_pipeline.scheduler)
    scheduler.set_timesteps(2)
    grid = SolverGrid(tiny_pipeline.scheduler, 2, 2)
    assert scheduler.timesteps.tolist() == grid.timesteps.tolist()
    x, cond = latents(1), conditioning(1)
    with torch.no_grad():
        v = tiny_pipeline.unet(x, grid.timesteps[:1], **cond).sample
    out = scheduler.step(v, scheduler.timesteps[0], x)
    alpha = grid.alpha[:1]
    clean = alpha.sqrt() * x - (1 - alpha).sqrt() * v
    if sampler == "lcm":
        assert torch.allclose(out.denoised, clean, atol=1e-3)
    else:
        at = torch.tensor([0])
        assert torch.allclose(out.prev_sample, grid.step(v, x, at, at + 1), atol=1e-5)


def test_a_lora_student_is_small_and_merges_into_what_it_was(tiny_pipeline: Any) -> None:
    settings = StudentConfig(kind="lora", rank=1)
    student: Any = make_student(tiny_pipeline.unet, DistillConfig(student=settings))
    assert 0 < trained_share(student) <= 0.1
    with torch.no_grad():
        x, t, cond = latents(), torch.tensor(500), conditioning()
        assert torch.equal(student(x, t, **cond).sample, tiny_pipeline.unet(x, t, **cond).sample)
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=seeded())
        student.eval()
        trained = student(x, t, **cond).sample
        plain: Any = merged(student, settings, None)
        assert torch.allclose(plain(x, t, **cond).sample, trained, atol=1e-4)
    assert set(plain.state_dict()) == set(tiny_pipeline.unet.state_dict())
    with pytest.raises(RecipeError, match="ends with one of to_banana"):
        trainable(
            copy.deepcopy(tiny_pipeline.unet), StudentConfig(kind="lora", targets=("to_banana",))
        )
