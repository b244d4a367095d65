"""GroupNorm over a cluster's shared memory: run on the CPU, thread by thread; what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hcf_kernels.emulation import RANDOM, Emulated, Launch
from hcf_kernels.gpu import cuda_group_norm
from hcf_kernels.gpu.cuda_group_norm import (
    SHARED_BYTES,
    THREADS,
    Shape,
    candidates,
    defines_of,
    norm_of,
    shape_of,
)
from hcf_kernels.group_norm_silu import group_norm_silu_quantized_ref, group_norm_silu_ref
from hcf_kernels.testing import assert_as_close_as_torch, assert_same_codes

Compile = Callable[..., Emulated]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    output = tmp_path_factory.mktemp("csrc")
    made: dict[tuple[object, ...], Emulated] = {}

    def compile_for(element: torch.dtype, out: torch.dtype, cluster: int) -> Emulated:
        key = (element, out, cluster)
        if key not in made:
            made[key] = Emulated("group_norm_sm90", defines_of(*key), output)
        return made[key]

    return compile_for


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, per_image: bool = False, mean: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, C, H, W) channels_last, weight and bias, add"""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) + mean
    affine = shape[:2] if per_image else shape[1:2]
    weight, bias, add = (
        torch.randn(size, generator=generator) for size in (affine, affine, shape[:2])
    )
    x = x.to(dtype).to(memory_format=torch.channels_last)
    return x, weight.to(dtype), bias.to(dtype), add.to(dtype)


def run(
    compiled: Compile, x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str,
    slab: int, cluster: int, add: Tensor | None = None, scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """As cuda_group_norm.launch, on the CPU"""
    y = torch.empty_like(x, dtype=dtype or x.dtype)
    config = {"slab": slab, "cluster": cluster}
    shape = shape_of(x, groups)
    norm, kept = norm_of(x, y, weight, bias, groups, 1e-5, activation, add, scale, config)
    blocks = shape.batch * (shape.channels // slab) * cluster
    launch = Launch(blocks, THREADS, cluster, shape.shared_bytes(slab, cluster), RANDOM, 0)
    compiled(x.dtype, y.dtype, cluster).run(launch, norm)
    del kept
    return y


SHAPES = [
    # groups of 10 channels across the 8 of a thread; a position left over
    ((1, 80, 7, 11), 8, 80, 4, "silu", torch.float16),
    ((2, 64, 5, 5), 4, 32, 2, "none", torch.bfloat16),
    # more blocks than positions; one channel a group
    ((1, 16, 1, 7), 16, 16, 8, "gelu", torch.float16),
    ((1, 320, 16, 16), 32, 80, 2, "silu", torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "groups", "slab", "cluster", "activation", "dtype"), SHAPES)
def test_as_close_as_torch(
    compiled: Compile, shape: tuple[int, ...], groups: int, slab: int, cluster: int,
    activation: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    x, weight, bias, add = inputs(shape, dtype, per_image=shape[0] > 1)
    found = run(compiled, x, weight, bias, groups, activation, slab, cluster, add)
    assert_as_close_as_torch(
        found, group_norm_silu_ref, x, weight, bias, groups, 1e-5, activation, add
    )
    assert found.stride() == x.stride()


def test_a_large_mean_cancels_nothing(compiled: Compile) -> None:
    x, weight, bias, _ = inputs((1, 64, 5, 5), torch.bfloat16, mean=300.0)
    found = run(compiled, x, weight.float(), bias.float(), 4, "none", 32, 2)
    exact = group_norm_silu_ref(x.double(), weight.double(), bias.double(), 4, 1e-5, "none")
    # one rounding to bfloat16
    assert float((found.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_codes(compiled: Compile, codes: torch.dtype) -> None:
    x, weight, bias, add = inputs((1, 80, 7, 11), torch.float16)
    scale = torch.tensor(0.02 if codes == torch.int8 else 0.005)
    found = run(compiled, x, weight, bias, 8, "silu", 80, 4, add, scale, codes)
    exact = group_norm_silu_quantized_ref(
        x.double(), weight.double(), bias.double(), 8, 1e-5, "silu", scale, codes, add.double()
    )
    assert_same_codes(found, exact)


def test_slabs_are_whole_groups_and_sectors() -> None:
    unet = Shape(batch=2, positions=4096, channels=320, groups=32)
    assert unet.slabs == [80, 160, 320]
    best = candidates(unet)[0]
    assert best == {"variant": "cuda", "slab": 80, "cluster": 8}
    assert all(unet.shared_bytes(c["slab"], c["cluster"]) <= SHARED_BYTES for c in candidates(unet))
    assert candidates(Shape(batch=1, positions=512 * 512, channels=128, groups=32)) == []


def test_what_the_kernel_does_not_take_is_refused() -> None:
    x = torch.randn(1, 64, 8, 8)
    weight = torch.ones(64)
    with pytest.raises(ValueError, match="float16 or bfloat16 whose channels lie together"):
        cuda_group_norm.launch(x, weight, weight, 8, 1e-5, "silu")
    with pytest.raises(ValueError, match="whose channels lie together"):
        cuda_group_norm.launch(x.half(), weight, weight, 8, 1e-5, "silu")
    wide = torch.empty(1, 128, 512, 512, dtype=torch.float16).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="no slab of .* fits in a cluster"):
        cuda_group_norm.launch(wide, weight, weight, 32, 1e-5, "silu")


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (2, 640, 64, 64), (2, 1280, 32, 32)])
def test_on_a_gpu(shape: tuple[int, ...]) -> None:
    x, weight, bias, add = (t.cuda() for t in inputs(shape, torch.bfloat16))
    for config in candidates(shape_of(x, 32)):
        found = cuda_group_norm.launch(x, weight, bias, 32, 1e-5, "silu", add, config=config)
        assert_as_close_as_torch(found, group_norm_silu_ref, x, weight, bias, 32, 1e-5, "silu", add)
