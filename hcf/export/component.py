"""The parts of a pipeline that engines replace, as modules of named tensors, with inputs.

    unet, transformer   sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), ...
                        -> out_sample (B, C, H, W)
    controlnet          the same and controlnet_cond (B, 3, f*H, f*W)
                        -> down_block_res_sample_0.. (B, C_i, H_i, W_i), mid_block_res_sample
    vae_decoder         latents (B, C, H, W), divided by the scaling factor already
                        -> image (B, 3, f*H, f*W) in [-1, 1]
    vae_encoder         image (B, 3, f*H, f*W) in [-1, 1] -> moments (B, 2*C, H, W): mean, log var
    unet_full_0         as unet -> out_sample, features (B, C', H', W')      the two steps of a
    unet_shallow_0      as unet, and features -> out_sample                  cache at branch 0
    text_encoder, _2    input_ids (B, S) int64
                        -> last_hidden_state (B, S, D), pooled (B, P), hidden_states (n+1, B, S, D)

Floats are float32; so is the timestep, which every scheduler's integer or real timesteps convert to
without loss. Other integers are int64.
B batch, C channels, H W latent size, f the first stage's factor, S text tokens, D width, P width of
the pooled vector, n layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError, RecipeError
from hcf.feature_cache import FullStep, ShallowStep, require_cuttable
from hcf.feature_cache.install import FEATURES
from hcf.trace import (
    CONTROLNET,
    DenoiserCall,
    call_denoiser,
    call_flat,
    denoiser_name,
    record_calls,
)

VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# the steps of `hcf.feature_cache`, with their branch
CACHED = re.compile(r"unet_(full|shallow)_(\d+)")
PROMPTS = ("红色的圆", "blue square")  # any text will do: shapes and types are wanted
# inputs whose height and width are the latents' times the first stage's factor
PIXELS = ("controlnet_cond", "image")


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


class Control(nn.Module):
    """A ControlNet at conditioning scale 1, its inputs as `Denoiser` takes them."""

    def __init__(self, controlnet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.names = tuple(names)

    def forward(
        self, sample: Tensor, timestep: Tensor, *conditioning: Tensor
    ) -> tuple[Tensor, ...]:
        """sample (B, C, H, W), timestep (B,), conditioning -> residuals, the mid block's last"""
        kwargs = dict(zip(self.names, conditioning, strict=True))
        down, mid = call_flat(self.controlnet, sample, timestep, kwargs)
        return (*down, mid)


class Decoder(nn.Module):
    """The decoding half of a first stage."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> image (B, 3, f*H, f*W)"""
        return self.vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]


class Encoder(nn.Module):
    """The encoding half of a first stage with a Gaussian posterior."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, f*H, f*W) -> mean and log variance (B, 2*C, H, W)"""
        return self.vae.encode(image, return_dict=False)[0].parameters  # type: ignore[operator]


class TextEncoder(nn.Module):
    """A CLIP text model, its states of every layer stacked."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, S) -> states (B, S, D), pooled (B, P), states of every layer (n+1, B, S, D)"""
        out = self.text_encoder(input_ids, output_hidden_states=True)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return out.last_hidden_state, pooled, torch.stack(tuple(out.hidden_states))


def components_of(pipe: Any) -> tuple[str, ...]:
    """Names of the components engines can replace in `pipe`, the denoiser first."""
    return tuple(name for name, reason in _known(pipe).items() if reason is None)


def why_not(pipe: Any) -> dict[str, str]:
    """{component: reason} of those that `pipe` has and engines cannot replace."""
    return {name: reason for name, reason in _known(pipe).items() if reason is not None}


def default_components(pipe: Any) -> tuple[str, ...]:
    """What a run replaces unless it is told: all that works in every step, and the decoder."""
    wanted = (denoiser_name(pipe), CONTROLNET, VAE_DECODER)
    return tuple(name for name in components_of(pipe) if name in wanted)


def cached_components(branch: int) -> tuple[str, str]:
    """Names of the full and the shallow step of a feature cache at `branch`."""
    return f"unet_full_{branch}", f"unet_shallow_{branch}"


def check_component(pipe: Any, component: str) -> None:
    """Raises RecipeError for a component that this pipeline does not have or cannot replace."""
    known = _known(pipe)
    if (cached := CACHED.fullmatch(component)) and "unet" in known:
        require_cuttable(pipe.unet, int(cached[2]))
        return
    if known.get(component, "") is None:
        return
    reason = f": {known[component]}" if component in known else ""
    raise RecipeError(
        f"{component!r} is no component engines can replace in {type(pipe).__name__}{reason}",
        fix=f"use {' or '.join(components_of(pipe))}",
    )


def component_module(pipe: Any, component: str, names: Sequence[str]) -> nn.Module:
    """The component as a module whose forward takes the tensors `names` (its inputs) in order."""
    check_component(pipe, component)
    if component == VAE_DECODER:
        return Decoder(pipe.vae).eval()
    if component == VAE_ENCODER:
        return Encoder(pipe.vae).eval()
    if component in TEXT_ENCODERS:
        return TextEncoder(getattr(pipe, component)).eval()
    if component == CONTROLNET:
        return Control(pipe.controlnet, names[2:]).eval()
    if cached := CACHED.fullmatch(component):
        if cached[1] == "full":
            return FullStep(pipe.unet, int(cached[2]), names[2:]).eval()
        return ShallowStep(pipe.unet, int(cached[2]), names[3:]).eval()
    return Denoiser(getattr(pipe, component), names[2:]).eval()


def output_names(pipe: Any, component: str) -> tuple[str, ...]:
    """Names of the tensors a component returns, in order."""
    if component == VAE_DECODER:
        return ("image",)
    if component == VAE_ENCODER:
        return ("moments",)
    if component in TEXT_ENCODERS:
        return ("last_hidden_state", "pooled", "hidden_states")
    if component == CONTROLNET:
        blocks = len(pipe.controlnet.controlnet_down_blocks)
        names = [f"down_block_res_sample_{i}" for i in range(blocks)]
        return (*names, "mid_block_res_sample")
    if (cached := CACHED.fullmatch(component)) and cached[1] == "full":
        return ("out_sample", FEATURES)
    return ("out_sample",)


def graph_inputs(call: DenoiserCall) -> dict[str, Tensor]:
    """A recorded call as named inputs, each (B, ...): floats, timestep float32; integers int64."""
    inputs = {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
    return {
        name: tensor.to(
            torch.float32 if tensor.is_floating_point() or name == "timestep" else torch.int64
        ).contiguous()
        for name, tensor in inputs.items()
    }


def example_inputs(
    pipe: Any,
    component: str,
    batch: int = 2,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of one real call, each (batch, ...); pixels, the pipeline's own size without them."""
    return example_calls(pipe, component, batch, 1, seed, height, width)[0]


def example_calls(
    pipe: Any,
    component: str,
    batch: int,
    steps: int,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
) -> list[dict[str, Tensor]]:
    """Inputs of the calls of one real sampling run without guidance, each (batch, ...).

    A first stage and a text encoder have one: latents of unit noise, which is what a first stage
    is scaled to see, an image in [-1, 1], the tokens of two texts.
    """
    check_component(pipe, component)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    if component in TEXT_ENCODERS:
        return [{"input_ids": _token_ids(pipe, component, prompts)}]
    first_stage = component in (VAE_DECODER, VAE_ENCODER)
    calls = record_calls(
        pipe,
        prompts,
        steps=steps,
        guidance_scale=1.0,
        seed=seed,
        batch_size=batch,
        max_calls=1 if first_stage or steps == 1 else None,  # stops before it computes
        height=height,
        width=width,
        component=component if component == CONTROLNET else None,
    )
    if not calls:
        raise HcfError(f"{type(pipe).__name__} never called its denoiser")
    if (cached := CACHED.fullmatch(component)) and cached[1] == "shallow":
        return [_with_features(pipe, graph_inputs(call), int(cached[2])) for call in calls]
    if not first_stage:
        return [graph_inputs(call) for call in calls]
    generator = torch.Generator().manual_seed(seed)
    rows, columns = calls[0].sample.shape[-2:]
    if component == VAE_DECODER:
        channels = int(pipe.vae.config.latent_channels)
        return [{"latents": torch.randn(batch, channels, rows, columns, generator=generator)}]
    factor = int(pipe.vae_scale_factor)
    image = torch.randn(batch, 3, rows * factor, columns * factor, generator=generator)
    return [{"image": image.clamp(-1, 1)}]


@torch.no_grad()
def _with_features(pipe: Any, inputs: dict[str, Tensor], branch: int) -> dict[str, Tensor]:
    """Inputs of a shallow step: those of a call, and what its full step keeps, in third place."""
    items = list(inputs.items())
    full = FullStep(pipe.unet, branch, [name for name, _ in items[2:]]).eval()
    features = full(*inputs.values())[1].contiguous()
    return dict([*items[:2], (FEATURES, features), *items[2:]])


def with_batch(inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The same inputs repeated or cut to `batch` rows, the latents and timesteps made distinct."""
    changed: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        rows = torch.arange(batch) % len(tensor)
        changed[name] = tensor[rows].contiguous()
        if name in ("sample", "latents", "image"):
            changed[name] = changed[name].roll(1, dims=-1)
        elif name == "timestep":
            changed[name] = changed[name] * torch.linspace(1.0, 0.1, batch)
    return changed


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, L2 norms in float64; inf where that is not finite."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-12)
    return float(error) if torch.isfinite(error) else float("inf")


def _known(pipe: Any) -> dict[str, str | None]:
    """{component: None, or why engines cannot replace it} of what `pipe` has, in order."""
    known: dict[str, str | None] = {denoiser_name(pipe): None}
    controlnet = getattr(pipe, CONTROLNET, None)
    if controlnet is not None:
        known[CONTROLNET] = _not_a_controlnet(controlnet)
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        known[VAE_DECODER] = None
        known[VAE_ENCODER] = _no_posterior(vae)
    for name in TEXT_ENCODERS:
        if getattr(pipe, name, None) is not None:
            known[name] = _not_clip(getattr(pipe, name))
    return known


def _not_a_controlnet(controlnet: Any) -> str | None:
    from diffusers import ControlNetModel

    if isinstance(controlnet, ControlNetModel):
        return None
    return f"it is a {type(controlnet).__name__}; a single ControlNetModel is needed"


def _no_posterior(vae: Any) -> str | None:
    from diffusers import AutoencoderKL

    if isinstance(vae, AutoencoderKL):
        return None
    return f"a {type(vae).__name__} has no Gaussian posterior; an AutoencoderKL is needed"


def _not_clip(text_encoder: Any) -> str | None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if isinstance(text_encoder, CLIPTextModel | CLIPTextModelWithProjection):
        return None
    return (
        f"a {type(text_encoder).__name__} is called with more than token ids; "
        "a CLIPTextModel is needed"
    )


def _token_ids(pipe: Any, component: str, prompts: Sequence[str]) -> Tensor:
    """ids (B, S), padded to the tokenizer's length as the pipelines do."""
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    limit = getattr(pipe, component).config.max_position_embeddings
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=min(tokenizer.model_max_length, limit),
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids
