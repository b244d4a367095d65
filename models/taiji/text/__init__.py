"""Text side of Taiji: character tokenizer, Sandwich encoder, ImageCLIP and their fusion."""

from taiji.text.fusion import TextFusion
from taiji.text.sandwich import SandwichTextEncoder

__all__ = ["SandwichTextEncoder", "TextFusion"]
