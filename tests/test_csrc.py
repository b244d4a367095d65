"""The CUDA C++ kernels run on the CPU, thread by thread, through the C++ form of their intrinsics.

csrc/emulate.h says what is checked on the way: fragments, swizzles, bank conflicts, and that every
wait, barrier and byte count is there, since what is asynchronous happens as late as it may.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcf_kernels.build import SOURCES
from hcf_kernels.emulation import EAGER, LATE, RANDOM, Emulated, Launch
from hcf_kernels.gpu import cuda_gemm
from hcf_kernels.gpu.cuda_gemm import (
    Box,
    Tiling,
    candidates,
    conv_boxes,
    describe_images,
    gemm_boxes,
    pixels_of,
    problem_of,
    resident,
    tiling_of,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


class MapOfTests(ctypes.Structure):
    """`Tensor` of emulate.h in the place of a tensor map's 128 bytes."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("element_bytes", ctypes.c_int),
        ("sizes", ctypes.c_int * 4),
        ("box", ctypes.c_int * 4),
        ("strides", ctypes.c_uint64 * 4),
        ("unused", ctypes.c_uint8 * 48),
    ]


Compile = Callable[..., Emulated]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """compiled(tiling, folder): the tiling's kernel for the CPU, made once."""
    output = tmp_path_factory.mktemp("csrc")
    made: dict[Any, Emulated] = {}

    def compile_tiling(tiling: Tiling, folder: Path = SOURCES) -> Emulated:
        key = (tiling.kernel, tuple(tiling.defines.items()), folder)
        if key not in made:
            made[key] = Emulated(tiling.kernel, tiling.defines, output, folder)
        return made[key]

    return compile_tiling


def map_of(box: Box) -> MapOfTests:
    def padded(values: tuple[int, ...]) -> list[int]:
        return [*reversed(values), *[1] * (4 - len(values))]

    found = MapOfTests(box.address, len(box.sizes), box.element_bytes)
    found.sizes[:], found.box[:] = padded(box.sizes), padded(box.box)
    found.strides[:] = padded(box.strides)
    return found


def operands(m: int, n: int, k: int, element: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (m, k) and b (n, k) whose products sum up exactly in float32"""
    generator = torch.Generator().manual_seed(m + n + k)
    largest = 128 if element == torch.int8 else 8
    low = -largest if element == torch.int8 else -largest + 1
    a = torch.randint(low, largest, (m, k), generator=generator)
    b = torch.randint(low, largest, (n, k), generator=generator)
    return a.to(element), b.to(element)


def tiling_for(element: torch.dtype, tiles: dict[str, int], kernel: str = "gemm_sm90") -> Tiling:
    return tiling_of({"variant": "cuda", "kernel": kernel, **tiles}, element)


def reference(
    product: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What the epilogue makes of an exact product, in its order of operations, in float32"""
    v = product.float() * (scale_a.reshape(-1, 1) * scale_b)
    v = ACTIVATIONS[activation](v if bias is None else v + bias.float())
    return (v if residual is None else v + residual.float()).to(dtype)


def run_gemm(
    compiled: Compile, tiling: Tiling, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16, timing: int = RANDOM, seed: int = 0,
    multiprocessors: int = 3, folder: Path = SOURCES,
) -> Tensor:  # fmt: skip
    """As cuda_gemm.launch, on the CPU. AssertionError where the emulation finds a fault."""
    (m, k), n = a.shape, b.shape[0] // (1 + int(tiling.defines.get("GEGLU", 0)))
    y = torch.full((m, n), torch.nan, dtype=dtype)
    problem, kept = problem_of(y, scale_a, scale_b, bias, residual, activation)
    problem.m, problem.n, problem.k = m, n, k
    rows, columns = -(-m // tiling.block_m), -(-n // tiling.columns)
    if tiling.kernel == "gemm_sm80":
        blocks, given = rows * columns, [ctypes.c_void_p(t.data_ptr()) for t in (a, b)]
    else:
        blocks = resident(tiling, rows, columns, multiprocessors)
        maps = [map_of(box) for box in gemm_boxes(a, b, tiling)]
        given = [ctypes.cast(ctypes.byref(m), ctypes.c_void_p) for m in maps]
    launch = Launch(blocks, tiling.threads, tiling.cluster, tiling.shared_bytes, timing, seed)
    compiled(tiling, folder).run(launch, *given, problem)
    del kept
    return y


def scales(m: int, n: int, per_row: bool, per_column: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * n)
    scale_a = torch.rand(m if per_row else 1, generator=generator) * 0.01
    scale_b = torch.rand(n if per_column else 1, generator=generator)
    return (scale_a if per_row else scale_a[0]), (scale_b if per_column else scale_b[0])


SM80 = [
    (torch.int8, {}, (130, 136, 208)),
    (torch.int8, {"block_n": 256, "row_bytes": 128, "stages": 3}, (65, 264, 400)),
    (torch.float16, {"row_bytes": 128, "stages": 3}, (1, 8, 136)),
    (torch.bfloat16, {"block_m": 64, "stages": 5}, (67, 136, 200)),
    (torch.float8_e4m3fn, {}, (130, 8, 16)),
]


@pytest.mark.parametrize(("element", "tiles", "shape"), SM80)
def test_gemm_sm80(
    compiled: Compile, element: torch.dtype, tiles: dict[str, int], shape: tuple[int, int, int]
) -> None:
    a, b = operands(*shape, element)
    scale_a, scale_b = scales(*shape[:2], True, True)
    found = run_gemm(compiled, tiling_for(element, tiles, "gemm_sm80"), a, b, scale_a, scale_b)
    product = a.double() @ b.double().T
    assert torch.equal(
        found, reference(product, scale_a, scale_b, None, None, "none", torch.float16)
    )


SM90 = [
    (torch.int8, {"cluster": 1}, (130, 136, 336), (EAGER, LATE)),
    (torch.int8, {"cluster": 2, "block_n": 128}, (390, 136, 656), (EAGER,)),
    (torch.float8_e4m3fn, {"rows": 128, "block_n": 128, "stages": 3}, (257, 136, 528), (LATE,)),
    (
        torch.int8,
        {"pingpong": 1, "rows": 128, "block_n": 128, "stages": 3},
        (390, 264, 656),
        (EAGER, RANDOM),
    ),
    (torch.float8_e4m3fn, {"pingpong": 1, "cluster": 1, "stages": 3}, (330, 264, 1040), (LATE,)),
    (torch.float8_e4m3fn, {"promote": 1, "block_n": 128}, (130, 136, 656), (RANDOM,)),
    (
        torch.float8_e4m3fn,
        {"promote": 1, "block_n": 128, "pingpong": 1},
        (200, 264, 400),
        (RANDOM,),
    ),
    (torch.bfloat16, {"block_n": 64}, (1, 72, 72), (RANDOM,)),
]


@pytest.mark.parametrize(("element", "tiles", "shape", "timings"), SM90)
def test_gemm_sm90(
    compiled: Compile, element: torch.dtype, tiles: dict[str, int], shape: tuple[int, int, int],
    timings: tuple[int, ...],
) -> None:  # fmt: skip
    a, b = operands(*shape, element)
    scale_a, scale_b = scales(*shape[:2], True, True)
    wanted = reference(a.double() @ b.double().T, scale_a, scale_b, None, None, "none",
                       torch.float16)  # fmt: skip
    tiling = tiling_for(element, tiles)
    for seed, timing in enumerate(timings):
        found = run_gemm(compiled, tiling, a, b, scale_a, scale_b, timing=timing, seed=seed)
        assert torch.equal(found, wanted), f"timing {timing}"


@pytest.mark.parametrize("kernel", ["gemm_sm80", "gemm_sm90"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_epilogue(compiled: Compile, kernel: str, dtype: torch.dtype, activation: str) -> None:
    tiles = {"cluster": 1} if kernel == "gemm_sm90" else {}
    tiling = tiling_for(torch.int8, tiles, kernel)
    m, n, k = 67, 72, 144
    a, b = operands(m, n, k, torch.int8)
    generator = torch.Generator().manual_seed(0)
    silu = activation == "silu"
    scale_a, scale_b = scales(m, n, per_row=not silu, per_column=silu)
    bias = torch.randn(n, generator=generator).to(torch.float32 if silu else dtype)
    residual = torch.randn(m, n, generator=generator).to(dtype)
    found = run_gemm(compiled, tiling, a, b, scale_a, scale_b, bias, residual, activation, dtype)
    wanted = reference(a.double() @ b.double().T, scale_a, scale_b, bias, residual, activation,
                       dtype)  # fmt: skip
    # float32 rounds differently in the exponential: the 16-bit result may be its neighbour
    step = torch.finfo(dtype).eps if activation != "none" else 0.0
    torch.testing.assert_close(found, wanted, rtol=step, atol=1e-6 if step else 0.0)


GEGLU = [
    (torch.bfloat16, {"cluster": 1, "block_n": 128}, (67, 72, 136)),
    (torch.int8, {"rows": 128, "block_n": 128, "pingpong": 1, "stages": 3}, (257, 136, 272)),
]


@pytest.mark.parametrize(("element", "tiles", "shape"), GEGLU)
def test_geglu_sm90(
    compiled: Compile, element: torch.dtype, tiles: dict[str, int], shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    a, b = operands(m, 2 * n, k, element)
    scale_a, scale_b = scales(m, 2 * n, True, True)
    bias = torch.randn(2 * n, generator=torch.Generator().manual_seed(0))
    found = run_gemm(
        compiled, tiling_for(element, {**tiles, "geglu": 1}), a, b, scale_a, scale_b, bias
    )
    product = a.double() @ b.double().T
    hidden, gate = reference(product, scale_a, scale_b, bias, None, "none",
                             torch.float32).chunk(2, dim=1)  # fmt: skip
    wanted = (hidden * torch.nn.functional.gelu(gate)).half()
    # far below 0 a float32 gelu holds no digits, torch's own neither
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6 * float(wanted.abs().max()))


CONV = [
    (torch.int8, {"cluster": 1, "block_n": 128}, (1, 13, 17, 144, 40)),
    (torch.int8, {"rows": 128, "block_n": 128, "pingpong": 1, "stages": 3}, (3, 8, 8, 128, 136)),
    (torch.float8_e4m3fn, {"block_n": 128, "stages": 3}, (2, 16, 12, 48, 264)),
]


@pytest.mark.parametrize(("element", "tiles", "shape"), CONV)
def test_conv3x3_sm90(
    compiled: Compile, element: torch.dtype, tiles: dict[str, int], shape: tuple[int, ...]
) -> None:
    images, height, width, channels, n = shape
    a, b = operands(images * height * width, n * 9, channels, element)
    x, weight = a.reshape(images, height, width, channels), b.reshape(n, 3, 3, channels)
    scale_a, scale_b = scales(1, n, False, True)
    tiling = tiling_for(element, tiles, "conv3x3_sm90")
    y = torch.full((images, height, width, n), torch.nan, dtype=torch.bfloat16)
    problem, kept = problem_of(y, scale_a, scale_b, None, None, "none")
    rows = describe_images(problem, x, weight, tiling.block_m)
    blocks = resident(tiling, rows, -(-n // tiling.columns), 3)
    maps = [map_of(box) for box in conv_boxes(x, weight, tiling)]
    given = [ctypes.cast(ctypes.byref(m), ctypes.c_void_p) for m in maps]
    launch = Launch(blocks, tiling.threads, tiling.cluster, tiling.shared_bytes, RANDOM, 0)
    compiled(tiling).run(launch, *given, problem)
    del kept
    product = torch.nn.functional.conv2d(
        x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), padding=1
    )
    wanted = reference(product.permute(0, 2, 3, 1).reshape(-1, n), scale_a, scale_b, None, None,
                       "none", torch.bfloat16)  # fmt: skip
    assert torch.equal(y.reshape(-1, n), wanted)


FAULTS = [
    # a tile is read before its copies are waited for
    ("gemm_sm80.cu", "wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>", {}),
    # two rows of an ldmatrix in the same banks
    ("gemm_sm80.cu", "row >> 1 & 3", "row & 3", {}),
    # a stage is given back while products still read it
    ("gemm_sm90.cuh", "if (block > 0) release(ring, at - 1)", "release(ring, at)", {}),
    # the barrier waits for half of what comes
    ("gemm_sm90.cuh", "barrier_expect(full, STAGE_BYTES)", "barrier_expect(full, A_BYTES)", {}),
    # the other block of the cluster is not asked
    ("gemm_sm90.cuh", "READERS = CLUSTER * 4", "READERS = 4", {"cluster": 2}),
    # a group runs two phases ahead of its stages
    ("gemm_sm90.cuh", "turns.wait(tile / 2);", "", {"pingpong": 1, "rows": 128}),
]


@pytest.mark.parametrize(("file", "line", "fault", "tiles"), FAULTS)
def test_the_emulation_finds_faults(
    compiled: Compile, tmp_path: Path, file: str, line: str, fault: str, tiles: dict[str, int]
) -> None:
    for source in SOURCES.iterdir():
        shutil.copy(source, tmp_path)
    text = (SOURCES / file).read_text()
    assert text.count(line) == 1, "the line that is to be spoilt"
    (tmp_path / file).write_text(text.replace(line, fault))
    sm80 = file.startswith("gemm_sm80")
    tiling = (
        tiling_for(torch.int8, {}, "gemm_sm80")
        if sm80
        else tiling_for(torch.int8, {"block_n": 128, "stages": 3, "cluster": 1, **tiles})
    )
    a, b = operands(390, 136, 784, torch.int8)
    scale = torch.tensor(1e-3), torch.tensor(1.0)
    wanted = reference(a.double() @ b.double().T, *scale, None, None, "none", torch.float16)

    def is_wrong(timing: int) -> bool:
        try:
            found = run_gemm(compiled, tiling, a, b, *scale, timing=timing, folder=tmp_path)
        except AssertionError:
            return True
        return not torch.equal(found, wanted)

    assert is_wrong(EAGER) or is_wrong(LATE)


def test_tiles_of_pixels_waste_little() -> None:
    assert pixels_of(2, 64, 64, 128) == (1, 8, 16)
    assert pixels_of(4, 8, 8, 256) == (4, 8, 8)
    assert pixels_of(1, 96, 96, 128) == (1, 8, 16)
    assert pixels_of(1, 13, 17, 128) == (1, 16, 8)
    assert pixels_of(64, 1, 1, 64) == (64, 1, 1)


def test_launches_are_refused_with_what_is_needed() -> None:
    a, b = operands(16, 16, 32, torch.int8)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        cuda_gemm.launch(a, b, dtype=torch.float32)
    with pytest.raises(ValueError, match="multiple of 16 bytes, N of 8"):
        cuda_gemm.launch(a[:, :20], b[:, :20])
    with pytest.raises(ValueError, match="multiple of 16 bytes, N of 8"):
        cuda_gemm.launch(a, b[:12])
    with pytest.raises(ValueError, match="not torch.float32"):
        cuda_gemm.launch(a.float(), b.float())


def test_candidates_fit_the_gpu() -> None:
    for element in (torch.int8, torch.float8_e4m3fn, torch.bfloat16):
        for config in candidates(element, (9, 0)):
            assert config["variant"] == "cuda"
            assert tiling_of(config, element).shared_bytes <= 227 * 1024
        assert all(
            tiling_of(c, element).shared_bytes <= 99 * 1024 for c in candidates(element, (8, 9))
        )
    assert candidates(torch.float8_e4m3fn, (8, 0)) == []
    assert len(candidates(torch.int8, (8, 0))) == len(cuda_gemm.SM80_TILES)


GPU_SHAPES = [(4096, 320, 320), (4096, 1280, 640), (77, 768, 1024), (8192, 5120, 1280)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("element", [torch.int8, torch.float8_e4m3fn])
def test_products_on_a_gpu(element: torch.dtype, shape: tuple[int, int, int]) -> None:
    capability = torch.cuda.get_device_capability()
    a, b = (t.cuda() for t in operands(*shape, element))
    scale_a, scale_b = (s.cuda() for s in scales(*shape[:2], True, True))
    residual = torch.randn(*shape[:2], device="cuda").half()
    product = a.double() @ b.double().T
    wanted = reference(product, scale_a, scale_b, None, residual, "silu", torch.float16)
    for config in candidates(element, capability):
        found = cuda_gemm.launch(a, b, scale_a, scale_b, None, residual, "silu", config=config)
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3, msg=str(config))


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("element", [torch.int8, torch.float8_e4m3fn])
def test_convolutions_on_a_gpu(element: torch.dtype) -> None:
    images, height, width, channels, n = 2, 64, 64, 320, 640
    a, b = (t.cuda() for t in operands(images * height * width, n * 9, channels, element))
    x, weight = a.reshape(images, height, width, channels), b.reshape(n, 3, 3, channels)
    scale_a, scale_b = (s.cuda() for s in scales(1, n, False, True))
    product = torch.nn.functional.conv2d(
        x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), padding=1
    )
    wanted = reference(product.permute(0, 2, 3, 1).reshape(-1, n), scale_a, scale_b, None, None,
                       "none", torch.float16).reshape(images, height, width, n)  # fmt: skip
    for config in candidates(element, (9, 0), kind="conv3x3"):
        found = cuda_gemm.launch_conv3x3(x, weight, scale_a, scale_b, config=config)
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3, msg=str(config))
