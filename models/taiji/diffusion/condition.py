"""Text as the denoisers take it: hidden states of one encoder and their mask.

B texts, S tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from taiji.text.tokenizer import tokens


@dataclass(frozen=True)
class Text:
    """hidden (B, S, D), zero where masked; mask (B, S), 1 = attend, or None for all."""

    hidden: Tensor
    mask: Tensor | None = None

    def repeat(self, times: int) -> "Text":
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return Text(self.hidden.repeat_interleave(times, 0), mask)


def encode(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Text:
    """ids, mask (B, S) -> Text. The null condition of guidance is the empty text."""
    hidden = encoder(ids, mask)
    # diffusers pools the text (addition_embed_type="text") and normalises it over its tokens
    # (cross_attention_norm="group_norm") without the mask
    return Text(hidden * mask[..., None].to(hidden.dtype), mask)


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    encoder: nn.Module,
    prompts: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> Text:
    """Texts cut and padded to the tokenizer's `model_max_length`"""
    ids, mask = tokens(tokenizer, prompts, tokenizer.model_max_length)
    text = encode(encoder, ids.to(device), mask.to(device))
    return Text(text.hidden.to(dtype), text.mask)


def uses_text(unet: Any) -> bool:
    """Whether a U-Net attends to a text; those of `taiji.unet` always do."""
    config = unet.config
    if "down_block_types" not in config:
        return True
    names = (*config.down_block_types, config.mid_block_type or "", *config.up_block_types)
    return any("CrossAttn" in name for name in names)


def text_arguments(unet: Any, texts: list[Text]) -> dict[str, Any]:
    """Keyword arguments of a U-Net's call for the texts' rows, one after the other."""
    if not uses_text(unet):
        return {"encoder_hidden_states": None}
    hidden = torch.cat([text.hidden for text in texts])
    masks = [text.mask for text in texts if text.mask is not None]
    if masks and len(masks) != len(texts):
        raise ValueError("either all texts of a call have a mask or none has")
    arguments: dict[str, Any] = {"encoder_hidden_states": hidden}
    if masks:
        arguments["encoder_attention_mask"] = torch.cat(masks)
    if unet.config.get("addition_embed_type") == "text":
        arguments["added_cond_kwargs"] = {"text_embeds": hidden}
    return arguments


def check_text_length(unet: Any, tokens: int, height: int, width: int) -> None:
    """Raises ValueError where diffusers would take the text's mask for one of text and pixels.

    Blocks that attend to both at once lengthen the mask by the pixels, unless the text has exactly
    as many tokens as there are pixels (`Attention.prepare_attention_mask`).
    """
    blocks = unet.config.get("down_block_types", ())
    if not any(name.startswith("SimpleCrossAttn") for name in blocks):
        return
    for level in range(len(unet.config.block_out_channels)):
        if tokens == (height >> level) * (width >> level):
            raise ValueError(
                f"{tokens} text tokens are as many as the {height >> level}x{width >> level} "
                "positions of an attention block, which diffusers cannot mask; set the "
                "tokenizer's model_max_length to another length"
            )
