"""Guidance and a scheduler's step: against diffusers' schedulers, in the interpreter, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from hcf_kernels.gpu.guidance_step import (
    Shape,
    candidates,
    default_config,
    launch,
    launch_multistep,
)
from hcf_kernels.guidance_step import (
    ddim_coefficients,
    dpm_coefficients,
    dynamic_threshold,
    euler_coefficients,
    guidance_multistep,
    guidance_multistep_ref,
    guidance_step,
    guidance_step_ref,
)
from hcf_kernels.testing import assert_as_close_as_torch

COEFFICIENTS = torch.tensor([1.3, -0.8, 0.7, 0.4, 0.3, -0.2])
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = 5
SCALE = 4.5
# (B, C, H, W): one, odd, prime, then latents of an image
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 13, 11), (2, 4, 16, 16)]
SMALL = {"block": 64, "moments_block": 32, "splits": 3, "num_warps": 1}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(shape: tuple[int, ...], dtype: torch.dtype, guided: bool = True) -> tuple[Any, ...]:
    """noise, sample, coefficients, guidance_scale"""
    images = shape[0] * (1 + guided)
    made = noise(images, *shape[1:]), noise(*shape, seed=1) * 2
    return *(t.to(dtype) for t in made), COEFFICIENTS, SCALE


def limits(images: int) -> list[tuple[Any, ...]]:
    """rescale, clip, threshold"""
    return [(0.0,), (0.7, 0.9, None), (0.0, None, torch.linspace(1.0, 2.0, images))]


@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernels_in_the_interpreter(shape: tuple[int, ...], config: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        for rest in limits(shape[0])[(shape == SHAPES[0]) * 2 :]:  # one value has no deviation
            made = (*arguments(shape, dtype), *rest)
            assert_as_close_as_torch(launch(*made, config=config), guidance_step_ref, *made)
        unguided = arguments(shape, dtype, guided=False)
        assert_as_close_as_torch(launch(*unguided, config=config), guidance_step_ref, *unguided)


@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
def test_several_steps_in_the_interpreter(config: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        predicted, sample, *head = arguments((2, 4, 7, 5), dtype)
        extra = noise(2, 4, 7, 5, seed=2).to(dtype)
        for rest in limits(2):
            made = (predicted, sample, extra, *head, *rest)
            for found in (launch_multistep(*made, config=config), guidance_multistep(*made)):
                for i in range(2):
                    assert_as_close_as_torch(
                        found[i],
                        lambda *made, i=i: guidance_multistep_ref(*made)[i],
                        *made,
                    )


def test_each_tensor_has_a_memory_format_of_its_own() -> None:
    predicted, sample, *head = arguments((2, 4, 6, 10), torch.float32)
    extra = noise(2, 4, 6, 10, seed=2)
    forms = [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t, t], dim=3)[..., :10],
    ]
    exact = guidance_multistep_ref(predicted, sample, extra, *head, 0.7, 1.5)
    for of_noise in forms:
        for of_sample in forms:
            seen = of_noise(predicted), of_sample(sample), of_noise(extra)
            made = (*seen, *head, 0.7, 1.5)
            for found in (launch_multistep(*made), guidance_multistep(*made)):
                for a, b in zip(found, exact, strict=True):
                    assert a.stride() == torch.empty_like(seen[1]).stride()
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_latents_may_be_wider_than_predictions() -> None:
    predicted, sample, *head = arguments((2, 4, 5, 3), torch.float32)
    exact = guidance_step_ref(predicted.half().float(), sample, *head)
    for found in (launch(predicted.half(), sample, *head),
                  guidance_step(predicted.half(), sample, *head)):  # fmt: skip
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact)


def test_every_candidate_runs() -> None:
    made = (*arguments((2, 4, 5, 7), torch.float32), 0.5)
    found = candidates(Shape(2, 140))
    assert found[0] == default_config(Shape(2, 140)) and 6 <= len(found) <= 30
    for config in found:
        assert_as_close_as_torch(launch(*made, config=config), guidance_step_ref, *made)
    # a latent of SDXL fills a GPU only in small blocks; two images of 3 x 1024 x 1024 in large ones
    assert default_config(Shape(1, 4 * 128 * 128))["block"] == 256
    large = default_config(Shape(2, 3 * 1024 * 1024))
    assert (large["block"], large["splits"]) == (1024, 64)


def both(step: Tensor, *made: Any) -> list[Tensor]:
    """The step by the operator and by the kernel."""
    return [guidance_step(step, *made), launch(step, *made)]


def guided(predicted: Tensor) -> Tensor:
    unconditional, text = predicted.chunk(2)
    return unconditional + SCALE * (text - unconditional)


def assert_same_step(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6 * float(wanted.abs().max()))


def ddim_alphas(scheduler: Any, timestep: int) -> tuple[float, float]:
    """As the docstring of `ddim_coefficients` says."""
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = scheduler.final_alpha_cumprod
    following = scheduler.alphas_cumprod[before] if before >= 0 else last
    return float(scheduler.alphas_cumprod[timestep]), float(following)


@pytest.mark.parametrize("reuse", [False, True], ids=["eps", "eps_of_clipped"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_ddim(prediction_type: str, clip: float | None, reuse: bool) -> None:
    # trailing steps of a zero-SNR schedule start where x_0 has no share in the latents
    zero_snr = prediction_type == "v_prediction"
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=clip is not None, clip_sample_range=clip or 1,
        timestep_spacing="trailing" if zero_snr else "leading", rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    x = noise(2, 4, 5, 6)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        predicted = noise(4, 4, 5, 6, seed=i + 1)
        six = ddim_coefficients(*ddim_alphas(scheduler, t), prediction_type, reuse)
        following = scheduler.step(guided(predicted), t, x, use_clipped_model_output=reuse)[0]
        for found in both(predicted, x, six, SCALE, 0.0, clip):
            assert_same_step(found, following)
        x = following


def test_steps_of_ddim_with_noise() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x, fresh, predicted = noise(1, 4, 5, 6), noise(1, 4, 5, 6, seed=2), noise(2, 4, 5, 6, seed=3)
    for t in scheduler.timesteps.tolist():
        six = ddim_coefficients(*ddim_alphas(scheduler, t), eta=0.8)
        wanted = scheduler.step(guided(predicted), t, x, eta=0.8, variance_noise=fresh)
        for found in (guidance_multistep(predicted, x, fresh, six, SCALE),
                      launch_multistep(predicted, x, fresh, six, SCALE)):  # fmt: skip
            assert_same_step(found[0], wanted.prev_sample)
            assert_same_step(found[1], wanted.pred_original_sample)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_euler(prediction_type: str) -> None:
    scheduler = EulerDiscreteScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.tolist()
    x = noise(2, 4, 5, 6) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        predicted = noise(4, 4, 5, 6, seed=i + 1)
        scheduler.scale_model_input(x, t)
        following = scheduler.step(guided(predicted), t, x).prev_sample
        six = euler_coefficients(sigmas[i], sigmas[i + 1], prediction_type)
        for found in both(predicted, x, six, SCALE):
            assert_same_step(found, following)
        x = following


@pytest.mark.parametrize("karras", [False, True], ids=["uniform", "karras"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_steps_of_dpm(prediction_type: str, karras: bool) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=prediction_type, use_karras_sigmas=karras, lower_order_final=False,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.tolist()
    x = before = noise(2, 4, 5, 6)
    for i, t in enumerate(scheduler.timesteps):
        # the last of these steps stays where it is; x_0 before it has no weight then
        if sigmas[i + 1] == sigmas[i]:
            break
        predicted = noise(4, 4, 5, 6, seed=i + 1)
        following = scheduler.step(guided(predicted), t, x).prev_sample
        known = sigmas[i - 1] if i else None
        six = dpm_coefficients(sigmas[i], sigmas[i + 1], known, prediction_type)
        for steps in (guidance_multistep, launch_multistep):
            found, x_0 = steps(predicted, x, before, six, SCALE)
            assert_same_step(found, following)
        x, before = following, x_0
    assert i >= STEPS - 2


def test_the_last_step_of_dpm_is_of_first_order() -> None:
    scheduler = DPMSolverMultistepScheduler()  # its last sigma is 0
    scheduler.set_timesteps(STEPS)
    x, predicted = noise(1, 4, 5, 6), noise(2, 4, 5, 6, seed=1)
    for t in scheduler.timesteps:
        wanted = scheduler.step(guided(predicted), t, x).prev_sample
    sigmas = scheduler.sigmas.tolist()
    six = dpm_coefficients(sigmas[-2], sigmas[-1], sigmas[-3])
    assert six[5] == 0
    for found in both(predicted, x, six, SCALE):
        assert_same_step(found, wanted)


def test_rescaling_is_that_of_diffusers() -> None:
    predicted, x = noise(4, 4, 9, 6), noise(2, 4, 9, 6, seed=1)
    wanted = rescale_noise_cfg(guided(predicted), predicted.chunk(2)[1], 0.7)
    as_it_is = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])  # x_prev = m
    for found in both(predicted, x, as_it_is, SCALE, 0.7):
        assert_same_step(found, wanted)


def test_dynamic_thresholds_are_those_of_diffusers() -> None:
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9,
                              sample_max_value=3.0)  # fmt: skip
    scheduler.set_timesteps(STEPS)
    t = int(scheduler.timesteps[-1])
    predicted, x = noise(4, 3, 8, 8), noise(2, 3, 8, 8, seed=1) * 2
    six = ddim_coefficients(*ddim_alphas(scheduler, t))
    s = dynamic_threshold(predicted, x, six, SCALE, ratio=0.9, largest=3.0)
    assert s.shape == (2,) and (s > 1).all()
    wanted = scheduler.step(guided(predicted), t, x).prev_sample
    for found in both(predicted, x, six, SCALE, 0.0, None, s):
        assert_same_step(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operators(dtype: torch.dtype) -> None:
    predicted, sample, *head = arguments((2, 4, 4, 6), dtype)
    extra = noise(2, 4, 4, 6, seed=2).to(dtype)
    last = sample.to(memory_format=torch.channels_last)
    for rest in limits(2):
        made = (predicted, sample, *head, *rest)
        assert_as_close_as_torch(guidance_step(*made), guidance_step_ref, *made)
    for x in (sample, last, sample[..., ::2]):
        seen = predicted[..., ::2] if x.shape != sample.shape else predicted
        z = extra[..., ::2] if x.shape != sample.shape else extra
        torch.library.opcheck(guidance_step, (seen, x, *head, *limits(2)[2]))
        torch.library.opcheck(guidance_multistep, (seen, x, z, *head, *limits(2)[1]))


def test_it_compiles_without_a_graph_break() -> None:
    predicted, sample, *head = arguments((1, 4, 4, 4), torch.float32)

    def call(predicted: Tensor, x: Tensor) -> Tensor:
        x, x_0 = guidance_multistep(predicted, x, x, *head)
        return guidance_step(predicted * 2, x, *head) + x_0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(predicted, sample), call(predicted, sample))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    predicted, x, six, scale = arguments((2, 4, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=r"noise is \(3, 4, 4, 4\), sample \(2, 4, 4, 4\)"):
        guidance_step(predicted[:3], x, six, scale)
    with pytest.raises(ValueError, match=r"float32 of \(4,\): float32 of \(6,\)"):
        guidance_step(predicted, x, six[:4], scale)
    with pytest.raises(ValueError, match="0 for noise .* without guidance"):
        guidance_step(predicted[:2], x, six, scale, 0.5)
    with pytest.raises(ValueError, match="beside a threshold"):
        guidance_step(predicted, x, six, scale, 0.0, 1.0, torch.ones(2))
    with pytest.raises(ValueError, match=r"threshold is \(4,\), \(B,\) is \(2,\)"):
        guidance_step(predicted, x, six, scale, 0.0, None, torch.ones(4))
    with pytest.raises(ValueError, match=r"extra is \(1, 4, 4, 4\)"):
        guidance_multistep(predicted, x, x[:1], six, scale)
    with pytest.raises(ValueError, match="torch.float64"):
        guidance_step(predicted.double(), x, six, scale)
    with pytest.raises(ValueError, match="alphas_cumprod is 0: use v"):
        ddim_coefficients(0.0, 0.1)
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample, not flow"):
        euler_coefficients(2.0, 1.0, "flow")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in [*SHAPES[1:], (1, 4, 64, 64), (4, 4, 128, 128), (2, 3, 1024, 1024)]:
        for rest in limits(shape[0]):
            made = tuple(
                a.cuda() if isinstance(a, Tensor) else a for a in (*arguments(shape, dtype), *rest)
            )
            last = (made[0].to(memory_format=torch.channels_last), *made[1:])
            for given in (made, last):
                assert_as_close_as_torch(guidance_step(*given), guidance_step_ref, *given)
