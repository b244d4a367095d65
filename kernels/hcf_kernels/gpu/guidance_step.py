"""Guidance and a scheduler's step in Triton: one elementwise pass, one before it to rescale.

    moments_kernel    where guidance is rescaled: mean and squared differences of t and of the
                      guided m, of `splits` parts of each image
    step_kernel       merges those, then everything else; the coefficients lie on the GPU, so that a
                      captured graph takes those of each step

Merging is that of Chan, Golub and LeVeque (1979). A program is inside one image, at offsets of 32
bits. P is the innermost size of sample's memory, Q the other: C H W is Q * P of NCHW with P = H W,
of channels_last with P = C. Where noise has the other format its offset is (i % P) * Q + i // P.
B images, N values of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.tables import Config, Plan, find_config, shape_key

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


@triton.jit
def _predictions(  # type: ignore[no-untyped-def]
    noise_ptr, i, inside, N, P, Q, guidance_scale, GUIDED: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """t and the guided m at values i of this program's image, float32."""
    image = tl.program_id(1).to(tl.int64)
    at = (i % P) * Q + i // P if TRANSPOSED else i
    first = tl.load(noise_ptr + image * N + at, mask=inside, other=0.0).to(tl.float32)
    text, guided = first, first
    if GUIDED:
        second = (tl.num_programs(1) + image) * N
        text = tl.load(noise_ptr + second + at, mask=inside, other=0.0).to(tl.float32)
        guided = first + guidance_scale * (text - first)
    return text, guided


@triton.jit
def _grown(mean, squares, count, v, inside, n):  # type: ignore[no-untyped-def]
    """Mean and squared differences of `count` values, with n more of v, which is 0 outside."""
    tile_mean = tl.sum(v, axis=0) / n
    away = tl.where(inside, v - tile_mean, 0.0)
    delta = tile_mean - mean
    total = count + n
    squares += tl.sum(away * away, axis=0) + delta * delta * (count * n / total)
    return mean + delta * (n / total), squares


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    noise_ptr, moments_ptr, N, P, Q, split_n, guidance_scale,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (split, image): of split_n values. moments (B, splits, 4): of t, then of m."""
    first = tl.program_id(0) * split_n
    last = tl.minimum(first + split_n, N)
    text_mean, text_squares, mean, squares, count = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < last
        text, guided = _predictions(noise_ptr, i, inside, N, P, Q, guidance_scale, True, TRANSPOSED)
        n = tl.minimum(last - start, BLOCK).to(tl.float32)
        text_mean, text_squares = _grown(text_mean, text_squares, count, text, inside, n)
        mean, squares = _grown(mean, squares, count, guided, inside, n)
        count += n
    out = moments_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(out, text_mean)
    tl.store(out + 1, text_squares)
    tl.store(out + 2, mean)
    tl.store(out + 3, squares)


@triton.jit
def _variance(pairs, there, counts, N):  # type: ignore[no-untyped-def]
    """Times N: of an image, from the moments of its parts."""
    means = tl.load(pairs, mask=there, other=0.0)
    squares = tl.load(pairs + 1, mask=there, other=0.0)
    away = tl.where(there, means - tl.sum(means * counts, axis=0) / N, 0.0)
    return tl.sum(squares + counts * away * away, axis=0)


@triton.jit
def step_kernel(  # type: ignore[no-untyped-def]
    noise_ptr, sample_ptr, extra_ptr, coefficients_ptr, threshold_ptr, moments_ptr,
    x_prev_ptr, x_0_ptr, N, P, Q, split_n, splits, guidance_scale, rescale, clip,
    GUIDED: tl.constexpr, TRANSPOSED: tl.constexpr, RESCALE: tl.constexpr, CLIP: tl.constexpr,
    THRESHOLD: tl.constexpr, MULTISTEP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, image): x_prev, and x_0 where there is an extra."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    _, m = _predictions(noise_ptr, i, inside, N, P, Q, guidance_scale, GUIDED, TRANSPOSED)
    if RESCALE:
        split = tl.arange(0, SPLITS)
        there = split < splits
        counts = tl.where(there, tl.minimum(N - split * split_n, split_n), 0).to(tl.float32)
        parts = moments_ptr + (image * splits + split) * 4
        ratio = tl.sqrt(_variance(parts, there, counts, N) / _variance(parts + 2, there, counts, N))
        m = m * (rescale * ratio + (1.0 - rescale))
    x = tl.load(sample_ptr + image * N + i, mask=inside, other=0.0).to(tl.float32)
    x_0 = tl.load(coefficients_ptr) * x + tl.load(coefficients_ptr + 1) * m
    if CLIP:
        x_0 = tl.minimum(tl.maximum(x_0, -clip), clip)
    if THRESHOLD:
        s = tl.load(threshold_ptr + image).to(tl.float32)
        x_0 = tl.minimum(tl.maximum(x_0, -s), s) / s
    x_prev = tl.load(coefficients_ptr + 2) * x_0 + tl.load(coefficients_ptr + 3) * x
    x_prev += tl.load(coefficients_ptr + 4) * m
    if MULTISTEP:
        z = tl.load(extra_ptr + image * N + i, mask=inside, other=0.0).to(tl.float32)
        x_prev += tl.load(coefficients_ptr + 5) * z
        tl.store(x_0_ptr + image * N + i, x_0.to(x_0_ptr.dtype.element_ty), mask=inside)
    tl.store(x_prev_ptr + image * N + i, x_prev.to(x_prev_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Shape:
    """B images of N values."""

    images: int
    values: int


def default_config(shape: Shape) -> Config:
    """Blocks of 1024 where they fill the GPU twice, else of 256; moments of 64 parts at most."""
    large = shape.images * shape.values >= PROGRAMS * 1024
    return {
        "block": 1024 if large else 256,
        "moments_block": 1024,
        "splits": max(1, min(64, shape.values // 1024)),
        "num_warps": 4,
    }


def candidates(shape: Shape) -> list[Config]:
    """What a tuner tries; the default is the first."""
    found = [default_config(shape)]
    for block in (128, 256, 512, 1024, 2048):
        for warps in (1, 2, 4, 8):
            if 64 <= block // warps <= 512:
                found.append({**found[0], "block": block, "num_warps": warps})
    return [config for i, config in enumerate(found) if config not in found[:i]]


def launch(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernels for `hcf::guidance_step`; arguments as there.

    Tensors that are neither NCHW nor channels_last are copied first.
    """
    limits = (guidance_scale, rescale, clip, threshold)
    return _run(noise, sample, None, coefficients, limits, config)[0]


def launch_multistep(
    noise: Tensor, sample: Tensor, extra: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernels for `hcf::guidance_multistep`; arguments as there."""
    limits = (guidance_scale, rescale, clip, threshold)
    return _run(noise, sample, extra, coefficients, limits, config)


def _run(
    noise: Tensor, sample: Tensor, extra: Tensor | None, coefficients: Tensor,
    limits: tuple[float, float, float | None, Tensor | None], config: Config | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_prev and x_0, with the strides of sample where it has no gaps."""
    shape = Shape(len(sample), sample[0].numel())
    if shape.values > 2**30:
        raise ValueError(f"an image of {shape.values} values needs 64-bit offsets; use tiles")
    if sample.numel() == 0:
        return torch.empty_like(sample), torch.empty_like(sample)
    default = default_config(shape)
    config = config or find_config("guidance_step", _key(sample), default, sample.device)
    source = sample if _is_dense(sample) else sample.contiguous()
    noise = noise if _is_dense(noise) else noise.contiguous()
    z = None if extra is None else _as(extra, source)
    with torch.cuda.device_of(sample):
        made = _step(noise, source, z, coefficients.contiguous(), limits, shape, config)
    x_prev, x_0 = (_as(t, torch.empty_like(sample)) for t in made)
    return x_prev, x_0


def _step(
    noise: Tensor, sample: Tensor, extra: Tensor | None, coefficients: Tensor,
    limits: tuple[float, float, float | None, Tensor | None], shape: Shape, config: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_prev and x_0 of NCHW or channels_last; the latter is x_prev where there is no extra."""
    guidance_scale, rescale, clip, threshold = limits
    nhwc = not sample.is_contiguous()
    inner = sample.shape[1] if nhwc else shape.values // sample.shape[1]
    turned = noise.is_contiguous() == nhwc and 1 < inner < shape.values
    part = config["moments_block"]
    split_n = triton.cdiv(triton.cdiv(shape.values, config["splits"]), part) * part
    splits = triton.cdiv(shape.values, split_n)
    sizes = (shape.values, inner, shape.values // inner, split_n)
    x_prev = torch.empty_like(sample)
    x_0 = x_prev if extra is None else torch.empty_like(sample)
    moments = coefficients
    if rescale:
        moments = coefficients.new_empty(shape.images, splits, 4)
        moments_kernel[(splits, shape.images)](
            noise, moments, *sizes, guidance_scale, TRANSPOSED=turned, BLOCK=part, num_warps=4
        )
    step_kernel[(triton.cdiv(shape.values, config["block"]), shape.images)](
        noise, sample, sample if extra is None else extra, coefficients,
        coefficients if threshold is None else threshold.contiguous(), moments, x_prev, x_0,
        *sizes, splits, guidance_scale, rescale, 0.0 if clip is None else clip,
        GUIDED=len(noise) == 2 * shape.images, TRANSPOSED=turned, RESCALE=rescale != 0,
        CLIP=clip is not None, THRESHOLD=threshold is not None, MULTISTEP=extra is not None,
        SPLITS=triton.next_power_of_2(splits), BLOCK=config["block"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return x_prev, x_0


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _as(x: Tensor, other: Tensor) -> Tensor:
    """x with the strides of `other`."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


def _key(sample: Tensor) -> str:
    return shape_key(tuple(sample.shape), sample.dtype)


def plan(
    noise: Tensor, sample: Tensor, coefficients: Tensor, guidance_scale: float,
    rescale: float = 0.0, clip: float | None = None, threshold: Tensor | None = None,
) -> Plan:  # fmt: skip
    """How `hcf::guidance_step` can run; arguments as there. The multistep form takes the same."""
    made = (noise, sample, coefficients, guidance_scale, rescale, clip, threshold)
    return Plan(
        _key(sample),
        candidates(Shape(len(sample), sample[0].numel())),
        lambda config: launch(*made, config),
    )


PLANS = {"guidance_step": plan}


def _variants() -> list[Variant]:
    pointers = {"noise_ptr": "*bf16", "sample_ptr": "*bf16", "extra_ptr": "*bf16",
                "coefficients_ptr": "*fp32", "threshold_ptr": "*fp32", "moments_ptr": "*fp32",
                "x_prev_ptr": "*bf16", "x_0_ptr": "*bf16"}  # fmt: skip
    sizes = {n: "i32" for n in ("N", "P", "Q", "split_n")}
    found = []
    for turned in (False, True):
        layout = "turned" if turned else "same"
        constants: dict[str, Any] = {"TRANSPOSED": turned, "BLOCK": 1024}
        found.append(
            Variant(
                f"guidance_step.moments_{layout}", moments_kernel,
                {"noise_ptr": "*bf16", "moments_ptr": "*fp32"} | sizes
                | {"guidance_scale": "fp32"} | {n: "constexpr" for n in constants},
                constants, ("noise_ptr", "N", "P", "split_n"),
            )
        )  # fmt: skip
        for name, rescale, clip, multistep in (("plain", False, False, False),
                                               ("all", True, True, True)):  # fmt: skip
            flags = {"GUIDED": True, "TRANSPOSED": turned, "RESCALE": rescale, "CLIP": clip,
                     "THRESHOLD": clip, "MULTISTEP": multistep, "SPLITS": 64,
                     "BLOCK": 1024}  # fmt: skip
            found.append(
                Variant(
                    f"guidance_step.{name}_{layout}", step_kernel,
                    pointers | sizes | {"splits": "i32"}
                    | {n: "fp32" for n in ("guidance_scale", "rescale", "clip")}
                    | {n: "constexpr" for n in flags},
                    flags, ("noise_ptr", "sample_ptr", "extra_ptr", "x_prev_ptr", "x_0_ptr",
                            "N", "P"),
                )
            )  # fmt: skip
    return found


VARIANTS = _variants()
