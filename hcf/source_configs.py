"""What a Stable Diffusion checkpoint in one file is: facts that its tensors do not hold.

A1111 and CompVis keep U-Net, first stage and text encoders in one safetensors file under names of
their own, without configurations. The architecture follows from the width of the text the U-Net
attends to, and what it takes from the channels of its first convolution; the configurations below
are the published ones of each family (SD 1.5, SD 2.1, SDXL 1.0 base and refiner).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hcf.errors import InvalidArtifact
from hcf.weights import TensorEntry

UNET_PREFIX = "model.diffusion_model."
FIRST_CONVOLUTION = UNET_PREFIX + "input_blocks.0.0.weight"
VAE_PREFIX = "first_stage_model."
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = {**BETAS, "num_train_timesteps": 1000, "steps_offset": 1}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# in float16 the decoder of SDXL overflows: `force_upcast` has the pipelines run it in float32
XL_VAE = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "out_channels": 4,
}
XL_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "layers_per_block": 2,
    "out_channels": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "sample_size": 128,
}

# token 2 as the end of text is what was published; transformers then pools at the largest id
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
CLIP_L = {
    **CLIP,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
# the last of 24 layers is not used, and left out
OPEN_CLIP_H = {
    **CLIP,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPEN_CLIP_G = {
    **CLIP,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@dataclass(frozen=True)
class Architecture:
    """A family: configuration of each model, its scheduler, padding token of each tokenizer.

    `prefixes`: what the names in the file begin with, by component.
    """

    name: str
    pipeline: str
    models: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    prefixes: Mapping[str, str]
    flags: Mapping[str, Any] = field(default_factory=dict)


SD15 = Architecture(
    "sd15",
    "StableDiffusionPipeline",
    {
        "unet": {**UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": VAE,
        "text_encoder": CLIP_L,
    },
    {
        "_class_name": "PNDMScheduler",
        **STEPS,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    {"tokenizer": "<|endoftext|>"},
    {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": "cond_stage_model.transformer."},
    {"requires_safety_checker": False},
)
SD21 = Architecture(
    "sd21",
    "StableDiffusionPipeline",
    {
        "unet": {
            **UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": OPEN_CLIP_H,
    },
    {
        "_class_name": "DDIMScheduler",
        **STEPS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "prediction_type": "v_prediction",
    },
    {"tokenizer": "!"},
    {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": "cond_stage_model.model."},
    {"requires_safety_checker": False},
)
SDXL = Architecture(
    "sdxl",
    "StableDiffusionXLPipeline",
    {
        "unet": {
            **XL_UNET,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": XL_VAE,
        "text_encoder": CLIP_L,
        "text_encoder_2": OPEN_CLIP_G,
    },
    {"_class_name": "EulerDiscreteScheduler", **STEPS, "timestep_spacing": "leading"},
    {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    {
        "unet": UNET_PREFIX,
        "vae": VAE_PREFIX,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    {"force_zeros_for_empty_prompt": True},
)
SDXL_REFINER = Architecture(
    "sdxl-refiner",
    "StableDiffusionXLImg2ImgPipeline",
    {
        "unet": {
            **XL_UNET,
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": XL_VAE,
        "text_encoder_2": OPEN_CLIP_G,
    },
    {"_class_name": "EulerDiscreteScheduler", **STEPS, "timestep_spacing": "leading"},
    {"tokenizer_2": "!"},
    {
        "unet": UNET_PREFIX,
        "vae": VAE_PREFIX,
        "text_encoder_2": "conditioner.embedders.0.model.",
    },
    {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
)
BY_TEXT_WIDTH = {768: SD15, 1024: SD21, 2048: SDXL, 1280: SDXL_REFINER}
CONVERT = "convert it with the scripts of diffusers, and give the folder"


def architecture_of(header: Mapping[str, TensorEntry], file: str) -> Architecture:
    """The family of a checkpoint with these tensors, for the channels its U-Net takes.

    Raises InvalidArtifact for files of another kind, and for those that lack a model.
    """
    check_checkpoint(header, file)
    widths = {
        entry.shape[1]
        for name, entry in header.items()
        if name.startswith(UNET_PREFIX) and name.endswith(".attn2.to_k.weight")
    }
    found = BY_TEXT_WIDTH.get(next(iter(widths))) if len(widths) == 1 else None
    if found is None:
        raise InvalidArtifact(
            f"{file}: the U-Net attends to text of width {sorted(widths)}; known are "
            + ", ".join(f"{width} ({a.name})" for width, a in BY_TEXT_WIDTH.items()),
            fix="give config= the folder of the model it was made from (model_index.json)",
        )
    absent = [
        name
        for name, prefix in found.prefixes.items()
        if not any(key.startswith(prefix) for key in header)
    ]
    if absent:
        raise InvalidArtifact(
            f"{file} is a {found.name} checkpoint without {', '.join(absent)}",
            fix="give a checkpoint that holds the whole model",
        )
    return _with_channels(found, header[FIRST_CONVOLUTION].shape[1], file)


def check_checkpoint(header: Mapping[str, TensorEntry], file: str) -> None:
    """Raises InvalidArtifact for a file that is no whole checkpoint of plain numbers."""
    if any(name.startswith(("lora_", "base_model.")) or ".lora_" in name for name in header):
        raise InvalidArtifact(
            f"{file} is a LoRA, not a model",
            fix="open its model, then pipe.load_lora_weights(file)",
        )
    if FIRST_CONVOLUTION not in header:
        names = ", ".join(sorted(header)[:3]) or "nothing"
        raise InvalidArtifact(
            f"{file} has no U-Net under A1111 or CompVis names ({FIRST_CONVOLUTION}); "
            f"it holds {names}, ...",
            fix=CONVERT,
        )
    if "scaled_fp8" in header or any(name.endswith(".scale_weight") for name in header):
        raise InvalidArtifact(
            f"{file} is quantised already: its weights are scaled FP8",
            fix="give the unquantised weights; `hcf quantize` makes the FP8 form",
        )


def scheduler_config(
    architecture: Architecture, header: Mapping[str, TensorEntry], original: Mapping[str, Any]
) -> dict[str, Any]:
    """The scheduler's configuration; `original` is the CompVis YAML of the file, {} without one.

    Checkpoints of v-prediction and of zero terminal SNR name it by an empty tensor.
    """
    config = dict(architecture.scheduler)
    params = (original.get("model") or {}).get("params") or {}
    if params:
        config["prediction_type"] = "v_prediction" if _predicts_v(params) else "epsilon"
    if "v_pred" in header:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in header:
        config["rescale_betas_zero_snr"] = True
        config["timestep_spacing"] = "trailing"
    if config["_class_name"] == "PNDMScheduler" and config.get("rescale_betas_zero_snr"):
        config["_class_name"] = "DDIMScheduler"  # PNDM cannot rescale
        config.pop("skip_prk_steps")
        config["clip_sample"] = False
    return config


def _predicts_v(params: Mapping[str, Any]) -> bool:
    target = ((params.get("denoiser_config") or {}).get("params") or {}).get("scaling_config") or {}
    return params.get("parameterization") == "v" or "VScaling" in str(target.get("target", ""))


def _with_channels(architecture: Architecture, channels: int, file: str) -> Architecture:
    if channels not in (4, 9) or (channels == 9 and architecture is SDXL_REFINER):
        raise InvalidArtifact(
            f"{file}: the U-Net takes {channels} channels; 4 (text and image to image) or 9 "
            "(inpainting) are known",
            fix=CONVERT,
        )
    unet = {**architecture.models["unet"], "in_channels": channels}
    pipeline = architecture.pipeline
    if channels == 9:
        pipeline = pipeline.replace("Pipeline", "InpaintPipeline")
    return replace(architecture, pipeline=pipeline, models={**architecture.models, "unet": unet})
