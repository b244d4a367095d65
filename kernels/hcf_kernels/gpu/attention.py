"""Attention to a short text in Triton: keys and values of a head stay on chip.

Program (part of the image tokens, head, image): loads k (S, K) and v (S, K) once, then goes over
its tiles of BLOCK_L image tokens. The whole row of scores is there, so the softmax is exact and
taken once. B batch, N heads, L image tokens, S keys, K head dim.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.attention import SHORT, output_like
from hcf_kernels.tables import Config, Plan, find_config, shape_key

LOG2_E = tl.constexpr(1.4426950408889634)
ON_CHIP_BYTES = 128 * 1024  # of padded keys and values: an A100 has 163 KB for all
PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def cross_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, o_ptr,
    q_b, q_n, q_l, k_b, k_n, k_s, v_b, v_n, v_s, o_b, o_n, o_l,
    L, S, N, tiles, scale,
    BIAS: tl.constexpr, K: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % N
    image = (tl.program_id(1) // N).to(tl.int64)
    q_ptr += image * q_b + head * q_n
    k_ptr += image * k_b + head * k_n
    v_ptr += image * v_b + head * v_n
    o_ptr += image * o_b + head * o_n
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_K)
    there = (s < S)[:, None] & (d < K)[None, :]
    k = tl.load(k_ptr + s[:, None] * k_s + d[None, :], mask=there, other=0.0)
    v = tl.load(v_ptr + s[:, None] * v_s + d[None, :], mask=there, other=0.0)
    hidden = tl.where(s < S, 0.0, float("-inf"))
    if BIAS:
        hidden += tl.load(bias_ptr + image * S + s, mask=s < S, other=0.0).to(tl.float32) * LOG2_E
    first = tl.program_id(0) * tiles
    for tile in range(first, first + tiles):
        rows = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (rows < L)[:, None] & (d < K)[None, :]
        q = tl.load(q_ptr + rows[:, None] * q_l + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        scores += hidden[None, :]
        p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / tl.sum(p, axis=1)[:, None]
        out = o_ptr + rows[:, None] * o_l + d[None, :]
        tl.store(out, o.to(o_ptr.dtype.element_ty), mask=inside)


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel is for these: keys and values of a head that fit on chip."""
    keys, width = k.shape[2:]
    held = 2 * math.prod(_padded(keys, width)) * k.element_size()
    return 0 < keys <= SHORT and 0 < width and held <= ON_CHIP_BYTES


def default_config(batch: int, heads: int, tokens: int, keys: int, width: int) -> Config:
    """Two programs a multiprocessor, each over several tiles of image tokens.

    Of 64 tokens, the least that wgmma takes; of 32 where k and v leave no registers for more.
    """
    wide = math.prod(_padded(keys, width)) > 8192
    block_l = 32 if wide else 64
    parts = max(1, min(triton.cdiv(tokens, block_l), PROGRAMS // max(1, batch * heads)))
    return {
        "block_l": block_l,
        "parts": parts,
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if wide else 2,
    }


def candidates(batch: int, heads: int, tokens: int, keys: int, width: int) -> list[Config]:
    """What a tuner tries; the default is the first."""
    found = [default_config(batch, heads, tokens, keys, width)]
    for block_l in (32, 64, 128):
        for share in (1, 2, 4):
            parts = max(1, triton.cdiv(triton.cdiv(tokens, block_l), share))
            for warps in (4, 8):
                stages = found[0]["num_stages"]
                config = dict(block_l=block_l, parts=parts, num_warps=warps, num_stages=stages)
                found += [config] if config not in found else []
    return found


def _padded(keys: int, width: int) -> tuple[int, int]:
    return max(16, triton.next_power_of_2(keys)), max(16, triton.next_power_of_2(width))


def launch(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernel for `hcf::attention`; arguments as there. Heads must lie whole in memory."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, tokens, width = q.shape
    keys = k.shape[2]
    default = default_config(batch, heads, tokens, keys, width)
    config = config or find_config("attention", _key(q, k), default, q.device)
    o = output_like(q)
    block_s, block_k = _padded(keys, width)
    tiles = triton.cdiv(triton.cdiv(tokens, config["block_l"]), config["parts"])
    bias = q if key_bias is None else key_bias.contiguous()
    cross_attention_kernel[(triton.cdiv(tokens, tiles * config["block_l"]), batch * heads)](
        q, k, v, bias, o,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        tokens, keys, heads, tiles, width**-0.5 if scale is None else scale,
        BIAS=key_bias is not None, K=width,
        BLOCK_L=config["block_l"],
        BLOCK_S=block_s, BLOCK_K=block_k,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return o


def plan(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Plan:
    """How `hcf::attention` can run where the kernel takes it; arguments as there."""
    batch, heads, tokens, width = q.shape
    return Plan(
        _key(q, k),
        candidates(batch, heads, tokens, k.shape[2], width),
        lambda config: launch(q, k, v, key_bias, scale, config),
    )


PLANS = {"attention": plan}


def _key(q: Tensor, k: Tensor) -> str:
    return shape_key((*q.shape[:3], k.shape[2], q.shape[3]), q.dtype)


def _variant(keys: int, width: int) -> Variant:
    pointers = {f"{t}_ptr": "*bf16" for t in ("q", "k", "v", "bias", "o")}
    axes = {"q": "bnl", "k": "bns", "v": "bns", "o": "bnl"}
    strides = {f"{t}_{axis}": "i32" for t, names in axes.items() for axis in names}
    sizes = {name: "i32" for name in ("L", "S", "N", "tiles")}
    flags = {n: "constexpr" for n in ("BIAS", "K", "BLOCK_L", "BLOCK_S", "BLOCK_K")}
    config = default_config(2, 10, 4096, keys, width)
    block_s, block_k = _padded(keys, width)
    return Variant(
        f"attention.text{keys}_head{width}", cross_attention_kernel,
        pointers | strides | sizes | {"scale": "fp32"} | flags,
        {"BIAS": True, "K": width, "BLOCK_L": config["block_l"], "BLOCK_S": block_s,
         "BLOCK_K": block_k},
        (*pointers, *strides), config["num_warps"], config["num_stages"],
        expect={80: ("HMMA",), 90: ("HMMA" if config["block_l"] < 64 else "HGMMA",)},
    )  # fmt: skip


VARIANTS = [_variant(*each) for each in ((77, 64), (256, 64), (77, 40), (77, 80), (77, 160))]
