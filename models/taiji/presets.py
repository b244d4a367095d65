"""Exact configurations of the family, as plain dicts that the classes take.

`SD_A` is the U-Net of Taiji-SD at full size (872,139,204 parameters); `SD_MINI` is the shipped
demonstrator: the same design at 64x64 pixels. `A_*` are the 64x64 base U-Nets of Taiji-Imagen in
pixel space, `SR_S` the latent super-resolution U-Net and `VQ_F4` its first stage. Keys are
diffusers' own.
"""

from typing import Any

SD_A_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2048 + 6 * 256,
}

# Every width must divide by 32 (group norm) and every attended width by 64 (head).
_FAMILY_A: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "attention_head_dim": 64,
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.414,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 16,
}
# 312,817,667 parameters
A_300M_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "block_out_channels": (192, 384, 576, 768),
    "cross_attention_dim": 512,
}
# 1,292,364,803 parameters
A_1_3B_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 2048,
}
# 853,443 parameters: tests on a CPU
A_TINY_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
}

# x4 latent super-resolution, 192,985,763 parameters: the low-resolution image is concatenated to
# the noisy latent, whose grid it shares; `class_labels` is the noise level. Self-attention only at
# the deepest level. Any size works; 256 is the latent of a 1024x1024 output.
SR_S_UNET: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (160, 320, 320, 640),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "class_embed_type": "timestep",
}

# VQ-f4 as published, 55,322,782 parameters. Its one mid-block self-attention is half the work of a
# 1024x1024 decode; `VQ_F4_PLAIN` is without it, 53,219,486 parameters.
VQ_F4: dict[str, Any] = {
    "sample_size": 256,
    "latent_channels": 3,
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
}
VQ_F4_PLAIN: dict[str, Any] = {**VQ_F4, "mid_block_add_attention": False}

MINI_IMAGE_SIZE = 64
MINI_CLIP_TOKENS = 24
MINI_SANDWICH_TOKENS = 32

MINI_VAE: dict[str, Any] = {
    "sample_size": MINI_IMAGE_SIZE,
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

MINI_SANDWICH: dict[str, Any] = {
    "width": 192,
    "layers": 4,
    "heads": 4,
    "ffn_width": 512,
    "max_length": MINI_SANDWICH_TOKENS,
    "sandwich_k": 1,
    "sandwich_norm": True,
}

MINI_CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": MINI_CLIP_TOKENS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MINI_CLIP_VISION: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": MINI_IMAGE_SIZE,
    "patch_size": 8,
    "projection_dim": 128,
}
MINI_CLIP_PROJECTION = 128

MINI_FUSION: dict[str, Any] = {
    "clip_width": 128,
    "clip_projection": MINI_CLIP_PROJECTION,
    "clip_tokens": MINI_CLIP_TOKENS,
    "sandwich_width": 192,
    "sandwich_tokens": MINI_SANDWICH_TOKENS,
    "context_width": 192,
}

MINI_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 128, 160),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 192,
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": MINI_CLIP_PROJECTION + 192 + 6 * 32,
}

MINI_GUIDANCE = 2.0

# v-prediction with zero terminal SNR (Lin et al., arXiv 2305.08891): emoji stand on white, and a
# schedule that leaks the mean brightness at t = T cannot start from pure noise.
MINI_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
