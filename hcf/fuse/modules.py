"""Modules of diffusers with fused kernels in their forward: the same parameters, names and config.

A module is swapped by changing its class, so it stays the object it was for `state_dict`, adapters
and hooks, and changing the class back undoes it. Layers that adapters or simulated quantisation
have taken over are called as modules; only the kernels around them are fused then.

B batch, C channels, H W size, L image tokens, S text tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from hcf.fuse import FOLDED
from hcf.fuse.quantized import QuantizedConv2d, QuantizedLinear, odd_convolution
from hcf_kernels.attention import SHORT, attention
from hcf_kernels.conv3x3 import conv3x3, fold_upsample, upsample_conv3x3
from hcf_kernels.geglu import geglu, geglu_gate, geglu_int8
from hcf_kernels.group_norm_silu import group_norm_silu, group_norm_silu_quantized
from hcf_kernels.layer_norm import layer_norm
from hcf_kernels.quantize import quantize

NARROW = 32
ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.GELU: "gelu"}


def is_activation(module: Any) -> bool:
    """Whether the kernel has it; of GELU it has the exact one."""
    return type(module) in ACTIVATIONS and getattr(module, "approximate", "none") == "none"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is just a `kind`: no adapter, no replaced forward, no hook."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and "forward" not in module.__dict__ and not hooked


def normalise(
    norm: nn.GroupNorm, x: Tensor, activation: str = "silu", add: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """x (B, C, ...), add (B, C), scale and shift (B, C) -> (B, C, ...)"""
    weight, bias = affine(norm, scale_shift)
    return group_norm_silu(x, weight, bias, norm.num_groups, norm.eps, activation, add)


def affine(
    norm: nn.GroupNorm, scale_shift: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm (C,), or with scale and shift folded in (B, C)."""
    if scale_shift is None:
        return norm.weight, norm.bias
    scale, shift = scale_shift
    return norm.weight * (1 + scale), norm.bias * (1 + scale) + shift


def convolve(
    conv: nn.Module, norm: nn.GroupNorm, x: Tensor, activation: str, add: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What `conv` makes of the normalised x; of its codes at once where it computes in 8 bits."""
    if type(conv) is QuantizedConv2d and (held := conv.hcf_codes.to(x)).divisor.ndim == 0:
        conv.hcf_codes = held
        weight, bias = affine(norm, scale_shift)
        codes = group_norm_silu_quantized(
            x, weight, bias, norm.num_groups, norm.eps, activation, held.divisor,
            held.weight.dtype, add,
        )  # fmt: skip
        return conv.from_codes(codes, x.dtype)
    return conv(normalise(norm, x, activation, add, scale_shift))


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm without an activation: before a transformer, in a first stage's attention."""

    def forward(self, input: Tensor) -> Tensor:
        """x (B, C, ...) -> (B, C, ...)"""
        return normalise(self, input, "none")


class FusedGroupNormSiLU(nn.GroupNorm):
    """GroupNorm and the SiLU after it, which is an `AbsorbedSiLU` then."""

    def forward(self, input: Tensor) -> Tensor:
        """x (B, C, ...) -> (B, C, ...)"""
        return normalise(self, input)


class FusedGroupNormGELU(nn.GroupNorm):
    """GroupNorm and the GELU after it, which is an `AbsorbedGELU` then."""

    def forward(self, input: Tensor) -> Tensor:
        """x (B, C, ...) -> (B, C, ...)"""
        return normalise(self, input, "gelu")


class AbsorbedSiLU(nn.SiLU):
    """Does nothing: the norm before it has done it."""

    def forward(self, input: Tensor) -> Tensor:
        """x -> x"""
        return input


class AbsorbedGELU(nn.GELU):
    """Does nothing: the norm before it has done it."""

    def forward(self, input: Tensor) -> Tensor:
        """x -> x"""
        return input


# activation -> (its norm with it, it with nothing left to do)
WITH_ACTIVATION: dict[type[nn.Module], tuple[type[nn.GroupNorm], type[nn.Module]]] = {
    nn.SiLU: (FusedGroupNormSiLU, AbsorbedSiLU),
    nn.GELU: (FusedGroupNormGELU, AbsorbedGELU),
}


class FusedLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    def forward(self, input: Tensor) -> Tensor:
        """x (..., D) -> (..., D)"""
        return layer_norm(input, self.weight, self.bias, self.eps)


class FusedGEGLU(GEGLU):
    """The projection with the gate in its epilogue; the gate alone where an adapter projects."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x (..., D) -> (..., inner)"""
        if is_plain(self.proj, nn.Linear):
            return geglu(hidden_states, self.proj.weight, self.proj.bias)
        if type(self.proj) is QuantizedLinear:
            return self._in_8_bits(hidden_states, self.proj)
        return geglu_gate(self.proj(hidden_states))

    def _in_8_bits(self, x: Tensor, proj: QuantizedLinear) -> Tensor:
        held = proj.hcf_codes = proj.hcf_codes.to(x)
        if held.weight.dtype != torch.int8 or held.low_rank is not None:
            return geglu_gate(proj(x))
        codes = quantize(x.reshape(-1, x.shape[-1]), held.divisor, torch.int8)
        y = geglu_int8(codes, held.weight, held.scale_x, held.scale_w, proj.bias, x.dtype)
        return y.reshape(*x.shape[:-1], -1)


class FusedConv2d(nn.Conv2d):
    """A 3x3 or 1x1 convolution; a residual is added in its epilogue."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), residual (B, O, H', W') -> (B, O, H', W')"""
        if torch.compiler.is_exporting():  # the graph has the plain operators
            y = super().forward(input)
            return y if residual is None else residual + y
        return conv3x3(input, self.weight, self.bias, None, residual, self.stride[0])


class FusedResnetBlock2D(ResnetBlock2D):
    """Norm, SiLU, time embedding and scale-shift as one kernel before each convolution."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        """x (B, C, H, W), temb (B, T) -> (B, C', H', W')"""
        if self.training and self.dropout.p > 0:
            return super().forward(input_tensor, temb)  # between norm and convolution it drops
        activation = ACTIVATIONS[type(self.nonlinearity)]
        x, resample = input_tensor, self.upsample or self.downsample
        if resample is None:
            h = convolve(self.conv1, self.norm1, x, activation)
        else:
            h = self.conv1(resample(normalise(self.norm1, x, activation)))
            x = resample(x)
        add = scale_shift = None
        if self.time_emb_proj is not None and temb is not None:
            embedded = temb if self.skip_time_act else self.nonlinearity(temb)
            projected = self.time_emb_proj(embedded)
            if self.time_embedding_norm == "scale_shift":
                scale, shift = projected.chunk(2, dim=1)
                scale_shift = scale, shift
            else:
                add = projected
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        if is_plain(self.conv2, FusedConv2d):
            out = self.conv2(normalise(self.norm2, h, activation, add, scale_shift), x)
        else:
            out = x + convolve(self.conv2, self.norm2, h, activation, add, scale_shift)
        return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


class FusedAttnProcessor:
    """Attention to a short text with its keys on chip; everything else as `AttnProcessor2_0`."""

    def __init__(self) -> None:
        self.library = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x (B, L, D), text (B, S, D'), mask (B, 1, S) added to the scores -> (B, L, D)"""
        text = encoder_hidden_states
        per_key = attention_mask is None or (
            attention_mask.ndim == 3 and attention_mask.shape[1] == 1
        )
        if text is None or text.shape[1] > SHORT or not per_key or hidden_states.ndim != 3:
            return self.library(attn, hidden_states, text, attention_mask, temb, **kwargs)
        residual = hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        batch, tokens, _ = hidden_states.shape
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        key_bias = None if attention_mask is None else attention_mask[:, 0]
        o = attention(q, k, v, key_bias).transpose(1, 2).reshape(batch, tokens, -1)
        o = attn.to_out[1](attn.to_out[0](o))
        o = o + residual if attn.residual_connection else o
        return o if attn.rescale_output_factor == 1.0 else o / attn.rescale_output_factor


class FusedUpsample2D(Upsample2D):
    """Nearest-neighbour upsampling and its 3x3 convolution with 4/9 of the products.

    The summed weights are kept until the convolution's change. Under torch.compile, which cannot
    see that they did, and where an adapter has the convolution, it computes as before.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """x (B, C, H, W) -> (B, O, 2H, 2W), or nearest neighbours at `output_size`"""
        x, conv = hidden_states, self.conv
        plain = is_plain(conv, nn.Conv2d) and not torch.compiler.is_compiling()
        if plain and is_twice(x, output_size):
            return upsample_conv3x3(x, self._folded(conv.weight), conv.bias)
        return conv(interpolated(x, output_size))

    def _folded(self, weight: Tensor) -> Tensor:
        held: tuple[Any, Tensor] | None = self.__dict__.get(FOLDED)
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if held is None or held[0] != state:
            held = self.__dict__[FOLDED] = state, fold_upsample(weight.detach())
        return held[1]


def takes_processor(attn: Attention) -> str | None:
    """None where `FusedAttnProcessor` computes what this attention does, else why not."""
    kind = type(attn.processor)
    if kind is not AttnProcessor2_0:
        return f"its processor is {kind.__name__}"
    if attn.spatial_norm is not None or attn.group_norm is not None:
        return "it norms over space first"
    return None


def takes_resnet(block: ResnetBlock2D) -> str | None:
    """None where `FusedResnetBlock2D` computes what this block does, else why not."""
    if not is_activation(block.nonlinearity):
        return f"its activation is {block.nonlinearity}"
    known = block.time_embedding_norm in ("default", "scale_shift")
    if block.time_emb_proj is not None and not known:
        return f"its time embedding is of kind {block.time_embedding_norm}"
    for norm in (block.norm1, block.norm2):
        if not is_plain(norm, nn.GroupNorm) or norm.weight is None:
            return f"its norm is {type(norm).__name__}"
    return None


def takes_conv(conv: nn.Conv2d) -> str | None:
    """None where `FusedConv2d` computes what this convolution does, else why not."""
    if (reason := odd_convolution(conv)) is not None:
        return reason
    if min(conv.in_channels, conv.out_channels) < NARROW:
        return f"it has fewer than {NARROW} channels, where the library's is the better kernel"
    return None


def takes_upsample(block: Upsample2D) -> str | None:
    """None where the upsampling convolution computes what this block does, else why not."""
    conv = getattr(block, "conv", None)
    if not block.use_conv or block.use_conv_transpose or not block.interpolate or block.norm:
        return "it is not nearest-neighbour with a convolution"
    sizes = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    if not isinstance(conv, nn.Conv2d) or sizes != (
        conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    ):  # fmt: skip
        return "its convolution is not a plain 3x3"
    return None


def interpolated(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """x (B, C, H, W) -> nearest neighbours at twice the size, or at `size`"""
    if size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


def is_twice(x: Tensor, size: Any) -> bool:
    """Whether `size` is None or twice that of x (B, C, H, W)."""
    return size is None or tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1])
