"""GEGLU in one product: the CPU form, the Triton kernels in the interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_int8_gemm import FORMS, TILE, codes, reference, to_gpu
from torch import Tensor

from hcf_kernels.geglu import (
    geglu,
    geglu_gate,
    geglu_gate_ref,
    geglu_int8,
    geglu_int8_ref,
    geglu_ref,
)
from hcf_kernels.gpu.geglu import (
    Shape,
    candidates,
    default_config,
    gate_candidates,
    launch,
    launch_gate,
)
from hcf_kernels.testing import assert_as_close_as_torch

# (M, N, K): 1, odd, prime, a U-Net's widths on few tokens, rows that descriptors can read
SHAPES = [(1, 1, 1), (1, 48, 64), (33, 7, 5), (35, 37, 131), (40, 48, 320)]


def arguments(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x (M, K), weight (2N, K), bias (2N,): sums about 1, where the gate bends."""
    generator = torch.Generator().manual_seed(1)
    sizes = {(m, k): 1.0, (2 * n, k): k**-0.5, (2 * n,): 0.5}
    made = [torch.randn(size, generator=generator) * scale for size, scale in sizes.items()]
    return tuple(each.to(dtype) for each in made)


def int8_arguments(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """a, weight, scale_a (M,), scale_b (2N,), bias"""
    x, weight, bias = arguments(m, n, k, torch.float32)
    scale_a, scale_b = (t.abs().amax(1) / 127 + 1e-4 for t in (x, weight))
    quantised = [
        (t / s[:, None]).round().to(torch.int8) for t, s in ((x, scale_a), (weight, scale_b))
    ]
    return *quantised, scale_a, scale_b, bias.to(dtype)


def int8_launch(a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor,
                dtype: torch.dtype, config: Any = None) -> Tensor:  # fmt: skip
    return launch(a, weight, bias, scale_a, scale_b, dtype, config)


def close_int8(found: Tensor, made: tuple[Any, ...]) -> None:
    assert_as_close_as_torch(found, reference(geglu_int8_ref, found.dtype), *made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernels_in_the_interpreter(shape: tuple[int, int, int], form: str) -> None:
    config = TILE | FORMS[form]
    for dtype in (torch.float32, torch.float16):
        made = arguments(*shape, dtype)
        assert_as_close_as_torch(launch(*made, config=config), geglu_ref, *made)
    codes = int8_arguments(*shape, torch.float32)
    close_int8(int8_launch(*codes, torch.float16, config), codes)


def test_default_configurations_in_the_interpreter() -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            made = arguments(*shape, dtype)
            assert_as_close_as_torch(launch(*made), geglu_ref, *made)
        codes = int8_arguments(*shape, torch.float32)
        close_int8(int8_launch(*codes, torch.float32), codes)


@pytest.mark.parametrize("form", ["persistent", "descriptors"])
def test_a_program_takes_many_tiles(form: str) -> None:
    small = {"block_m": 16, "block_n": 16, "block_k": 32, "persistent": 1, "strips": 1}
    made = arguments(16 * 9, 16 * 16, 32, torch.float32)  # more tiles than the 132 programs
    assert_as_close_as_torch(launch(*made, config=TILE | FORMS[form] | small), geglu_ref, *made)


def test_bias_and_vectors_of_scales_can_be_left_out() -> None:
    x, weight, _ = arguments(20, 24, 48, torch.float32)
    a, b, scale_a, scale_b, _ = int8_arguments(20, 24, 48, torch.float32)
    made = (a, b, scale_a.mean(), scale_b.mean())
    for form in FORMS:
        config = TILE | FORMS[form]
        assert_as_close_as_torch(launch(x, weight, config=config), geglu_ref, x, weight)
        found = launch(a, b, None, *made[2:], torch.float32, config)
        close_int8(found, made)
        assert torch.allclose(geglu_int8(*made, dtype=torch.float32), found, atol=1e-5)


def test_sums_of_int8_are_exact() -> None:
    a, weight = codes(5, 300), codes(12, 300, seed=1)
    a[0], weight[0], weight[6] = -128, -128, 127
    hidden, gate = (a.long() @ weight.long().T).float().chunk(2, dim=1)
    assert (gate.abs() > 40).all()  # all of the gate is open or shut
    exact = hidden * gate.clamp(min=0)
    one = torch.ones(())
    for form in FORMS:
        found = launch(a, weight, None, one, one, torch.float32, TILE | FORMS[form])
        assert torch.equal(found[gate > 0], exact[gate > 0])
        assert (found[gate < 0] / hidden[gate < 0]).abs().max() < 1e-8
    assert torch.equal(geglu_int8(a, weight, one, one, dtype=torch.float32), exact)


def test_the_polynomial_of_gelu() -> None:
    gate = torch.cat([torch.linspace(-9, 9, 4000), torch.tensor([1e30, torch.inf, -torch.inf])])
    found = launch_gate(torch.cat([torch.ones_like(gate), gate])[None])[0]
    exact = torch.nn.functional.gelu(gate[:-2].double())
    # 4e-8 and what float32 cannot hold
    assert ((found[:-2] - exact).abs() <= 4e-8 + 2**-23 * exact.abs()).all()
    assert found[-2] == torch.inf and found[-1].abs() < 1e-8
    assert launch_gate(torch.tensor([[1.0, torch.nan]])).isnan().all()


def test_the_gate_on_its_own() -> None:
    for rows, width in ((1, 1), (3, 7), (5, 1030), (19, 320)):
        for dtype in (torch.float32, torch.float16):
            x, _, _ = arguments(rows, 1, 2 * width, dtype)
            for config in (None, {"block_m": 4, "block_n": 256, "num_warps": 4}):
                assert_as_close_as_torch(launch_gate(x, config), geglu_gate_ref, x)
    wide = arguments(6, 1, 40, torch.float32)[0]
    for view in (wide[:, 3:25], wide.T, wide[::2]):
        assert_as_close_as_torch(launch_gate(view), geglu_gate_ref, view)
    assert len({str(config) for config in gate_candidates()}) == len(gate_candidates())


def test_rows_may_lie_apart() -> None:
    x, weight, bias = arguments(20, 24, 80, torch.float32)
    for view in (x[:, 3:51], x[::2, :48], x.T[:48, :].T):
        made = (view, weight[:, : view.shape[1]], bias)
        for form in ("pointers", "descriptors"):
            assert_as_close_as_torch(launch(*made, config=TILE | FORMS[form]), geglu_ref, *made)
        assert_as_close_as_torch(geglu(*made), geglu_ref, *made)


def test_configurations_fit_the_shape() -> None:
    wide = default_config(Shape(8192, 2560, 640, torch.bfloat16, geglu=True))
    # two accumulators of 128 columns are as large as one of 256
    assert (wide["block_m"], wide["block_n"], wide["tma"]) == (128, 128, True)
    deep = Shape(128, 5120, 1280, torch.bfloat16, geglu=True)
    assert not default_config(deep)["persistent"] and len(candidates(deep)) > 5


def test_operators_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight, bias = arguments(12, 9, 20, dtype)
        for made in ((x, weight, bias), (x.reshape(3, 4, 20), weight, None), (x[0], weight, bias)):
            assert_as_close_as_torch(geglu(*made), geglu_ref, *made)
            torch.library.opcheck(geglu, made)
            torch.library.opcheck(geglu_gate, (made[0],))
        torch.library.opcheck(geglu_gate, (x.reshape(3, 4, 20).transpose(0, 1),))
        codes = int8_arguments(12, 9, 20, dtype)
        close_int8(geglu_int8(*codes, dtype), codes)
        torch.library.opcheck(geglu_int8, (*codes, dtype))


def test_it_compiles_without_a_graph_break() -> None:
    x, weight, bias = arguments(6, 8, 16, torch.float32)

    def call(x: Tensor) -> Tensor:
        return geglu_gate(geglu(x, weight, bias)) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    x, weight, bias = arguments(4, 6, 8, torch.float32)
    with pytest.raises(ValueError, match=r"x \(..., K\) is \(4, 7\), weight \(2N, K\) \(12, 8\)"):
        geglu(x[:, :7], weight)
    with pytest.raises(ValueError, match="even number of rows"):
        geglu(x, weight[:11])
    with pytest.raises(ValueError, match=r"bias is \(6,\), weight has 12 rows"):
        geglu(x, weight, bias[:6])
    with pytest.raises(ValueError, match="x is torch.float32, weight torch.float16"):
        geglu(x, weight.half())
    with pytest.raises(ValueError, match=r"of \(..., 2N\), not torch.float32 of \(4, 7\)"):
        geglu_gate(x[:, :7])
    a, b, scale_a, scale_b, bias = int8_arguments(4, 6, 8, torch.float32)
    with pytest.raises(ValueError, match=r"scale_b is torch.float32 of \(6,\)"):
        geglu_int8(a, b, scale_a, scale_b[:6])
    with pytest.raises(ValueError, match="are int8, not torch.float32"):
        geglu_int8(x, b, scale_a, scale_b)


# (M, N, K) of SDXL and SD 1.5 at batch 2, 1024 and 512 pixels
LARGE = [(8192, 2560, 640), (2048, 5120, 1280), (8192, 1280, 320), (128, 5120, 1280)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *LARGE]:
        made = to_gpu(arguments(*shape, dtype))
        assert_as_close_as_torch(geglu(*made), geglu_ref, *made)
        assert_as_close_as_torch(geglu_gate(made[1].T), geglu_gate_ref, made[1].T)
        codes = to_gpu(int8_arguments(*shape, dtype))
        close_int8(geglu_int8(*codes, dtype), codes)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 2560, 640), (128, 5120, 1280)], ids=str)
def test_all_candidates_on_a_gpu(shape: tuple[int, int, int]) -> None:
    made = to_gpu(arguments(*shape, torch.float16))
    for config in candidates(Shape(*shape, torch.float16, geglu=True)):
        assert_as_close_as_torch(launch(*made, config=config), geglu_ref, *made)
    codes = to_gpu(int8_arguments(*shape, torch.float16))
    for config in candidates(Shape(*shape, torch.int8, geglu=True)):
        close_int8(int8_launch(*codes, torch.float16, config), codes)
