"""The two parts of a pipeline that engines replace, as modules of named tensors, with inputs.

    denoiser      sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), ...
                  -> out_sample (B, C, H, W)
    vae_decoder   latents (B, C, H, W), divided by the scaling factor already
                  -> image (B, 3, f*H, f*W) in [-1, 1]

The denoiser is called "unet" or "transformer", as in the pipeline. Everything is float32; so is
the timestep, which every scheduler's integer or real timesteps convert to without loss.
B batch, C channels, H W latent size, f the first stage's factor, S text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError, RecipeError
from hcf.trace import DenoiserCall, call_denoiser, denoiser_name, record_calls

VAE_DECODER = "vae_decoder"
PROMPTS = ("红色的圆", "blue square")  # any text will do: shapes and types are wanted


class Denoiser(nn.Module):
    """A denoiser that takes its conditioning as positional tensors, in the order of `names`."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        """sample (B, C, H, W), timestep (B,), conditioning (B, ...) each -> (B, C, H, W)"""
        kwargs = dict(zip(self.names, conditioning, strict=True))
        return call_denoiser(self.denoiser, sample, timestep, kwargs)


class Decoder(nn.Module):
    """The decoding half of a first stage."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> image (B, 3, f*H, f*W)"""
        return self.vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]


def check_component(pipe: Any, component: str) -> None:
    """Raises RecipeError for a component that this pipeline does not have."""
    known = [denoiser_name(pipe), VAE_DECODER]
    if component not in known:
        raise RecipeError(
            f"{component!r} is no component engines can replace in {type(pipe).__name__}",
            fix=f"use {' or '.join(known)}",
        )


def component_module(pipe: Any, component: str, names: Sequence[str]) -> nn.Module:
    """The component as a module whose forward takes the tensors `names` (its inputs) in order."""
    check_component(pipe, component)
    if component == VAE_DECODER:
        return Decoder(pipe.vae).eval()
    return Denoiser(getattr(pipe, component), names[2:]).eval()


def output_name(component: str) -> str:
    """Name of the one tensor a component returns."""
    return "image" if component == VAE_DECODER else "out_sample"


def graph_inputs(call: DenoiserCall) -> dict[str, Tensor]:
    """A recorded call as named float32 inputs, each (B, ...)."""
    inputs = {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in inputs.items()}


def example_inputs(pipe: Any, component: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one real call, at the pipeline's own size, each (batch, ...)."""
    return example_calls(pipe, component, batch, steps=1, seed=seed)[0]


def example_calls(
    pipe: Any, component: str, batch: int, steps: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Inputs of the calls of one real sampling run without guidance, each (batch, ...).

    The decoder's latents are unit noise, one call: what a first stage is scaled to see.
    """
    check_component(pipe, component)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    decoder = component == VAE_DECODER
    calls = record_calls(
        pipe,
        prompts,
        steps=steps,
        guidance_scale=1.0,
        seed=seed,
        batch_size=batch,
        max_calls=1 if decoder else None,
    )
    if not calls:
        raise HcfError(f"{type(pipe).__name__} never called its denoiser")
    if not decoder:
        return [graph_inputs(call) for call in calls]
    generator = torch.Generator().manual_seed(seed)
    return [{"latents": torch.randn(calls[0].sample.shape, generator=generator)}]


def with_batch(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The same inputs repeated or cut to `batch` rows, the latents and timesteps made distinct."""
    changed: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        rows = torch.arange(batch) % len(tensor)
        changed[name] = tensor[rows].contiguous()
        if name in ("sample", "latents"):
            changed[name] = changed[name].roll(1, dims=-1)
        elif name == "timestep":
            changed[name] = changed[name] * torch.linspace(1.0, 0.1, batch)
    return changed


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, L2 norms in float64; inf where that is not finite."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
    return float(error) if torch.isfinite(error) else float("inf")
