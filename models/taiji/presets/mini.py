"""The shipped demonstrator Taiji-SD-mini: SD-A at 64x64 pixels, trained on a CPU."""

from typing import Any

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
