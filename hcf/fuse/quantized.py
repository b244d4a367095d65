"""Layers that compute in 8 bits: codes in, an INT8 or FP8 product, scales and bias in its epilogue.

    y = scale_x scale_w (Q(x / s) W'^T) + bias + L1 L2 (x / s),     W' the codes of W s - L1 L2

s smoothing, L1 L2 the low-rank branch of a linear layer, each only where the layer's scale has it.
The same arithmetic as `hcf.quantize.simulate`, with the sums exact in int32. A layer keeps its
floating-point parameters, so that taking the codes out again is taking nothing away.

B batch, O output channels, I input channels, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hcf.quantize.formats import weight_codes
from hcf.quantize.scales import LayerScale
from hcf_kernels.conv3x3 import conv3x3_quantized
from hcf_kernels.fp8_gemm import fp8_gemm
from hcf_kernels.int8_gemm import int8_gemm
from hcf_kernels.quantize import quantize

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class Codes:
    """What an 8-bit product of a layer takes.

    weight (O, I) or (O, I, k, k); scale_x (), scale_w (O,) float32; divisor: by what the input is
    divided before it is rounded, () or (I,) with smoothing; low_rank: (up (O, R), down (R, I)).
    """

    weight: Tensor
    scale_x: Tensor
    scale_w: Tensor
    divisor: Tensor
    smooth: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    def to(self, x: Tensor) -> Codes:
        """On the device of x; the scales stay float32."""
        if self.weight.device == x.device:
            return self
        branch = self.low_rank
        return Codes(
            self.weight.to(x.device),
            self.scale_x.to(x.device),
            self.scale_w.to(x.device),
            self.divisor.to(x.device),
            None if self.smooth is None else self.smooth.to(x.device),
            None if branch is None else (branch[0].to(x.device), branch[1].to(x.device)),
        )


class QuantizedLinear(nn.Linear):
    """A linear layer in 8 bits."""

    hcf_codes: Codes

    def forward(self, input: Tensor) -> Tensor:
        """x (..., I) -> (..., O)"""
        held = self.hcf_codes = self.hcf_codes.to(input)
        x = input.reshape(-1, input.shape[-1])
        branch = None
        if held.low_rank is not None:
            up, down = (part.to(x.dtype) for part in held.low_rank)
            smoothed = x if held.smooth is None else x / held.smooth.to(x.dtype)
            branch = smoothed @ down.T @ up.T
        codes = quantize(x, held.divisor, held.weight.dtype)
        product = int8_gemm if held.weight.dtype == torch.int8 else fp8_gemm
        y = product(
            codes, held.weight, held.scale_x, held.scale_w, self.bias, branch, "none", x.dtype
        )
        return y.reshape(*input.shape[:-1], -1)


class QuantizedConv2d(nn.Conv2d):
    """A 3x3 or 1x1 convolution in 8 bits, in channels_last."""

    hcf_codes: Codes

    def forward(self, input: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, H', W')"""
        held = self.hcf_codes = self.hcf_codes.to(input)
        return self.from_codes(quantize(input, held.divisor, held.weight.dtype, 1), input.dtype)

    def from_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes of x / s (B, I, H, W) -> (B, O, H', W') in `dtype`"""
        held = self.hcf_codes
        return conv3x3_quantized(
            codes, held.weight, held.scale_x, held.scale_w, self.bias, None, None,
            self.stride[0], dtype,
        )  # fmt: skip


def why_not(module: nn.Module, scale: LayerScale) -> str | None:
    """None where a layer can compute in 8 bits with `scale`, else why not."""
    if scale.scheme not in DTYPES:
        return f"{scale.scheme} has no 8-bit product"
    if scale.bucket_amax is not None:
        return "its range depends on the timestep"
    if type(module) is nn.Linear:
        return None
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}"
    if scale.low_rank is not None:
        return "a convolution with a low-rank branch"
    return odd_convolution(module)


def odd_convolution(conv: nn.Conv2d) -> str | None:
    """None for a 3x3 or 1x1 convolution of stride 1 or 2 that keeps its borders, else why not."""
    size, padding = conv.kernel_size, conv.padding
    square = size in ((3, 3), (1, 1)) and padding == (size[0] // 2, size[0] // 2)
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not (square and plain and conv.stride in ((1, 1), (2, 2))):
        return "its convolution is neither a plain 3x3 nor 1x1"
    return None


@torch.no_grad()
def codes_of(module: Any, scale: LayerScale) -> Codes:
    """The codes of a layer that `why_not` has nothing against."""
    weight = module.weight
    dtype = DTYPES[scale.scheme]
    codes = weight_codes(weight, scale)
    codes = codes.clamp_min(-127).to(dtype) if dtype == torch.int8 else codes.to(dtype)
    if codes.ndim == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
    step = torch.tensor(scale.input_scale, dtype=torch.float32, device=weight.device)
    per_channel = torch.from_numpy(scale.weight_scale).to(weight.device).expand(codes.shape[0])
    smooth = None if scale.smooth is None else torch.from_numpy(scale.smooth).to(weight.device)
    low_rank = None
    if scale.low_rank is not None:
        up, down = scale.low_rank
        low_rank = torch.from_numpy(up).to(weight), torch.from_numpy(down).to(weight)
    return Codes(
        weight=codes,
        scale_x=step,
        scale_w=per_channel.contiguous(),
        divisor=step if smooth is None else step * smooth,
        smooth=smooth,
        low_rank=low_rank,
    )
