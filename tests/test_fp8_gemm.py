"""FP8 product with its epilogue: the CPU form, the Triton kernels in the interpreter, on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_int8_gemm import FORMS, SHAPES, TILE, arguments, reference, to_gpu
from torch import Tensor

from hcf_kernels.fp8_gemm import fp8_gemm, fp8_gemm_ref
from hcf_kernels.gpu import gemm
from hcf_kernels.gpu.gemm import Shape, candidates, launch
from hcf_kernels.testing import assert_as_close_as_torch

EXACT = {"max_num_imprecise_acc": 32}


def fp8_arguments(
    m: int, n: int, k: int, dtype: torch.dtype, vectors: bool = True
) -> tuple[Any, ...]:
    """As of the INT8 product, its codes over 32: down to e4m3's subnormals they are on its grid."""
    a, b, *rest = arguments(m, n, k, dtype, vectors)
    rest[:2] = (scale * 32 for scale in rest[:2])
    return (*((t.float() / 32).to(torch.float8_e4m3fn) for t in (a, b)), *rest)


def close(found: Tensor, made: tuple[Any, ...]) -> None:
    assert_as_close_as_torch(found, reference(fp8_gemm_ref, found.dtype), *made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernels_in_the_interpreter(shape: tuple[int, int, int], form: str) -> None:
    for dtype in (torch.float32, torch.float16):
        made = fp8_arguments(*shape, dtype)
        close(launch(*made, dtype, config=TILE | FORMS[form] | EXACT), made)


def test_default_configurations_in_the_interpreter() -> None:
    for shape in SHAPES:
        made = fp8_arguments(*shape, torch.float32)
        close(launch(*made, torch.float32), made)


def test_all_codes_of_e4m3_are_read() -> None:
    codes = torch.arange(256).to(torch.uint8)
    finite = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)  # all but the two NaN
    one = torch.eye(16, dtype=torch.float32).to(torch.float8_e4m3fn)
    a = torch.zeros(256, 16).to(torch.float8_e4m3fn)
    a.view(torch.uint8)[:254, 3] = finite.view(torch.uint8)
    scale = torch.ones(())
    found = launch(a, one, scale, scale, dtype=torch.float32, config=TILE | {"block_k": 32})
    assert torch.equal(found[:254, 3], finite.float())
    assert torch.equal(found, fp8_gemm(a, one, scale, scale, dtype=torch.float32))


def test_operator_on_the_cpu() -> None:
    for vectors in (False, True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            made = fp8_arguments(17, 33, 65, dtype, vectors)
            close(fp8_gemm(*made, dtype), made)
    # its check of the schema compares arguments, which torch cannot in e4m3
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_gemm, (*made, dtype), test_utils=checks)
    torch.library.opcheck(fp8_gemm, made[:4], test_utils=checks)


def test_it_compiles_without_a_graph_break() -> None:
    a, *rest = fp8_arguments(8, 16, 32, torch.float32)

    def call(a: Tensor) -> Tensor:
        return fp8_gemm(a, *rest, torch.float32) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), call(a))


def test_a_configuration_with_a_second_accumulator_can_be_tuned_for() -> None:
    found = candidates(Shape(8192, 5120, 640, torch.float8_e4m3fn))
    assert [c["block_n"] for c in found if c["max_num_imprecise_acc"] == 128] == [128]
    assert all(
        c["max_num_imprecise_acc"] is None for c in candidates(Shape(64, 64, 64, torch.int8))
    )


def test_what_does_not_fit_is_refused() -> None:
    a, b, scale_a, scale_b, *_ = fp8_arguments(4, 6, 8, torch.float32)
    with pytest.raises(
        ValueError, match="are torch.float8_e4m3fn, not torch.float8_e4m3fn of .*int8"
    ):
        fp8_gemm(a, b.view(torch.int8), scale_a, scale_b)
    with pytest.raises(ValueError, match="scale_b is"):
        fp8_gemm(a, b, scale_a, scale_b.double())


def test_a_gpu_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    a = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"need compute capability 8\.9, this GPU has 8\.0"):
        gemm.shape_of(a, a, a)  # type: ignore[arg-type]


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="needs compute capability 8.9")
def test_on_a_gpu() -> None:
    large = [(8192, 5120, 640), (8192, 320, 320), (2048, 1280, 5120), (128, 1280, 5120)]
    for shape in [*SHAPES, *large]:
        made = to_gpu(fp8_arguments(*shape, torch.bfloat16))
        # sums of about 14 bits are within what bfloat16 keeps
        close(fp8_gemm(*made, torch.bfloat16), made)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="needs compute capability 8.9")
def test_all_candidates_on_a_gpu() -> None:
    for shape in ((2048, 1280, 1280), (512, 1280, 2560)):
        made = to_gpu(fp8_arguments(*shape, torch.bfloat16))
        for config in candidates(Shape(*shape, torch.float8_e4m3fn)):
            exact = config["max_num_imprecise_acc"] is not None
            dtype = torch.float16 if exact else torch.bfloat16
            close(launch(*made, dtype, config=config), made)
