"""Rounding to INT8, FP8 and INT4 grids, and a layer's weight as its scheme changes it.

    scheme        weights                       activations
    int8          INT8, a scale a channel       INT8, one static scale a tensor
    fp8           E4M3, a channel or a tensor   E4M3, one static scale a tensor
    int8-weight   INT8, a scale a channel       floating point
    int4-weight   INT4, a scale a block         floating point
    int4          INT4, a scale a block         INT4, a scale a group of channels, found at run time

One static 4-bit scale a tensor is hopeless for activations (16 levels for a range whose channels
differ by 100x), so `int4` takes the groups of SVDQuant (Li et al., arXiv 2411.05007): of each
position the input channels in groups, scale = max |x| / 7. E4M3 has no infinity; 448 is its largest
value and what lies above saturates. Rounding is to nearest, ties to even, as in ONNX.

O output channels, I input channels, K = I * kh * kw, a block or group g of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hcf.quantize.scales import GRID_MAX, SCHEMES, LayerScale

SMALLEST_SCALE = 1e-12  # of a group that holds nothing but zeros
# first ONNX opset that has the grid's type (INT4 also needs scales in blocks)
OPSETS = {"int8": 13, "fp8": 19, "int4": 21}


def codes(x: Tensor, scale: Tensor, grid: str) -> Tensor:
    """x (...), scale broadcastable -> float32 values on the grid: x / scale rounded and clipped.

    The gradient is that of the clipped quotient (straight through the rounding).
    """
    top = GRID_MAX[grid]
    low = -top if grid == "fp8" else -top - 1
    v = x.float() / scale
    if grid == "fp8":
        v = v.clamp(low, top)
        rounded = v.detach().to(torch.float8_e4m3fn).float()
    else:
        # rounded first, clipped then: the same, and the gradient is cut where the code is clipped
        rounded = v.detach().round().clamp(low, top)
        v = v.clamp(low, top) if v.requires_grad else v
    return v + (rounded - v).detach() if v.requires_grad else rounded


def fake_quantize(x: Tensor, scale: Tensor, grid: str = "int8") -> Tensor:
    """x (...), scale broadcastable -> x as it comes back from the grid, in x's type."""
    return (codes(x, scale, grid) * scale).to(x.dtype)


def fake_quantize_groups(x: Tensor, axis: int, group: int) -> Tensor:
    """x (..., I on `axis`, ...) on the INT4 grid with a scale for each `group` channels."""
    moved = x.movedim(axis, -1).float()
    grouped = moved.reshape(*moved.shape[:-1], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE) / GRID_MAX["int4"]
    rounded = codes(grouped, scale.detach(), "int4") * scale.detach()
    return rounded.reshape(moved.shape).movedim(-1, axis).to(x.dtype)


def block_of(inputs: int, asked: int) -> int:
    """Inputs that share a 4-bit scale: the largest power of two up to `asked` that divides them.

    Below 16 the scales would cost more than the weights: then all inputs share one.
    """
    block = asked
    while block >= 16 and inputs % block:
        block //= 2
    return block if block >= 16 else inputs


def group_of(scale: LayerScale, channels: int, columns: int) -> int:
    """Input channels that share a run-time scale in `int4`: as many as share one of the weight's
    (O, columns) in a block, where that divides the channels."""
    block = columns // scale.weight_amax.shape[1]
    return block_of(channels, 1 << max(4, block.bit_length() - 1))


def expanded(scale: Tensor, columns: int) -> Tensor:
    """Scales (), (O,) or (O, blocks) -> broadcastable to a weight (O, columns)."""
    if scale.ndim < 2:
        return scale if scale.ndim == 0 else scale[:, None]
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)


def residual_weight(weight: Tensor, scale: LayerScale) -> Tensor:
    """weight (O, I, ...) -> what is left for the grid, in float32: smoothed, less L1 L2."""
    w = weight.float()
    if scale.smooth is not None:
        smooth = torch.from_numpy(scale.smooth).to(w.device)
        w = w * smooth.view(1, -1, *[1] * (w.ndim - 2))
    if scale.low_rank is not None:
        up, down = (torch.from_numpy(part).to(w.device) for part in scale.low_rank)
        w = w - (up @ down).view(w.shape)
    return w


def weight_codes(weight: Tensor, scale: LayerScale, steps: Tensor | None = None) -> Tensor:
    """weight (O, I, ...) -> float32 codes on the scheme's grid, (O, I, ...).

    `steps` replaces the scheme's own weight scales (a type that holds them less exactly, or one
    that is being trained).
    """
    w = residual_weight(weight, scale).flatten(1)
    steps = torch.from_numpy(scale.weight_scale).to(w.device) if steps is None else steps
    return codes(w, expanded(steps, w.shape[1]), scale.weight_grid).view(weight.shape)


def weight_on_grid(weight: Tensor, scale: LayerScale, steps: Tensor | None = None) -> Tensor:
    """Weight (O, I, ...) as the product sees it: smoothed, less L1 L2, rounded; in its own type."""
    steps = torch.from_numpy(scale.weight_scale).to(weight.device) if steps is None else steps
    rounded = weight_codes(weight, scale, steps).flatten(1)
    return (rounded * expanded(steps, rounded.shape[1])).view(weight.shape).to(weight.dtype)


def input_channels(module: nn.Conv2d | nn.Linear) -> int:
    """Channels a layer reads (all groups of a grouped convolution together)."""
    return module.in_channels if isinstance(module, nn.Conv2d) else module.in_features


def numpy_codes(values: Any, grid: str) -> Any:
    """float32 codes (any shape) as the numpy type an ONNX initializer of the grid holds."""
    import ml_dtypes

    kinds: dict[str, Any] = {
        "int8": np.int8,
        "fp8": ml_dtypes.float8_e4m3fn,
        "int4": ml_dtypes.int4,
    }
    return values.astype(kinds[grid])


def is_weight_only(scheme: str) -> bool:
    """Whether the layer's input stays in floating point."""
    return scheme.endswith("-weight") and SCHEMES[scheme][1] is None
