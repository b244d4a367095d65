"""Launches the kernels of `conv3x3_kernels` for the operators of `hcf_kernels.conv3x3`.

B images, C channels, O (OUT) output channels, H W size of x, P Q of the output, k kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hcf_kernels.aot import Variant
from hcf_kernels.conv3x3 import checked_size, output_like
from hcf_kernels.gpu import cuda_gemm
from hcf_kernels.gpu.conv3x3_kernels import boxes_kernel, gather_kernel, sum_kernel
from hcf_kernels.gpu.conv3x3_tiles import LINE, Shape, box, candidates, default_config, tiles_of
from hcf_kernels.tables import Config, Plan, find_config, shape_key

__all__ = ["VARIANTS", "Shape", "candidates", "default_config", "launch"]

SUM_TILE = (8, 64)  # positions and output channels of the kernel that adds parts
LARGEST_IMAGE = 2**30  # values: a tile of two images stays within 32-bit offsets


@dataclass(frozen=True)
class Job:
    """What one launch works on: x (B, H, W, C), w (parities * O, k * k * C), y the output or, in
    parts of K, their sums (splits, positions * O); `ends` bias, add, residual, scale_x, scale_w."""

    x: Tensor
    w: Tensor
    y: Tensor
    ends: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    shape: Shape
    flags: dict[str, Any]
    config: Config
    steps: int
    splits: int
    part_stride: int


def launch(
    x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False, scale_x: Tensor | None = None, scale_w: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """What the operators of `hcf_kernels.conv3x3` return, in y (B, O, P, Q) unless in CUDA C++.

    Raises ValueError for images of 2^30 values and more, and RuntimeError for e4m3 on a GPU that
    has none.
    """
    if y.numel() == 0:
        return y
    _require(x, y)
    folded, kernel = weight.ndim == 5, weight.shape[-1]
    x = x.permute(0, 2, 3, 1).contiguous()
    w = weight.movedim(-3, -1).contiguous().flatten(-3).flatten(0, -2)
    shape = shape_of(x, w, y, kernel, folded, simple=stride == 1 and (folded or not upsample))
    key = _key(x, y, kernel, stride, folded, upsample, asymmetric)
    config = config or find_config("conv3x3", key, default_config(shape), x.device)
    if config["variant"] == "cuda" and not _cuda_takes(x, y, weight, add, stride, upsample):
        config = default_config(shape)  # measured without a time embedding
    if config["variant"] == "cuda":
        return _in_cuda(x, weight, y, bias, residual, scale_x, scale_w, config)
    if config["variant"] == "boxes" and not shape.boxes:
        config = default_config(shape)  # measured with tensors that were aligned
    total = kernel**2 * triton.cdiv(shape.channels, config["block_k"])
    steps = triton.cdiv(total, config["splits"])
    splits = triton.cdiv(total, steps)
    after = {"BIAS": bias is not None, "ADD": add is not None, "RESIDUAL": residual is not None}
    flags = {
        "KERNEL": kernel,
        "PAD": 0 if asymmetric else kernel // 2,
        "PARITIES": shape.parities,
        "QUANT": {torch.int8: 1, torch.float8_e4m3fn: 2}.get(x.dtype, 0),
        "SPLIT": splits > 1,
        **(after if splits == 1 else dict.fromkeys(after, False)),
    }
    ends = (
        y if bias is None else bias.contiguous(),
        y if add is None else add.contiguous(),
        y if residual is None else residual.permute(0, 2, 3, 1).contiguous(),
        y if scale_x is None else scale_x.float(),
        y if scale_w is None else scale_w.float().contiguous(),
    )
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    target = y if splits == 1 else y.new_empty((splits, y.numel()), dtype=sums)
    job = Job(x, w, target, ends, shape, flags, config, steps, splits, y.numel())
    if config["variant"] == "boxes":
        _boxes(job)
    else:
        _gather(job, STRIDE=stride, UPSAMPLE=upsample and not folded)
    if splits > 1:
        _sum(job, y, after)
    return y


def plan_floats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, upsample: bool = False,
    asymmetric: bool = False,
) -> Plan:  # fmt: skip
    """How `hcf::conv3x3` can run; arguments as there."""
    rest = (bias, add, residual, stride, upsample, asymmetric)
    return _plan(x, weight, output_like(x, checked_size(x, weight, *rest)), *rest)


def plan_folded(x: Tensor, folded: Tensor, bias: Tensor | None = None) -> Plan:
    """How `hcf::upsample_conv3x3` can run; arguments as there."""
    rest = (bias, None, None, 1, True)
    return _plan(x, folded, output_like(x, checked_size(x, folded, *rest)), *rest)


def plan_codes(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None,
    add: Tensor | None, residual: Tensor | None, stride: int, dtype: torch.dtype,
    upsample: bool = False,
) -> Plan:  # fmt: skip
    """How `hcf::conv3x3_quantized` can run; arguments as there."""
    rest = (bias, add, residual, stride, upsample)
    y = output_like(x, checked_size(x, weight, *rest), dtype)
    return _plan(x, weight, y, *rest, False, scale_x, scale_w)


PLANS = {
    "conv3x3": plan_floats,
    "upsample_conv3x3": plan_folded,
    "conv3x3_quantized": plan_codes,
}


def _plan(
    x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, add: Tensor | None,
    residual: Tensor | None, stride: int, upsample: bool, asymmetric: bool = False,
    *scales: Tensor,
) -> Plan:  # fmt: skip
    folded, kernel = weight.ndim == 5, weight.shape[-1]
    last = x.permute(0, 2, 3, 1).contiguous()
    w = weight.movedim(-3, -1).contiguous().flatten(-3).flatten(0, -2)
    shape = shape_of(last, w, y, kernel, folded, simple=stride == 1 and (folded or not upsample))
    tried = candidates(shape)
    if x.is_cuda and _cuda_takes(last, y, weight, add, stride, upsample):
        found = torch.cuda.get_device_capability(x.device)
        tried += cuda_gemm.candidates(x.dtype, found, "conv3x3")
    scale_x, scale_w = scales or (None, None)
    return Plan(
        _key(last, y, kernel, stride, folded, upsample, asymmetric),
        tried,
        lambda config: launch(
            x,
            weight,
            y,
            bias,
            add,
            residual,
            stride,
            upsample,
            asymmetric,
            scale_x,
            scale_w,
            config,
        ),
    )


def _key(
    x: Tensor, y: Tensor, kernel: int, stride: int, folded: bool, upsample: bool, asymmetric: bool
) -> str:
    kind = "folded" if folded else "up" if upsample else "below" if asymmetric else ""
    return shape_key(tuple(x.shape), y.shape[1], f"k{kernel}s{stride}{kind}", x.dtype)


def _cuda_takes(
    x: Tensor, y: Tensor, weight: Tensor, add: Tensor | None, stride: int, upsample: bool
) -> bool:
    """Whether csrc/conv3x3_sm90.cu computes this: x (B, H, W, C), 3x3, stride 1, nothing added."""
    plain = weight.ndim == 4 and weight.shape[-1] == 3 and stride == 1 and not upsample
    rows = x.shape[-1] * x.element_size() % 16 == 0 and y.shape[1] % 8 == 0
    sixteen = y.dtype in (torch.float16, torch.bfloat16) and x.dtype != torch.float32
    return plain and rows and sixteen and add is None


def _in_cuda(
    x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None,
    scale_x: Tensor | None, scale_w: Tensor | None, config: Config,
) -> Tensor:  # fmt: skip
    made = cuda_gemm.launch_conv3x3(
        x, weight.permute(0, 2, 3, 1).contiguous(), scale_x, scale_w, bias,
        None if residual is None else residual.permute(0, 2, 3, 1).contiguous(), "none",
        y.dtype, config,
    )  # fmt: skip
    return made.permute(0, 3, 1, 2)


def shape_of(x: Tensor, w: Tensor, y: Tensor, kernel: int, folded: bool, simple: bool) -> Shape:
    """Of a `Job`'s x and w, y (B, O, P, Q); `simple`: x is read pixel by pixel as it is."""
    parities = 4 if folded else 1
    height, width = (side // 2 if folded else side for side in y.shape[2:])
    aligned = all(
        t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in (x, w)
    )
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return Shape(
        x.shape[0], x.shape[3], y.shape[1], height, width, kernel, parities, x.element_size(),
        boxes=simple and aligned and hopper and x.element_size() < 4,
    )  # fmt: skip


def _require(x: Tensor, y: Tensor) -> None:
    largest = max(x[0].numel(), y[0].numel())
    if largest >= LARGEST_IMAGE:
        raise ValueError(f"an image of {largest} values needs 64-bit offsets; use tiles")
    if x.dtype == torch.float8_e4m3fn and x.is_cuda:
        found = torch.cuda.get_device_capability(x.device)
        if found < (8, 9):
            raise RuntimeError(
                f"e4m3 needs compute capability 8.9, found {found[0]}.{found[1]}: use int8"
            )


def _gather(job: Job, **options: Any) -> None:
    shape, config = job.shape, job.config
    tiles = triton.cdiv(shape.positions, config["block_m"])
    tiles *= triton.cdiv(shape.outputs, config["block_n"]) * shape.parities
    gather_kernel[(tiles, job.splits)](
        job.x, job.w, job.y, *job.ends,
        *job.x.shape, shape.outputs, shape.height, shape.width, job.steps, job.part_stride,
        **job.flags, **options, EVEN_C=shape.channels % config["block_k"] == 0,
        BLOCK_M=config["block_m"], BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        GROUP=config["group"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


def _boxes(job: Job) -> None:
    shape, config = job.shape, job.config
    whole = (shape.images, shape.height, shape.width)
    sides = box(config["block_m"], *whole)
    tiles = triton.cdiv(shape.outputs, config["block_n"]) * shape.parities
    for size, side in zip(whole, sides, strict=True):
        tiles *= triton.cdiv(size, side)
    boxes_kernel[(tiles, job.splits)](
        _described(job.x, [*sides, config["block_k"]]),
        _described(job.w, [config["block_n"], config["block_k"]]),
        job.y, *job.ends, *job.x.shape, shape.outputs, job.steps, job.part_stride,
        **job.flags, BOX_B=sides[0], BOX_H=sides[1], BOX_W=sides[2],
        BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        GROUP=config["group"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Strides from the shape: torch leaves those of sides of 1 open."""
    strides = [1]
    for side in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * side)
    return TensorDescriptor(tensor, list(tensor.shape), strides, block)


def _sum(job: Job, y: Tensor, after: dict[str, bool]) -> None:
    outputs, area = y.shape[1], y.shape[2] * y.shape[3]
    positions = y.shape[0] * area
    block_m, block_n = SUM_TILE
    sum_kernel[(triton.cdiv(positions, block_m), triton.cdiv(outputs, block_n))](
        job.y, y, *job.ends, positions, outputs, area, job.part_stride,
        SPLITS=job.splits, SCALE=job.flags["QUANT"] > 0, **after,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


# what `x_ptr` and `w_ptr` are, the tensor core instructions, and where they are
KINDS: dict[str, tuple[str, int, dict[int, tuple[str, ...]], tuple[int, ...]]] = {
    "bf16": ("bf16", 0, {80: ("HMMA",), 90: ("HGMMA",)}, (80, 90)),
    "int8": ("i8", 1, {80: ("IMMA",), 90: ("IGMMA",)}, (80, 90)),
    "e4m3": ("fp8e4nv", 2, {90: ("QGMMA",)}, (90,)),
    "fp32": ("fp32", 0, {}, (80, 90)),
}
ENDS = {"y_ptr": "*bf16", "bias_ptr": "*bf16", "add_ptr": "*bf16", "residual_ptr": "*bf16",
        "scale_x_ptr": "*fp32", "scale_w_ptr": "*fp32"}  # fmt: skip


def _variant(kind: str, form: str, tile: tuple[int, int], split: bool = False, parities: int = 1,
             **changes: Any) -> Variant:  # fmt: skip
    element, quant, expect, architectures = KINDS[kind]
    element_bytes = {"fp32": 4, "bf16": 2}.get(kind, 1)
    step = LINE // element_bytes
    warps, stages = tiles_of(form, element_bytes)[tile]
    after = dict.fromkeys(("BIAS", "ADD", "RESIDUAL"), not split)
    constants = {"KERNEL": 3 if parities == 1 else 2, "PAD": 1, "PARITIES": parities,
                 "QUANT": quant, **after, "SPLIT": split}  # fmt: skip
    blocks = {"BLOCK_N": tile[1], "BLOCK_K": step, "GROUP": 8}
    sizes = ["B", "H", "W", "C", "OUT", "P", "Q", "steps", "part_stride"]
    if form == "boxes":
        sides = box(tile[0], 2, 64, 64)
        shape = ", ".join(map(str, (*sides, step)))
        sources = {"x_boxes": f"tensordesc<{element}[{shape}]>",
                   "w_boxes": f"tensordesc<{element}[{tile[1]}, {step}]>"}  # fmt: skip
        sizes = [name for name in sizes if name not in "PQ"]
        constants |= dict(zip(("BOX_B", "BOX_H", "BOX_W"), sides, strict=True)) | blocks
        # copied by the tensor memory accelerator, straight to what the tensor cores read
        expect, architectures = {90: (*expect[90], "UTMALDG")}, (90,)
    else:
        sources = {"x_ptr": f"*{element}", "w_ptr": f"*{element}"}
        constants |= {"STRIDE": 1, "UPSAMPLE": False, "EVEN_C": True, **changes}
        constants |= {"BLOCK_M": tile[0], **blocks}
    y = {"y_ptr": "*i32" if quant == 1 else "*fp32"} if split else {}
    name = "_".join([form, kind, f"{tile[0]}x{tile[1]}", *(["split"] if split else []),
                     *(["folded"] if parities == 4 else []), *map(str.lower, changes)])  # fmt: skip
    signature = sources | ENDS | y | dict.fromkeys(sizes, "i32")
    aligned = [n for n in signature if n.endswith("_ptr")] + ["C", "OUT", "part_stride"]
    return Variant(
        f"conv3x3.{name}", boxes_kernel if form == "boxes" else gather_kernel,
        signature | dict.fromkeys(constants, "constexpr"), constants, tuple(aligned),
        warps, stages, expect, architectures,
    )  # fmt: skip


def _sum_variant(int8: bool) -> Variant:
    parts = {"parts_ptr": "*i32" if int8 else "*fp32"}
    sizes = dict.fromkeys(("M", "OUT", "area", "part_stride"), "i32")
    constants = {"SPLITS": 32, "SCALE": int8, "BIAS": True, "ADD": True, "RESIDUAL": True,
                 "BLOCK_M": SUM_TILE[0], "BLOCK_N": SUM_TILE[1]}  # fmt: skip
    return Variant(
        f"conv3x3.sum{'_int8' if int8 else ''}", sum_kernel,
        parts | ENDS | sizes | dict.fromkeys(constants, "constexpr"), constants,
        ("parts_ptr", *ENDS, "OUT", "part_stride"),
    )  # fmt: skip


VARIANTS = [
    *(_variant(kind, form, tile) for kind in ("bf16", "int8", "e4m3")
      for form in ("gather", "boxes") for tile in tiles_of(form, 2)),
    *(_variant("fp32", "gather", tile) for tile in tiles_of("gather", 4)),
    *(_variant(kind, form, (128, 128), split=True) for kind in ("bf16", "int8")
      for form in ("gather", "boxes")),
    _variant("bf16", "gather", (128, 256), parities=4),
    _variant("bf16", "boxes", (256, 128), parities=4),
    _variant("int8", "boxes", (256, 128), parities=4),
    *(_variant(kind, "gather", (128, 256), STRIDE=2) for kind in ("bf16", "int8")),
    *(_variant(kind, "gather", (128, 256), UPSAMPLE=True) for kind in ("bf16", "int8")),
    *(_variant(kind, "gather", (128, 128), EVEN_C=False) for kind in ("bf16", "int8", "e4m3")),
    _sum_variant(False), _sum_variant(True),
]  # fmt: skip
