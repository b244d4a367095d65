"""LayerNorm: the CPU form, the Triton kernel in the interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcf_kernels.gpu.layer_norm import candidates, default_config, launch, launch_per_token
from hcf_kernels.layer_norm import (
    layer_norm,
    layer_norm_per_token,
    layer_norm_per_token_ref,
    layer_norm_quantized,
    layer_norm_quantized_ref,
    layer_norm_ref,
)
from hcf_kernels.testing import assert_as_close_as_torch, assert_same_codes, to_float64

EPS = 1e-5
KINDS = (torch.int8, torch.float8_e4m3fn)
# one, odd, prime, then the widths of U-Nets and text encoders
SHAPES = [(1, 1), (2, 3), (3, 5, 7), (1, 13, 31), (2, 9, 320), (1, 7, 640), (2, 2, 1280), (5, 768)]
ROWS = {"block_m": 4, "num_warps": 4}


def arguments(shape: tuple[int, ...], dtype: torch.dtype, affine: str = "both") -> tuple[Any, ...]:
    """`affine` both, weight, or none."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    # a mean of several deviations: sums of squares would cancel
    x = (noise(*shape) * 2 + 7).to(dtype)
    weight, bias = noise(shape[-1]).to(dtype), noise(shape[-1]).to(dtype)
    given = {"both": (weight, bias), "weight": (weight, None), "none": (None, None)}
    return x, *given[affine], EPS


@pytest.mark.parametrize("config", [None, ROWS], ids=["default", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernel_in_the_interpreter(shape: tuple[int, ...], config: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        for affine in ("both", "weight", "none"):
            made = arguments(shape, dtype, affine)
            assert_as_close_as_torch(launch(*made, config=config), layer_norm_ref, *made)


@pytest.mark.parametrize("kind", KINDS, ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 13, 31), (2, 9, 320)], ids=str)
def test_quantised_output_is_the_rounded_one(shape: tuple[int, ...], kind: torch.dtype) -> None:
    for affine in ("both", "none"):
        made = arguments(shape, torch.float32, affine)
        scale = torch.tensor(0.02)
        exact = layer_norm_quantized_ref(*to_float64(made), scale, kind)
        assert_same_codes(launch(*made, scale, kind), exact)
        assert_same_codes(launch(*made, scale, kind, ROWS), exact)
        assert_same_codes(layer_norm_quantized(*made, scale, kind), exact)
        exact, scale = layer_norm_per_token_ref(*to_float64(made), kind)
        for codes, found in (
            launch_per_token(*made, kind),
            launch_per_token(*made, kind, ROWS),
            layer_norm_per_token(*made, kind),
        ):
            assert found.shape == (*shape[:-1], 1) and found.dtype == torch.float32
            torch.testing.assert_close(found, scale.float(), rtol=1e-5, atol=0)
            assert_same_codes(codes, exact)


def test_a_token_of_zeros_has_scale_one() -> None:
    x = torch.full((3, 8), 2.5)
    for codes, scale in (
        launch_per_token(x, None, None, EPS, torch.int8),
        layer_norm_per_token(x, None, None, EPS, torch.int8),
    ):
        assert torch.equal(scale, torch.ones(3, 1)) and not codes.any()


def test_strided_x_is_taken_as_it_is_seen() -> None:
    x, weight, bias, eps = arguments((4, 6, 20), torch.float32)
    for view in (x[:, ::2], x[..., :10], x.transpose(0, 1), x[..., ::2], x.transpose(1, 2)):
        made = (view, weight[: view.shape[-1]], bias[: view.shape[-1]], eps)
        for found in (launch(*made), layer_norm(*made)):
            assert found.is_contiguous()
            assert_as_close_as_torch(found, layer_norm_ref, *made)


def test_nothing_in_nothing_out() -> None:
    assert launch(torch.empty(0, 8), None, None, EPS).shape == (0, 8)
    assert launch_per_token(torch.empty(0, 8), None, None, EPS, torch.int8)[1].shape == (0, 1)


def test_every_candidate_runs() -> None:
    made = arguments((5, 40), torch.float32)
    found = candidates(5, 40)
    assert found[0] == default_config(5, 40)
    for config in found:
        assert_as_close_as_torch(launch(*made, config=config), layer_norm_ref, *made)
    for width in (320, 640, 1280):
        assert 6 <= len(candidates(8192, width)) <= 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operators(dtype: torch.dtype) -> None:
    for affine in ("both", "none"):
        made = arguments((2, 5, 32), dtype, affine)
        assert_as_close_as_torch(layer_norm(*made), layer_norm_ref, *made)
        torch.library.opcheck(layer_norm, made)
        strided = (made[0].transpose(0, 1), *made[1:])
        torch.library.opcheck(layer_norm, strided)
        for kind in KINDS:
            torch.library.opcheck(layer_norm_quantized, (*made, torch.tensor(0.1), kind))
            torch.library.opcheck(layer_norm_per_token, (*strided, kind))


def test_a_float32_affine_goes_with_half_tokens() -> None:
    x, weight, bias, eps = arguments((3, 16), torch.float16)
    made = (x, weight.float(), bias.float(), eps)
    assert_as_close_as_torch(launch(*made), layer_norm_ref, *made)
    assert_as_close_as_torch(layer_norm(*made), layer_norm_ref, *made)


def test_it_compiles_without_a_graph_break() -> None:
    x, weight, bias, eps = arguments((4, 16), torch.float32)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = layer_norm_per_token(x, weight, bias, eps, torch.int8)
        return codes * scale, layer_norm(x, None, None, eps) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), call(x), strict=True))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    x, weight, bias, eps = arguments((2, 8), torch.float32)
    with pytest.raises(ValueError, match=r"weight is \(4,\), x \(..., D\) is \(2, 8\)"):
        layer_norm(x, weight[:4], bias, eps)
    with pytest.raises(ValueError, match=r"bias is \(1, 8\)"):
        layer_norm(x, weight, bias[None], eps)
    with pytest.raises(ValueError, match="not torch.float64"):
        layer_norm(x.double(), weight, bias, eps)
    with pytest.raises(ValueError, match=r"scale is torch.float32 of \(8,\): .* of \(\)"):
        layer_norm_quantized(x, weight, bias, eps, weight, torch.int8)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn, not torch.int32"):
        layer_norm_per_token(x, weight, bias, eps, torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    kinds = KINDS[: 1 + (torch.cuda.get_device_capability() >= (8, 9))]
    for shape in [*SHAPES, (2, 4096, 320), (2, 4096, 640), (2, 1024, 1280), (2, 77, 1024)]:
        for affine in ("both", "none"):
            made = tuple(
                a.cuda() if isinstance(a, Tensor) else a for a in arguments(shape, dtype, affine)
            )
            assert_as_close_as_torch(layer_norm(*made), layer_norm_ref, *made)
            if made[0].numel() < 10_000:
                continue
            for kind in kinds:
                exact, scale = layer_norm_per_token_ref(*to_float64(made), kind)
                codes, found = layer_norm_per_token(*made, kind)
                torch.testing.assert_close(found, scale.float(), rtol=1e-5, atol=0)
                assert_same_codes(codes, exact)
