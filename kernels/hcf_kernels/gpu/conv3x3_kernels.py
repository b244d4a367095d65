"""Triton kernels of convolution 3x3 and 1x1: an implicit matrix product in NHWC.

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

import triton
import triton.language as tl


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
    """Program (tile and parity, part of K). QUANT 0: floats; 1: int8; 2: e4m3.

    Folded weights see the pixels from h - 1 (even rows) or h (odd rows) on; columns likewise.
    """
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
    twice: tl.constexpr = 2 if PARITIES == 4 else 1
    at = (near * P + p) * twice + parity // 2
    at = (at * Q + q) * twice + parity % 2
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
        # weights come first: a reshaped first operand would go through registers
        acc = tl.dot(weights, values.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    m = tl.arange(0, BLOCK_M)
    q = w_0 + m % BOX_W
    p = h_0 + m // BOX_W % BOX_H
    near = m // (BOX_W * BOX_H)
    there = (q < W) & (p < H) & (image_0 + near < B)
    twice: tl.constexpr = 2 if PARITIES == 4 else 1
    at = (near * H + p) * twice + parity // 2
    at = (at * W + q) * twice + parity % 2
    base = image_0.to(tl.int64) * (H * W * PARITIES * OUT)
    if SPLIT:
        base += tl.program_id(1).to(tl.int64) * part_stride
    _store(acc.T, at, image_0 + near, there, n_0, OUT, y_ptr + base, bias_ptr, add_ptr,
           residual_ptr + base, scale_x_ptr, scale_w_ptr, QUANT > 0, BIAS, ADD, RESIDUAL, SPLIT,
           BLOCK_N)  # fmt: skip


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, y_ptr, bias_ptr, add_ptr, residual_ptr, scale_x_ptr, scale_w_ptr,
    M, OUT, area, part_stride,
    SPLITS: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts (SPLITS, M, OUT) -> y (M, OUT), added in order; `area` positions an image.

    SPLITS is known when it is compiled, so that all its loads are on their way at once.
    """
    m_0 = tl.program_id(0) * BLOCK_M
    n_0 = tl.program_id(1) * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = n_0 + tl.arange(0, BLOCK_N)
    inside = (m_0 + m < M)[:, None] & (n < OUT)[None, :]
    base = m_0.to(tl.int64) * OUT
    parts_ptr += base
    acc = tl.zeros((BLOCK_M, BLOCK_N), parts_ptr.dtype.element_ty)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + (m[:, None] * OUT + n[None, :]), mask=inside, other=0)
        parts_ptr += part_stride
    _store_part(acc, m, (m_0 + m) // area, m_0 + m < M, n_0, OUT, y_ptr + base, bias_ptr, add_ptr,
                residual_ptr + base, scale_x_ptr, scale_w_ptr, SCALE, BIAS, ADD, RESIDUAL, False,
                BLOCK_N)  # fmt: skip
