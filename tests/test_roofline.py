"""Ceilings are measured and floors are sums: formulas by hand, sizes and notes by running."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hcf.errors import MissingDependency, RecipeError
from hcf_bench.opcount import OpCost, OpKind, count_workload
from hcf_bench.records import Ceiling
from hcf_bench.roofline import (
    MACHINES,
    ceiling_values,
    estimate_floor,
    floor_ms,
    fraction_of_peak,
    fraction_of_roofline,
    measure_ceilings,
    survey_ceilings,
)
from hcf_bench.workloads import find_workload

CEILINGS = {"copy": 100.0, "gemm-fp32": 1.0, "gemm-bf16": 4.0, "gemm-int8": 8.0}
TERA, GIGA = 10**12, 10**9


@cache
def counted(workload: str, batch: int) -> list[OpCost]:
    return count_workload(find_workload(workload), batch, "bf16")


def op(flops: int, moved: int, kind: OpKind = "linear", dtype: str = "fp32") -> OpCost:
    return OpCost("op", "layer", flops, moved, dtype, kind)


def test_the_floor_is_the_sum_of_the_larger_terms() -> None:
    compute_bound = op(TERA, GIGA)  # 1000 ms of arithmetic, 10 ms of traffic
    memory_bound = op(GIGA, 20 * GIGA)  # 1 ms and 200 ms
    free = op(0, 0, "elementwise")
    assert floor_ms([], CEILINGS, "fp32") == 0.0
    assert floor_ms([compute_bound, memory_bound, free], CEILINGS, "fp32") == pytest.approx(1200.0)


def test_matmuls_in_another_dtype_move_its_bytes() -> None:
    traffic = op(0, 8 * GIGA)
    assert floor_ms([traffic], CEILINGS, "fp32") == pytest.approx(80.0)
    assert floor_ms([traffic], CEILINGS, "int8") == pytest.approx(20.0)
    assert floor_ms([op(8 * TERA, 0)], CEILINGS, "int8") == pytest.approx(1000.0)
    # a norm stays in the dtype that it was counted in
    assert floor_ms([op(0, 8 * GIGA, "norm")], CEILINGS, "int8") == pytest.approx(80.0)


def test_fractions() -> None:
    assert fraction_of_peak(2.0, 1000.0, CEILINGS, "bf16") == pytest.approx(0.5)
    assert fraction_of_roofline(3.0, 4.0) == pytest.approx(0.75)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(RecipeError, match="gemm-fp8 is not known .known: copy"):
        floor_ms([op(1, 1)], CEILINGS, "fp8")
    with pytest.raises(RecipeError, match="copy is not known"):
        floor_ms([op(1, 1)], {"gemm-fp32": 1.0}, "fp32")
    with pytest.raises(RecipeError, match="'fp12'") as caught:
        measure_ceilings("cpu", ["fp12"])
    assert "bf16" in caught.value.fix
    with pytest.raises(RecipeError, match="'B300'") as caught:
        estimate_floor("B300", [op(1, 1)], "bf16")
    assert "H100" in caught.value.fix
    with pytest.raises(RecipeError, match="gemm-fp32"):
        estimate_floor("A100", [op(1, 1)], "fp32")


@pytest.mark.parametrize(
    ("workload", "batch", "machine", "dtype", "published_ms", "tolerance"),
    [
        ("sd15/unet", 2, "H100", "bf16", 2.70, 0.01),
        ("sd15/unet", 2, "A100-80GB", "bf16", 6.97, 0.03),
        ("sd15/unet", 2, "H100", "fp8", 1.69, 0.01),
        ("sd15/unet", 1, "H100", "bf16", 1.52, 0.01),
        ("sdxl/unet", 2, "H100", "bf16", 20.6, 0.01),
        ("sdxl/unet", 2, "A100", "bf16", 56.6, 0.03),
        ("sdxl/unet", 2, "H100", "fp8", 12.5, 0.04),
    ],
)
def test_the_roofline_sums_of_the_performance_anchors(
    workload: str, batch: int, machine: str, dtype: str, published_ms: float, tolerance: float
) -> None:
    found, formula = estimate_floor(machine, counted(workload, batch), dtype)
    assert found == pytest.approx(published_ms, rel=tolerance)
    known = MACHINES[machine]
    assert f"{known.ceilings[f'gemm-{dtype}']:g} TFLOP/s {dtype}" in formula
    assert f"{known.ceilings['copy']:g} GB/s" in formula and known.name in formula


def test_a_datasheet_peak_that_stands_in_is_said() -> None:
    found, formula = estimate_floor("A100", [op(624 * TERA, 0, dtype="bf16")], "int8")
    assert found == pytest.approx(1000.0)
    assert "624 TFLOP/s int8, the datasheet's peak" in formula


def test_the_ceilings_of_this_cpu() -> None:
    before = torch.get_num_threads()
    found, left_out = survey_ceilings("cpu", ["fp32", "bf16", "fp8"], threads=1, budget_s=0.2)
    assert torch.get_num_threads() == before
    assert torch.get_float32_matmul_precision() == "highest"
    values = ceiling_values(found)
    assert list(values) == ["copy", "gemm-fp32", "gemm-bf16"]
    assert all(value > 0 for value in values.values())
    assert [ceiling.unit for ceiling in found] == ["GB/s", "TFLOP/s", "TFLOP/s"]
    assert all("1 threads" in ceiling.note for ceiling in found)
    assert "MiB" in found[0].note and "1024x1024x1024" in found[1].note
    assert "no TF32" in found[1].note and "no TF32" not in found[2].note
    assert "compute capability 8.9" in left_out["gemm-fp8"]
    # what was measured is what a floor takes
    assert floor_ms([op(TERA, GIGA)], values, "fp32") > 0


def test_int8_on_a_cpu_runs_or_says_why_not() -> None:
    found, left_out = survey_ceilings("cpu", ["fp32", "int8"], threads=1, budget_s=0.2)
    values = ceiling_values(found)
    assert ("gemm-int8" in values) != ("gemm-int8" in left_out)
    if "gemm-int8" in values and values["gemm-int8"] < values["gemm-fp32"]:
        assert "slower than gemm-fp32" in found[-1].note


def test_ceilings_of_a_gpu_that_is_not_here() -> None:
    if torch.cuda.is_available():
        assert measure_ceilings("cuda", [], budget_s=0.5)[0].name == "copy"
    else:
        with pytest.raises(MissingDependency, match="CUDA"):
            measure_ceilings("cuda", ["bf16"])


def test_a_record_takes_them() -> None:
    ceiling = Ceiling(name="gemm-bf16", value=1.5, unit="TFLOP/s")
    assert ceiling_values([ceiling]) == {"gemm-bf16": 1.5}


@pytest.mark.gpu
def test_the_ceilings_of_this_gpu() -> None:
    found, left_out = survey_ceilings("cuda", ["fp32", "bf16", "fp16", "int8", "fp8"])
    values = ceiling_values(found)
    assert {"copy", "gemm-fp32", "gemm-bf16", "gemm-fp16"} <= values.keys()
    assert values["gemm-bf16"] > values["gemm-fp32"]
    if torch.cuda.get_device_capability() >= (8, 9):
        assert values["gemm-fp8"] > values["gemm-bf16"], left_out
