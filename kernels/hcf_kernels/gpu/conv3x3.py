"""Convolution 3x3 and 1x1 in Triton: an implicit matrix product in NHWC.

    gather   a program's rows are any BLOCK_M positions; each step loads BLOCK_K channels of the
             pixel that a tap sees from each. Strides, upsampling, every GPU
    boxes    its rows are a box of images, rows and columns, which the tensor memory accelerator
             reads moved by a tap; pixels outside the image come as zeros. Stride 1, Hopper on

K runs over taps and channels. With `splits` K is cut: the parts write their sums side by side and a
second kernel adds them in order, so that results are the same at every run. With a folded weight
(PARITIES 4) a program makes the output pixels of one parity, each a 2x2 convolution of x.

B images, H W C of x, O (OUT) output channels, P Q positions of a parity (the output where there is
one parity).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu.conv3x3_tiles import LINE, Shape, box, default_config, tiles_of
from hcf_kernels.tables import Config, find_config, shape_key

SUM_TILE = (8, 64)  # positions and output channels of the kernel that adds parts
LARGEST_IMAGE = 2**30  # values: a tile of two images stays within 32-bit offsets


@triton.jit
def _store_part(  # type: ignore[no-untyped-def]
    acc, at, image, there, n_0, OUT,
    y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, RESIDUAL: tl.constexpr,
    RAW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """acc (M, N) to positions `at` (M,) of y (positions, OUT); RAW: sums as they are."""
    n = n_0 + tl.arange(0, N)
    known = n < OUT
    inside = there[:, None] & known[None, :]
    offsets = at[:, None] * OUT + n[None, :]
    if RAW:
        tl.store(y_ptr + offsets, acc, mask=inside)
    else:
        v = acc.to(tl.float32)
        if SCALE:
            scale = tl.load(scale_x_ptr) * tl.load(scale_w_ptr + n, mask=known, other=0.0)
            v *= scale[None, :]
        if BIAS:
            v += tl.load(bias_ptr + n, mask=known, other=0.0).to(tl.float32)[None, :]
        if ADD:
            added = add_ptr + (image[:, None] * OUT + n[None, :])
            v += tl.load(added, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            v += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc, at, image, there, n_0, OUT,
    y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, RESIDUAL: tl.constexpr,
    RAW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """In parts of 64 output channels: residuals of a whole tile would not fit beside its sums."""
    if N > 64:
        HALF: tl.constexpr = N // 2
        left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
        _store(left, at, image, there, n_0, OUT, y_ptr, bias_ptr, add_ptr, residual_ptr,
               scale_x_ptr, scale_w_ptr, SCALE, BIAS, ADD, RESIDUAL, RAW, HALF)  # fmt: skip
        _store(right, at, image, there, n_0 + HALF, OUT, y_ptr, bias_ptr, add_ptr, residual_ptr,
               scale_x_ptr, scale_w_ptr, SCALE, BIAS, ADD, RESIDUAL, RAW, HALF)  # fmt: skip
    else:
        _store_part(acc, at, image, there, n_0, OUT, y_ptr, bias_ptr, add_ptr, residual_ptr,
                    scale_x_ptr, scale_w_ptr, SCALE, BIAS, ADD, RESIDUAL, RAW, N)  # fmt: skip


@triton.jit
def _tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tile of positions, of output channels): GROUP of the first go through all of the second
    before the next ones come, so that both stay in the L2 cache."""
    band = GROUP * tiles_n
    first = pid // band * GROUP
    tall = tl.minimum(tiles_m - first, GROUP)
    return first + pid % band % tall, pid % band // tall


@triton.jit
def gather_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    B, H, W, C, OUT, P, Q, steps, part_stride,
    KERNEL: tl.constexpr, PAD: tl.constexpr, PARITIES: tl.constexpr,
    STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, EVEN_C: tl.constexpr, QUANT: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (tile and parity, part of K). QUANT 0: floats; 1: int8; 2: e4m3."""
    parity = tl.program_id(0) % PARITIES
    M = B * P * Q
    tile_m, tile_n = _tile(
        tl.program_id(0) // PARITIES, tl.cdiv(M, BLOCK_M), tl.cdiv(OUT, BLOCK_N), GROUP
    )
    n_0 = tile_n * BLOCK_N
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image_0 = tile_m * BLOCK_M // (P * Q)
    near = m // (P * Q) - image_0
    p = m % (P * Q) // Q
    q = m % Q
    h = p * STRIDE - PAD + parity // 2
    w = q * STRIDE - PAD + parity % 2
    # one bit a tap: whether it sees a pixel of the image
    seen = tl.zeros((BLOCK_M,), tl.int32)
    scale: tl.constexpr = 2 if UPSAMPLE else 1
    for i in tl.static_range(KERNEL * KERNEL):
        h_i = h + i // KERNEL
        w_i = w + i % KERNEL
        is_seen = (h_i >= 0) & (h_i < H * scale) & (w_i >= 0) & (w_i < W * scale) & (m < M)
        seen |= is_seen.to(tl.int32) << i
    x_ptr += image_0.to(tl.int64) * (H * W * C)
    w_ptr += parity * (OUT * KERNEL * KERNEL * C)
    n = n_0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # output channels beyond the last read the first one's weights: no mask in the loop
    w_rows = tl.where(n < OUT, n, 0) * (KERNEL * KERNEL * C)
    pixels = ((near * H + h) * W + w) * C
    blocks = tl.cdiv(C, BLOCK_K)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, KERNEL * KERNEL * blocks)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if QUANT == 1 else tl.float32)
    for step in range(first, last):
        tap = step // blocks
        c_0 = (step - tap * blocks) * BLOCK_K
        down = tap // KERNEL
        right = tap % KERNEL
        inside = ((seen >> tap) & 1)[:, None] != 0
        if UPSAMPLE:
            pixels = ((near * H + ((h + down) >> 1)) * W + ((w + right) >> 1)) * C
            x_step = x_ptr + c_0
        else:
            x_step = x_ptr + ((down * W + right) * C + c_0)
        w_offsets = w_rows[:, None] + k[None, :]
        w_step = w_ptr + (tap * C + c_0)
        if EVEN_C:
            weights = tl.load(w_step + w_offsets)
        else:
            inside &= (k < C - c_0)[None, :]
            weights = tl.load(w_step + w_offsets, mask=(k < C - c_0)[None, :], other=0.0)
        values = tl.load(x_step + (pixels[:, None] + k[None, :]), mask=inside, other=0.0)
        acc = tl.dot(values, weights.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    parity_h: tl.constexpr = 2 if PARITIES == 4 else 1
    at = (near * P + p) * parity_h + parity // 2
    at = (at * Q + q) * parity_h + parity % 2
    base = image_0.to(tl.int64) * (P * Q * PARITIES * OUT)
    if SPLIT:
        base += tl.program_id(1).to(tl.int64) * part_stride
    _store(acc, at, image_0 + near, m < M, n_0, OUT, y_ptr + base, bias_ptr, add_ptr,
           residual_ptr + base, scale_x_ptr, scale_w_ptr, QUANT > 0, BIAS, ADD, RESIDUAL, SPLIT,
           BLOCK_N)  # fmt: skip


@triton.jit
def boxes_kernel(  # type: ignore[no-untyped-def]
    x_boxes, w_boxes, y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    B, H, W, C, OUT, steps, part_stride,
    KERNEL: tl.constexpr, PAD: tl.constexpr, PARITIES: tl.constexpr, QUANT: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    BOX_B: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (box and parity, part of K). Where BLOCK_K goes beyond C, x comes as zeros."""
    BLOCK_M: tl.constexpr = BOX_B * BOX_H * BOX_W
    parity = tl.program_id(0) % PARITIES
    across = tl.cdiv(W, BOX_W)
    down = tl.cdiv(H, BOX_H)
    tiles_m = across * down * tl.cdiv(B, BOX_B)
    tile, tile_n = _tile(tl.program_id(0) // PARITIES, tiles_m, tl.cdiv(OUT, BLOCK_N), GROUP)
    w_0 = tile % across * BOX_W
    h_0 = tile // across % down * BOX_H
    image_0 = tile // (across * down) * BOX_B
    n_0 = tile_n * BLOCK_N
    blocks = tl.cdiv(C, BLOCK_K)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, KERNEL * KERNEL * blocks)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if QUANT == 1 else tl.float32)
    for step in range(first, last):
        tap = step // blocks
        c_0 = (step - tap * blocks) * BLOCK_K
        h = h_0 - PAD + parity // 2 + tap // KERNEL
        w = w_0 - PAD + parity % 2 + tap % KERNEL
        values = x_boxes.load([image_0, h, w, c_0]).reshape(BLOCK_M, BLOCK_K)
        weights = w_boxes.load([parity * OUT + n_0, tap * C + c_0])
        # a reshaped first operand would go through registers; the second stays where it was copied
        acc = tl.dot(weights, values.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    m = tl.arange(0, BLOCK_M)
    q = w_0 + m % BOX_W
    p = h_0 + m // BOX_W % BOX_H
    near = m // (BOX_W * BOX_H)
    there = (q < W) & (p < H) & (image_0 + near < B)
    parity_h: tl.constexpr = 2 if PARITIES == 4 else 1
    at = (near * H + p) * parity_h + parity // 2
    at = (at * W + q) * parity_h + parity % 2
    base = image_0.to(tl.int64) * (H * W * PARITIES * OUT)
    if SPLIT:
        base += tl.program_id(1).to(tl.int64) * part_stride
    _store(acc.T, at, image_0 + near, there, n_0, OUT, y_ptr + base, bias_ptr, add_ptr,
           residual_ptr + base, scale_x_ptr, scale_w_ptr, QUANT > 0, BIAS, ADD, RESIDUAL, SPLIT,
           BLOCK_N)  # fmt: skip


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    M, OUT, area, splits, part_stride,
    SCALE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts (splits, M, OUT) -> y (M, OUT), added in order; `area` positions an image."""
    m_0 = tl.program_id(0) * BLOCK_M
    n_0 = tl.program_id(1) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = n_0 + tl.arange(0, BLOCK_N)
    inside = (m_0 + m < M)[:, None] & (n < OUT)[None, :]
    base = m_0.to(tl.int64) * OUT
    parts_ptr += base
    acc = tl.zeros((BLOCK_M, BLOCK_N), parts_ptr.dtype.element_ty)
    for _ in range(splits):
        acc += tl.load(parts_ptr + (m[:, None] * OUT + n[None, :]), mask=inside, other=0)
        parts_ptr += part_stride
    _store_part(acc, m, (m_0 + m) // area, m_0 + m < M, n_0, OUT, y_ptr + base, bias_ptr, add_ptr,
                residual_ptr + base, scale_x_ptr, scale_w_ptr, SCALE, BIAS, ADD, RESIDUAL, False,
                BLOCK_N)  # fmt: skip


def launch(
    x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False, scale_x: Tensor | None = None, scale_w: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Writes y (B, O, P, Q), channels_last, for the operators of `hcf_kernels.conv3x3`; returns it.

    Raises ValueError for images of 2^30 values and more, and RuntimeError for e4m3 on a GPU that
    has none.
    """
    _require(x, y)
    x, kernel = x.permute(0, 2, 3, 1).contiguous(), weight.shape[-1]
    folded = weight.ndim == 5
    w = weight.movedim(-3, -1).contiguous().flatten(-3).flatten(0, -2)
    shape = shape_of(x, w, y, kernel, folded, simple=stride == 1 and (folded or not upsample))
    kind = "folded" if folded else "up" if upsample else "below" if asymmetric else ""
    key = shape_key(tuple(x.shape), y.shape[1], f"k{kernel}s{stride}{kind}", x.dtype)
    config = config or find_config("conv3x3", key, default_config(shape), x.device)
    flags = {
        "KERNEL": kernel,
        "PAD": 0 if asymmetric else kernel // 2,
        "PARITIES": shape.parities,
        "QUANT": {torch.int8: 1, torch.float8_e4m3fn: 2}.get(x.dtype, 0),
    }
    after = {"BIAS": bias is not None, "ADD": add is not None, "RESIDUAL": residual is not None}
    ends = (
        y if bias is None else bias.contiguous(),
        y if add is None else add.contiguous(),
        y if residual is None else residual.permute(0, 2, 3, 1).contiguous(),
        y if scale_x is None else scale_x,
        y if scale_w is None else scale_w.contiguous(),
    )
    if y.numel() == 0:
        return y
    if config["variant"] == "boxes" and not shape.boxes:
        config = {**config, "variant": "gather"}
    total = kernel**2 * triton.cdiv(shape.channels, config["block_k"])
    steps = triton.cdiv(total, config["splits"])
    splits = triton.cdiv(total, steps)
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    target = y if splits == 1 else y.new_empty((splits, y.numel()), dtype=sums)
    # sums of a part are stored as they are; what comes after is for the kernel that adds them
    flags |= {**(dict.fromkeys(after, False) if splits > 1 else after), "SPLIT": splits > 1}
    if config["variant"] == "boxes":
        _boxes(x, w, target, ends, shape, steps, splits, y.numel(), flags, config)
    else:
        flags |= {"STRIDE": stride, "UPSAMPLE": upsample and not folded}
        _gather(x, w, target, ends, shape, steps, splits, y.numel(), flags, config)
    if splits > 1:
        _sum(target, y, ends, flags["QUANT"] > 0, after)
    return y


def shape_of(x: Tensor, w: Tensor, y: Tensor, kernel: int, folded: bool, simple: bool) -> Shape:
    """x (B, H, W, C), w (parities * O, k * k * C), y (B, O, P, Q); `simple`: x is read as it is."""
    parities = 4 if folded else 1
    height, width = (side // 2 if folded else side for side in y.shape[2:])
    aligned = all(
        t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in (x, w)
    )
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return Shape(
        x.shape[0], x.shape[3], y.shape[1], height, width, kernel, parities, x.element_size(),
        boxes=simple and aligned and hopper and x.element_size() < 4,
    )  # fmt: skip


def _require(x: Tensor, y: Tensor) -> None:
    largest = max(x[0].numel(), y[0].numel()) if x.shape[0] else 0
    if largest >= LARGEST_IMAGE:
        raise ValueError(f"an image of {largest} values needs 64-bit offsets; use tiles")
    if x.dtype == torch.float8_e4m3fn and x.is_cuda:
        found = torch.cuda.get_device_capability(x.device)
        if found < (8, 9):
            raise RuntimeError(
                f"e4m3 needs compute capability 8.9, found {found[0]}.{found[1]}: use int8"
            )


Ends = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _gather(
    x: Tensor, w: Tensor, y: Tensor, ends: Ends, shape: Shape, steps: int, splits: int,
    part_stride: int, flags: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    tiles = triton.cdiv(shape.positions, config["block_m"])
    tiles *= triton.cdiv(shape.outputs, config["block_n"]) * shape.parities
    gather_kernel[(tiles, splits)](
        x, w, y, *ends, *x.shape, shape.outputs, shape.height, shape.width, steps, part_stride,
        **flags, EVEN_C=shape.channels % config["block_k"] == 0,
        BLOCK_M=config["block_m"], BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        GROUP=config["group"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


def _boxes(
    x: Tensor, w: Tensor, y: Tensor, ends: Ends, shape: Shape, steps: int, splits: int,
    part_stride: int, flags: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    sides = box(config["block_m"], shape.images, shape.height, shape.width)
    x_boxes = _described(x, [*sides, config["block_k"]])
    w_boxes = _described(w, [config["block_n"], config["block_k"]])
    tiles = triton.cdiv(shape.outputs, config["block_n"]) * shape.parities
    for whole, part in zip((shape.images, shape.height, shape.width), sides, strict=True):
        tiles *= triton.cdiv(whole, part)
    boxes_kernel[(tiles, splits)](
        x_boxes, w_boxes, y, *ends, *x.shape, shape.outputs, steps, part_stride,
        **flags, BOX_B=sides[0], BOX_H=sides[1], BOX_W=sides[2],
        BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        GROUP=config["group"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Strides from the shape: those of sides of 1 are anything in torch."""
    strides = [1]
    for side in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * side)
    return TensorDescriptor(tensor, list(tensor.shape), strides, block)


def _sum(parts: Tensor, y: Tensor, ends: Ends, scale: bool, after: dict[str, bool]) -> None:
    positions, outputs = y.numel() // y.shape[1], y.shape[1]
    block_m, block_n = SUM_TILE
    sum_kernel[(triton.cdiv(positions, block_m), triton.cdiv(outputs, block_n))](
        parts, y, *ends, positions, outputs, y.shape[2] * y.shape[3], len(parts), y.numel(),
        SCALE=scale, **after, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


# what `x_ptr` and `w_ptr` are, the tensor core instructions, and where they are
KINDS: dict[str, tuple[str, int, dict[int, tuple[str, ...]], tuple[int, ...]]] = {
    "bf16": ("bf16", 0, {80: ("HMMA",), 90: ("HGMMA",)}, (80, 90)),
    "int8": ("i8", 1, {80: ("IMMA",), 90: ("IGMMA",)}, (80, 90)),
    "e4m3": ("fp8e4nv", 2, {90: ("QGMMA",)}, (90,)),
    "fp32": ("fp32", 0, {}, (80, 90)),
}
ENDS = {"y_ptr": "*bf16", "bias_ptr": "*bf16", "add_ptr": "*bf16", "residual_ptr": "*bf16",
        "scale_x_ptr": "*fp32", "scale_w_ptr": "*fp32"}  # fmt: skip


def _variant(kind: str, form: str, tile: tuple[int, int], split: bool = False, parities: int = 1,
             **changes: Any) -> Variant:  # fmt: skip
    element, quant, expect, architectures = KINDS[kind]
    element_bytes = {"fp32": 4, "bf16": 2}.get(kind, 1)
    step = LINE // element_bytes
    warps, stages = tiles_of(form, element_bytes)[tile]
    after = dict.fromkeys(("BIAS", "ADD", "RESIDUAL"), not split)
    constants = {"KERNEL": 3 if parities == 1 else 2, "PAD": 1, "PARITIES": parities,
                 "QUANT": quant, **after, "SPLIT": split}  # fmt: skip
    blocks = {"BLOCK_N": tile[1], "BLOCK_K": step, "GROUP": 8}
    sizes = ["B", "H", "W", "C", "OUT", "P", "Q", "steps", "part_stride"]
    if form == "boxes":
        sides = box(tile[0], 2, 64, 64)
        shape = ", ".join(map(str, (*sides, step)))
        sources = {"x_boxes": f"tensordesc<{element}[{shape}]>",
                   "w_boxes": f"tensordesc<{element}[{tile[1]}, {step}]>"}  # fmt: skip
        sizes = [name for name in sizes if name not in "PQ"]
        constants |= dict(zip(("BOX_B", "BOX_H", "BOX_W"), sides, strict=True)) | blocks
        # copied by the tensor memory accelerator, straight to what the tensor cores read
        expect, architectures = {90: (*expect[90], "UTMALDG")}, (90,)
    else:
        sources = {"x_ptr": f"*{element}", "w_ptr": f"*{element}"}
        constants |= {"STRIDE": 1, "UPSAMPLE": False, "EVEN_C": True, **changes}
        constants |= {"BLOCK_M": tile[0], **blocks}
    y = {"y_ptr": "*i32" if quant == 1 else "*fp32"} if split else {}
    name = "_".join([form, kind, f"{tile[0]}x{tile[1]}", *(["split"] if split else []),
                     *(["folded"] if parities == 4 else []), *map(str.lower, changes)])  # fmt: skip
    signature = sources | ENDS | y | dict.fromkeys(sizes, "i32")
    aligned = [n for n in signature if n.endswith("_ptr")] + ["C", "OUT", "part_stride"]
    return Variant(
        f"conv3x3.{name}", boxes_kernel if form == "boxes" else gather_kernel,
        signature | dict.fromkeys(constants, "constexpr"), constants, tuple(aligned),
        warps, stages, expect, architectures,
    )  # fmt: skip


def _sum_variant(quant: bool) -> Variant:
    parts = {"parts_ptr": "*i32" if quant else "*fp32"}
    sizes = dict.fromkeys(("M", "OUT", "area", "splits", "part_stride"), "i32")
    constants = {"SCALE": quant, "BIAS": True, "ADD": True, "RESIDUAL": True,
                 "BLOCK_M": SUM_TILE[0], "BLOCK_N": SUM_TILE[1]}  # fmt: skip
    return Variant(
        f"conv3x3.sum{'_int8' if quant else ''}", sum_kernel,
        parts | ENDS | sizes | dict.fromkeys(constants, "constexpr"), constants,
        ("parts_ptr", *ENDS, "OUT", "part_stride"),
    )  # fmt: skip


VARIANTS = [
    *(_variant(kind, form, tile) for kind in ("bf16", "int8", "e4m3")
      for form in ("gather", "boxes") for tile in tiles_of(form, 2)),
    *(_variant("fp32", "gather", tile) for tile in tiles_of("gather", 4)),
    *(_variant(kind, form, (128, 128), split=True) for kind in ("bf16", "int8")
      for form in ("gather", "boxes")),
    _variant("bf16", "gather", (128, 256), parities=4),
    _variant("bf16", "boxes", (256, 128), parities=4),
    _variant("int8", "boxes", (256, 128), parities=4),
    *(_variant(kind, "gather", (128, 256), STRIDE=2) for kind in ("bf16", "int8")),
    *(_variant(kind, "gather", (128, 256), UPSAMPLE=True) for kind in ("bf16", "int8")),
    *(_variant(kind, "gather", (128, 128), EVEN_C=False) for kind in ("bf16", "int8", "e4m3")),
    _sum_variant(False), _sum_variant(True),
]  # fmt: skip
