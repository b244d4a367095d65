from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from taiji.diffusion.losses import (
    denoising_loss,
    diffusion_target,
    min_snr_weight,
    process_loss,
)
from taiji.diffusion.schedules import edm_preconditioning, edm_sigma, make_scheduler
from taiji.train.phases.unet import UNetObjective


def test_min_snr_weight_in_closed_form() -> None:
    alpha = torch.tensor([0.5, 0.9])  # SNR 1 and 9
    assert torch.allclose(min_snr_weight(alpha, 5.0, "epsilon"), torch.tensor([1.0, 5 / 9]))
    assert torch.allclose(min_snr_weight(alpha, 5.0, "v_prediction"), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="sample"):
        min_snr_weight(alpha, 5.0, "sample")


def test_v_target_gives_back_the_data() -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x_0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 500, 999])
    x_t, v = diffusion_target(scheduler, x_0, eps, t)
    a = scheduler.alphas_cumprod[t][:, None, None, None]
    assert torch.allclose(a.sqrt() * x_t - (1 - a).sqrt() * v, x_0, atol=1e-4)


def test_zero_snr_keeps_some_weight() -> None:
    one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    loss = denoising_loss(one, zero, torch.zeros(1), gamma=5.0, kind="v_prediction")
    assert loss.item() == pytest.approx(0.1)


def test_no_gamma_is_the_plain_mean() -> None:
    one, zero = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    alpha = torch.tensor([0.0, 0.9])
    loss = denoising_loss(one, zero, alpha, gamma=None, kind="v_prediction")
    assert loss.item() == 1.0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_timesteps_cover_the_schedule_in_no_order_of_the_rows(share: float) -> None:
    """Rows come sorted by kind: a timestep tied to the row would tie noise to the kind of image."""
    objective: Any = SimpleNamespace(high_noise_share=share, alphas_cumprod=torch.ones(1000))
    g = torch.Generator().manual_seed(0)
    t = torch.stack([UNetObjective.draw_timesteps(objective, 64, g) for _ in range(200)])
    assert t.min() >= 0 and t.max() <= 999
    expected = 0.4 * (1 - share) + share
    assert (t >= 600).float().mean().item() == pytest.approx(expected, abs=0.02)
    per_row = t.float().mean(0)
    assert per_row.std() < 40  # 1000 / sqrt(12 * 200) = 20 for rows that are alike


def test_a_perfect_denoiser_has_no_loss_in_any_process() -> None:
    """With x_0 = 0 the noised input is the noise, so every target follows from it."""
    x_0 = torch.zeros(8, 3, 4, 4)
    for schedule, kind in (("cosine", "epsilon"), ("linear", "v_prediction"), ("edm", "epsilon")):
        scheduler: Any = make_scheduler(schedule, kind)  # type: ignore[arg-type]

        def perfect(x: torch.Tensor, t: torch.Tensor, scheduler: Any = scheduler) -> torch.Tensor:
            if not hasattr(scheduler, "alphas_cumprod"):  # F = -c_skip x / c_out, x is c_in x
                c_skip, c_out, c_in, _ = edm_preconditioning((4 * t).exp())
                return (-c_skip / (c_out * c_in))[:, None, None, None] * x
            a = scheduler.alphas_cumprod[t][:, None, None, None]
            eps = x / (1 - a).sqrt()
            return eps if scheduler.config.prediction_type == "epsilon" else a.sqrt() * eps

        g = torch.Generator().manual_seed(0)
        loss, mse = process_loss(perfect, scheduler, x_0, g)
        assert loss.item() == pytest.approx(0, abs=1e-8) and mse == pytest.approx(0, abs=1e-8)


def test_edm_loss_is_the_weighted_error_of_the_denoised_image() -> None:
    x_0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler: Any = make_scheduler("edm", "epsilon")
    loss, mse = process_loss(
        lambda x, t: torch.zeros_like(x), scheduler, x_0, torch.Generator().manual_seed(0)
    )
    g = torch.Generator().manual_seed(0)
    sigma = edm_sigma(torch.randn(4, generator=g))[:, None, None, None]
    x = x_0 + sigma * torch.randn(x_0.shape, generator=g)
    c_skip, c_out, _, _ = edm_preconditioning(sigma)
    error = (c_skip * x - x_0).square()
    assert mse == pytest.approx(error.mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((error / c_out**2).mean().item(), rel=1e-5)


def test_gamma_is_for_discrete_schedules_alone() -> None:
    x_0 = torch.randn(4, 3, 8, 8)
    for schedule, same in (("edm", True), ("linear", False)):
        scheduler: Any = make_scheduler(schedule, "epsilon")  # type: ignore[arg-type]
        losses = [
            process_loss(
                lambda x, t: torch.zeros_like(x), scheduler, x_0,
                torch.Generator().manual_seed(0), gamma=gamma,
            )[0].item()
            for gamma in (5.0, None)
        ]  # fmt: skip
        assert (losses[0] == losses[1]) == same
