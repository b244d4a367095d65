"""What a training run would cost, before any GPU is asked for: `hcf train plan PRESET`.

Work is counted, speed is estimated. Multiply-accumulates of one forward pass are counted on the
meta device; a training step costs 6 FLOPs each (2 a multiply-accumulate, the backward pass twice
the forward). The rate follows from the GPUs' dense bf16 peak and an assumed utilisation, 27 %: the
published rates of MosaicML's Stable Diffusion 2 on 32 A100s, 4,080 img/s at 256 pixels and 1,195 at
512, are 22 % and 29 % by the same count.
"""

import re
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from taiji import presets
from taiji.text import SandwichTextEncoder
from taiji.train.throughput import PEAK_TFLOPS, FlopCounter
from taiji.unet import EfficientUNet, ImagenUNet

FLOPS_PER_MAC = 6
# Bytes a parameter: bf16 weight, fp32 master weight, Adam's two moments, EMA; and the gradient.
WEIGHT, MASTER, MOMENTS, AVERAGE, GRADIENT = 2, 4, 8, 4, 2
TEXT_TOKENS = 128


class PlanConfig(BaseModel):
    """`resolution` in pixels of the image that is made (a super-resolution model: of its training
    crops); None is what the preset is trained at. `text` counts a Sandwich encoder of 24 layers and
    128 tokens beside the U-Net: its forward pass, or its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(32, gt=0)
    hours: float = Field(336.0, gt=0)
    batch: int = Field(4096, gt=0)
    resolution: int | None = Field(None, gt=0)
    mfu: float = Field(0.27, gt=0, le=1)
    device: str = "a100"
    images: float = Field(100e6, gt=0)
    text: Literal["none", "frozen", "trained"] = "none"


class Plan(BaseModel):
    """Counted: params, gmacs, tflop_per_sample. All else is estimated from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    kind: str = "estimated"
    resolution: int
    context_tokens: int
    params: int
    gmacs: float
    tflop_per_sample: float
    img_per_s: float
    samples: float
    steps: float
    passes: float
    hours_per_pass: float
    checkpoint_gb: float
    memory_gb: dict[str, float]
    config: PlanConfig


def preset_names() -> dict[str, str]:
    """Spoken name to the constant of `taiji.presets`: "A-1.3B" to "A_1_3B_UNET"."""
    found = sorted(name for name in vars(presets) if name.endswith("_UNET"))
    return {
        re.sub(r"(\d)-(\dB)", r"\1.\2", name.removesuffix("_UNET").replace("_", "-")): name
        for name in found
        if not name.startswith("_")
    }


def find_preset(name: str) -> tuple[str, dict[str, Any]]:
    """Raises ValueError, listing the names, for one that is none."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower().removesuffix("_unet"))

    for spoken, constant in preset_names().items():
        if plain(spoken) == plain(name):
            return spoken, getattr(presets, constant)
    raise ValueError(f"no preset is called {name!r}; there are {', '.join(preset_names())}")


def build(config: dict[str, Any]) -> nn.Module:
    """The U-Net of a preset; its class follows from the keys."""
    if "self_attention" in config:
        return EfficientUNet(**config)
    if "attention_levels" in config:
        return ImagenUNet(**config)
    if "AttnDownBlock2D" in config.get("down_block_types", ()):
        return UNet2DModel(**config)
    return UNet2DConditionModel(**config)


def latent_factor(name: str) -> int:
    """Pixels a side of a latent: 1 in pixel space, 4 for VQ-f4 and KL-f4, 8 for KL-f8."""
    plain = name.removeprefix("TINY-")
    if plain.startswith("SD"):
        return 8
    is_latent_sr = plain.startswith(("SR-", "LDM")) or plain == "SR"
    return 4 if (is_latent_sr and "IF" not in plain) or plain == "MINI" else 1


def training_resolution(name: str, config: dict[str, Any]) -> int:
    """Super-resolution trains on crops of 256 pixels; the rest at the preset's own size."""
    if name.removeprefix("TINY-").startswith(("SR-S", "SR-L", "LDM", "SR256", "SR1024")):
        return 256
    return int(config["sample_size"]) * latent_factor(name)


def context_tokens(name: str) -> int:
    """Text tokens the U-Net attends to: both encoders' (52 + 128), or the Sandwich's alone."""
    plain = name.removeprefix("TINY-")
    if plain == "MINI":
        return presets.MINI_CLIP_TOKENS + presets.MINI_SANDWICH_TOKENS
    if plain.startswith("SD1"):
        return 77
    one_encoder = plain.startswith(("B", "SR", "LDM", "EFFICIENT")) or plain == "SD-B"
    return TEXT_TOKENS if one_encoder else presets.IMAGE_CLIP_TOKENS + TEXT_TOKENS


@torch.no_grad()
def count(config: dict[str, Any], *, grid: int, tokens: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of one forward pass at batch 1, on the meta device."""
    with torch.device("meta"):
        model = build(config).eval()
        inputs = unet_inputs(config, grid=grid, tokens=tokens, batch=1)
        counter = FlopCounter()
        with counter:
            call_unet(model, torch.zeros(1), inputs)
    return sum(p.numel() for p in model.parameters()), counter.flops // 2


def unet_inputs(config: dict[str, Any], *, grid: int, tokens: int, batch: int) -> dict[str, Tensor]:
    """Random tensors for one call: sample (B, C, H, W), the context (B, S, D), and by name what
    else the preset takes."""
    sample = torch.randn(batch, config["in_channels"], grid, grid)
    inputs = {"sample": sample}
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if width:
        inputs["encoder_hidden_states"] = torch.randn(batch, tokens, width)
    if config.get("addition_embed_type") == "text_time":
        numbers = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - numbers
        inputs["text_embeds"] = torch.randn(batch, pooled)
        inputs["time_ids"] = torch.zeros(batch, 6)
    if config.get("class_embed_type") == "timestep":
        inputs["class_labels"] = torch.zeros(batch)
    if config.get("class_embed_type") == "projection":
        inputs["class_labels"] = torch.randn(batch, config["projection_class_embeddings_input_dim"])
    return inputs


def call_unet(model: nn.Module, timestep: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The prediction (B, C', H, W) for what `unet_inputs` gives."""
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    rest = {k: v for k, v in inputs.items() if k not in added}
    if added:
        return model(timestep=timestep, added_cond_kwargs=added, **rest).sample
    return model(timestep=timestep, **rest).sample


@torch.no_grad()
def text_macs() -> int:
    """Multiply-accumulates of the large Sandwich encoder over its 128 tokens."""
    with torch.device("meta"):
        encoder = SandwichTextEncoder(**{"vocab_size": 21128, **presets.SANDWICH_LARGE}).eval()
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
        counter = FlopCounter()
        with counter:
            encoder(ids, torch.ones_like(ids))
    return counter.flops // 2


def peak_tflops(device: str) -> float:
    """Dense bf16 TFLOP/s of a GPU named in any case."""
    for name, (bf16, _) in PEAK_TFLOPS.items():
        if name.lower().replace(" ", "") == device.lower().replace(" ", "").replace("-", ""):
            return bf16
    raise ValueError(f"no peak is known of {device!r}; known are {', '.join(PEAK_TFLOPS)}")


def memory_per_gpu(params: int, gpus: int) -> dict[str, float]:
    """GB of weights, optimiser, EMA and gradients by mode of `loop.parallel`, no activations."""
    state, divided = WEIGHT + AVERAGE, MASTER + MOMENTS
    bytes_each = {
        "ddp": state + divided + GRADIENT,
        "zero1": state + divided / gpus + GRADIENT,
        "zero2": state + (divided + GRADIENT) / gpus,
        "fsdp2": (state + divided + GRADIENT) / gpus,
    }
    return {mode: params * each / 1e9 for mode, each in bytes_each.items()}


def plan(preset: str, config: PlanConfig | None = None) -> Plan:
    """Raises ValueError for a preset or device that is not known, or a size that does not fit."""
    settings = config or PlanConfig()
    name, unet = find_preset(preset)
    resolution = settings.resolution or training_resolution(name, unet)
    factor = latent_factor(name)
    if resolution % factor:
        raise ValueError(f"{name} needs a resolution that divides by {factor}, not {resolution}")
    tokens = context_tokens(name)
    params, macs = count(unet, grid=resolution // factor, tokens=tokens)
    flops = FLOPS_PER_MAC * macs
    if settings.text != "none":
        flops += (2 if settings.text == "frozen" else FLOPS_PER_MAC) * text_macs()
    rate = settings.gpus * peak_tflops(settings.device) * 1e12 * settings.mfu / flops
    samples = rate * settings.hours * 3600
    return Plan(
        preset=name,
        resolution=resolution,
        context_tokens=tokens,
        params=params,
        gmacs=macs / 1e9,
        tflop_per_sample=flops / 1e12,
        img_per_s=rate,
        samples=samples,
        steps=samples / settings.batch,
        passes=samples / settings.images,
        hours_per_pass=settings.images / rate / 3600,
        # what a checkpoint holds: fp32 weights, their average and Adam's moments
        checkpoint_gb=params * (MASTER + AVERAGE + MOMENTS) / 1e9,
        memory_gb=memory_per_gpu(params, settings.gpus),
        config=settings,
    )


def table(plans: list[Plan]) -> str:
    """The cost table, a row a preset, and the memory by mode of parallelism."""
    settings = plans[0].config
    head = (
        f"estimated, not measured: {settings.gpus} {settings.device.upper()} at "
        f"{settings.mfu:.0%} of {peak_tflops(settings.device):.0f} TFLOP/s, "
        f"{settings.hours:g} h, batch {settings.batch}, text encoder: {settings.text}"
    )
    rows = [
        ["preset", "px", "params", "GMACs", "TFLOP/sample", "img/s", "samples",
         f"passes over {_short(settings.images)}", "steps", "checkpoint GB"],
        *(
            [p.preset, str(p.resolution), f"{p.params:,}", f"{p.gmacs:,.1f}",
             f"{p.tflop_per_sample:.2f}", f"{p.img_per_s:,.0f}", _short(p.samples),
             f"{p.passes:.1f}", _short(p.steps), f"{p.checkpoint_gb:.1f}"]
            for p in plans
        ),
    ]  # fmt: skip
    modes = list(plans[0].memory_gb)
    memory = [
        ["GB a GPU by loop.parallel.mode, without activations", *modes],
        *([p.preset, *(f"{p.memory_gb[m]:.1f}" for m in modes)] for p in plans),
    ]
    return "\n".join([head, "", *_aligned(rows), "", *_aligned(memory)])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def _short(number: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
