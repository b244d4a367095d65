"""GroupNorm with SiLU in Triton: one pass where a group fits on chip, else three launches.

    one_pass    a program holds a group of an image: x is read once
    cuda        on sm_90 a cluster of blocks holds a slab of channels (`cuda_group_norm`): x is read
                once; only where a measured table says so
    two_pass    moments of tiles -> moments of groups -> apply: x is read twice, the second time
                from the L2 cache where `slab_bytes` of x, that pass through all three launches
                before the next ones do, fit there

A tile is (BLOCK_S positions, BLOCK_C channels) of one image; strides make NCHW and NHWC the same
code. Offsets inside an image are 32 bits. Moments are a mean and a sum of squared differences,
merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979): no cancellation. B batch, C channels, G groups, K channels of a group, S
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu import cuda_group_norm
from hcf_kernels.gpu.quantized import to_codes
from hcf_kernels.tables import Config, Plan, capability, find_config, shape_key

ONE_PASS_VALUES = 16384  # of a padded group: 32 a thread in 16 warps; twice that spills
TILE_VALUES = 4096
L2_SLAB_BYTES = 24 * 2**20  # about half of the L2 cache of an A100 (40 MB) or H100 (50 MB)


@triton.jit
def _activate(v, weight, bias, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    y = v * weight + bias
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y


@triton.jit
def _store(y_ptr, offsets, y, mask, scale_ptr, QUANT: tl.constexpr):  # type: ignore[no-untyped-def]
    """QUANT 0: in y's dtype; 1: int8; 2: e4m3."""
    if QUANT == 0:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        codes = to_codes(y / tl.load(scale_ptr), QUANT == 1)
        tl.store(y_ptr + offsets, codes, mask=mask)


@triton.jit
def one_pass_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr,
    C, S, K, affine_stride, x_stride_b, eps,
    NHWC: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (group, image): all S positions and K channels of it are in registers."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)[:, None]
    k = tl.arange(0, BLOCK_C)[None, :]
    c = group * K + k
    inside = (s < S) & (k < K)
    offsets = s * C + c if NHWC else c * S + s
    x_ptr += image * x_stride_b
    y_ptr += image * x_stride_b
    v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(add_ptr + image * C + c, mask=k < K, other=0.0).to(tl.float32)
        v = tl.where(inside, v, 0.0)
    count = (S * K).to(tl.float32)
    mean = tl.sum(tl.sum(v, axis=1), axis=0) / count
    centred = tl.where(inside, v - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count
    rstd = tl.rsqrt(variance + eps)
    affine = image * affine_stride + c
    weight = tl.load(weight_ptr + affine, mask=k < K, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + affine, mask=k < K, other=0.0).to(tl.float32)
    y = _activate(centred * rstd, weight, bias, ACTIVATION)
    _store(y_ptr, offsets, y, inside, scale_ptr, QUANT)


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr, add_ptr, moments_ptr,
    C, S, K, x_stride_b, image_0, group_0, split_s,
    NHWC: tl.constexpr, ADD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (split, group, image): mean and squared differences of split_s positions.

    moments (B, G, splits, 2)
    """
    split = tl.program_id(0)
    group = group_0 + tl.program_id(1)
    image = (image_0 + tl.program_id(2)).to(tl.int64)
    k = tl.arange(0, BLOCK_C)[None, :]
    c = group * K + k
    added = tl.zeros((1, BLOCK_C), tl.float32)
    if ADD:
        added = tl.load(add_ptr + image * C + c, mask=k < K, other=0.0).to(tl.float32)
    x_ptr += image * x_stride_b
    mean, squares, count = 0.0, 0.0, 0.0
    first = split * split_s
    last = tl.minimum(first + split_s, S)
    for s_0 in range(first, last, BLOCK_S):
        s = s_0 + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < last) & (k < K)
        offsets = s * C + c if NHWC else c * S + s
        v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + added
        v = tl.where(inside, v, 0.0)
        n = (tl.minimum(last - s_0, BLOCK_S) * K).to(tl.float32)
        tile_mean = tl.sum(tl.sum(v, axis=1), axis=0) / n
        centred = tl.where(inside, v - tile_mean, 0.0)
        tile_squares = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
        delta = tile_mean - mean
        total = count + n
        mean += delta * (n / total)
        squares += tile_squares + delta * delta * (count * n / total)
        count = total
    G = C // K
    out = moments_ptr + ((image * G + group) * tl.num_programs(0) + split) * 2
    tl.store(out, mean)
    tl.store(out + 1, squares)


@triton.jit
def apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, moments_ptr,
    C, S, K, affine_stride, x_stride_b, image_0, channel_0, channels, splits, split_s, eps,
    NHWC: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (positions, channels, image): merges the moments of its groups, then applies them."""
    image = (image_0 + tl.program_id(2)).to(tl.int64)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    at = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel_0 + at
    known = at < channels
    # (BLOCK_C, SPLITS) moments: of the group of each channel, one column a split
    split = tl.arange(0, SPLITS)[None, :]
    there = known[:, None] & (split < splits)
    pairs = moments_ptr + ((image * (C // K) + c // K)[:, None] * splits + split) * 2
    means = tl.load(pairs, mask=there, other=0.0)
    squares = tl.load(pairs + 1, mask=there, other=0.0)
    counts = tl.where(there, tl.minimum(S - split * split_s, split_s) * K, 0).to(tl.float32)
    count = (S * K).to(tl.float32)
    mean = tl.sum(means * counts, axis=1) / count
    away = tl.where(there, means - mean[:, None], 0.0)
    variance = tl.sum(squares + counts * away * away, axis=1) / count
    rstd = tl.rsqrt(variance + eps)
    affine = image * affine_stride + c
    weight = tl.load(weight_ptr + affine, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + affine, mask=known, other=0.0).to(tl.float32)
    if ADD:
        mean -= tl.load(add_ptr + image * C + c, mask=known, other=0.0).to(tl.float32)
    inside = (s < S) & known[None, :]
    offsets = s * C + c[None, :] if NHWC else c[None, :] * S + s
    x_ptr += image * x_stride_b
    y_ptr += image * x_stride_b
    v = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = _activate((v - mean[None, :]) * rstd[None, :], weight[None, :], bias[None, :], ACTIVATION)
    _store(y_ptr, offsets, y, inside, scale_ptr, QUANT)


@dataclass(frozen=True)
class Shape:
    """x (B, C, S) and what its elements are."""

    batch: int
    channels: int
    positions: int
    groups: int
    nhwc: bool
    element_bytes: int

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups


def default_config(shape: Shape) -> Config:
    """One pass where a padded group is at most ONE_PASS_VALUES, else slabs of half an L2 cache."""
    block_c = triton.next_power_of_2(shape.width)
    padded = block_c * triton.next_power_of_2(shape.positions)
    if padded <= ONE_PASS_VALUES:
        return {"variant": "one_pass", "num_warps": max(4, min(16, padded // 2048))}
    return {
        "variant": "two_pass",
        "tile": TILE_VALUES,
        "splits": max(1, min(64, shape.positions * shape.width // (4 * TILE_VALUES))),
        "slab_bytes": L2_SLAB_BYTES,
        "num_warps": 8,
    }


def candidates(shape: Shape) -> list[Config]:
    """What a tuner tries; the default is the first."""
    found = [default_config(shape)]
    padded = triton.next_power_of_2(shape.width) * triton.next_power_of_2(shape.positions)
    if padded <= 2 * ONE_PASS_VALUES:  # fp16 and bf16 may hold twice as much, spills and all
        found += [{"variant": "one_pass", "num_warps": warps} for warps in (4, 8, 16)]
    for tile in (2048, 4096, 8192):
        for splits in (4, 16, 64):
            for slab in (L2_SLAB_BYTES // 2, L2_SLAB_BYTES, 2**40):
                for warps in (4, 8):
                    found.append(
                        {"variant": "two_pass", "tile": tile, "splits": splits,
                         "slab_bytes": slab, "num_warps": warps}
                    )  # fmt: skip
    return [config for i, config in enumerate(found) if config not in found[:i]]


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    add: Tensor | None = None, scale: Tensor | None = None, dtype: torch.dtype | None = None,
    config: Config | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernels for `hcf::group_norm_silu` and its quantised form; arguments as there.

    NHWC is channels_last, or tokens (B, L, C) seen as (B, C, L). x that is neither that nor NCHW is
    made NCHW first, at the cost of a copy. `out`, of x's shape and strides, is written if given.
    """
    y = torch.empty_like(x, dtype=dtype or x.dtype) if out is None else out
    shape = _shape(x, groups)
    dense = shape.nhwc or x.is_contiguous()
    source = x if dense else x.contiguous()
    target = y if dense else torch.empty_like(source, dtype=y.dtype)
    if x[0].numel() >= 2**31:
        raise ValueError(f"an image of {x[0].numel()} values needs 64-bit offsets; use tiles")
    default = default_config(shape)
    config = config or find_config("group_norm_silu", _key(x, shape), default, x.device)
    if config["variant"] == "cuda":
        return cuda_group_norm.launch(
            x, weight, bias, groups, eps, activation, add, scale, dtype, config, out
        )
    run = _one_pass if config["variant"] == "one_pass" else _two_pass
    flags = {
        "NHWC": shape.nhwc,
        "ACTIVATION": activation,
        "ADD": add is not None,
        "QUANT": {torch.int8: 1, torch.float8_e4m3fn: 2}.get(y.dtype, 0),
    }
    add = source if add is None else add.contiguous()
    scale = source if scale is None else scale
    run(
        source,
        target,
        weight.contiguous(),
        bias.contiguous(),
        add,
        scale,
        eps,
        shape,
        flags,
        config,
    )
    return y if dense else y.copy_(target)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str = "silu",
    add: Tensor | None = None,
) -> Plan:  # fmt: skip
    """How `hcf::group_norm_silu` can run; arguments as there. Its quantised form takes the same."""
    shape = _shape(x, groups)
    tried = candidates(shape)
    if x.is_cuda and capability(x.device) == "sm_90" and cuda_group_norm.takes(x, groups):
        tried += cuda_group_norm.candidates(cuda_group_norm.shape_of(x, groups))
    return Plan(
        _key(x, shape),
        tried,
        lambda config: launch(x, weight, bias, groups, eps, activation, add, config=config),
    )


PLANS = {"group_norm_silu": plan}


def _shape(x: Tensor, groups: int) -> Shape:
    nhwc = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return Shape(x.shape[0], x.shape[1], x[0, 0].numel(), groups, nhwc, x.element_size())


def _key(x: Tensor, shape: Shape) -> str:
    return shape_key(tuple(x.shape), shape.groups, "nhwc" if shape.nhwc else "nchw", x.dtype)


def _one_pass(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, add: Tensor, scale: Tensor,
    eps: float, shape: Shape, flags: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    one_pass_kernel[(shape.groups, shape.batch)](
        x, y, weight, bias, add, scale,
        shape.channels, shape.positions, shape.width,
        shape.channels if weight.ndim == 2 else 0, shape.channels * shape.positions, eps,
        **flags,
        BLOCK_S=triton.next_power_of_2(shape.positions),
        BLOCK_C=triton.next_power_of_2(shape.width),
        num_warps=config["num_warps"],
    )  # fmt: skip


def _two_pass(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, add: Tensor, scale: Tensor,
    eps: float, shape: Shape, flags: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    block_k = triton.next_power_of_2(shape.width)
    block_s = max(1, min(config["tile"] // block_k, triton.next_power_of_2(shape.positions)))
    split_s = triton.cdiv(triton.cdiv(shape.positions, config["splits"]), block_s) * block_s
    splits = triton.cdiv(shape.positions, split_s)
    moments = x.new_empty(shape.batch, shape.groups, splits, 2, dtype=torch.float32)
    image_stride = shape.channels * shape.positions
    affine_stride = shape.channels if weight.ndim == 2 else 0
    for image, images, group, groups in slabs(shape, config["slab_bytes"]):
        moments_kernel[(splits, groups, images)](
            x, add, moments,
            shape.channels, shape.positions, shape.width, image_stride, image, group, split_s,
            NHWC=flags["NHWC"], ADD=flags["ADD"], BLOCK_S=block_s, BLOCK_C=block_k,
            num_warps=config["num_warps"],
        )  # fmt: skip
        channels = groups * shape.width
        # rows of a tile are what lies together in memory: channels in NHWC, positions in NCHW
        block_c = min(triton.next_power_of_2(channels), 64 if shape.nhwc else 1)
        rows = max(1, min(config["tile"] // block_c, triton.next_power_of_2(shape.positions)))
        grid = (triton.cdiv(shape.positions, rows), triton.cdiv(channels, block_c), images)
        apply_kernel[grid](
            x, y, weight, bias, add, scale, moments,
            shape.channels, shape.positions, shape.width, affine_stride, image_stride,
            image, group * shape.width, channels, splits, split_s, eps,
            **flags, BLOCK_S=rows, BLOCK_C=block_c, SPLITS=triton.next_power_of_2(splits),
            num_warps=config["num_warps"],
        )  # fmt: skip


def slabs(shape: Shape, slab_bytes: int) -> list[tuple[int, int, int, int]]:
    """Parts of x of about `slab_bytes`: (first image, images, first group, groups) each.

    Whole images where one fits, else groups of one. In NHWC a slab of few groups touches short
    pieces of every row: it has at least 32 bytes of a row, the sector of a cache line.
    """
    image_bytes = shape.channels * shape.positions * shape.element_bytes
    if image_bytes <= slab_bytes:
        images = max(1, slab_bytes // image_bytes)
        return [
            (first, min(images, shape.batch - first), 0, shape.groups)
            for first in range(0, shape.batch, images)
        ]
    groups = max(1, slab_bytes // (image_bytes // shape.groups))
    if shape.nhwc:
        groups = max(groups, triton.cdiv(32, shape.width * shape.element_bytes))
    return [
        (image, 1, first, min(groups, shape.groups - first))
        for image in range(shape.batch)
        for first in range(0, shape.groups, groups)
    ]


def _variants() -> list[Variant]:
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16",
                "add_ptr": "*bf16", "scale_ptr": "*fp32"}  # fmt: skip
    sizes = {"C": "i32", "S": "i32", "K": "i32", "affine_stride": "i32", "x_stride_b": "i32"}
    tiles = {"BLOCK_S": "constexpr", "BLOCK_C": "constexpr"}
    flags = {name: "constexpr" for name in ("NHWC", "ACTIVATION", "ADD", "QUANT")}
    found = []
    for nhwc in (True, False):
        layout = "nhwc" if nhwc else "nchw"
        for quant, suffix, out in ((0, "", "*bf16"), (1, "_int8", "*i8"), (2, "_e4m3", "*fp8e4nv")):
            archs = (90,) if quant == 2 else (80, 90)
            values = {"NHWC": nhwc, "ACTIVATION": "silu", "ADD": True, "QUANT": quant}
            of = pointers | {"y_ptr": out}
            found.append(
                Variant(
                    f"group_norm_silu.one_pass_{layout}{suffix}", one_pass_kernel,
                    of | sizes | {"eps": "fp32"} | flags | tiles,
                    values | {"BLOCK_S": 1024, "BLOCK_C": 16},
                    ("x_ptr", "y_ptr", "C", "S", "x_stride_b"), num_warps=16,
                    architectures=archs,
                )
            )  # fmt: skip
            found.append(
                Variant(
                    f"group_norm_silu.apply_{layout}{suffix}", apply_kernel,
                    of | {"moments_ptr": "*fp32"} | sizes
                    | {name: "i32" for name in ("image_0", "channel_0", "channels", "splits",
                                                "split_s")}
                    | {"eps": "fp32"} | flags | tiles | {"SPLITS": "constexpr"},
                    values | {"BLOCK_S": 128 if nhwc else 8192, "BLOCK_C": 64 if nhwc else 1,
                              "SPLITS": 64},
                    ("x_ptr", "y_ptr", "C", "S", "x_stride_b", "channel_0"), num_warps=8,
                    architectures=archs,
                )
            )  # fmt: skip
        found.append(
            Variant(
                f"group_norm_silu.moments_{layout}", moments_kernel,
                {"x_ptr": "*bf16", "add_ptr": "*bf16", "moments_ptr": "*fp32", "C": "i32",
                 "S": "i32", "K": "i32", "x_stride_b": "i32", "image_0": "i32", "group_0": "i32",
                 "split_s": "i32", "NHWC": "constexpr", "ADD": "constexpr"} | tiles,
                {"NHWC": nhwc, "ADD": True, "BLOCK_S": 512, "BLOCK_C": 16},
                ("x_ptr", "C", "S", "x_stride_b", "split_s"), num_warps=8,
            )
        )  # fmt: skip
    return found


VARIANTS = _variants()
