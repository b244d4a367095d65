"""What is measured, as data: kernels, the modules of each preset, and whole pipelines.

A case is a workload built for one batch, device and dtype: a module that takes positional tensors
and returns one, which is what exporters and compilers can take, with its inputs. B batch, C
channels, H W size, S text tokens, L tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from hcf.errors import MissingDependency, RecipeError
from hcf_bench.pipelines import (
    build_network,
    build_preset_pipeline,
    fill_weights,
    open_shipped,
)
from hcf_bench.presets import KERNEL_SHAPES, PRESETS, Part, Shape, context_width, pooled_width

Kind = Literal["kernel", "module", "pipeline"]

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM_GROUPS: Final = 32
TIMESTEP: Final = 501.0
_BOTH_LAYOUTS: Final = ("group_norm_silu", "conv3x3")  # NCHW, and channels_last as "_nhwc"


@dataclass(frozen=True)
class Workload:
    """One thing that is timed.

    `batch` is the default: 2 for a U-Net, which guidance runs on two rows. `params` and `tflop` are
    the published counts, of one forward at batch 1; a decoder's `params` are those of its whole
    first stage, a pipeline's `tflop` is of one image. `shape` and `channels_last` are a kernel's;
    `steps` and `guidance_scale` a pipeline's.
    """

    name: str
    kind: Kind
    preset: str
    component: str
    batch: int
    params: int | None = None
    tflop: float | None = None
    shape: Shape = ()
    channels_last: bool = False
    steps: int = 0
    guidance_scale: float = 1.0


@dataclass
class Case:
    """A workload in memory. `module(*inputs.values())` is one forward and returns one tensor."""

    workload: Workload
    module: nn.Module
    inputs: dict[str, Tensor]

    def run(self) -> Tensor:
        """One forward without gradients."""
        with torch.inference_mode():
            return self.module(*self.inputs.values())


def find_workload(name: str) -> Workload:
    """The workload called `name`; RecipeError with the nearest names where there is none."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    near = get_close_matches(name, WORKLOADS, n=3, cutoff=0.5)
    parts = f"PRESET/unet, /vae_decoder, /text_encoder or /pipeline, PRESET of {', '.join(PRESETS)}"
    raise RecipeError(
        f"there is no workload {name!r}",
        fix=f"did you mean {' or '.join(near)}?" if near else f"use {parts}",
    )


def workload_names() -> list[str]:
    """Every name, kernels first, in a fixed order."""
    return list(WORKLOADS)


def build_case(
    workload: Workload,
    *,
    batch: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    seed: int = 0,
) -> Case:
    """Builds a kernel or module workload on `device`; "meta" builds shapes only.

    Weights and inputs are a function of seed and device; another dtype rounds the same numbers.

    Raises:
        RecipeError: a pipeline, a batch below 1, an unknown dtype or device.
        MissingDependency: a GPU that is not here.
        InvalidArtifact: the shipped weights are wanted and not here.
    """
    rows = workload.batch if batch is None else batch
    if rows < 1:
        raise RecipeError(f"batch={rows}", fix="use 1 or more")
    number = _check_target(device, dtype)
    if workload.kind == "pipeline":
        raise RecipeError(
            f"{workload.name} is a pipeline, which is no single module",
            fix=f"name one of its parts, such as {workload.preset}/unet",
        )
    draw = _Draw(device, number, seed)
    if workload.kind == "kernel":
        return _kernel_case(workload, rows, draw)
    part = PRESETS[workload.preset].parts[workload.component]
    network = _network(workload, part, draw)
    if part.kind == "unet":
        return Case(workload, _denoise(network, part), _denoiser_inputs(part, rows, draw))
    if part.kind in ("kl", "vq"):
        channels = part.config["latent_channels"]
        latents = draw.normal(rows, channels, part.grid, part.grid)
        return Case(workload, DecodeForward(network), {"latents": latents})
    return Case(workload, _text_module(network, part), _text_inputs(part, rows, draw))


def build_pipeline(
    workload: Workload, *, device: str = "cpu", dtype: str = "fp32", seed: int = 0
) -> Any:
    """A diffusers pipeline with random weights and an offline tokenizer; "mini" has real weights.

    Raises RecipeError, MissingDependency and InvalidArtifact as `build_case`.
    """
    number = _check_target(device, dtype)
    if workload.kind != "pipeline":
        raise RecipeError(f"{workload.name} is no pipeline", fix="name one that ends in /pipeline")
    preset = PRESETS[workload.preset]
    return build_preset_pipeline(preset, device=device, dtype=number, seed=seed)


class DenoiseForward(nn.Module):
    """A U-Net conditioned on text alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """sample (B, C, H, W), timestep (B,), states (B, S, D) -> (B, C, H, W)"""
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class AddedDenoiseForward(nn.Module):
    """A U-Net that also takes a pooled text vector and sizes, as SDXL's."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """As DenoiseForward, with text_embeds (B, P) and time_ids (B, 6)"""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]


class LabelledDenoiseForward(nn.Module):
    """A U-Net that also takes a noise level per row."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor
    ) -> Tensor:
        """As DenoiseForward, with class_labels (B,)"""
        return self.unet(
            sample, timestep, encoder_hidden_states, class_labels=class_labels, return_dict=False
        )[0]


class DecodeForward(nn.Module):
    """The decoding half of a first stage, which loses its encoder.

    A VQ model decodes its latents as they are: its search for the nearest code has no half
    precision in torch, and the published cost is the decoder's.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None
        self.vae = vae
        self.options = {"force_not_quantize": True} if hasattr(vae, "quantize") else {}

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> image (B, 3, f*H, f*W)"""
        return self.vae.decode(latents, return_dict=False, **self.options)[0]


class TextForward(nn.Module):
    """A transformers text tower; with a projection, its pooled vector is put after the tokens."""

    def __init__(self, encoder: nn.Module, projected: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.projected = projected

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, S) int64 -> states (B, S, D), or (B, S + 1, D) with a projection to D"""
        out = self.encoder(input_ids)
        states: Tensor = out.last_hidden_state
        if not self.projected:
            return states
        return torch.cat([states, out.text_embeds[:, None]], dim=1)


class Geglu(nn.Module):
    """x (B, L, D) -> a * gelu(b), with [a, b] = x W + bias and both (B, L, 4 D)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * gelu(b)


class Attention(nn.Module):
    """q (B, N, L, K), k, v (B, N, S, K) -> softmax(q k^T / sqrt(K)) v"""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


class _Draw:
    """Where a case is built, and its random inputs."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype, self.seed = device, dtype, seed
        # the meta device has no generator
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed + 1)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def constant(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device)

    def network(self, part: Part) -> Any:
        return build_network(part, device=self.device, dtype=self.dtype, seed=self.seed)


def _network(workload: Workload, part: Part, draw: _Draw) -> Any:
    if PRESETS[workload.preset].pipeline == "shipped" and draw.device != "meta":
        pipe = open_shipped(device=draw.device, dtype=draw.dtype)
        return getattr(pipe, workload.component.removesuffix("_decoder"))
    return draw.network(part)


def _denoise(unet: nn.Module, part: Part) -> nn.Module:
    if pooled_width(part.config):
        return AddedDenoiseForward(unet)
    if "class_embed_type" in part.config:
        return LabelledDenoiseForward(unet)
    return DenoiseForward(unet)


def _denoiser_inputs(part: Part, batch: int, draw: _Draw) -> dict[str, Tensor]:
    config = part.config
    size, pooled = config["sample_size"], pooled_width(config)
    inputs = {
        "sample": draw.normal(batch, config["in_channels"], size, size),
        "timestep": draw.constant(TIMESTEP, batch),
        "encoder_hidden_states": draw.normal(batch, part.tokens, context_width(config)),
    }
    if pooled:
        pixels = 8.0 * size  # original size, crop corner, target size
        sizes = torch.tensor([pixels, pixels, 0.0, 0.0, pixels, pixels], device=draw.device)
        inputs["text_embeds"] = draw.normal(batch, pooled)
        inputs["time_ids"] = sizes.to(draw.dtype).repeat(batch, 1)
    if "class_embed_type" in config:
        inputs["class_labels"] = draw.constant(20.0, batch)
    return inputs


def _text_module(encoder: Any, part: Part) -> nn.Module:
    if part.kind == "sandwich":
        return encoder
    tower = encoder.text_model if part.kind == "image_clip" else encoder
    return TextForward(tower, projected=part.kind == "clip_projection")


def _text_inputs(part: Part, batch: int, draw: _Draw) -> dict[str, Tensor]:
    """Texts that fill the tower's length; CLIP's begin and end as its tokenizer's do."""
    clip = part.kind in ("clip", "clip_projection")
    config = part.config.get("text_config", part.config)
    last = config["bos_token_id"] if clip else config["vocab_size"]
    ids = draw.integers(1, last, batch, part.tokens)
    if clip:
        ids[:, 0], ids[:, -1] = config["bos_token_id"], config["eos_token_id"]
    if part.kind != "sandwich":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _kernel_case(workload: Workload, batch: int, draw: _Draw) -> Case:
    op, shape = workload.component, workload.shape
    with torch.device(draw.device):
        module = _kernel_module(op, shape)
    if draw.device != "meta":
        fill_weights(module, device=draw.device, dtype=draw.dtype, seed=draw.seed)
    module = module.to(draw.dtype).eval().requires_grad_(False)
    if op == "attention":
        _, heads, tokens, width, keys = shape
        inputs = {
            "q": draw.normal(batch, heads, tokens, width),
            "k": draw.normal(batch, heads, keys, width),
            "v": draw.normal(batch, heads, keys, width),
        }
    elif op == "gemm":
        inputs = {"x": draw.normal(batch * shape[0], shape[2])}
    else:
        inputs = {"x": draw.normal(batch, *shape[1:])}
    if workload.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    return Case(workload, module, inputs)


def _kernel_module(op: str, shape: Shape) -> nn.Module:
    if op == "group_norm_silu":
        return nn.Sequential(nn.GroupNorm(NORM_GROUPS, shape[1]), nn.SiLU())
    if op == "conv3x3":
        return nn.Conv2d(shape[1], shape[1], 3, padding=1)
    if op == "layer_norm":
        return nn.LayerNorm(shape[-1])
    if op == "geglu":
        return Geglu(shape[-1])
    if op == "gemm":
        return nn.Linear(shape[2], shape[1], bias=False)
    return Attention()


def _check_target(device: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise RecipeError(f"there is no dtype {dtype!r}", fix=f"use {', '.join(DTYPES)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise RecipeError(f"there is no device {device!r}", fix="use cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("torch finds no CUDA device", fix="use --device cpu")
    return DTYPES[dtype]


def _all_workloads() -> dict[str, Workload]:
    made: list[Workload] = []
    for op, shapes in KERNEL_SHAPES.items():
        for shape in shapes:
            # the keys of self-attention need no saying
            said = shape[:4] if op == "attention" else shape
            name = f"kernel/{op}_{'x'.join(map(str, said))}"
            if op == "attention" and shape[2] != shape[4]:
                name += f"_keys{shape[4]}"
            batch = 1 if op == "gemm" else shape[0]
            made.append(Workload(name, "kernel", "kernel", op, batch, shape=shape))
            if op in _BOTH_LAYOUTS:
                made.append(replace(made[-1], name=f"{name}_nhwc", channels_last=True))
    for key, preset in PRESETS.items():
        for component, part in preset.parts.items():
            batch = 2 if part.kind == "unet" else 1
            made.append(
                Workload(
                    f"{key}/{component}", "module", key, component, batch, part.params, part.tflop
                )
            )
        if preset.pipeline:
            made.append(
                Workload(
                    f"{key}/pipeline",
                    "pipeline",
                    key,
                    "pipeline",
                    batch=1,
                    tflop=preset.image_tflop,
                    steps=preset.steps,
                    guidance_scale=preset.guidance_scale,
                )
            )
    return {workload.name: workload for workload in made}


WORKLOADS: Final[dict[str, Workload]] = _all_workloads()
