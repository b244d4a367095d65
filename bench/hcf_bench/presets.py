"""True architectures as data: what is built with random weights, and what is published of it.

A preset is a set of parts (U-Net, first stage, text encoders), each the configuration its own class
takes, with the published parameter count and the TFLOP of one forward at batch 1 (2 per
multiply-accumulate, attention matmuls included). Tests count both on the meta device. Counts of the
public models are those of their diffusers configurations; the family's come from `taiji.presets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from taiji import presets as taiji

PartKind = Literal["unet", "kl", "vq", "clip", "clip_projection", "image_clip", "sandwich"]
Shape = tuple[int, ...]
PipelineKind = Literal["", "sd", "sdxl", "kolors", "taiji", "shipped"]


@dataclass(frozen=True)
class Part:
    """One network.

    `kind` says which class takes `config`. `params` and `tflop` are as published: an exact integer,
    or one rounded as in its source (859_500_000 is "859.5M"). `tokens` is the length of the text it
    reads (U-Net: of its context), `grid` the latent it decodes (first stage only).
    """

    kind: PartKind
    config: Mapping[str, Any]
    params: int | None = None
    tflop: float | None = None
    tokens: int = 0
    grid: int = 0


@dataclass(frozen=True)
class Preset:
    """A model: its parts by component name, and how its pipeline samples; `size` in pixels.

    `image_tflop` is the published work of one guided image: all U-Net steps and one decode.
    """

    title: str
    size: int
    parts: Mapping[str, Part]
    pipeline: PipelineKind = ""
    steps: int = 0
    guidance_scale: float = 1.0
    image_tflop: float | None = None
    note: str = ""


_SD_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
}
SD15_UNET: Final = {
    **_SD_UNET,
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21_UNET: Final = {
    **_SD_UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL_UNET: Final[dict[str, Any]] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
# SDXL's U-Net behind a projection of ChatGLM3's 4096-wide states, with their wider pooled vector.
KOLORS_UNET: Final = {
    **SDXL_UNET,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 4096 + 6 * 256,
}

# force_upcast is for trained weights, which overflow in fp16: random ones do not, and published
# decode times are of fp16 decoders.
KL_F8: Final[dict[str, Any]] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "force_upcast": False,
}
SDXL_KL_F8: Final = {**KL_F8, "sample_size": 1024, "scaling_factor": 0.13025}
KL_F8_PARAMS: Final = 83_653_863

# bos, eos and padding of the offline tokenizer (`pipelines.byte_tokenizer`), whose 514 entries are
# the first rows of a full vocabulary.
TOKENIZER_IDS: Final = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
CLIP_L: Final[dict[str, Any]] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    **TOKENIZER_IDS,
}
# SD 2 drops the last of OpenCLIP-H's 24 layers.
OPENCLIP_H: Final = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
OPENCLIP_BIGG: Final = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# Chinese-CLIP's text tower (RoBERTa-wwm-large); its published 325.5M count BERT's pooler, which is
# not part of it. A pipeline never runs the vision tower: it is cut to one narrow layer.
IMAGE_CLIP: Final[dict[str, Any]] = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 21128,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
    },
}
SANDWICH: Final[dict[str, Any]] = {
    "vocab_size": 21128,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "ffn_width": 4096,
    "max_length": 512,
}
# The published 325.5M is BERT-large with its pooler; this has none, and 100,352 more in the norms
# of `sandwich_norm`.
SANDWICH_PART: Final = Part("sandwich", SANDWICH, 324_573_184, 0.0790, tokens=128)

TINY_UNET: Final[dict[str, Any]] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
TINY_XL_UNET: Final = {
    **TINY_UNET,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TINY_KL: Final[dict[str, Any]] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "force_upcast": False,
}
TINY_CLIP: Final = {
    **CLIP_L,
    "vocab_size": 514,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 32,
}

_MINI_TOKENS = taiji.MINI_CLIP_TOKENS + taiji.MINI_SANDWICH_TOKENS
_MINI_VOCABULARY = 679

PRESETS: Final[dict[str, Preset]] = {
    "sd15": Preset(
        "Stable Diffusion 1.5 at 512 (also Taiyi-SD)",
        512,
        {
            "unet": Part("unet", SD15_UNET, 859_500_000, 0.803, tokens=77),
            "vae_decoder": Part("kl", KL_F8, KL_F8_PARAMS, 2.515, grid=64),
            "text_encoder": Part("clip", CLIP_L, 123_060_480, tokens=77),
        },
        "sd", 50, 7.5, 82.8,
    ),
    "sd21": Preset(
        "Stable Diffusion 2.1 at 768",
        768,
        {
            "unet": Part("unet", SD21_UNET, 865_900_000, 2.149, tokens=77),
            "vae_decoder": Part("kl", {**KL_F8, "sample_size": 768}, KL_F8_PARAMS, 5.754, grid=96),
            "text_encoder": Part("clip", OPENCLIP_H, 340_387_840, tokens=77),
        },
        "sd", 50, 7.5,
    ),
    "sdxl": Preset(
        "Stable Diffusion XL at 1024",
        1024,
        {
            "unet": Part("unet", SDXL_UNET, 2_567_500_000, 6.761, tokens=77),
            "vae_decoder": Part("kl", SDXL_KL_F8, KL_F8_PARAMS, 10.470, grid=128),
            "text_encoder": Part("clip", CLIP_L, 123_060_480, tokens=77),
            "text_encoder_2": Part("clip_projection", OPENCLIP_BIGG, 694_659_840, tokens=77),
        },
        "sdxl", 30, 5.0, 416.1,
    ),
    "kolors": Preset(
        "Kolors at 1024",
        1024,
        {
            "unet": Part("unet", KOLORS_UNET, 2_579_458_820, 6.958, tokens=256),
            "vae_decoder": Part("kl", SDXL_KL_F8, KL_F8_PARAMS, 10.470, grid=128),
        },
        "kolors", 50, 5.0,
        note="ChatGLM3 (6B) is left out: prompt embeddings are random. The count of 2567.5M one "
        "finds is SDXL's; Kolors has 8,390,656 more in encoder_hid_proj and 3,604,480 more in "
        "add_embedding. The TFLOP of 6.958 lack the projection (0.004).",
    ),
    "taiji-sd-a": Preset(
        "Taiji-SD-A at 512",
        512,
        {
            "unet": Part("unet", taiji.SD_A_UNET, 872_139_204, 2 * 0.4071, tokens=180),
            "vae_decoder": Part("kl", KL_F8, KL_F8_PARAMS, 2.515, grid=64),
            "text_encoder": SANDWICH_PART,
            "image_clip": Part("image_clip", IMAGE_CLIP, 324_472_832, tokens=52),
        },
        "taiji", 50, 3.0,
    ),
    "taiji-imagen-300m": Preset(
        "Taiji-Imagen base, 0.3B, 64 pixels",
        64,
        {
            "unet": Part("unet", taiji.A_300M_UNET, 312_817_667, 2 * 0.1128, tokens=128),
            "text_encoder": SANDWICH_PART,
        },
    ),
    "taiji-imagen-1.3b": Preset(
        "Taiji-Imagen base, 1.3B, 64 pixels",
        64,
        {
            "unet": Part("unet", taiji.A_1_3B_UNET, 1_292_364_803, 2 * 0.4423, tokens=128),
            "text_encoder": SANDWICH_PART,
        },
    ),
    "sr-s": Preset(
        "Taiji SR-S, x4 to 1024",
        1024,
        {
            "unet": Part("unet", taiji.SR_S_UNET, 192_985_763, 2 * 0.9006, tokens=128),
            "vae_decoder": Part("vq", taiji.VQ_F4_PLAIN, 53_219_486, 2 * 5.021, grid=256),
            "vae_decoder_attention": Part("vq", taiji.VQ_F4, 55_322_782, 2 * 9.488, grid=256),
        },
    ),
    "mini": Preset(
        "Taiji-SD-mini at 64, the shipped weights",
        taiji.MINI_IMAGE_SIZE,
        {
            "unet": Part("unet", taiji.MINI_UNET, tokens=_MINI_TOKENS),
            "vae_decoder": Part("kl", taiji.MINI_VAE, grid=16),
            "text_encoder": Part(
                "sandwich",
                {**taiji.MINI_SANDWICH, "vocab_size": _MINI_VOCABULARY},
                tokens=taiji.MINI_SANDWICH_TOKENS,
            ),
            "image_clip": Part(
                "image_clip",
                {
                    "projection_dim": taiji.MINI_CLIP_PROJECTION,
                    "text_config": {**taiji.MINI_CLIP_TEXT, "vocab_size": _MINI_VOCABULARY},
                    "vision_config": taiji.MINI_CLIP_VISION,
                },
                tokens=taiji.MINI_CLIP_TOKENS,
            ),
        },
        "shipped", 50, taiji.MINI_GUIDANCE,
    ),
    "tiny": Preset(
        "A Stable Diffusion of 1M parameters, for rehearsals",
        64,
        {
            "unet": Part("unet", TINY_UNET, tokens=16),
            "vae_decoder": Part("kl", TINY_KL, grid=16),
            "text_encoder": Part("clip", TINY_CLIP, tokens=16),
        },
        "sd", 4, 7.5,
    ),
    "tiny-xl": Preset(
        "An SDXL of 1M parameters, for rehearsals",
        64,
        {
            "unet": Part("unet", TINY_XL_UNET, tokens=16),
            "vae_decoder": Part("kl", TINY_KL, grid=16),
            "text_encoder": Part("clip", TINY_CLIP, tokens=16),
            "text_encoder_2": Part("clip_projection", TINY_CLIP, tokens=16),
        },
        "sdxl", 4, 5.0,
    ),
}  # fmt: skip

# Of SD1.5 at 512, SDXL at 1024 and the KL-f8 decoder. B batch, C channels, L tokens, D width, N
# heads, K head dim. The smallest group norm is for rehearsals.
KERNEL_SHAPES: Final[dict[str, tuple[Shape, ...]]] = {
    # (B, C, H, W)
    "group_norm_silu": (
        (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 320, 128, 128),
        (1, 512, 128, 128), (1, 256, 512, 512), (1, 128, 1024, 1024), (1, 32, 16, 16),
    ),
    # (B, C, H, W), C to C
    "conv3x3": (
        (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16),
        (2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32),
    ),
    # (B, L, D)
    "layer_norm": ((2, 4096, 320), (2, 4096, 640), (2, 1024, 1280)),
    # (B, L, D) to (B, L, 4 D)
    "geglu": (
        (2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 4096, 640), (2, 1024, 1280),
    ),
    # (M, N, K): SDXL's feed-forwards, in and out, then squares
    "gemm": (
        (8192, 5120, 640), (8192, 640, 2560), (2048, 10240, 1280), (2048, 1280, 5120),
        (4096, 4096, 4096), (8192, 8192, 8192),
    ),
    # (B, N, L, K, keys)
    "attention": (
        (2, 8, 4096, 40, 4096), (2, 10, 4096, 64, 4096), (2, 20, 1024, 64, 1024),
        (2, 10, 4096, 64, 77), (2, 20, 1024, 64, 77),
    ),
}  # fmt: skip


def pooled_width(unet: Mapping[str, Any]) -> int:
    """Width of `text_embeds` that a text_time U-Net takes; 0 where it takes none."""
    if unet.get("addition_embed_type") != "text_time":
        return 0
    total: int = unet["projection_class_embeddings_input_dim"]
    return total - 6 * int(unet["addition_time_embed_dim"])


def context_width(unet: Mapping[str, Any]) -> int:
    """Width of the `encoder_hidden_states` a U-Net takes, before any projection of its own."""
    return int(unet.get("encoder_hid_dim") or unet["cross_attention_dim"])
