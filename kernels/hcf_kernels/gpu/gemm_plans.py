"""How matrix products can run, for tuning: tiles of the Triton kernels, then those of CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from hcf_kernels.gpu import cuda_gemm, geglu, gemm
from hcf_kernels.gpu.gemm_tiles import Shape, candidates
from hcf_kernels.tables import Config, Plan


def plan_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Plan:  # fmt: skip
    """How `hcf::int8_gemm` and `hcf::fp8_gemm` can run; arguments as there."""
    shape = gemm.shape_of(a, b, a.new_empty(a.shape[0], b.shape[0], dtype=dtype))
    return Plan(
        gemm.key_of(shape, dtype),
        candidates(shape) + _cuda(a, shape, dtype, "gemm"),
        lambda config: gemm.launch(
            a, b, scale_a, scale_b, bias, residual, activation, dtype, config
        ),
    )


def plan_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Plan:
    """How `hcf::geglu` can run; arguments as there."""
    return _plan_geglu(x.reshape(-1, x.shape[-1]), weight, bias, None, None, x.dtype)


def plan_geglu_int8(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Plan:  # fmt: skip
    """How `hcf::geglu_int8` can run; arguments as there."""
    return _plan_geglu(a, weight, bias, scale_a, scale_b, dtype)


def plan_gate(x: Tensor) -> Plan:
    """How `hcf::geglu_gate` can run; arguments as there."""
    rows = x.reshape(-1, x.shape[-1])
    return Plan(
        geglu.gate_key(rows),
        geglu.gate_candidates(),
        lambda config: geglu.launch_gate(rows, config),
    )


PLANS = {
    "int8_gemm": plan_product,
    "fp8_gemm": plan_product,
    "geglu": plan_geglu,
    "geglu_int8": plan_geglu_int8,
    "geglu_gate": plan_gate,
}


def _plan_geglu(
    a: Tensor, weight: Tensor, bias: Tensor | None, scale_a: Tensor | None,
    scale_b: Tensor | None, dtype: torch.dtype,
) -> Plan:  # fmt: skip
    shape = gemm.shape_of(a, weight, a.new_empty(a.shape[0], weight.shape[0] // 2, dtype=dtype))
    return Plan(
        gemm.key_of(shape, dtype),
        candidates(shape) + _cuda(a, shape, dtype, "geglu"),
        lambda config: geglu.launch(a, weight, bias, scale_a, scale_b, dtype, config),
    )


def _cuda(a: Tensor, shape: Shape, dtype: torch.dtype, kind: str) -> list[Config]:
    """Tiles of csrc/, where they take the operands: rows of 16 bytes, 16-bit output."""
    sixteen = dtype in (torch.float16, torch.bfloat16) and shape.operand != torch.float32
    if not (a.is_cuda and sixteen and shape.aligned and shape.n % 8 == 0):
        return []
    return cuda_gemm.candidates(shape.operand, torch.cuda.get_device_capability(a.device), kind)
