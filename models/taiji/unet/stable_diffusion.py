"""From Stable Diffusion's U-Net to Taiji-SD's: its weights, and a new way in for pooled text.

The embedding of pooled text and image size that SD-C adds to SD 1.x ends in a layer of zeros, so
that before training the U-Net computes what the checkpoint computes, to the bit.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

POOLED_WIDTH = 2048  # ImageCLIP's projected CLS 1024, attention-pooled Sandwich 1024
SIZE_WIDTH = 256  # of each of the six numbers of the size condition


def load_sd1_unet(
    source: str | Path | UNet2DConditionModel,
    *,
    pooled_width: int = POOLED_WIDTH,
    addition_time_embed_dim: int = SIZE_WIDTH,
    torch_dtype: torch.dtype | None = None,
) -> UNet2DConditionModel:
    """SD-C from an SD 1.x U-Net in memory, or from the `unet` folder of a diffusers checkpoint.

    Any text-conditioned U-Net without a pooled condition will do: that of SD 2.x becomes SD-A.
    Reads safetensors only. Raises ValueError for a U-Net that has such a condition already.
    """
    if not isinstance(source, UNet2DConditionModel):
        source = UNet2DConditionModel.from_pretrained(
            source, use_safetensors=True, torch_dtype=torch_dtype or torch.float32
        )
    taken = [key for key in ("addition_embed_type", "class_embed_type") if source.config[key]]
    if taken or source.config["num_class_embeds"]:
        raise ValueError(
            f"the U-Net has {taken or ['num_class_embeds']} already: pass one of Stable Diffusion "
            "1.x or 2.x base, which is conditioned by its context alone"
        )
    config: dict[str, Any] = {k: v for k, v in source.config.items() if not k.startswith("_")}
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": addition_time_embed_dim,
        "projection_class_embeddings_input_dim": pooled_width + 6 * addition_time_embed_dim,
    }
    unet = UNet2DConditionModel(**config)
    dtype = torch_dtype or source.dtype
    if unet.dtype != dtype:  # diffusers warns of every cast
        unet.to(dtype)
    missing, unexpected = unet.load_state_dict(source.state_dict(), strict=False)
    strange = [name for name in missing if not name.startswith("add_embedding.")] + unexpected
    if strange:
        raise ValueError(f"the U-Net's weights do not fit its configuration: {strange[:3]}")
    zero_pooled_text(unet)
    return unet.to(source.device)


def zero_pooled_text(unet: UNet2DConditionModel) -> None:
    """Sets the last layer of the pooled text's embedding to zero: the U-Net ignores it at step 0.

    It is `add_embedding` in SD-A, B and C, `class_embedding` in SD-A3. Raises ValueError for a
    U-Net with neither.
    """
    embedding = getattr(unet, "add_embedding", None) or unet.class_embedding
    last = getattr(embedding, "linear_2", None)
    if not isinstance(last, nn.Linear):
        raise ValueError(
            "the U-Net has no embedding of pooled text: build it with "
            "addition_embed_type='text_time' or class_embed_type='projection'"
        )
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
