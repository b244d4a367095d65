"""INT8 product with its epilogue: the CPU form, the Triton kernels in the interpreter, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hcf_kernels.gpu.gemm import Shape, candidates, default_config, launch
from hcf_kernels.gpu.gemm_tiles import fitted
from hcf_kernels.int8_gemm import int8_gemm, int8_gemm_ref, scaled_ref
from hcf_kernels.testing import assert_as_close_as_torch

# (M, N, K): 1, odd, prime, a U-Net's widths on few tokens, rows that descriptors can read
SHAPES = [(1, 1, 1), (1, 48, 64), (33, 7, 5), (35, 37, 131), (40, 48, 320)]
TILE = {"block_m": 32, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2, "group_m": 2,
        "persistent": 0, "tma": False, "splits": 1, "strips": 1,
        "max_num_imprecise_acc": None}  # fmt: skip
# every path of the kernel that a default or a candidate takes, on tiles that small sizes fill
FORMS: dict[str, dict[str, Any]] = {
    "pointers": {},
    "strips": {"strips": 8},
    "parts": {"splits": 3},
    "persistent": {"persistent": 1, "strips": 4},
    "descriptors": {"persistent": 2, "tma": True, "strips": 4},
    "descriptors_once": {"tma": True},
    "descriptors_parts": {"persistent": 1, "tma": True, "splits": 2},
    "descriptors_once_parts": {"tma": True, "splits": 2},
}


def codes(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)


def arguments(m: int, n: int, k: int, dtype: torch.dtype, vectors: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    scale_a, scale_b = (noise(m), noise(n)) if vectors else (noise(), noise())
    # sums about 1, where the activations bend
    scale_a, scale_b = (0.5 + scale_a.abs()) / 75**2, (0.5 + scale_b.abs()) * k**-0.5
    bias, residual = noise(n).to(dtype), noise(m, n).to(dtype)
    return codes(m, k), codes(n, k, seed=1), scale_a, scale_b, bias, residual, "gelu"


def reference(ref: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """`ref` with an output of `dtype`, of float64 where it is given scales of that."""

    def call(*made: Any) -> Tensor:
        return ref(*made, dtype=torch.float64 if made[2].dtype == torch.float64 else dtype)

    return call


def close(found: Tensor, made: tuple[Any, ...]) -> None:
    assert_as_close_as_torch(found, reference(int8_gemm_ref, found.dtype), *made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernels_in_the_interpreter(shape: tuple[int, int, int], form: str) -> None:
    for dtype in (torch.float32, torch.float16):
        made = arguments(*shape, dtype)
        close(launch(*made, dtype, config=TILE | FORMS[form]), made)


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_exact(form: str) -> None:
    a, b = codes(40, 700), codes(48, 700, seed=1)
    a[0], b[0], b[1] = -128, -128, 127
    one = torch.ones(())
    exact = (a.long() @ b.long().T).float()
    assert exact.abs().max() < 2**24
    found = launch(a, b, one, one, dtype=torch.float32, config=TILE | FORMS[form])
    assert torch.equal(found, exact)
    assert torch.equal(int8_gemm(a, b, one, one, dtype=torch.float32), exact)


def test_default_configurations_in_the_interpreter() -> None:
    for shape in [*SHAPES, (200, 144, 96)]:
        made = arguments(*shape, torch.float32)
        close(launch(*made, torch.float32), made)


@pytest.mark.parametrize("form", ["persistent", "descriptors"])
def test_a_program_takes_many_tiles(form: str) -> None:
    small = {"block_m": 16, "block_n": 16, "block_k": 32, "persistent": 1, "strips": 1}
    # more tiles than the 132 programs, and a last group of one row of tiles
    made = (*arguments(16 * 9, 16 * 16, 32, torch.float32, vectors=False)[:6], "none")
    close(launch(*made, torch.float32, config=TILE | FORMS[form] | small), made)


def test_what_follows_the_product_can_be_left_out() -> None:
    for vectors in (False, True):
        a, b, scale_a, scale_b, bias, residual, _ = arguments(20, 24, 40, torch.float32, vectors)
        for made in (
            (a, b, scale_a, scale_b, None, None, "none"),
            (a, b, scale_a, scale_b, bias, None, "silu"),
            (a, b, scale_a, scale_b, None, residual[:, :1].expand(20, 24), "none"),
        ):
            for form in ("pointers", "parts"):
                close(launch(*made, torch.float32, config=TILE | FORMS[form]), made)


def test_rows_may_lie_apart() -> None:
    a, b, *rest = arguments(20, 24, 40, torch.float32)
    wide = torch.zeros(20, 100, dtype=torch.int8)
    wide[:, 3:43] = a
    residual = torch.zeros(20, 60)
    residual[:, 1:25] = rest[3]
    made = (wide[:, 3:43], b.T.contiguous().T, *rest[:3], residual[:, 1:25], "silu")
    for form in FORMS:
        close(launch(*made, torch.float32, config=TILE | FORMS[form]), made)
    close(int8_gemm(*made, torch.float32), made)


def test_16_bit_and_float32_operands_run_too() -> None:
    for dtype in (torch.float16, torch.float32):
        made = arguments(33, 48, 80, dtype)
        a, b = (t.to(dtype) / 75 for t in made[:2])
        for form in ("pointers", "descriptors", "parts"):
            found = launch(a, b, None, None, *made[4:], dtype, config=TILE | FORMS[form])

            def ref(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
                return scaled_ref(a @ b.T, scale, scale, bias, residual, "gelu", a.dtype)

            one = torch.ones((), dtype=dtype)
            assert_as_close_as_torch(found, ref, a, b, *made[4:6], one)


def test_configurations_fit_the_shape() -> None:
    def default(*sizes: int, **facts: Any) -> dict[str, Any]:
        return default_config(Shape(*sizes, torch.int8, **facts))

    wide = default(8192, 5120, 640)
    assert (wide["block_m"], wide["block_n"], wide["tma"], wide["splits"]) == (128, 256, True, 1)
    # two dozen tiles do not fill a GPU: K in parts, without descriptors for one tile a program
    deep = default(128, 1280, 10240)
    assert deep["splits"] > 1 and not deep["persistent"]
    assert not default(8192, 5120, 640, sm=80)["tma"]
    assert default(8192, 5120, 641, aligned=False)["block_m"] == 64
    assert not fitted(wide, Shape(8192, 5120, 641, torch.int8, aligned=False))["tma"]


def test_a_tuner_has_something_to_try() -> None:
    for operand in (torch.int8, torch.float8_e4m3fn, torch.float16, torch.float32):
        for sizes in ((8192, 5120, 640), (2048, 1280, 5120), (128, 1280, 10240), (154, 640, 2048)):
            for facts in ({}, {"sm": 80, "multiprocessors": 108}, {"aligned": False}):
                for geglu in (False, True):
                    shape = replace(Shape(*sizes, operand, geglu=geglu), **facts)
                    found = candidates(shape)
                    assert 3 <= len(found) <= 30 and found[0] == default_config(shape)
                    assert len({str(config) for config in found}) == len(found)
                    assert all(config.keys() == TILE.keys() for config in found)


def test_operator_on_the_cpu() -> None:
    for vectors in (False, True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            made = arguments(17, 33, 65, dtype, vectors)
            close(int8_gemm(*made, dtype), made)
            torch.library.opcheck(int8_gemm, (*made, dtype))
    torch.library.opcheck(int8_gemm, made[:4])
    assert int8_gemm(made[0][:0], made[1], *(t.mean() for t in made[2:4])).shape == (0, 33)


def test_it_compiles_without_a_graph_break() -> None:
    a, *rest = arguments(8, 16, 32, torch.float32)

    def call(a: Tensor) -> Tensor:
        return int8_gemm(a, *rest, torch.float32) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), call(a))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    a, b, scale_a, scale_b, bias, residual, _ = arguments(4, 6, 8, torch.float32)
    with pytest.raises(ValueError, match=r"a is \(4, 8\), b \(6, 7\)"):
        int8_gemm(a, b[:, :7], scale_a, scale_b)
    with pytest.raises(ValueError, match="are torch.int8, not torch.uint8"):
        int8_gemm(a.view(torch.uint8), b, scale_a, scale_b)
    with pytest.raises(ValueError, match=r"scale_b is torch.float32 of \(4,\): float32 of \(\) or"):
        int8_gemm(a, b, scale_a, scale_a)
    with pytest.raises(ValueError, match="scale_a is torch.float16"):
        int8_gemm(a, b, scale_a.half(), scale_b)
    with pytest.raises(ValueError, match="bias is"):
        int8_gemm(a, b, scale_a, scale_b, scale_a)
    with pytest.raises(ValueError, match=r"residual is \(6, 4\), \(M, N\) is \(4, 6\)"):
        int8_gemm(a, b, scale_a, scale_b, bias, residual.T)
    with pytest.raises(ValueError, match="activation is none, silu or gelu, not relu"):
        int8_gemm(a, b, scale_a, scale_b, activation="relu")
    with pytest.raises(ValueError, match="output dtype"):
        int8_gemm(a, b, scale_a, scale_b, dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    large = [(8192, 5120, 640), (8192, 320, 320), (2048, 1280, 5120), (128, 1280, 10240),
             (154, 640, 2048)]  # fmt: skip
    for shape in [*SHAPES, *large]:
        made = to_gpu(arguments(*shape, dtype))
        close(int8_gemm(*made, dtype), made)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 1280, 1280), (512, 1280, 2560)], ids=str)
def test_all_candidates_are_exact_on_a_gpu(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b, one = to_gpu((codes(m, k) // 4, codes(n, k, seed=1) // 4, torch.ones(())))
    exact = (a.double() @ b.double().T).float()
    for config in candidates(Shape(m, n, k, torch.int8)):
        assert torch.equal(launch(a, b, one, one, dtype=torch.float32, config=config), exact), (
            config
        )


def to_gpu(made: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.cuda() if isinstance(each, Tensor) else each for each in made)
