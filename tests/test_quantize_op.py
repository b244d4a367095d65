"""Rounding to 8 bits: the CPU form, the Triton kernels in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcf_kernels.gpu.quantize import (
    Tiling,
    candidates,
    default_config,
    default_row_config,
    launch,
    launch_per_token,
    row_candidates,
    tiling,
)
from hcf_kernels.quantize import (
    quantize,
    quantize_per_token,
    quantize_per_token_ref,
    quantize_ref,
)
from hcf_kernels.rounding import LARGEST
from hcf_kernels.testing import assert_same_codes

KINDS = (torch.int8, torch.float8_e4m3fn)
# one, odd, prime, then the widths of U-Nets and text encoders
TOKENS = [(1, 1), (1, 3), (2, 5, 7), (1, 13, 31), (2, 3, 320), (1, 7, 640), (3, 1280), (5, 768)]
IMAGES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 13, 3, 1), (2, 64, 4, 4), (1, 320, 2, 2)]
SMALL = {"block_r": 2, "block_c": 16, "num_warps": 1}


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3
    return x.to(dtype)


def scales(channels: int) -> Tensor:
    """Some of them so small that values are clamped."""
    return torch.rand(channels, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01


@pytest.mark.parametrize("kind", KINDS, ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", [*TOKENS, *IMAGES], ids=str)
def test_known_scales_in_the_interpreter(shape: tuple[int, ...], kind: torch.dtype) -> None:
    for dtype in (torch.float32, torch.float16):
        x = values(shape, dtype)
        views = [(x, -1)] if len(shape) < 4 else [(x, 1)]
        if len(shape) == 4:
            views.append((x.to(memory_format=torch.channels_last), 1))
        for view, axis in views:
            for scale in (torch.tensor(0.02), scales(view.shape[axis])):
                exact = quantize_ref(view, scale, kind, axis)
                for found in (
                    launch(view, scale, kind, axis),
                    quantize(view, scale, kind, axis),
                ):
                    assert found.stride() == view.stride()
                    assert_same_codes(found, exact)


@pytest.mark.parametrize("kind", KINDS, ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_scales_of_tokens_in_the_interpreter(shape: tuple[int, ...], kind: torch.dtype) -> None:
    for dtype in (torch.float32, torch.float16):
        x = values(shape, dtype)
        exact, scale_exact = quantize_per_token_ref(x, kind)
        for codes, scale in (launch_per_token(x, kind), quantize_per_token(x, kind)):
            assert scale.dtype == torch.float32 and scale.shape == (*shape[:-1], 1)
            torch.testing.assert_close(scale, scale_exact, rtol=1e-6, atol=0)
            assert_same_codes(codes, exact)
            # the largest value of a token has the largest code
            assert torch.equal(codes.float().abs().amax(-1), torch.full(shape[:-1], LARGEST[kind]))


def test_a_token_of_zeros_has_scale_one() -> None:
    x = values((3, 8), torch.float32)
    x[1] = 0
    for codes, scale in (launch_per_token(x, torch.int8), quantize_per_token(x, torch.int8)):
        assert scale[1] == 1 and not codes[1].any()


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 300.0, -300.0])
    wanted = torch.tensor([-2, -2, 0, 0, 2, 2, 126, 127, -127], dtype=torch.int8)
    one = torch.tensor(1.0)
    for found in (launch(x, one, torch.int8), quantize(x, one, torch.int8)):
        assert torch.equal(found, wanted)


def test_strided_x_is_taken_as_it_is_seen() -> None:
    x = values((2, 6, 8, 10), torch.float32)
    for view in (x[..., ::2], x.transpose(1, 3), x.permute(2, 0, 3, 1), x[:, 1:4], x[:, :1]):
        for axis in (1, -1):
            scale = scales(view.shape[axis])
            exact = quantize_ref(view, scale, torch.int8, axis)
            for found in (
                launch(view, scale, torch.int8, axis),
                quantize(view, scale, torch.int8, axis),
            ):
                assert found.stride() == torch.empty_like(view).stride()
                assert_same_codes(found, exact)
        exact, _ = quantize_per_token_ref(view, torch.int8)
        for codes, _ in (launch_per_token(view, torch.int8), quantize_per_token(view, torch.int8)):
            assert codes.is_contiguous()
            assert_same_codes(codes, exact)


def test_nothing_in_nothing_out() -> None:
    x = torch.empty(0, 8)
    assert launch(x, torch.tensor(1.0), torch.int8).shape == (0, 8)
    assert launch_per_token(x, torch.int8)[1].shape == (0, 1)


def test_a_scale_belongs_to_a_column_or_a_row_of_memory() -> None:
    x, scale = torch.empty(2, 320, 8, 8), torch.ones(320)
    assert tiling(x, scale, 1) == Tiling(640, 64, 2, 320)
    nhwc = x.to(memory_format=torch.channels_last)
    assert tiling(nhwc, scale, 1) == Tiling(128, 320, 1, 320)
    assert tiling(x, scale[0], 1) == Tiling(1, x.numel(), 0, 1)


def test_tiles_waste_nothing_on_widths_of_u_nets() -> None:
    for width in (320, 640, 1280, 768, 1024):
        config = default_config(Tiling(8192, width, 1, width))
        assert width % config["block_c"] == 0 and config["block_r"] * config["block_c"] == 4096
    assert default_config(Tiling(1, 10**6, 0, 1))["block_c"] == 4096
    # 154 tokens of a text: one a program
    assert default_row_config(154, 768)["block_m"] == 1
    assert default_row_config(8192, 640)["block_m"] == 4


def test_every_candidate_runs() -> None:
    x = values((3, 5, 40), torch.float32)
    for scale in (torch.tensor(0.02), scales(40)):
        exact = quantize_ref(x, scale, torch.int8)
        shape = tiling(x, scale, -1)
        assert candidates(shape)[0] == default_config(shape)
        for config in [*candidates(shape), SMALL]:
            assert_same_codes(launch(x, scale, torch.int8, config=config), exact)
    exact, _ = quantize_per_token_ref(x, torch.int8)
    assert row_candidates(15, 40)[0] == default_row_config(15, 40)
    for config in row_candidates(15, 40):
        assert_same_codes(launch_per_token(x, torch.int8, config)[0], exact)
    for width in (320, 640, 1280):
        assert 6 <= len(row_candidates(8192, width)) <= 30


@pytest.mark.parametrize("kind", KINDS, ids=["int8", "e4m3"])
def test_operators(kind: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = values((2, 6, 4, 4), dtype)
        for view in (x, x.to(memory_format=torch.channels_last), x[..., ::2]):
            torch.library.opcheck(quantize, (view, scales(6), kind, 1))
            torch.library.opcheck(quantize, (view, torch.tensor(0.1), kind))
            torch.library.opcheck(quantize_per_token, (view, kind))


def test_it_compiles_without_a_graph_break() -> None:
    x = values((4, 16), torch.float32)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_per_token(x * 2, torch.int8)
        return quantize(codes * scale, torch.tensor(0.1), torch.int8), scale + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), call(x), strict=True))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    x, scale = values((2, 3, 8), torch.float32), torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"of \(3,\), x is \(2, 3, 8\): .* \(\) or \(8,\)"):
        quantize(x, scales(3), torch.int8)
    with pytest.raises(ValueError, match="axis 3 of x"):
        quantize(x, scales(3), torch.int8, 3)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn, not torch.uint8"):
        quantize(x, scale, torch.uint8)
    with pytest.raises(ValueError, match="not torch.float64"):
        quantize(x.double(), scale, torch.int8)
    with pytest.raises(ValueError, match=r"quantize_per_token takes .* of \(4, 0\)"):
        quantize_per_token(torch.empty(4, 0), torch.int8)
    with pytest.raises(ValueError, match="a row of 20000 values does not fit on chip"):
        launch_per_token(torch.empty(1, 20000), torch.int8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    e4m3 = torch.cuda.get_device_capability() >= (8, 9)
    for kind in KINDS[: 1 + e4m3]:
        for shape in [(2, 4096, 320), (2, 1024, 1280), (2, 1024, 5120), (2, 77, 768)]:
            x = values(shape, dtype).cuda()
            codes, scale = quantize_per_token(x, kind)
            exact, scale_exact = quantize_per_token_ref(x, kind)
            torch.testing.assert_close(scale, scale_exact, rtol=1e-6, atol=0)
            assert_same_codes(codes, exact)
            for size in (torch.tensor(0.02), scales(shape[-1])):
                exact = quantize_ref(x, size.cuda(), kind)
                assert_same_codes(quantize(x, size.cuda(), kind), exact)
        image = values((2, 320, 64, 64), dtype).cuda()
        for x in (image, image.to(memory_format=torch.channels_last)):
            exact = quantize_ref(x, scales(320).cuda(), kind, 1)
            assert_same_codes(quantize(x, scales(320).cuda(), kind, 1), exact)
