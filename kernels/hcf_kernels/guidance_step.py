"""One step of sampling in one pass: classifier-free guidance, x_0, its limits, and the update.

    m       = u + guidance_scale (t - u)                     u unconditional, t with the text
    m       = m (rescale std(t) / std(m) + 1 - rescale)      std over an image
    x_0     = a x + b m
    x_0     = clamp(x_0, -clip, clip)    or    clamp(x_0, -s, s) / s, s an image's threshold
    x_prev  = c x_0 + d x + e m + f z

Six numbers (a, b, c, d, e, f) make it the step of a scheduler, for every type of prediction. Below
alpha^2 + sigma^2 = 1, primes are of the timestep stepped to, and k = sigma / alpha is the noise
level by which schedulers like Euler go, whose latents are x / alpha.

    prediction    DDIM, DPM++: x = alpha x_0 + sigma eps    Euler: x = x_0 + k eps
    epsilon       a = 1 / alpha     b = -sigma / alpha      a = 1            b = -k
    v             a = alpha         b = -sigma              a = alpha^2      b = -sigma
    sample        a = 0             b = 1                   a = 0            b = 1

DDIM    x_prev = alpha' x_0 + sigma' eps: c = alpha'. eps is m, or alpha m + sigma x of a predicted
        v, or (x - alpha m) / sigma of a predicted sample: d and e are sigma' times what stands
        before x and m. It is not found again from the limited x_0; where that is asked for
        (use_clipped_model_output), eps = (x - alpha x_0) / sigma goes into c and d, and e = 0.
        With eta the direction sigma' eps shrinks, and f z adds noise z.
Euler   x_prev = x + (k' - k) (x - x_0) / k: c = 1 - k' / k, d = k' / k.
DPM++   2M, midpoint: c = alpha' (1 - exp(-h)) (1 + 1 / 2r), d = sigma' / sigma, and f is the part
        of c with 1 / 2r, negated, of z = x_0 of the step before; h = log(k / k'), r = log(k_before
        / k) / h. A first step, without 1 / 2r, is DDIM's.

Bytes that must move: predictions and latents once, latents once. Guidance: Ho and Salimans, arXiv
2207.12598. Rescaling: Lin et al., arXiv 2305.08891, equations 15 and 16. Thresholds: Saharia et
al. (Imagen), arXiv 2205.11487, section 2.3. DDIM: Song et al., arXiv 2010.02502, equation 12.
Euler: Karras et al., arXiv 2206.00364, algorithm 1. DPM++ 2M: Lu et al., arXiv 2211.01095,
algorithm 2. v: Salimans and Ho, arXiv 2202.00512.

B images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def guided_ref(noise: Tensor, images: int, guidance_scale: float, rescale: float) -> Tensor:
    """noise (2B, ...), unconditional first, or (B, ...) as it is -> (B, ...)"""
    if len(noise) == images:
        return noise
    unconditional, text = noise.chunk(2)
    guided = unconditional + guidance_scale * (text - unconditional)
    if rescale == 0:
        return guided
    over = list(range(1, noise.ndim))
    ratio = text.std(over, keepdim=True) / guided.std(over, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))


def guidance_multistep_ref(
    noise: Tensor, sample: Tensor, extra: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """noise (2B or B, ...), sample and extra (B, ...), coefficients (6,), threshold (B,)
    -> x_prev (B, ...), x_0 (B, ...)"""
    a, b, c, d, e, f = coefficients
    m = guided_ref(noise, len(sample), guidance_scale, rescale)
    x_0 = a * sample + b * m
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if threshold is not None:
        s = threshold.reshape(-1, *[1] * (sample.ndim - 1)).to(x_0.dtype)
        x_0 = x_0.clamp(-s, s) / s
    x_prev = c * x_0 + d * sample + e * m + f * extra
    return x_prev.to(sample.dtype), x_0.to(sample.dtype)


def guidance_step_ref(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `guidance_multistep_ref` without z: f is not used -> x_prev (B, ...)"""
    return guidance_multistep_ref(
        noise, sample, torch.zeros_like(sample), coefficients, guidance_scale, rescale, clip,
        threshold,
    )[0]  # fmt: skip


@torch.library.custom_op("hcf::guidance_step", mutates_args=())
def guidance_step(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """noise (2B, C, H, W), sample (B, C, H, W), coefficients (6,) float32 -> x_prev (B, C, H, W)

    noise: the unconditional predictions, then those with the text; (B, C, H, W) is taken unguided.
    rescale 0 to 1, 0 for none. clip: of x_0, or threshold (B,), from `dynamic_threshold`. x_prev
    has sample's dtype and memory format. f is not used. Raises ValueError for what does not fit.
    """
    _check(noise, sample, coefficients, rescale, clip, threshold)
    x_prev = guidance_step_ref(
        noise.float(), sample.float(), coefficients, guidance_scale, rescale, clip, threshold
    )
    return _like(sample, x_prev)


@guidance_step.register_fake
def _(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(noise, sample, coefficients, rescale, clip, threshold)
    return torch.empty_like(sample)


@guidance_step.register_kernel("cuda")
def _(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.guidance_step import launch

    _check(noise, sample, coefficients, rescale, clip, threshold)
    return launch(noise, sample, coefficients, guidance_scale, rescale, clip, threshold)


@torch.library.custom_op("hcf::guidance_multistep", mutates_args=())
def guidance_multistep(
    noise: Tensor, sample: Tensor, extra: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`guidance_step` with z = extra (B, C, H, W) -> x_prev, x_0 (B, C, H, W)

    extra: the x_0 of the step before, or fresh noise. Where f is 0, as in a first step, anything
    finite: sample itself.
    """
    _check(noise, sample, coefficients, rescale, clip, threshold, extra)
    x_prev, x_0 = guidance_multistep_ref(
        noise.float(), sample.float(), extra.float(), coefficients, guidance_scale, rescale, clip,
        threshold,
    )  # fmt: skip
    return _like(sample, x_prev), _like(sample, x_0)


@guidance_multistep.register_fake
def _(
    noise: Tensor, sample: Tensor, extra: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(noise, sample, coefficients, rescale, clip, threshold, extra)
    return torch.empty_like(sample), torch.empty_like(sample)


@guidance_multistep.register_kernel("cuda")
def _(
    noise: Tensor, sample: Tensor, extra: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from hcf_kernels.gpu.guidance_step import launch_multistep

    _check(noise, sample, coefficients, rescale, clip, threshold, extra)
    return launch_multistep(
        noise, sample, extra, coefficients, guidance_scale, rescale, clip, threshold
    )


def dynamic_threshold(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, ratio: float = 0.995, largest: float = 1.0,
) -> Tensor:  # fmt: skip
    """s (B,) float32: the `ratio` percentile of an image's |x_0|, from 1 to `largest`

    Imagen's, with diffusers' `dynamic_thresholding_ratio` and `sample_max_value`; a sort, apart
    from the pass. For pixels, whose x_0 lies in [-1, 1].
    """
    m = guided_ref(noise.float(), len(sample), guidance_scale, rescale)
    x_0 = coefficients[0] * sample.float() + coefficients[1] * m
    return x_0.flatten(1).abs().quantile(ratio, dim=1).clamp(1.0, largest)


def ddim_coefficients(
    alpha_cumprod: float, alpha_cumprod_prev: float, prediction_type: str = "epsilon",
    use_clipped_model_output: bool = False, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """(6,) float32 of a DDIM step, from alphas_cumprod (alpha^2) of its timestep and of the next

    With diffusers' DDIMScheduler: `alphas_cumprod[t]`, and `alphas_cumprod[t - stride]` with stride
    num_train_timesteps // num_inference_steps, `final_alpha_cumprod` where that is below 0. With
    eta above 0, `extra` of `guidance_multistep` is fresh noise.
    """
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    a, b = _prediction(alpha, sigma, prediction_type)
    variance = 0.0
    if eta:
        kept = (1 - alpha_cumprod_prev) / (1 - alpha_cumprod)
        variance = eta**2 * kept * (1 - alpha_cumprod / alpha_cumprod_prev)
    direction = math.sqrt(1 - alpha_cumprod_prev - variance)
    c, f = math.sqrt(alpha_cumprod_prev), math.sqrt(variance)
    if use_clipped_model_output:
        return _six(a, b, c - direction * alpha / sigma, direction / sigma, 0.0, f)
    of_x, of_m = {
        "epsilon": (0.0, 1.0),
        "v_prediction": (sigma, alpha),
        "sample": (1 / sigma, -alpha / sigma),
    }[prediction_type]
    return _six(a, b, c, direction * of_x, direction * of_m, f)


def euler_coefficients(
    sigma: float, sigma_next: float, prediction_type: str = "epsilon"
) -> Tensor:  # fmt: skip
    """(6,) float32 of an Euler step, from diffusers' `sigmas[i]` and `sigmas[i + 1]`

    Of EulerDiscreteScheduler without churn: latents are x / alpha, the U-Net's input is scaled by
    `scale_model_input` before.
    """
    alpha = 1 / math.sqrt(sigma**2 + 1)
    a, b = _prediction(alpha, sigma * alpha, prediction_type)
    ratio = sigma_next / sigma
    # alpha * latents is what x is in a and b
    return _six(a * alpha, b, 1 - ratio, ratio, 0.0, 0.0)


def dpm_coefficients(
    sigma: float, sigma_next: float, sigma_before: float | None = None,
    prediction_type: str = "epsilon",
) -> Tensor:  # fmt: skip
    """(6,) float32 of a DPM++ 2M step (midpoint), from `sigmas[i]`, `[i + 1]` and `[i - 1]`

    Of diffusers' DPMSolverMultistepScheduler, `algorithm_type="dpmsolver++"`. First order, f = 0,
    without `sigma_before` or where sigma_next is 0; so are the first step, and the last where
    `euler_at_final`, or `lower_order_final` below 15 steps.
    """
    alpha, alpha_next = (1 / math.sqrt(s**2 + 1) for s in (sigma, sigma_next))
    a, b = _prediction(alpha, sigma * alpha, prediction_type)
    c = alpha_next * (1 - sigma_next / sigma)
    d = sigma_next * alpha_next / (sigma * alpha)
    f = 0.0
    if sigma_before is not None and sigma_next > 0:
        r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
        f = -c / (2 * r)
    return _six(a, b, c - f, d, 0.0, f)


def _prediction(alpha: float, sigma: float, prediction_type: str) -> tuple[float, float]:
    """a and b of x_0 = a x + b m, where x = alpha x_0 + sigma eps."""
    if prediction_type == "epsilon" and alpha == 0:
        raise ValueError("x_0 is not in a predicted epsilon where alphas_cumprod is 0: use v")
    made = {
        "epsilon": lambda: (1 / alpha, -sigma / alpha),
        "v_prediction": lambda: (alpha, -sigma),
        "sample": lambda: (0.0, 1.0),
    }
    if prediction_type not in made:
        raise ValueError(f"prediction_type is {', '.join(made)}, not {prediction_type}")
    return made[prediction_type]()


def _six(*coefficients: float) -> Tensor:
    return torch.tensor(coefficients, dtype=torch.float32)


def _like(sample: Tensor, made: Tensor) -> Tensor:
    """`made` in the dtype and with the strides that `torch.empty_like(sample)` promises."""
    out = torch.empty_like(sample)
    same = made.stride() == out.stride() and made.dtype == out.dtype
    return made if same else out.copy_(made)


def _check(
    noise: Tensor, sample: Tensor, coefficients: Tensor, rescale: float, clip: float | None,
    threshold: Tensor | None, extra: Tensor | None = None,
) -> None:  # fmt: skip
    kinds = [t.dtype for t in (noise, sample, extra) if t is not None]
    if any(kind not in DTYPES for kind in kinds):
        raise ValueError(
            f"noise, sample and extra are float32, float16 or bfloat16, not {set(kinds)}"
        )
    images = len(sample) if sample.ndim > 1 else 0
    if not images or noise.shape[1:] != sample.shape[1:] or len(noise) not in (images, 2 * images):
        raise ValueError(
            f"noise is {tuple(noise.shape)}, sample {tuple(sample.shape)}: (2B, ...) or (B, ...), "
            "and (B, ...)"
        )
    if extra is not None and extra.shape != sample.shape:
        raise ValueError(f"extra is {tuple(extra.shape)}, sample {tuple(sample.shape)}")
    if tuple(coefficients.shape) != (6,) or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients are {coefficients.dtype} of {tuple(coefficients.shape)}: float32 of (6,)"
        )
    if not 0 <= rescale <= 1 or (rescale and len(noise) == images):
        raise ValueError(f"rescale is {rescale}: 0 to 1, and 0 for noise (B, ...) without guidance")
    if clip is not None and (threshold is not None or not clip > 0):
        raise ValueError(f"clip is {clip}: above 0, or None, as it is beside a threshold")
    if threshold is not None and tuple(threshold.shape) != (images,):
        raise ValueError(f"threshold is {tuple(threshold.shape)}, (B,) is ({images},)")
