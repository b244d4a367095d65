"""GroupNorm with SiLU: the CPU form, the Triton kernels in the interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcf_kernels.gpu.group_norm_silu import Shape, default_config, launch, slabs
from hcf_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_quantized,
    group_norm_silu_quantized_ref,
    group_norm_silu_ref,
)
from hcf_kernels.testing import assert_as_close_as_torch, assert_same_codes, to_float64

EPS = 1e-5
# (B, C, H, W), groups: 1, odd, prime; then U-Net widths on small maps
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((1, 6, 1, 1), 3),
    ((2, 12, 7, 5), 4),
    ((1, 33, 13, 3), 11),
    ((2, 64, 8, 8), 32),
    ((1, 320, 4, 4), 32),
]
# small tiles, so that small maps have several of everything
TWO_PASS = {"variant": "two_pass", "tile": 64, "splits": 3, "slab_bytes": 4000, "num_warps": 4}


def arguments(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, nhwc: bool, per_image: bool = False
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    # a mean of several deviations: sums of squares would cancel
    x = (noise(*shape) * 2 + 5).to(dtype)
    if nhwc:
        x = x.to(memory_format=torch.channels_last)
    size = shape[:2] if per_image else shape[1:2]
    weight, bias, add = noise(*size), noise(*size), noise(*shape[:2])
    return x, weight.to(dtype), bias.to(dtype), groups, EPS, "silu", add.to(dtype)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("config", [None, TWO_PASS], ids=["default", "two_pass"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_triton_kernels_in_the_interpreter(
    shape: tuple[int, ...], groups: int, config: Any, nhwc: bool
) -> None:
    for dtype in (torch.float32, torch.float16):
        made = arguments(shape, groups, dtype, nhwc)
        y = launch(*made, config=config)
        assert y.stride() == torch.empty_like(made[0]).stride()
        assert_as_close_as_torch(y, group_norm_silu_ref, *made)


@pytest.mark.parametrize("config", [None, TWO_PASS], ids=["default", "two_pass"])
def test_what_stands_around_it_can_be_left_out_or_be_per_image(config: Any) -> None:
    for nhwc in (False, True):
        x, weight, bias, groups, eps, _, add = arguments((2, 12, 6, 5), 3, torch.float32, nhwc)
        plain = (x, weight, bias, groups, eps, "none")
        assert_as_close_as_torch(launch(*plain, config=config), group_norm_silu_ref, *plain)
        gelu = (*plain[:-1], "gelu", add)
        assert_as_close_as_torch(launch(*gelu, config=config), group_norm_silu_ref, *gelu)
        assert_as_close_as_torch(group_norm_silu(*gelu), group_norm_silu_ref, *gelu)
        made = arguments((2, 12, 6, 5), 3, torch.float32, nhwc, per_image=True)
        assert_as_close_as_torch(launch(*made, config=config), group_norm_silu_ref, *made)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("config", [None, TWO_PASS], ids=["default", "two_pass"])
def test_quantised_output_is_the_rounded_one(dtype: torch.dtype, config: Any) -> None:
    scale = torch.tensor(0.02)
    for nhwc in (False, True):
        *head, add = arguments((2, 24, 7, 6), 4, torch.float32, nhwc)
        found = launch(*head, add, scale, dtype, config=config)
        exact = group_norm_silu_quantized_ref(*to_float64(tuple(head)), scale, dtype, add.double())
        assert_same_codes(found, exact)
        on_cpu = group_norm_silu_quantized(*head, scale, dtype, add)
        assert on_cpu.stride() == found.stride()
        assert_same_codes(on_cpu, exact)


def test_strided_x_is_taken_as_it_is_seen() -> None:
    x, *rest = arguments((2, 16, 6, 10), 4, torch.float32, nhwc=False)
    tokens = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    for view in (x[:, :, :, ::2], x.transpose(2, 3), x[:, :, 0, :], tokens):
        assert_as_close_as_torch(launch(view, *rest), group_norm_silu_ref, view, *rest)
        assert_as_close_as_torch(group_norm_silu(view, *rest), group_norm_silu_ref, view, *rest)


def test_slabs_cover_everything_once() -> None:
    shape = Shape(batch=3, channels=128, positions=1024, groups=32, nhwc=True, element_bytes=2)
    for size in (1, 10_000, 100_000, 300_000, 2**30):
        seen = [
            (image, group)
            for first, images, start, groups in slabs(shape, size)
            for image in range(first, first + images)
            for group in range(start, start + groups)
        ]
        assert sorted(seen) == [(i, g) for i in range(3) for g in range(32)]
    # a slab of one group of 4 channels would touch 8 bytes of each row
    assert slabs(shape, 1)[0] == (0, 1, 0, 4)


def test_small_groups_take_one_pass() -> None:
    def variant(*sizes: int) -> str:
        return str(default_config(Shape(*sizes, nhwc=True, element_bytes=2))["variant"])

    assert variant(2, 1280, 16 * 16, 32) == variant(2, 1280, 64, 32) == "one_pass"
    assert variant(2, 320, 64 * 64, 32) == variant(1, 128, 1024 * 1024, 32) == "two_pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_on_the_cpu(dtype: torch.dtype) -> None:
    for nhwc in (False, True):
        for per_image in (False, True):
            made = arguments((2, 32, 8, 8), 8, dtype, nhwc, per_image)
            assert_as_close_as_torch(group_norm_silu(*made), group_norm_silu_ref, *made)
            torch.library.opcheck(group_norm_silu, made)
    *head, add = made
    for kind in (torch.int8, torch.float8_e4m3fn):
        torch.library.opcheck(group_norm_silu_quantized, (*head, torch.tensor(0.1), kind, add))


def test_it_compiles_without_a_graph_break() -> None:
    made = arguments((1, 8, 4, 4), 2, torch.float32, nhwc=False)

    def call(x: Tensor) -> Tensor:
        return group_norm_silu(x, *made[1:]) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(made[0]), call(made[0]))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    x, weight, bias, groups, eps, silu, add = arguments((2, 8, 4, 4), 2, torch.float32, nhwc=False)
    with pytest.raises(ValueError, match="8 channels do not make 3 groups"):
        group_norm_silu(x, weight, bias, 3, eps)
    with pytest.raises(ValueError, match=r"weight is \(4,\), x \(B, C, ...\) is \(2, 8, 4, 4\)"):
        group_norm_silu(x, weight[:4], bias, groups, eps)
    with pytest.raises(ValueError, match="add is"):
        group_norm_silu(x, weight, bias, groups, eps, silu, add[:1])
    with pytest.raises(ValueError, match="both"):
        group_norm_silu(x, weight, add, groups, eps)
    with pytest.raises(ValueError, match="none, silu, gelu, not relu"):
        group_norm_silu(x, weight, bias, groups, eps, "relu")
    with pytest.raises(ValueError, match="float64 of"):
        group_norm_silu(x.double(), weight, bias, groups, eps)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn, not torch.int32"):
        group_norm_silu_quantized(x, weight, bias, groups, eps, silu, add[0, 0], torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for shape, groups in [*SHAPES, ((2, 320, 64, 64), 32), ((1, 128, 512, 512), 32)]:
        for nhwc in (False, True):
            made = tuple(
                a.cuda() if isinstance(a, Tensor) else a
                for a in arguments(shape, groups, dtype, nhwc)
            )
            assert_as_close_as_torch(group_norm_silu(*made), group_norm_silu_ref, *made)
