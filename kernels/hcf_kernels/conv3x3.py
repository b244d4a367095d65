"""Convolution 3x3 (and 1x1) of residual blocks with what follows it, in NHWC, in 16 or 8 bits.

    y = scale_x * scale_w * conv(up(x), weight) + bias + add + residual

`add` is the time embedding of each image and output channel, `residual` the block's input. `up`
repeats each pixel 2 x 2 (nearest); the enlarged tensor is never written. The scales are those of
8-bit codes. Sums in float32, exact int32 for int8.

Upsampling and then 3x3 is, for each of the four parities of an output pixel, a 2x2 convolution of
the small image with summed weights: `fold_upsample` sums them once, and 9 products an output become
4 in `upsample_conv3x3`. The same in real arithmetic; the sums are rounded once to the weight's
dtype.

x and outputs lie in memory as NHWC (torch.channels_last), weights as (O, k, k, C); anything else is
copied into that order at every call.
Bytes that must move: x, weight, residual and y once. Products: B * H * W * O * k * k * C.

B batch, C channels, O output channels, H W size of x, k kernel size, P Q size of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hcf_kernels.rounding import LARGEST

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# [parity][tap of 2]: which of 3 taps fall on the same pixel of the small image
SAME_PIXEL = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def conv3x3_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W), weight (O, C, k, k), bias (O,), add (B, O), residual (B, O, P, Q) -> same"""
    x = F.interpolate(x, scale_factor=2.0) if upsample else x
    x = F.pad(x, (0, 1, 0, 1)) if asymmetric else x
    y = F.conv2d(x, weight, bias, stride, padding=0 if asymmetric else weight.shape[2] // 2)
    y = y if add is None else y + add[:, :, None, None]
    return y if residual is None else y + residual


@torch.library.custom_op("hcf::conv3x3", mutates_args=())
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W), weight (O, C, k, k), bias (O,), add (B, O), residual (B, O, P, Q) -> same

    k 3 with a border of one zero, or k 1 with none; stride 1 or 2. `asymmetric`: zeros only below
    and to the right, as AutoencoderKL's downsampling pads (stride 2). In x's dtype, channels_last.
    Widths of 4 (a U-Net's first and last convolution) run in padded tiles: right, but the library's
    kernel is the better one there. Raises ValueError for shapes that do not fit, with the shapes.
    """
    _check_floats(x, weight, folded=False)
    size = checked_size(x, weight, bias, add, residual, stride, upsample, asymmetric)
    y = conv3x3_ref(x, weight, _as(bias, x), _as(add, x), _as(residual, x), stride, upsample,
                    asymmetric)  # fmt: skip
    return _laid_out(y, size)


@conv3x3.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False,
) -> Tensor:  # fmt: skip
    _check_floats(x, weight, folded=False)
    return output_like(
        x, checked_size(x, weight, bias, add, residual, stride, upsample, asymmetric)
    )


@conv3x3.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.conv3x3 import launch

    _check_floats(x, weight, folded=False)
    y = output_like(x, checked_size(x, weight, bias, add, residual, stride, upsample, asymmetric))
    return launch(x, weight, y, bias, add, residual, stride, upsample, asymmetric)


def fold_upsample(weight: Tensor) -> Tensor:
    """weight (O, C, 3, 3) -> (4, O, C, 2, 2): of parities (0, 0), (0, 1), (1, 0), (1, 1)

    Summed in float32 (float64 of float64), in the memory order (4, O, 2, 2, C).
    """
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    sums = torch.tensor(SAME_PIXEL, dtype=wide.dtype, device=wide.device)
    folded = torch.einsum("pai,qbj,ocij->pqoabc", sums, sums, wide).flatten(0, 1)
    return folded.to(weight.dtype).contiguous().permute(0, 1, 4, 2, 3)


def upsample_conv3x3_ref(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), folded (4, O, C, 2, 2), bias (O,) -> (B, O, 2H, 2W)"""
    parts = [
        F.conv2d(F.pad(x, (1 - right, right, 1 - down, down)), folded[2 * down + right], bias)
        for down in (0, 1)
        for right in (0, 1)
    ]
    return F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), 2)


@torch.library.custom_op("hcf::upsample_conv3x3", mutates_args=())
def upsample_conv3x3(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), folded (4, O, C, 2, 2) of `fold_upsample`, bias (O,) -> (B, O, 2H, 2W)

    As `conv3x3(x, weight, bias, upsample=True)`, with 4/9 of its products.
    """
    _check_floats(x, folded, folded=True)
    size = checked_size(x, folded, bias, None, None, 1, True)
    return _laid_out(upsample_conv3x3_ref(x, folded, _as(bias, x)), size)


@upsample_conv3x3.register_fake
def _(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_floats(x, folded, folded=True)
    return output_like(x, checked_size(x, folded, bias, None, None, 1, True))


@upsample_conv3x3.register_kernel("cuda")
def _(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Tensor:
    from hcf_kernels.gpu.conv3x3 import launch

    _check_floats(x, folded, folded=True)
    y = output_like(x, checked_size(x, folded, bias, None, None, 1, True))
    return launch(x, folded, y, bias, upsample=True)


def conv3x3_quantized_ref(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None,
    add: Tensor | None, residual: Tensor | None, stride: int, dtype: torch.dtype,
    upsample: bool = False,
) -> Tensor:  # fmt: skip
    """As `conv3x3_ref` of codes times scale_x () and scale_w (O,), in `dtype`; sums in float64"""
    if weight.ndim == 5:
        y = upsample_conv3x3_ref(x.double(), weight.double())
    else:
        y = conv3x3_ref(x.double(), weight.double(), stride=stride, upsample=upsample)
    y = y * (scale_x.double() * scale_w.double())[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    y = y if add is None else y + add.double()[:, :, None, None]
    return (y if residual is None else y + residual.double()).to(dtype)


@torch.library.custom_op("hcf::conv3x3_quantized", mutates_args=())
def conv3x3_quantized(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None,
    add: Tensor | None, residual: Tensor | None, stride: int, dtype: torch.dtype,
    upsample: bool = False,
) -> Tensor:  # fmt: skip
    """`conv3x3` of codes x (B, C, H, W) and weight (O, C, k, k) -> (B, O, P, Q) in `dtype`

    Codes are both int8 or both float8_e4m3fn; their scales, float32, are scale_x () and scale_w
    (O,). With `upsample` the weight may be folded codes (4, O, C, 2, 2) of one scale an output
    channel. int8 sums are exact. e4m3 sums on Hopper are the tensor cores' own, kept in fewer bits
    than float32 while K grows, as in the library's fast accumulation.
    """
    size = checked_size(x, weight, bias, add, residual, stride, upsample)
    _check_codes(x, scale_x, scale_w, size[1], dtype)
    y = conv3x3_quantized_ref(x, weight, scale_x, scale_w, bias, add, residual, stride, dtype,
                              upsample)  # fmt: skip
    return _laid_out(y, size)


@conv3x3_quantized.register_fake
def _(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None,
    add: Tensor | None, residual: Tensor | None, stride: int, dtype: torch.dtype,
    upsample: bool = False,
) -> Tensor:  # fmt: skip
    size = checked_size(x, weight, bias, add, residual, stride, upsample)
    _check_codes(x, scale_x, scale_w, size[1], dtype)
    return output_like(x, size, dtype)


@conv3x3_quantized.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None,
    add: Tensor | None, residual: Tensor | None, stride: int, dtype: torch.dtype,
    upsample: bool = False,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.conv3x3 import launch

    size = checked_size(x, weight, bias, add, residual, stride, upsample)
    _check_codes(x, scale_x, scale_w, size[1], dtype)
    y = output_like(x, size, dtype)
    return launch(x, weight, y, bias, add, residual, stride, upsample, False, scale_x, scale_w)


def output_like(
    x: Tensor, size: tuple[int, int, int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """Empty (B, O, P, Q) in the memory order (B, P, Q, O)."""
    batch, outputs, height, width = size
    y = x.new_empty((batch, height, width, outputs), dtype=dtype or x.dtype)
    return y.permute(0, 3, 1, 2)


def _laid_out(y: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    out = output_like(y, size)
    return y if y.stride() == out.stride() else out.copy_(y)


def _as(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(x.dtype)


def checked_size(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None,
    stride: int, upsample: bool, asymmetric: bool = False,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The output's size (B, O, P, Q); ValueError where something does not fit."""
    folded = weight.ndim == 5
    outputs, kernel = _check_weight(x, weight)
    if stride not in (1, 2) or (upsample and (stride != 1 or kernel == 1)):
        raise ValueError(f"stride is 1 or 2, with upsample 1 (and the kernel 3x3), not {stride}")
    if folded and not upsample:
        raise ValueError("a folded weight (4, O, C, 2, 2) is for upsample=True")
    if asymmetric and (stride != 2 or kernel != 3 or min(x.shape[2:]) < 2):
        raise ValueError("asymmetric padding is for 3x3 with stride 2, of 2 x 2 pixels or more")
    scale, missing = 2 if upsample else 1, 1 if asymmetric else 0
    height, width = ((scale * side - 1 - missing) // stride + 1 for side in x.shape[2:])
    size = (x.shape[0], outputs, height, width)
    for name, tensor, fits in (
        ("bias", bias, size[1:2]), ("add", add, size[:2]), ("residual", residual, size),
    ):  # fmt: skip
        if tensor is not None and tuple(tensor.shape) != fits:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the output {size}: use {fits}")
    return size


def _check_weight(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """(O, k) of a weight that fits x."""
    head, sides = tuple(weight.shape[:-2]), tuple(weight.shape[-2:])
    known = sides == (2, 2) if weight.ndim == 5 and head[0] == 4 else sides in ((1, 1), (3, 3))
    if (
        x.ndim != 4 or weight.ndim not in (4, 5) or not known
        or head[-1] != x.shape[1] or weight.dtype != x.dtype
    ):  # fmt: skip
        raise ValueError(
            "conv3x3 takes x (B, C, H, W) and weight (O, C, 3, 3) or (O, C, 1, 1), folded "
            f"(4, O, C, 2, 2), of one dtype, not {x.dtype} {tuple(x.shape)} and "
            f"{weight.dtype} {tuple(weight.shape)}"
        )
    return head[-2], sides[0]


def _check_floats(x: Tensor, weight: Tensor, folded: bool) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"x is float32, float16 or bfloat16, not {x.dtype}")
    if folded != (weight.ndim == 5):
        raise ValueError(
            f"weight is {tuple(weight.shape)}: conv3x3 takes (O, C, k, k), upsample_conv3x3 what "
            "fold_upsample makes of it, (4, O, C, 2, 2)"
        )


def _check_codes(
    x: Tensor, scale_x: Tensor, scale_w: Tensor, outputs: int, dtype: torch.dtype
) -> None:
    if x.dtype not in LARGEST:
        raise ValueError(f"codes are int8 or float8_e4m3fn, not {x.dtype}")
    if scale_x.ndim or tuple(scale_w.shape) != (outputs,):
        raise ValueError(
            f"scale_x is () and scale_w ({outputs},), not {tuple(scale_x.shape)} and "
            f"{tuple(scale_w.shape)}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"the output dtype is float32, float16 or bfloat16, not {dtype}")
