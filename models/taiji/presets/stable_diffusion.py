"""Taiji-SD: the latent U-Net in every design of the fusion of two text encoders.

All are diffusers' `UNet2DConditionModel`; `attention_head_dim` is there the number of heads. The
`FUSION_*` are for `taiji.text.TextFusion`. Sizes are of a 64x64 latent, 512x512 pixels.

    design   context                                       pooled text enters by
    SD-A     tokens of both encoders at width 1024         text_time, with the image's size
    SD-A3    the same                                      class_labels
    SD-A4    the same                                      the U-Net pools the context itself
    SD-B     both along channels, width 2048               text_time
    SD-C     tokens at width 768: Stable Diffusion 1's     text_time, added to its weights

A `TINY_*` has 64x64 pixels and the widths of `TINY_FUSION`.
"""

from typing import Any

_SD_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
}
_POOLED = 2048  # ImageCLIP's projected CLS 1024, attention-pooled Sandwich 1024
_TEXT_TIME: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": _POOLED + 6 * 256,
}

# Stable Diffusion 1.x, the anchor: 859.5M parameters
SD1_UNET: dict[str, Any] = {
    **_SD_UNET,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD_A: dict[str, Any] = {
    **_SD_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
# 872,139,204 parameters
SD_A_UNET: dict[str, Any] = {**_SD_A, **_TEXT_TIME}
# 870,173,124 parameters: no size conditions
SD_A3_UNET: dict[str, Any] = {
    **_SD_A,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": _POOLED,
}
# 871,426,756 parameters; `encoder_hid_dim` brings a projection of the context, a million of them
SD_A4_UNET: dict[str, Any] = {
    **_SD_A,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 16,
    "encoder_hid_dim": 1024,
}
# 897,698,244 parameters
SD_B_UNET: dict[str, Any] = {**SD_A_UNET, "cross_attention_dim": 2048}
# 865,749,444 parameters, 859.5M of them Stable Diffusion 1's (`taiji.unet.load_sd1_unet`)
SD_C_UNET: dict[str, Any] = {**SD1_UNET, **_TEXT_TIME}

FUSION_SD_A: dict[str, Any] = {
    "clip_width": 1024,
    "clip_projection": 1024,
    "clip_tokens": 52,
    "sandwich_width": 1024,
    "sandwich_tokens": 128,
    "context_width": 1024,
}
FUSION_SD_A3: dict[str, Any] = FUSION_SD_A
FUSION_SD_A4: dict[str, Any] = {**FUSION_SD_A, "use_pooled": False}
# Channels of one position belong together, so both encoders read the same 128 tokens.
FUSION_SD_B: dict[str, Any] = {**FUSION_SD_A, "form": "channels", "clip_tokens": 128}
FUSION_SD_C: dict[str, Any] = {**FUSION_SD_A, "context_width": 768}

_TINY_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
_TINY_POOLED = 32 + 32
_TINY_TEXT_TIME: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": _TINY_POOLED + 6 * 8,
}
TINY_SD_A_UNET: dict[str, Any] = {**_TINY_UNET, **_TINY_TEXT_TIME}
TINY_SD_A3_UNET: dict[str, Any] = {
    **_TINY_UNET,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": _TINY_POOLED,
}
TINY_SD_A4_UNET: dict[str, Any] = {
    **_TINY_UNET,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "encoder_hid_dim": 32,
}
TINY_SD_B_UNET: dict[str, Any] = {**TINY_SD_A_UNET, "cross_attention_dim": 64}
TINY_SD1_UNET: dict[str, Any] = {
    **_TINY_UNET,
    "use_linear_projection": False,
    "attention_head_dim": 4,
}
TINY_SD_C_UNET: dict[str, Any] = {**TINY_SD1_UNET, **_TINY_TEXT_TIME}
TINY_FUSION: dict[str, Any] = {
    "clip_width": 32,
    "clip_projection": 32,
    "clip_tokens": 16,
    "sandwich_width": 32,
    "sandwich_tokens": 24,
    "context_width": 32,
}
