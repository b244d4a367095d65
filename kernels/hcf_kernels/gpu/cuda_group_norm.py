"""GroupNorm with its activation in CUDA C++: `csrc/group_norm_sm90.cu`, one read and one write.

A cluster of blocks keeps a slab of channels of an image in its shared memory, so it is for what
fits there: up to 200 KB a block, 8 blocks. The 2-launch form of `gpu.group_norm_silu` reads x a
second time from the L2 cache and waits for a launch between. NHWC (B, S, C) on sm_90 only; only a
measured table leads here ("variant": "cuda"). A configuration: slab (channels), cluster (blocks).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hcf_kernels.build import Build, load, require
from hcf_kernels.gpu.cuda_gemm import ACTIVATIONS, ELEMENTS, aligned
from hcf_kernels.tables import Config

THREADS = 512
CLUSTERS = (8, 4, 2, 1)
MAX_GROUPS = 128
# of THREADS x 8 sums, and of four numbers a group
FIXED_BYTES = THREADS * 32 + 16 * MAX_GROUPS
SHARED_BYTES = 227 * 1024
SECTOR_BYTES = 32
QUANT = {torch.int8: 1, torch.float8_e4m3fn: 2}


class Norm(ctypes.Structure):
    """Norm of group_norm_sm90.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "bias", "add", "scale")),
        *(
            (name, ctypes.c_int)
            for name in (
                "channels", "positions", "width", "slab", "affine_stride", "affine_fp32",
                "activation",
            )
        ),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """x (B, S, C) of two bytes a value, in G groups."""

    batch: int
    positions: int
    channels: int
    groups: int

    @property
    def slabs(self) -> list[int]:
        """Channels that a cluster may take: whole groups, 16 bytes at a time, and they divide C.

        Only the whole row may be other than whole sectors, which two clusters would both read.
        """
        width = self.channels // self.groups
        least = math.lcm(width, 8)
        return [
            slab
            for slab in range(least, min(self.channels, 8 * THREADS) + 1, least)
            if self.channels % slab == 0
            and slab // width <= MAX_GROUPS
            and (slab * 2 % SECTOR_BYTES == 0 or slab == self.channels)
        ]

    def shared_bytes(self, slab: int, cluster: int) -> int:
        """Of a block. Its positions lie in whole rounds of its threads."""
        return FIXED_BYTES + -(-self.positions // cluster) * slab * 2


def candidates(shape: Shape) -> list[Config]:
    """What a tuner should try, the default first; none where a slab does not fit.

    The default: of those with the most blocks, at most one a multiprocessor, the widest slab.
    """
    found = [
        {"variant": "cuda", "slab": slab, "cluster": cluster}
        for slab in shape.slabs
        for cluster in CLUSTERS
        if shape.shared_bytes(slab, cluster) <= SHARED_BYTES and cluster <= shape.positions
    ]

    def cost(config: Config) -> tuple[int, int]:
        blocks = shape.batch * (shape.channels // config["slab"]) * config["cluster"]
        return -min(blocks, 132), -config["slab"]

    return sorted(found, key=cost)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    add: Tensor | None = None, scale: Tensor | None = None, dtype: torch.dtype | None = None,
    config: Config | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Arguments as `hcf::group_norm_silu` and its quantised form, x channels_last -> as x, or out

    Raises ValueError for what the kernel does not take, RuntimeError where the GPU is not sm_90.
    """
    y = torch.empty_like(x, dtype=dtype or x.dtype) if out is None else out
    shape = shape_of(x, groups)
    config = config or candidates(shape)[0]
    require("group_norm_sm90", "sm_90", torch.cuda.get_device_capability(x.device))
    norm, kept = norm_of(x, y, weight, bias, groups, eps, activation, add, scale, config)
    blocks = shape.batch * (shape.channels // config["slab"]) * config["cluster"]
    defines = defines_of(x.dtype, y.dtype, config["cluster"])
    shared = shape.shared_bytes(config["slab"], config["cluster"])
    kernel = load("group_norm_sm90", "sm_90", x.device, defines, SHARED_BYTES)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(blocks, THREADS, stream, norm, shared_bytes=shared)
    del kept
    return y


def shape_of(x: Tensor, groups: int) -> Shape:
    """Of x (B, C, ...) whose channels lie together; ValueError where the kernel cannot take it."""
    last = x.movedim(1, -1)
    if x.dtype not in (torch.float16, torch.bfloat16) or not last.is_contiguous():
        raise ValueError(
            f"group_norm_sm90 takes float16 or bfloat16 whose channels lie together, not {x.dtype} "
            f"of {tuple(x.shape)} with strides {x.stride()}"
        )
    shape = Shape(x.shape[0], x[0, 0].numel(), x.shape[1], groups)
    if not candidates(shape):
        raise ValueError(f"no slab of {tuple(x.shape)} in {groups} groups fits in a cluster")
    return shape


def takes(x: Tensor, groups: int) -> bool:
    """Whether `launch` would take x (B, C, ...)."""
    try:
        shape_of(x, groups)
    except ValueError:
        return False
    return True


def norm_of(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    add: Tensor | None, scale: Tensor | None, config: Config,
) -> tuple[Norm, list[Tensor]]:  # fmt: skip
    """What the kernel is told, and the tensors that it points to."""
    same = weight.dtype == bias.dtype == x.dtype
    weight, bias = (t.contiguous() if same else t.float().contiguous() for t in (weight, bias))
    add = None if add is None else add.to(x.dtype).contiguous()
    if x.data_ptr() % 16:
        x = aligned(x.movedim(1, -1)).movedim(-1, 1)
    pointers = [0 if t is None else t.data_ptr() for t in (x, y, weight, bias, add, scale)]
    norm = Norm(*pointers)
    norm.channels, norm.positions, norm.width = x.shape[1], x[0, 0].numel(), x.shape[1] // groups
    norm.slab, norm.eps = config["slab"], eps
    norm.affine_stride = x.shape[1] if weight.ndim == 2 else 0
    norm.affine_fp32, norm.activation = int(not same), ACTIVATIONS[activation]
    return norm, [t for t in (x, y, weight, bias, add, scale) if t is not None]


def defines_of(element: torch.dtype, out: torch.dtype, cluster: int) -> dict[str, str | int]:
    """Definitions that the kernel is compiled with."""
    return {"ELEMENT": ELEMENTS[element], "CLUSTER": cluster, "QUANT": QUANT.get(out, 0)}


BUILDS = [
    Build("group_norm_sm90", "sm_90", defines_of(element, out, cluster), SHARED_BYTES, ("LDGSTS",))
    for element in (torch.float16, torch.bfloat16)
    for out in (element, torch.int8, torch.float8_e4m3fn)
    for cluster in CLUSTERS
]
