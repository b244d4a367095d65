"""Text encoders: the Sandwich encoder and the two sizes of ImageCLIP.

`SANDWICH_*` are for `taiji.text.SandwichTextEncoder` (its `vocab_size` is the tokenizer's);
`IMAGE_CLIP_*` for transformers' `ChineseCLIPConfig`, the towers of Chinese-CLIP (OFA-Sys,
arXiv 2211.01335): ViT-L/14 with RoBERTa-wwm-base, ViT-H/14 with RoBERTa-wwm-large.
"""

from typing import Any

# The size of BERT-large (hfl/chinese-roberta-wwm-ext-large), whose weights fit the one below:
# `taiji.text.sandwich.bert_to_sandwich`.
SANDWICH_LARGE: dict[str, Any] = {
    "vocab_size": 21128,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "ffn_width": 4096,
    "max_length": 512,
    "sandwich_k": 6,
    "sandwich_norm": True,
}
SANDWICH_LARGE_BERT: dict[str, Any] = {**SANDWICH_LARGE, "sandwich_k": 0, "sandwich_norm": False}

IMAGE_CLIP_TOKENS = 52
_TEXT_BASE: dict[str, Any] = {
    "vocab_size": 21128,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
_TEXT_LARGE: dict[str, Any] = {
    **_TEXT_BASE,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_VISION: dict[str, Any] = {"image_size": 224, "patch_size": 14}
IMAGE_CLIP_L14: dict[str, Any] = {
    "text_config": _TEXT_BASE,
    "vision_config": {
        **_VISION,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "projection_dim": 768,
    },
    "projection_dim": 768,
}
IMAGE_CLIP_H14: dict[str, Any] = {
    "text_config": _TEXT_LARGE,
    "vision_config": {
        **_VISION,
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "projection_dim": 1024,
    },
    "projection_dim": 1024,
}

TINY_SANDWICH: dict[str, Any] = {
    "width": 32,
    "layers": 2,
    "heads": 4,
    "ffn_width": 64,
    "max_length": 24,
    "sandwich_k": 1,
    "sandwich_norm": True,
}
_TINY_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TINY_IMAGE_CLIP: dict[str, Any] = {
    "text_config": {
        **_TINY_TOWER,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "vision_config": {**_TINY_TOWER, "image_size": 64, "patch_size": 16, "projection_dim": 32},
    "projection_dim": 32,
}
