"""What every decoded image is checked for, and the precision and layout a decoder is safe in.

B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError, RecipeError

# of the range [-1, 1]: dark, bright and flat pictures vary far more than this, constants do not
CONSTANT_RANGE = 2e-4
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_image(image: Tensor, component: str, latents: Tensor | None = None) -> Tensor:
    """The same image (B, C, H, W), in about [-1, 1], after one reduction over it.

    Raises HcfError for an image of the batch that is not finite, that varies by less than 2e-4
    (1e-4 of the range: exact constants, not merely flat pictures), or that lies beyond one end of
    the range everywhere (all black, all white). `latents` (B, ...) are looked at only then, to say
    whether the decoder or what came before it is to blame.
    """
    low, high = torch.aminmax(image.detach().flatten(1).float(), dim=1)
    bounds = torch.stack([low, high]).cpu()
    for i, (least, most) in enumerate(bounds.T.tolist()):
        what = _what_is_wrong(least, most)
        if what:
            cause, fix = _likely_cause(image.dtype, component, latents, i)
            raise HcfError(f"image {i} of {component} {what}; {cause}", fix=fix)
    return image


def _what_is_wrong(least: float, most: float) -> str:
    if not (-float("inf") < least and most < float("inf")):  # NaN compares false
        return "is not finite"
    if most - least < CONSTANT_RANGE:
        return f"is constant ({least:.4g} to {most:.4g})"
    if most <= -1:
        return f"is all black ({least:.4g} to {most:.4g}, black is -1)"
    if least >= 1:
        return f"is all white ({least:.4g} to {most:.4g}, white is 1)"
    return ""


def _likely_cause(
    dtype: torch.dtype, component: str, latents: Tensor | None, i: int
) -> tuple[str, str]:
    if latents is not None:
        own = latents[i].detach().float()
        if not bool(torch.isfinite(own).all()):
            return (
                "its latents are not finite either, so the denoiser made it",
                "run the denoiser in bf16 or fp32, or check its engine (`hcf check`)",
            )
        if float(own.max() - own.min()) == 0:
            return (
                "its latents are constant too, so the denoiser made it",
                "check the denoiser's engine and the scheduler's settings",
            )
    cause = "usually float16 overflowed in the decoder (SDXL's first stage does)"
    if dtype in (torch.float32, torch.bfloat16):
        cause += ", in its graph if not in torch"
    return (
        cause,
        f"run {component} in bf16 or fp32, honour the VAE's force_upcast, or use a first stage "
        "made for float16; if it persists the latents or weights are broken (`hcf inspect`)",
    )


def decoder_dtype(vae: Any, asked: str | None = None, *, upcast: str | None = None) -> torch.dtype:
    """The type to decode in: `asked` ("fp32", "fp16", "bf16"), or the module's own without it.

    A VAE whose config says force_upcast overflows in float16 and nothing else: bf16 has float32's
    range. float16 is then an error, or `upcast` ("bf16", "fp32") where that is given.
    """
    for name in (asked, upcast):
        if name is not None and name not in DTYPES:
            raise RecipeError(
                f"a decoder does not run in {name!r}", fix=f"use one of {', '.join(DTYPES)}"
            )
    if upcast == "fp16":
        raise RecipeError("upcast='fp16' is no upcast", fix="use bf16 or fp32")
    dtype: torch.dtype = vae.dtype if asked is None else DTYPES[asked]
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return dtype
    if upcast is None:
        raise HcfError(
            "fp16 was asked of a VAE whose config says force_upcast: it overflows to black images",
            fix="decode in bf16 or fp32, or give a VAE made for fp16, with force_upcast false",
        )
    return DTYPES[upcast]


def prefer_channels_last(module: nn.Module) -> bool:
    """Lays convolution weights out as NHWC where that is faster; whether it did. Values stay.

    For half precision on a GPU, whose tensor cores read NHWC, and bf16 on a CPU: SD 1.5's decoder
    takes 0.43 of the time in bf16 (AVX-512 BF16, one thread), and 0.96 in float32.
    """
    weights = [p for p in module.parameters() if p.ndim == 4]
    pays = bool(weights) and all(
        (p.device.type == "cuda" and p.dtype in (torch.float16, torch.bfloat16))
        or (p.device.type == "cpu" and p.dtype == torch.bfloat16)
        for p in weights
    )
    if pays:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pays
