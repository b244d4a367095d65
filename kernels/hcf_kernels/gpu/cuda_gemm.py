"""Matrix products and 3x3 convolutions in CUDA C++: `csrc/gemm_sm90.cu`, `gemm_sm80.cu` and
`conv3x3_sm90.cu`, with the tensor maps and numbers that they are launched with.

    y = activation(scale_a * scale_b * (a b^T) + bias) + residual
    y = hidden * gelu(gate) of such a product's halves, on sm_90a

a (M, K), b (N, K) int8, e4m3, float16 or bfloat16, rows a multiple of 16 bytes, N of 8; y (M, N)
float16 or bfloat16. Only a measured table leads here ("variant": "cuda"). A configuration:

    kernel      gemm_sm90 (wgmma, sm_90a), gemm_sm80 (mma.sync, from sm_80 on), conv3x3_sm90
    block_n...  the definitions it is compiled with, in lower case: see the sources
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcf_kernels.build import Build, check, driver, load, require
from hcf_kernels.tables import Config

ELEMENTS = {
    torch.int8: "INT8",
    torch.float8_e4m3fn: "E4M3",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2}
SWIZZLED_BYTES = 128
# CUtensorMapDataType, and what cuTensorMapEncodeTiled is asked for
MAP_TYPES = {1: 0, 2: 1}  # UINT8, UINT16 by bytes of an element
NO_INTERLEAVE, SWIZZLE_128B, L2_256B, ZERO_OUTSIDE = 0, 3, 3, 0

SM80: dict[str, int] = {
    "block_m": 128, "block_n": 128, "warp_n": 64, "row_bytes": 64, "stages": 4, "group": 8,
}  # fmt: skip
SM90: dict[str, int] = {
    "rows": 64, "block_n": 256, "pingpong": 0, "cluster": 2, "stages": 4, "promote": 0, "geglu": 0,
    "group": 8,
}  # fmt: skip
SM80_TILES: tuple[dict[str, int], ...] = (
    {},
    {"stages": 3},
    {"row_bytes": 128, "stages": 3},
    {"block_n": 256},
    {"block_n": 256, "row_bytes": 128, "stages": 3},
    {"block_m": 64, "stages": 5},
)
SM90_TILES: tuple[dict[str, int], ...] = (
    {},
    {"cluster": 1},
    {"rows": 128, "block_n": 128},
    {"rows": 128, "block_n": 128, "pingpong": 1, "stages": 6},
    {"rows": 128, "block_n": 128, "pingpong": 1, "stages": 6, "cluster": 1},
    {"pingpong": 1, "stages": 5},
    {"block_n": 128, "stages": 6, "cluster": 1},
    {"block_n": 128, "stages": 8, "pingpong": 1, "cluster": 1},
)
PROMOTED_TILES: tuple[dict[str, int], ...] = (
    {"block_n": 128, "stages": 6, "promote": 1},
    {"block_n": 128, "stages": 6, "promote": 1, "cluster": 1},
    {"block_n": 128, "stages": 8, "pingpong": 1, "promote": 1},
)


class Problem(ctypes.Structure):
    """Problem of epilogue.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("y", "scale_a", "scale_b", "bias", "residual")]
    _fields_ += [
        (name, ctypes.c_int)
        for name in (
            "stride_a", "stride_b", "bias_fp32", "bf16", "activation", "m", "n", "k",
            "height", "width", "images", "box_h", "box_w",
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A tensor as bulk copies read it; outermost dimension first, the last one contiguous.

    sizes and box in elements, strides in bytes. The innermost box is one swizzled row of 128 bytes.
    """

    address: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """What a configuration is compiled and launched as.

    block_m, columns: tile of y. b_rows: rows of b that a bulk copy takes.
    """

    kernel: str
    defines: dict[str, str | int]
    threads: int
    shared_bytes: int
    block_m: int
    columns: int
    b_rows: int
    cluster: int


def tiling_of(config: Config, element: torch.dtype) -> Tiling:
    """Of a configuration and the type of a and b."""
    kernel = config["kernel"]
    known = SM80 if kernel == "gemm_sm80" else SM90
    sizes = {name: int(config.get(name, default)) for name, default in known.items()}
    defines: dict[str, str | int] = {"ELEMENT": ELEMENTS[element]}
    defines |= {name.upper(): value for name, value in sizes.items()}
    if kernel == "gemm_sm80":
        block_m, block_n = sizes["block_m"], sizes["block_n"]
        threads = 32 * (block_m // 64) * (block_n // sizes["warp_n"])
        shared = sizes["stages"] * (block_m + block_n) * sizes["row_bytes"]
        return Tiling(kernel, defines, threads, shared, block_m, block_n, block_n, 1)
    block_m, block_n = sizes["rows"] * (1 if sizes["pingpong"] else 2), sizes["block_n"]
    # up to 1008 bytes to the next multiple of 1024, and the barriers
    shared = (
        sizes["stages"] * (block_m + block_n) * SWIZZLED_BYTES
        + 1024
        + 8 * (2 * sizes["stages"] + 2)
    )
    columns = block_n // 2 if sizes["geglu"] else block_n
    b_rows = block_n // 2 if sizes["geglu"] or sizes["cluster"] > 1 else block_n
    return Tiling(kernel, defines, 384, shared, block_m, columns, b_rows, sizes["cluster"])


def default_config(element: torch.dtype, capability: tuple[int, int]) -> Config:
    """What is tried first: the largest tile."""
    return candidates(element, capability)[0]


def candidates(
    element: torch.dtype, capability: tuple[int, int], kind: str = "gemm"
) -> list[Config]:
    """What a tuner should try on a GPU of that capability; none where no kernel takes `element`.

    kind: gemm, geglu or conv3x3.
    """
    if capability == (9, 0):
        kernel = "conv3x3_sm90" if kind == "conv3x3" else "gemm_sm90"
        base = {**SM90, "geglu": int(kind == "geglu")}
        promoted = PROMOTED_TILES if element == torch.float8_e4m3fn else ()
        return [_config(kernel, base, tiles) for tiles in (*SM90_TILES, *promoted)]
    enough = capability >= ((8, 9) if element == torch.float8_e4m3fn else (8, 0))
    if kind != "gemm" or not enough:
        return []
    # 8.6, 8.9 and 12.0 have 99 KB of shared memory
    small = capability[1] in (6, 9) or capability[0] >= 12
    found = [_config("gemm_sm80", SM80, tiles) for tiles in SM80_TILES]
    return [c for c in found if not small or tiling_of(c, element).shared_bytes <= 99 * 1024]


def _config(kernel: str, base: dict[str, int], tiles: dict[str, int]) -> Config:
    return {"variant": "cuda", "kernel": kernel, **base, **tiles}


def launch(
    a: Tensor, b: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """a (M, K), b (N, K), scales () or one a row, bias (N,), residual (M, N) -> (M, N) in `dtype`

    Raises ValueError for what the kernels do not take, RuntimeError with the needed and found
    capability where the configuration's kernel does not run on this GPU.
    """
    check_operands(a, b, dtype)
    y = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    config = config or default_config(a.dtype, torch.cuda.get_device_capability(a.device))
    return _multiply(y, a, b, scale_a, scale_b, bias, residual, activation, config)


def launch_geglu(
    a: Tensor, b: Tensor, bias: Tensor | None = None, scale_a: Tensor | None = None,
    scale_b: Tensor | None = None, dtype: torch.dtype = torch.float16,
    config: Config | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a (M, K), b (2N, K), hidden and then gate, bias (2N,) -> hidden * gelu(gate) (M, N)

    scale_a () or (M,), scale_b () or (2N,); `out` (M, N), where given, is written. Raises as
    `launch`.
    """
    check_operands(a, b[: b.shape[0] // 2], dtype)
    y = a.new_empty(a.shape[0], b.shape[0] // 2, dtype=dtype) if out is None else out
    config = {**(config or _config("gemm_sm90", SM90, {})), "geglu": 1}
    return _multiply(y, a, b, scale_a, scale_b, bias, None, "none", config)


def _multiply(
    y: Tensor, a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, activation: str, config: Config,
) -> Tensor:  # fmt: skip
    if y.numel() == 0:
        return y
    tiling = tiling_of(config, a.dtype)
    capability = torch.cuda.get_device_capability(a.device)
    arch = arch_of(capability) if tiling.kernel == "gemm_sm80" else "sm_90a"
    require(tiling.kernel, arch, capability)
    a, b = aligned(a), aligned(b)
    problem, kept = problem_of(y, scale_a, scale_b, bias, residual, activation)
    problem.m, problem.n, problem.k = *y.shape, a.shape[1]
    rows, columns = -(-y.shape[0] // tiling.block_m), -(-y.shape[1] // tiling.columns)
    if tiling.kernel == "gemm_sm80":
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b)]
        _run(tiling, a.device, arch, rows * columns, *pointers, problem)
    else:
        maps = [tensor_map(box) for box in gemm_boxes(a, b, tiling)]
        _run(tiling, a.device, arch, _resident(tiling, rows, columns, a.device), *maps, problem)
    del kept
    return y


def launch_conv3x3(
    a: Tensor, b: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """a (B, H, W, C), b (N, 3, 3, C), residual (B, H, W, N) -> (B, H, W, N); padding 1, stride 1

    scale_a () or (B * H * W,), scale_b () or (N,). Raises as `launch`.
    """
    check_operands(a.flatten(0, 2), b.flatten(1)[:, : a.shape[3]], dtype)
    if b.shape[1:] != (3, 3, a.shape[3]):
        raise ValueError(f"b is {tuple(b.shape)}, a {tuple(a.shape)}: (N, 3, 3, C), (B, H, W, C)")
    a, b = aligned(a), aligned(b)
    y = a.new_empty(*a.shape[:3], b.shape[0], dtype=dtype)
    if y.numel() == 0:
        return y
    tiling = tiling_of(config or _config("conv3x3_sm90", SM90, {}), a.dtype)
    require(tiling.kernel, "sm_90a", torch.cuda.get_device_capability(a.device))
    problem, kept = problem_of(y, scale_a, scale_b, bias, residual, activation)
    rows = describe_images(problem, a, b, tiling.block_m)
    blocks = _resident(tiling, rows, -(-b.shape[0] // tiling.columns), a.device)
    maps = [tensor_map(box) for box in conv_boxes(a, b, tiling)]
    _run(tiling, a.device, "sm_90a", blocks, *maps, problem)
    del kept
    return y


def describe_images(problem: Problem, a: Tensor, b: Tensor, block_m: int) -> int:
    """Sets the sizes of a convolution's problem -> tiles of pixels."""
    images, height, width, channels = a.shape
    box_n, box_h, box_w = pixels_of(images, height, width, block_m)
    problem.m, problem.n, problem.k = images * height * width, b.shape[0], channels
    problem.images, problem.height, problem.width = images, height, width
    problem.box_h, problem.box_w = box_h, box_w
    return -(-images // box_n) * -(-height // box_h) * -(-width // box_w)


def pixels_of(images: int, height: int, width: int, block_m: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a tile of `block_m` pixels, that cover least outside of a.

    Powers of two. Of equals the squarest, whose nine shifted boxes overlap most in the cache.
    """
    choices = [
        (block_m // (box_h * box_w), box_h, box_w)
        for box_h in _powers(block_m)
        for box_w in _powers(block_m // box_h)
    ]

    def cost(box: tuple[int, int, int]) -> tuple[int, int]:
        sizes = (images, height, width)
        tiles = [-(-size // length) for size, length in zip(sizes, box, strict=True)]
        return tiles[0] * tiles[1] * tiles[2], box[0] * (box[1] + 2) * (box[2] + 2)

    return min(choices, key=cost)


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if limit % (1 << i) == 0]


def check_operands(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """ValueError for what no kernel here takes; shapes fit each other as the operators check."""
    if a.dtype not in ELEMENTS or b.dtype != a.dtype:
        raise ValueError(f"a and b are one of {list(ELEMENTS)}, not {a.dtype} and {b.dtype}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the CUDA C++ kernels write float16 or bfloat16, not {dtype}")
    if a.shape[1] * a.element_size() % 16 or b.shape[0] % 8 or a.shape[1] == 0:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)}: rows are a multiple of 16 bytes, N of 8"
        )


def problem_of(
    y: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> tuple[Problem, list[Tensor]]:  # fmt: skip
    """Problem without its sizes, and the tensors that it points to."""
    scale_a, scale_b = (None if s is None else aligned(s) for s in (scale_a, scale_b))
    if bias is not None:
        bias = aligned(bias if bias.dtype in (y.dtype, torch.float32) else bias.to(y.dtype))
    if residual is not None:
        residual = aligned(residual.to(y.dtype))
    given = (scale_a, scale_b, bias, residual)
    problem = Problem(y.data_ptr(), *(0 if t is None else t.data_ptr() for t in given))
    problem.stride_a, problem.stride_b = (int(s is not None and s.ndim > 0) for s in given[:2])
    problem.bias_fp32 = int(bias is not None and bias.dtype == torch.float32)
    problem.bf16 = int(y.dtype == torch.bfloat16)
    problem.activation = ACTIVATIONS[activation]
    return problem, [y, *(t for t in given if t is not None)]


def aligned(x: Tensor) -> Tensor:
    """Contiguous at a multiple of 16 bytes: x itself, but for a part of another tensor."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def gemm_boxes(a: Tensor, b: Tensor, tiling: Tiling) -> list[Box]:
    """Of a (M, K) and b (N, K)."""
    row = SWIZZLED_BYTES // a.element_size()
    return [box_of(a, (tiling.block_m, row)), box_of(b, (tiling.b_rows, row))]


def conv_boxes(a: Tensor, b: Tensor, tiling: Tiling) -> list[Box]:
    """Of a (B, H, W, C) and b (N, 3, 3, C), the latter as (N, 9, C)."""
    row = SWIZZLED_BYTES // a.element_size()
    images, height, width, _ = a.shape
    pixels = pixels_of(images, height, width, tiling.block_m)
    taps = b.flatten(1, 2)
    return [box_of(a, (*pixels, row)), box_of(taps, (tiling.b_rows, 1, row))]


def box_of(tensor: Tensor, box: Sequence[int]) -> Box:
    """Of a tensor whose last dimension is contiguous."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    return Box(tensor.data_ptr(), size, tuple(tensor.shape), strides, tuple(box))


@functools.lru_cache(maxsize=4096)
def tensor_map(box: Box) -> Any:
    """The 128 bytes that a bulk tensor copy is told by; they depend on nothing but `box`."""
    memory = (ctypes.c_uint8 * (128 + 64))()
    encoded = (ctypes.c_uint8 * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
    rank = len(box.sizes)
    u64s, u32s = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    done = driver().cuTensorMapEncodeTiled(
        ctypes.byref(encoded), MAP_TYPES[box.element_bytes], rank, ctypes.c_void_p(box.address),
        u64s(*reversed(box.sizes)), u64s(*reversed(box.strides[:-1])), u32s(*reversed(box.box)),
        u32s(*[1] * rank), NO_INTERLEAVE, SWIZZLE_128B, L2_256B, ZERO_OUTSIDE,
    )  # fmt: skip
    check(done, f"a tensor map of {box}")
    return encoded


def arch_of(capability: tuple[int, int]) -> str:
    """sm_90 of (9, 0): gemm_sm80 is compiled for the GPU that it runs on."""
    return f"sm_{capability[0]}{capability[1]}"


def resident(tiling: Tiling, rows: int, columns: int, multiprocessors: int) -> int:
    """Blocks of a persistent kernel for rows x columns tiles: one a multiprocessor at most.

    A last row of tiles without a second one has a block of its cluster that stores nothing.
    """
    clusters = -(-rows // tiling.cluster) * columns
    return min(clusters, max(multiprocessors // tiling.cluster, 1)) * tiling.cluster


def _resident(tiling: Tiling, rows: int, columns: int, device: torch.device) -> int:
    found = torch.cuda.get_device_properties(device).multi_processor_count
    return resident(tiling, rows, columns, found)


def _run(tiling: Tiling, device: torch.device, arch: str, blocks: int, *arguments: Any) -> None:
    kernel = load(tiling.kernel, arch, device, tiling.defines, tiling.shared_bytes)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(blocks, tiling.threads, stream, *arguments)


def _builds() -> list[Build]:
    found = []
    for element, kinds, sm80, sm90 in (
        (torch.int8, ("gemm", "geglu", "conv3x3"), "IMMA", "IGMMA"),
        (torch.float8_e4m3fn, ("gemm", "geglu", "conv3x3"), "QMMA", "QGMMA"),
        (torch.bfloat16, ("geglu",), "HMMA", "HGMMA"),
        (torch.float16, ("geglu",), "HMMA", "HGMMA"),
    ):
        low = (8, 9) if element == torch.float8_e4m3fn else (8, 0)
        for kind in kinds:
            for capability, expect in (
                (low, (sm80, "LDGSTS", "LDSM")),
                ((9, 0), (sm90, "UTMALDG")),
            ):
                arch = "sm_90a" if capability == (9, 0) else arch_of(capability)
                for config in candidates(element, capability, kind):
                    found.append(_build(config, element, arch, expect))
    return found


def _build(config: Config, element: torch.dtype, arch: str, expect: tuple[str, ...]) -> Build:
    tiling = tiling_of(config, element)
    return Build(tiling.kernel, arch, tiling.defines, tiling.shared_bytes, expect)


BUILDS = _builds()
