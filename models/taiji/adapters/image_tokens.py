"""Image tokens appended to the text context: the method of the stickers.

An image becomes a few tokens as wide as the text's, which the denoiser attends to like words; it
gets no new weights. The tokens come from all hidden states of ImageCLIP's image tower through a
perceiver resampler (Flamingo: Alayrac et al., arXiv 2204.14198, section 3.1; for images as prompts
IP-Adapter Plus: Ye et al., arXiv 2308.06721), or from its pooled vector through one projection.

B images or rows, H W pixels, L tokens of the image tower, Df its width, T image tokens, S text
tokens, D context width, Dr resampler width, N heads.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import ImageProjection
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import ChineseCLIPModel

from taiji.diffusion.condition import check_text_length

Features = Literal["patches", "pooled"]


class ResamplerLayer(nn.Module):
    """Queries look at the image and at themselves, then pass an MLP; both are residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_image, self.norm_queries = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """queries (B, T, Dr), image (B, L, Dr) -> (B, T, Dr)"""
        x = self.norm_queries(queries)
        key, value = self.to_kv(torch.cat([self.norm_image(image), x], dim=1)).chunk(2, dim=-1)
        heads = [
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), key, value)
        ]
        attended = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        return queries + self.mlp(queries)


class Resampler(nn.Module):
    """features (B, L, Df) -> (B, T, D): T learned queries, however many tokens the image has"""

    def __init__(
        self,
        feature_width: int,
        context_width: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(feature_width, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, context_width)
        self.norm_out = nn.LayerNorm(context_width)

    def forward(self, features: Tensor) -> Tensor:
        image = self.proj_in(features)
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, image)
        return self.norm_out(self.proj_out(queries))


class ImageTokens(ModelMixin, ConfigMixin):
    """Features of ImageCLIP -> tokens of the context's width.

    "patches": (B, L, Df) through a resampler of `width`, `depth` and `heads`. "pooled": (B, Df)
    through one projection. Raises ValueError for sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        feature_width: int = 1280,
        context_width: int = 1024,
        tokens: int = 16,
        features: Features = "patches",
        width: int = 1024,
        depth: int = 4,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if features not in get_args(Features):
            raise ValueError(f"features={features!r} is not one of {get_args(Features)}")
        if width % heads:
            raise ValueError(f"width={width} must be divisible by heads={heads}")
        self.project: nn.Module
        if features == "pooled":
            self.project = ImageProjection(feature_width, context_width, tokens)
        else:
            self.project = Resampler(feature_width, context_width, tokens, width, depth, heads)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, L, Df) or (B, Df) -> (B, T, D)"""
        expected = 3 if self.config["features"] == "patches" else 2
        if features.ndim != expected or features.shape[-1] != self.config["feature_width"]:
            raise ValueError(
                f"features {tuple(features.shape)} are not the {self.config['features']} of width "
                f"{self.config['feature_width']}: take them from image_features(..., "
                f"{self.config['features']!r}) of the ImageCLIP this was trained with"
            )
        tokens: Tensor = self.project(features)
        return tokens


class Drops(BaseModel):
    """Shares of the rows of training that lose the image, the text or both: IP-Adapter's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: float = Field(0.05, ge=0, le=1)
    text: float = Field(0.05, ge=0, le=1)
    both: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "Drops":
        if self.image + self.text + self.both > 1:
            raise ValueError(f"image, text and both of {self} exceed all rows")
        return self

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """keep_image, keep_text (count,) bool"""
        u = torch.rand(count, generator=generator)
        keep_image = u >= self.image + self.both
        return keep_image, (u < self.image) | (u >= self.image + self.both + self.text)


@torch.no_grad()
def image_features(image_clip: ChineseCLIPModel, images: Tensor, features: Features) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> last hidden states but one (B, L, Df), or the projected
    class token (B, Df) of length 1

    The size must be the tower's.
    """
    size = image_clip.config.vision_config.image_size
    if tuple(images.shape[-2:]) != (size, size):
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels; resize them to {size}")
    vision = image_clip.vision_model(pixel_values=images, output_hidden_states=True)
    if features == "patches":
        hidden: Tensor = vision.hidden_states[-2]
        return hidden
    pooled: Tensor = image_clip.visual_projection(vision.pooler_output)
    return pooled / pooled.norm(dim=-1, keepdim=True)


@contextmanager
def image_prompt(
    unet: Any, tokens: Tensor, scale: float = 1.0, keep: Tensor | None = None
) -> Iterator[None]:
    """Every call of the U-Net inside sees `tokens` (B, T, D) behind its text.

    `scale` multiplies the weight of each image token before attention is normalised: log(scale) is
    added to its logit, to 0.0006, by a mask near 1. At 0 nothing is appended and the model is the
    one it was, bit for bit. A call of 2B rows is a guided one: the first half, the null condition,
    does not see the tokens. A row whose `keep` (B,) is 0 does not either.

    Family A pools its text into the time embedding: that stays text alone. (Family B pools its
    context, tokens included.) Raises ValueError for a scale that the U-Net cannot give.
    """
    _check_scale(unet, scale)
    keep = torch.ones(len(tokens), device=tokens.device) if keep is None else keep
    handles = []

    def text_alone(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, : -tokens.shape[1]],)

    def append(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = args[:2], {**dict(zip(_POSITIONAL, args[2:], strict=False)), **kwargs}
        context, mask = _with_tokens(
            kwargs["encoder_hidden_states"],
            kwargs.get("encoder_attention_mask"),
            tokens,
            keep,
            scale,
        )
        check_text_length(unet, context.shape[1], *_size(args, kwargs))
        return args, {**kwargs, "encoder_hidden_states": context, "encoder_attention_mask": mask}

    if scale:
        handles.append(unet.register_forward_pre_hook(append, with_kwargs=True))
        if unet.config.get("addition_embed_type") == "text":
            handles.append(unet.add_embedding.register_forward_pre_hook(text_alone))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_POSITIONAL = ("encoder_hidden_states",)  # of a U-Net's call, behind sample and timestep


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the sample of a U-Net's call."""
    sample: Tensor = args[0] if args else kwargs["sample"]
    return sample.shape[-2], sample.shape[-1]


def _check_scale(unet: Any, scale: float) -> None:
    if scale < 0:
        raise ValueError(f"scale={scale} must not be negative; 0 leaves the image out")
    weighted = "down_block_types" in unet.config and unet.dtype == torch.float32
    if scale not in (0, 1) and not weighted:
        raise ValueError(
            f"scale={scale} needs a diffusers U-Net in float32 (torch.autocast may run it in half "
            f"precision), whose mask can hold weights; this {type(unet).__name__} in {unet.dtype} "
            "takes scale 0 or 1"
        )


def _with_tokens(
    context: Tensor, mask: Tensor | None, tokens: Tensor, keep: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """context (R, S, D), mask (R, S), tokens (B, T, D), keep (B,), R = B or 2B -> both with T more

    A U-Net of diffusers makes -10000 (1 - mask) of its mask and adds that to the logits.
    """
    if tokens.shape[-1] != context.shape[-1] or len(context) not in (len(tokens), 2 * len(tokens)):
        raise ValueError(
            f"image tokens {tuple(tokens.shape)} do not fit a context {tuple(context.shape)}: one "
            "image a row is needed, as wide as the context"
        )
    if len(context) == 2 * len(tokens):
        tokens = torch.cat([torch.zeros_like(tokens), tokens])
        keep = torch.cat([torch.zeros_like(keep), keep])
    tokens = tokens * keep[:, None, None].to(tokens)
    text = torch.ones(context.shape[:2], device=context.device) if mask is None else mask.float()
    weight = (1 + math.log(scale) / 10000) * keep.float()
    image = weight[:, None].expand(-1, tokens.shape[1]).to(text)
    return torch.cat([context, tokens.to(context)], dim=1), torch.cat([text, image], dim=1)
