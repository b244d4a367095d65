"""Decoupled cross-attention for Taiji-SD: IP-Adapter (Ye et al., arXiv 2308.06721, section 3.2).

Every cross-attention gets keys and values of its own for the image, and their result is added to
the text's, times a scale. The text's weights stay as they are. The modules and the file format are
diffusers': what is saved here is read by `load_ip_adapter` of any pipeline with such a U-Net.
diffusers has no such processor for family A of Taiji-Imagen, which takes
`taiji.adapters.image_tokens` instead.

The image is its pooled vector, as four tokens, or the states of its patches through a resampler:
IP-Adapter Plus.

B rows, L tokens of the image tower, Df their width or the pooled vector's, D context width.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from taiji.pipelines.stable_diffusion import TaijiStableDiffusionPipeline

WEIGHTS = "ip_adapter.safetensors"
TOKENS = 4  # of a pooled image; the loaders of diffusers know no other number
PLUS_DEPTH, PLUS_HEAD = 4, 64  # of a resampler, as they read it: layers and width of a head
# of a resampler's layer: the name in the released files, the module's in diffusers
PLUS_NAMES = (
    ("0.norm1", "ln0"), ("0.norm2", "ln1"), ("0.to_q", "attn.to_q"), ("0.to_out", "attn.to_out.0"),
    ("1.0", "ff.0"), ("1.1", "ff.1.net.0.proj"), ("1.3", "ff.1.net.2"),
)  # fmt: skip

State = dict[str, dict[str, Tensor]]


def new_ip_adapter(
    unet: UNet2DConditionModel, image_width: int, patch_tokens: int = 0, patch_width: int = 0
) -> State:
    """The weights of an adapter that has not been trained, in the format of its file: of the pooled
    image, or, with `patch_tokens`, of its patches through a resampler of `patch_width`.

    Keys and values begin as copies of the text's, so that an image token says at once what a text
    token in its place would. Raises ValueError for a U-Net it is not for, or a width of no whole
    number of heads.
    """
    _check_unet(unet)
    width = unet.config.cross_attention_dim
    if patch_tokens and (patch_width < PLUS_HEAD or patch_width % PLUS_HEAD):
        raise ValueError(
            f"patch_width={patch_width} is no multiple of {PLUS_HEAD}, the width of a head that "
            "diffusers' loader takes for given"
        )
    attention: dict[str, Tensor] = {}
    for key, name in _cross_attention(unet).items():
        layer: Any = unet.get_submodule(name)
        attention[f"{key}.to_k_ip.weight"] = layer.to_k.weight.detach().clone()
        attention[f"{key}.to_v_ip.weight"] = layer.to_v.weight.detach().clone()
    with torch.device(unet.device):
        if patch_tokens:
            projection: nn.Module = IPAdapterPlusImageProjection(
                image_width,
                width,
                patch_width,
                PLUS_DEPTH,
                PLUS_HEAD,
                patch_width // PLUS_HEAD,
                patch_tokens,
            )
        else:
            projection = ImageProjection(image_width, width, TOKENS)
    return {"image_proj": _released(projection), "ip_adapter": attention}


def attach(unet: UNet2DConditionModel, state: State) -> list[nn.Parameter]:
    """Puts an adapter into the U-Net and returns what it added. From then on its calls need
    `image_embeds` in `added_cond_kwargs`.

    Raises ValueError for a U-Net it is not for, or that has one.
    """
    _check_unet(unet)
    with torch.device(unet.device):
        unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return adapter_parameters(unet)


def image_projection(unet: UNet2DConditionModel) -> nn.Module:
    """What makes an image's tokens (B, T, D) of the features (B, Df) or (B, L, Df).

    Raises ValueError without an adapter, or with several.
    """
    projections = unet.encoder_hid_proj
    if not isinstance(projections, MultiIPAdapterImageProjection) or (
        projections.num_ip_adapters != 1
    ):
        raise ValueError("the U-Net has not exactly one IP-Adapter: attach(unet, state) first")
    layer: nn.Module = projections.image_projection_layers[0]
    return layer


def adapter_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    projections: nn.Module = unet.encoder_hid_proj
    found = list(projections.parameters())
    for processor in _processors(unet).values():
        found += processor.parameters()
    return found


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """At 0 the image's attention is not computed and the U-Net is the one it was, bit for bit."""
    for processor in _processors(unet).values():
        processor.scale = [scale]


def ip_adapter_state(unet: UNet2DConditionModel) -> State:
    """The inverse of `attach`. Raises ValueError without an adapter, or with several."""
    layer = image_projection(unet)
    processors, attention = _processors(unet), dict[str, Tensor]()
    for key, name in _cross_attention(unet).items():
        processor = processors[f"{name}.processor"]
        attention[f"{key}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach().clone()
        attention[f"{key}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach().clone()
    return {"image_proj": _released(layer), "ip_adapter": attention}


def save_ip_adapter(unet: UNet2DConditionModel, folder: Path) -> Path:
    """`folder`/ip_adapter.safetensors, for
    `pipe.load_ip_adapter(folder, subfolder="", weight_name="ip_adapter.safetensors",
    image_encoder_folder=None)`."""
    flat = {
        f"{part}.{key}": tensor.contiguous().cpu()
        for part, tensors in ip_adapter_state(unet).items()
        for key, tensor in tensors.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS
    staging = target.with_name(target.name + ".tmp")
    save_file(flat, staging, {"format": "pt"})
    os.replace(staging, target)
    return target


@contextmanager
def image_condition(unet: UNet2DConditionModel, embeds: Tensor) -> Iterator[None]:
    """Every call of the U-Net inside is given `embeds` (B, Df) or (B, L, Df); a row of zeros is no
    image.

    A call of 2B rows is a guided one: the first half, the null condition, gets zeros, as in
    IP-Adapter. Raises ValueError for another number of rows.
    """

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = len(args[0] if args else kwargs["sample"])
        if rows not in (len(embeds), 2 * len(embeds)):
            raise ValueError(f"{len(embeds)} images for {rows} rows: give one a prompt and image")
        whole = embeds if rows == len(embeds) else torch.cat([torch.zeros_like(embeds), embeds])
        added = {**(kwargs.get("added_cond_kwargs") or {}), "image_embeds": [whole[:, None]]}
        return args, {**kwargs, "added_cond_kwargs": added}

    handle = unet.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class TaijiIPAdapterPipeline(IPAdapterMixin, TaijiStableDiffusionPipeline):
    """Taiji-SD with an image beside the prompt.

    pipe = TaijiIPAdapterPipeline.from_pretrained(folder)
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="ip_adapter.safetensors",
                         image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    pipe("升起左手", image_embeds=image_features(pipe.image_clip, images, "pooled"))

    An adapter of patches takes the features "patches".
    """

    @torch.no_grad()
    def __call__(
        self, prompt: Any, *args: Any, image_embeds: Tensor | None = None, **kw: Any
    ) -> Any:
        """As the base class; `image_embeds` (B, Df) or (B, L, Df) are an image a prompt. Without
        them an adapter that is loaded sees none."""
        if self.unet.config.encoder_hid_dim_type != "ip_image_proj":
            if image_embeds is not None:
                raise ValueError("image_embeds need an adapter: pipe.load_ip_adapter(...) first")
            return super().__call__(prompt, *args, **kw)
        count = 1 if isinstance(prompt, str) else len(prompt)
        if image_embeds is None:
            image_embeds = torch.zeros(count, *self._features_shape(), device=self.device)
        elif len(image_embeds) != count:
            raise ValueError(f"{len(image_embeds)} images for {count} prompts: give one a prompt")
        rows = image_embeds.to(self.unet.dtype).repeat_interleave(
            kw.get("num_images_per_prompt", 1), 0
        )
        with image_condition(self.unet, rows):
            return super().__call__(prompt, *args, **kw)

    def _features_shape(self) -> tuple[int, ...]:
        """Of one image: (Df,) or (L, Df)."""
        layer: Any = image_projection(self.unet)
        if isinstance(layer, ImageProjection):
            return (layer.image_embeds.in_features,)
        vision = self.image_clip.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1, layer.proj_in.in_features


def _check_unet(unet: UNet2DConditionModel) -> None:
    if any("SimpleCrossAttn" in name for name in unet.config.down_block_types):
        raise ValueError(
            "diffusers' IP-Adapter does not know the attention of family A (added keys and "
            "values): append image tokens instead, taiji.adapters.image_tokens"
        )
    if isinstance(unet.encoder_hid_proj, MultiIPAdapterImageProjection):
        raise ValueError("the U-Net has an IP-Adapter already: load it without one")


def _cross_attention(unet: UNet2DConditionModel) -> dict[int, str]:
    """Cross-attention layers by their number in the file: self-attentions take the even ones. A
    resampler of patches has attention of its own, and is not among them."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {2 * i + 1: n for i, n in enumerate(n for n in names if n.endswith("attn2"))}


def _processors(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {
        name: processor
        for name, processor in unet.attn_processors.items()
        if isinstance(processor, IPAdapterAttnProcessor2_0)
    }


def _released(projection: nn.Module) -> dict[str, Tensor]:
    """A projection with the names that the released files have."""
    state = {key: tensor.detach().clone() for key, tensor in projection.state_dict().items()}
    if isinstance(projection, ImageProjection):
        return {key.replace("image_embeds", "proj"): tensor for key, tensor in state.items()}
    for i in range(PLUS_DEPTH):
        at = f"layers.{i}."
        pair = [state.pop(f"{at}attn.to_{name}.weight") for name in "kv"]
        state[f"{at}0.to_kv.weight"] = torch.cat(pair)
        for released, name in PLUS_NAMES:
            for key in [key for key in state if key.startswith(f"{at}{name}.")]:
                state[key.replace(name, released, 1)] = state.pop(key)
    return state
