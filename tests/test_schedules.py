"""Schedules against their closed forms, and EDM against diffusers' own preconditioning."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from taiji.diffusion.schedules import (
    alphas_cumprod,
    edm_preconditioning,
    edm_sigma,
    edm_weight,
    make_scheduler,
    scheduler_config,
    stratified,
    x_0_coefficients,
)


def test_cosine_in_closed_form() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f((i + 1) / 1000) / f(0) for i in range(999)])
    # the last beta is capped at 0.999
    assert torch.allclose(alphas_cumprod("cosine")[:999], expected, rtol=1e-3, atol=1e-7)


def test_linear_and_scaled_linear_in_closed_form() -> None:
    linear = torch.linspace(1e-4, 0.02, 1000)
    scaled = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(alphas_cumprod("linear"), (1 - linear).cumprod(0))
    assert torch.allclose(alphas_cumprod("scaled_linear"), (1 - scaled).cumprod(0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddpm_and_ddim_take_the_same_configuration(kind: Any) -> None:
    config = scheduler_config("cosine", kind)
    ddpm, ddim = DDPMScheduler(**config), DDIMScheduler(**config)
    assert torch.equal(ddpm.alphas_cumprod, ddim.alphas_cumprod)
    ddim.set_timesteps(10)
    assert (ddim.timesteps[0] == 999) == (kind == "v_prediction")


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="sigmoid.*cosine, linear"):
        scheduler_config("sigmoid", "epsilon")  # type: ignore[arg-type]


def test_edm_in_closed_form_and_as_diffusers_has_it() -> None:
    c_skip, c_out, c_in, c_noise = edm_preconditioning(torch.tensor([0.5]))
    assert c_skip.item() == pytest.approx(0.5)
    assert c_out.item() == pytest.approx(0.25 / math.sqrt(0.5))
    assert c_in.item() == pytest.approx(math.sqrt(2))
    assert c_noise.item() == pytest.approx(math.log(0.5) / 4)

    scheduler: Any = make_scheduler("edm", "epsilon")
    assert isinstance(scheduler, EDMEulerScheduler) and scheduler.config.sigma_data == 0.5
    sigma, x, out = torch.tensor([3.0]), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma)
    assert torch.allclose(scheduler.precondition_inputs(x, sigma), c_in * x)
    assert torch.allclose(scheduler.precondition_outputs(x, out, sigma), c_skip * x + c_out * out)
    assert torch.allclose(scheduler.precondition_noise(sigma), c_noise)


def test_edm_noise_levels_and_weight() -> None:
    n = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    log_sigma = edm_sigma(n).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)
    sigma = torch.tensor([0.01, 0.5, 40.0])
    assert edm_weight(sigma)[1].item() == pytest.approx(0.5 / 0.25**2)
    assert torch.allclose(edm_weight(sigma) * edm_preconditioning(sigma)[1] ** 2, torch.ones(3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x_0_of_an_exact_output(kind: Any) -> None:
    scheduler: Any = make_scheduler("cosine", kind)
    scheduler.set_timesteps(8)
    x_0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x_t = scheduler.add_noise(x_0, eps, t[None])
        out = eps if kind == "epsilon" else scheduler.get_velocity(x_0, eps, t[None])
        p, q = x_0_coefficients(scheduler, t)
        assert torch.allclose(p * x_t + q * out, x_0, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x_0_of_edm(kind: Any) -> None:
    scheduler: Any = make_scheduler("edm", kind)
    scheduler.set_timesteps(4)
    x_t, out = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x_t, t)
        p, q = x_0_coefficients(scheduler, t)
        sigma = scheduler.sigmas[scheduler.step_index]
        expected = scheduler.precondition_outputs(x_t, out, sigma)
        assert torch.allclose(p * x_t + q * out, expected, atol=1e-5)
        scheduler.step(out, t, x_t)


def test_schedulers_without_x_0_are_refused() -> None:
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(4)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.*use DDPM"):
        x_0_coefficients(euler, euler.timesteps[0])
    with pytest.raises(ValueError, match="sample"):
        x_0_coefficients(DDIMScheduler(prediction_type="sample"), torch.tensor(5))


def test_stratified_draws_have_one_in_each_slice() -> None:
    u = stratified(64, torch.Generator().manual_seed(0))
    assert torch.equal((u * 64).floor().sort().values, torch.arange(64.0))
    assert not torch.equal(u, u.sort().values)
