"""Layer times: nothing twice, nothing lost, hooks gone. Real tiny modules; no figure of speed."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcf.errors import RecipeError
from hcf_bench.layer_profile import (
    OTHERS,
    OUTSIDE,
    layer_modules,
    profile_case,
    profile_table,
)
from hcf_bench.opcount import OpCost, count_ops, count_workload
from hcf_bench.roofline import floor_ms
from hcf_bench.workloads import Case, DenoiseForward, build_case, find_workload

CEILINGS = {"copy": 10.0, "gemm-fp32": 0.1, "gemm-bf16": 1.0}


@pytest.fixture
def unet_case(tiny_pipeline: Any) -> Case:
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": torch.randn(2, 16, 32),
    }
    return Case(find_workload("sd15/unet"), DenoiseForward(tiny_pipeline.unet), inputs)


def ops_of(case: Case) -> list[OpCost]:
    module = copy.deepcopy(case.module).to("meta")
    return count_ops(Case(case.workload, module, {n: x.to("meta") for n, x in case.inputs.items()}))


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_the_lines_add_up_to_the_whole(unet_case: Case) -> None:
    ops = ops_of(unet_case)
    profile = profile_case(unet_case, CEILINGS, repeats=2, ops=ops)
    assert (profile.workload, profile.subject, profile.dtype) == ("sd15/unet", "eager", "fp32")
    assert profile.batch == 2
    assert profile.floor_ms == pytest.approx(floor_ms(ops, CEILINGS, "fp32"), abs=1e-5)
    layers = profile.layers
    assert sum(x.time_ms for x in layers) == pytest.approx(profile.total_ms, abs=1e-4)
    assert sum(x.floor_ms for x in layers) == pytest.approx(profile.floor_ms, abs=1e-4)
    assert sum(x.tflop for x in layers) == pytest.approx(sum(op.flops for op in ops) / 1e12)
    assert sum(x.gbyte for x in layers) == pytest.approx(sum(op.bytes for op in ops) / 1e9)
    for layer in layers:
        assert layer.excess_ms == pytest.approx(layer.time_ms - layer.floor_ms, abs=1e-5)


def test_ten_layers_worst_first_then_two_sums(unet_case: Case) -> None:
    profile = profile_case(unet_case, CEILINGS, repeats=1, ops=ops_of(unet_case), subject="mine")
    *worst, others, outside = profile.layers
    assert len(worst) == 10
    excess = [layer.excess_ms for layer in worst]
    assert excess == sorted(excess, reverse=True)
    assert (others.name, outside.name) == (OTHERS, OUTSIDE)
    table = profile_table(profile)
    lines = table.splitlines()
    assert len(lines) == 14
    assert lines[0].startswith("sd15/unet mine fp32, batch 2: ")
    assert lines[-1].startswith(OUTSIDE)
    assert max(map(len, lines)) <= 120


class Sleeper(nn.Module):
    """Sleeps, then calls its child twice."""

    def __init__(self, own_s: float, child: nn.Module | None = None) -> None:
        super().__init__()
        self.own_s = own_s
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.own_s)
        return x if self.child is None else self.child(self.child(x))


def cost(layer: str, flops: int = 10**6) -> OpCost:
    return OpCost("mm", layer, flops, 10**3, "fp32", "linear")


def test_time_inside_a_nested_layer_is_not_its_parent_s() -> None:
    module = nn.Sequential(Sleeper(0.05, Sleeper(0.1)), Sleeper(0.01))
    case = Case(find_workload("sd15/unet"), module, {"x": torch.zeros(3, 1)})
    ops = [cost("0"), cost("0.child"), cost("")]
    profile = profile_case(case, CEILINGS, repeats=1, ops=ops)
    times = {layer.name: layer.time_ms for layer in profile.layers}
    assert times.keys() == {"0 (own ops)", "0.child", OUTSIDE}  # module 1 has no counted op
    assert times["0.child"] >= 200.0  # both calls
    assert 50.0 <= times["0 (own ops)"] < 200.0
    assert profile.batch == 3
    outside = profile.layers[-1]
    assert outside.tflop == pytest.approx(1e-6)  # the op of the top module


def test_a_layer_that_never_runs_leaves_its_ops_outside() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module.forward = module[0].forward  # type: ignore[method-assign]
    case = Case(find_workload("sd15/unet"), module, {"x": torch.zeros(1, 4)})
    profile = profile_case(case, CEILINGS, repeats=1, ops=[cost("0"), cost("1", 5)])
    assert [layer.name for layer in profile.layers] == [OUTSIDE]
    assert profile.layers[0].tflop == pytest.approx((10**6 + 5) / 1e12)


def test_hooks_are_gone_even_after_an_error(unet_case: Case) -> None:
    ops = ops_of(unet_case)
    profile_case(unet_case, CEILINGS, repeats=1, ops=ops)
    assert hooks_of(unet_case.module) == 0
    calls: list[int] = []

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 2:  # the first traced run
                raise RuntimeError("broken")
            return x

    module = nn.Sequential(Breaks())
    case = Case(find_workload("sd15/unet"), module, {"x": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="broken"):
        profile_case(case, CEILINGS, repeats=1, ops=[cost("0")])
    assert hooks_of(module) == 0


@pytest.mark.parametrize(
    "workload", ["sd15/unet", "sdxl/unet", "sd15/vae_decoder", "sd15/text_encoder"]
)
def test_the_layers_of_the_real_networks_hold_their_flops(workload: str) -> None:
    named = find_workload(workload)
    ops = count_workload(named, dtype="bf16")
    layers = layer_modules(build_case(named, device="meta", dtype="bf16").module, ops)
    assert sum(op.flops for op in ops if op.layer in layers) > 0.9 * sum(op.flops for op in ops)


def test_ops_are_counted_for_the_batch_and_dtype_of_the_case() -> None:
    named = find_workload("kernel/geglu_2x256x1280")
    case = build_case(named, batch=1, dtype="bf16")
    profile = profile_case(case, CEILINGS, repeats=1)
    assert (profile.dtype, profile.batch) == ("bf16", 1)
    assert profile.layers[0].name == "proj"
    assert profile.layers[0].tflop == pytest.approx(2 * 256 * 1280 * 10240 / 1e12)


def test_what_cannot_be_profiled_is_refused(unet_case: Case) -> None:
    ops = ops_of(unet_case)
    with pytest.raises(RecipeError, match="gemm-fp32"):
        profile_case(unet_case, {"copy": 1.0}, ops=ops)
    with pytest.raises(ValueError, match="repeats"):
        profile_case(unet_case, CEILINGS, repeats=0, ops=ops)


@pytest.mark.gpu
def test_a_profile_on_a_gpu(unet_case: Case) -> None:
    ops = ops_of(unet_case)
    unet_case.module.to("cuda")
    unet_case.inputs = {name: x.to("cuda") for name, x in unet_case.inputs.items()}
    profile = profile_case(unet_case, CEILINGS, device="cuda", repeats=3, ops=ops)
    assert all(layer.time_ms > 0 for layer in profile.layers[:10])
    assert sum(x.time_ms for x in profile.layers) == pytest.approx(profile.total_ms, abs=1e-3)
