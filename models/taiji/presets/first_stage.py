"""First stages: `VQ_*` for diffusers' `VQModel`, `KL_*` for its `AutoencoderKL`.

f4 and f8 are those of CompVis/latent-diffusion (models/first_stage_models/*/config.yaml), f16 of
CompVis/taming-transformers. A VQ's `scaling_factor` is diffusers' default and has to be measured
from the first latents (1 / standard deviation), never inherited.
"""

from typing import Any


def _stage(widths: tuple[int, ...], channels: int, attention_at_the_end: bool) -> dict[str, Any]:
    """Encoder and decoder mirrored; `attention_at_the_end` at the smallest resolution's blocks."""
    last_down = "AttnDownEncoderBlock2D" if attention_at_the_end else "DownEncoderBlock2D"
    first_up = "AttnUpDecoderBlock2D" if attention_at_the_end else "UpDecoderBlock2D"
    return {
        "sample_size": 256,
        "latent_channels": channels,
        "block_out_channels": widths,
        "down_block_types": (*("DownEncoderBlock2D",) * (len(widths) - 1), last_down),
        "up_block_types": (first_up, *("UpDecoderBlock2D",) * (len(widths) - 1)),
        "layers_per_block": 2,
    }


# 55,322,782 parameters. Its one mid-block self-attention is half the work of a 1024x1024 decode;
# `VQ_F4_PLAIN` is without it, 53,219,486 parameters.
VQ_F4: dict[str, Any] = {
    **_stage((128, 256, 512), 3, attention_at_the_end=False),
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
}
VQ_F4_PLAIN: dict[str, Any] = {**VQ_F4, "mid_block_add_attention": False}
VQ_F8: dict[str, Any] = {
    **_stage((128, 256, 256, 512), 4, attention_at_the_end=True),
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
}
VQ_F16: dict[str, Any] = {
    **_stage((128, 128, 256, 256, 512), 256, attention_at_the_end=True),
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 256,
}
VQ_F16_1024: dict[str, Any] = {**VQ_F16, "num_vq_embeddings": 1024}

# Stable Diffusion's, 83,653,863 parameters
KL_F8: dict[str, Any] = {
    **_stage((128, 256, 512, 512), 4, attention_at_the_end=False),
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
KL_F4: dict[str, Any] = _stage((128, 256, 512), 3, attention_at_the_end=False)

_TINY_STAGE: dict[str, Any] = {
    **_stage((16, 32, 32), 3, attention_at_the_end=False),
    "sample_size": 64,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
TINY_VQ_F4: dict[str, Any] = {**_TINY_STAGE, "num_vq_embeddings": 64, "vq_embed_dim": 3}
TINY_KL_F4: dict[str, Any] = {**_TINY_STAGE, "latent_channels": 4}
