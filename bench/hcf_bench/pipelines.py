"""Networks and pipelines of a preset with random weights, built offline.

Weights are drawn on the target device in float32, one tensor at a time, and cast: the same numbers
for a seed and device whatever the dtype. Every matrix and kernel has variance 1 / fan-in, norms
scale by 0.9 to 1.1 and nothing is zero, so no branch is hidden from a comparison of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact
from hcf_bench.presets import Part, Preset, context_width

SHIPPED = Path("weights", "taiji-sd-mini")  # in the folder that holds the `taiji` package
PROMPT_LETTERS = "一只戴着墨镜的狗站在沙滩上abcdefghijklmnopqrstuvwxyz0123456789"
# v-prediction, whatever the public model has: a random network that predicts eps drives its latents
# to tens of standard deviations, one that predicts v keeps them near 1. The work is the same.
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
KOLORS_SCHEDULER = {**SCHEDULER, "beta_end": 0.014, "num_train_timesteps": 1100}


def build_network(part: Part, *, device: str, dtype: torch.dtype, seed: int) -> Any:
    """The network of `part`, in eval mode, without gradients; on "meta" it holds no weights."""
    if device == "meta":
        with torch.device("meta"):
            network: nn.Module = _construct(part.kind, part.config)
        return cast(network, "meta", dtype).eval().requires_grad_(False)
    from accelerate import init_empty_weights

    # Default initialisation of 2.6 billion weights takes longer than ours, and is thrown away.
    with init_empty_weights(include_buffers=False):
        network = _construct(part.kind, part.config)
    fill_weights(network, device=device, dtype=dtype, seed=seed)
    return cast(network, device, dtype).eval()


def cast(network: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """`network.to`, without diffusers' warning about weights to be kept in float32: it has none."""
    return nn.Module.to(network, device=device, dtype=dtype)


@torch.no_grad()
def fill_weights(network: nn.Module, *, device: str, dtype: torch.dtype, seed: int) -> None:
    """Replaces every parameter of `network` by a drawn one."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in network.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(old.shape, device=device).uniform_(-1, 1, generator=generator)
            if old.dim() > 1:
                fan_in = old[0].numel()
                drawn *= (3 / fan_in) ** 0.5
            else:
                drawn *= 0.1
                if name == "weight":  # of a norm
                    drawn += 1
            setattr(module, name, nn.Parameter(drawn.to(dtype), requires_grad=False))


def build_preset_pipeline(preset: Preset, *, device: str, dtype: torch.dtype, seed: int) -> Any:
    """The diffusers pipeline of a preset whose `pipeline` is not empty.

    Raises InvalidArtifact where the shipped weights are wanted and not here.
    """
    if preset.pipeline == "shipped":
        return open_shipped(device=device, dtype=dtype)
    parts = {
        name.removesuffix("_decoder"): build_network(part, device=device, dtype=dtype, seed=seed)
        for name, part in preset.parts.items()
    }
    assemblers: dict[str, Any] = {
        "sd": _stable_diffusion,
        "sdxl": _stable_diffusion_xl,
        "kolors": partial(_kolors, preset=preset),
        "taiji": partial(_taiji, preset=preset, device=device, dtype=dtype, seed=seed),
    }
    pipe = assemblers[preset.pipeline](parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_shipped(*, device: str, dtype: torch.dtype) -> Any:
    """Taiji-SD-mini with the weights of this repository. Raises InvalidArtifact without them."""
    import taiji
    from hcf.source import open_pipeline

    folder = Path(next(iter(taiji.__path__))).parent / SHIPPED
    if not folder.is_dir():
        raise InvalidArtifact(
            f"the weights of Taiji-SD-mini are not at {folder}",
            fix="run from a checkout of the repository, where models/weights holds them",
        )
    pipe = open_pipeline(folder)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            cast(component, device, dtype)
    return pipe


def byte_tokenizer(max_length: int) -> Any:
    """A CLIP tokenizer of 514 entries, the bytes without merges; its ids are `TOKENIZER_IDS`."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    entries = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def _construct(kind: str, config: Mapping[str, Any]) -> nn.Module:
    if kind in ("unet", "kl", "vq"):
        import diffusers

        classes: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel,
            "kl": diffusers.AutoencoderKL,
            "vq": diffusers.VQModel,
        }
        return classes[kind](**config)
    if kind == "sandwich":
        from taiji.text.sandwich import SandwichTextEncoder

        return SandwichTextEncoder(**config)
    import transformers

    if kind == "image_clip":
        return transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**config))
    projected = kind == "clip_projection"
    model: Any = (
        transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    )
    return model(transformers.CLIPTextConfig(**config))


def _stable_diffusion(parts: Mapping[str, Any]) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts,
        tokenizer=_tokenizer_of(parts["text_encoder"]),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(parts: Mapping[str, Any]) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=_tokenizer_of(parts["text_encoder"]),
        tokenizer_2=_tokenizer_of(parts["text_encoder_2"]),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        # The public setting skips both towers for an empty negative prompt.
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _kolors(parts: Mapping[str, Any], *, preset: Preset) -> Any:
    """Kolors samples as SDXL does; diffusers' own class needs sentencepiece to be imported."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        **parts,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=EulerDiscreteScheduler(**KOLORS_SCHEDULER),
        add_watermarker=False,
    )
    pipe.encode_prompt = partial(_random_embeddings, pipe, preset.parts["unet"].tokens)
    return pipe


def _random_embeddings(
    pipe: Any,
    tokens: int,
    prompt: str | list[str],
    num_images_per_prompt: int = 1,
    negative_prompt: str | list[str] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In place of ChatGLM3: context (B, S, D) and pooled (B, D), a function of the text alone.

    Returns context, negative context, pooled, negative pooled.
    """
    width = context_width(pipe.unet.config)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = negative_prompt or ""
    if isinstance(negatives, str):
        negatives = [negatives] * len(prompts)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(crc32(text.encode()))
            rows.append(torch.randn(tokens, width, generator=generator))
        context = torch.stack(rows).to(pipe.device, pipe.unet.dtype)
        context = context.repeat_interleave(num_images_per_prompt, 0)
        return context, context[:, -1]

    (context, pooled), (negative, negative_pooled) = encode(prompts), encode(list(negatives))
    return context, negative, pooled, negative_pooled


def _taiji(
    parts: Mapping[str, Any], *, preset: Preset, device: str, dtype: torch.dtype, seed: int
) -> Any:
    from diffusers import DDIMScheduler

    from taiji.pipelines import TaijiStableDiffusionPipeline
    from taiji.text.fusion import TextFusion
    from taiji.text.tokenizer import build_tokenizer

    clip, sandwich = preset.parts["image_clip"], preset.parts["text_encoder"]
    fusion = TextFusion(
        clip_width=clip.config["text_config"]["hidden_size"],
        clip_projection=clip.config["projection_dim"],
        clip_tokens=clip.tokens,
        sandwich_width=sandwich.config["width"],
        sandwich_tokens=sandwich.tokens,
        context_width=context_width(preset.parts["unet"].config),
    )
    fill_weights(fusion, device=device, dtype=dtype, seed=seed)
    return TaijiStableDiffusionPipeline(
        **parts,
        tokenizer=build_tokenizer([PROMPT_LETTERS], max_length=sandwich.tokens),
        fusion=fusion.eval(),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False),
        default_steps=preset.steps,
        default_guidance_scale=preset.guidance_scale,
    )


def _tokenizer_of(encoder: Any) -> Any:
    return byte_tokenizer(encoder.config.max_position_embeddings)
