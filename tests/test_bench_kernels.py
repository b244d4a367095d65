"""Kernels by the calls models make: recorded, made again, timed beside torch, and tuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hcf.cli import app
from hcf_bench import kernels
from hcf_bench.kernel_calls import KernelCall, TensorSpec, calls_of, model_calls
from hcf_bench.kernels import (
    KernelRecord,
    flops_of,
    plan_of,
    select,
    time_call,
    tune_calls,
)
from hcf_kernels import MODULES

OTHER = ("int8_gemm", "quantize", "conv3x3", "conv3x3_quantized", "geglu_int8")
NORM = KernelCall(
    "group_norm_silu",
    (
        TensorSpec((1, 8, 4, 4), (128, 1, 32, 8), torch.float32),
        TensorSpec((8,), (1,), torch.float32), TensorSpec((8,), (1,), torch.float32),
        2, 1e-5, "silu", None,
    ),
)  # fmt: skip


def test_calls_are_those_of_one_forward() -> None:
    calls = model_calls("tiny/unet", 2, "fp32")
    assert {call.op for call in calls} <= set(MODULES) and sum(calls.values()) > 20
    norms = [call for call in calls if call.op == "group_norm_silu"]
    first = norms[0].arguments[0]
    assert first.shape[0] == 2 and first.strides[1] == 1  # channels_last
    assert {spec.dtype for call in calls for spec in call.arguments if isinstance(spec, TensorSpec)}
    assert calls_of(["tiny/unet"], "fp32").keys() == model_calls("tiny/unet", 2, "fp32").keys()


def test_a_call_is_made_again_as_it_was() -> None:
    x, weight, *_, groups, eps, activation, add = NORM.make("cpu", seed=3)
    assert x.stride() == (128, 1, 32, 8) and (groups, eps, activation, add) == (
        2,
        1e-5,
        "silu",
        None,
    )
    assert torch.equal(x, NORM.make("cpu", seed=3)[0]) and x.std() > 0.5
    for dtype in (torch.int8, torch.float8_e4m3fn):
        made = TensorSpec((64, 64), (64, 1), dtype).make("cpu", torch.Generator())
        assert made.float().abs().max() > 100 and made.dtype == dtype
    assert str(NORM) == "group_norm_silu(1x8x4x4, 8, 8)"


def test_a_row_is_checked_and_timed() -> None:
    row = time_call(NORM, 3, "cpu", False, {"copy": 10.0})
    assert row.count == 3 and row.sqnr_db is not None and row.sqnr_db > 100
    assert set(row.ms) == {"ours", "eager"} and row.faster["eager"].low > 0
    assert row.gbyte == (2 * 128 + 16) * 4 / 1e9 and row.ceiling == "copy" and not row.failed


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "reference", lambda op: lambda x, *rest: x)
    row = time_call(NORM, 1, "cpu", False, {})
    assert "dB to the reference" in row.failed["ours"] and not row.ms


def test_flops_of_products() -> None:
    def spec(*shape: int) -> TensorSpec:
        return TensorSpec(shape, tuple(shape), torch.float32)

    assert flops_of(KernelCall("geglu", (spec(2, 5, 8), spec(12, 8)))) == 2 * 10 * 8 * 12
    attention = (spec(1, 2, 6, 4), spec(1, 2, 3, 4), spec(1, 2, 3, 4))
    assert flops_of(KernelCall("attention", attention)) == 4 * 2 * 6 * 3 * 4
    assert flops_of(NORM) == 0


def test_the_costliest_calls_come_first() -> None:
    calls = model_calls("tiny/unet", 2, "fp32")
    ordered = list(select(calls, ()))
    size = [
        calls[c] * sum(a.nbytes for a in c.arguments if isinstance(a, TensorSpec)) for c in ordered
    ]
    assert size == sorted(size, reverse=True)
    assert {call.op for call in select(calls, ["geglu("])} == {"geglu"}


def test_tuning_keeps_the_fastest_that_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(NORM, NORM.make("cpu"))
    assert plan is not None and plan.candidates[0]["variant"] == "one_pass"
    few = kernels.Plan(
        plan.key, [plan.candidates[0], {"variant": "one_pass", "num_warps": 8}], plan.run
    )
    monkeypatch.setattr(kernels, "plan_of", lambda call, arguments: few)
    lines: list[str] = []
    table = tune_calls([NORM, NORM], "cpu", 60.0, lines.append)
    assert table["group_norm_silu"][plan.key] in few.candidates and len(lines) == 1
    wrong = kernels.Plan(plan.key, few.candidates, lambda config: torch.rand(4, 4))
    monkeypatch.setattr(kernels, "plan_of", lambda call, arguments: wrong)
    with pytest.raises(RuntimeError, match="dB from"):
        tune_calls([NORM], "cpu", 60.0, lines.append)


def test_the_command_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(*args: Any, **kwargs: Any) -> Any:
        return [], {}

    monkeypatch.setattr(kernels, "survey_ceilings", quick)
    monkeypatch.setattr(kernels, "ROUNDS", 2)
    command = ["bench", "kernels", "-m", "tiny/unet", "--dtype", "fp32", "--no-compile", "--most"]
    done = CliRunner().invoke(app, [*command, "2", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "kernels.json").read_text(encoding="utf-8")
    record = KernelRecord.model_validate(json.loads(text))
    assert len(record.rows) == 2 and not list(tmp_path.glob("*.tmp"))
    refused = CliRunner().invoke(app, [*command, "2", "--tune"])
    assert refused.exit_code != 0


def test_layers_are_recorded_in_8_bits_too() -> None:
    calls = model_calls("mini/unet", 2, "fp32")
    ops = {call.op for call in calls}
    assert {
        "int8_gemm",
        "fp8_gemm",
        "quantize",
        "conv3x3",
        "conv3x3_quantized",
        "geglu_int8",
    } <= ops
    made = [call for call in calls if call.op == "int8_gemm"]
    assert all(call.arguments[0].shape[1] == call.arguments[1].shape[1] for call in made)


@pytest.mark.parametrize(
    "op", ["int8_gemm", "quantize", "conv3x3", "conv3x3_quantized", "geglu_int8"]
)
def test_every_kind_of_call_can_be_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROUNDS", 2)
    calls = [call for call in model_calls("mini/unet", 2, "fp32") if call.op == op]
    smallest = min(calls, key=lambda call: call.arguments[0].nbytes)
    row = time_call(smallest, 1, "cpu", False, {})
    assert not row.failed and len(row.ms) >= 2, row


def test_a_table_is_merged_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    folder = tmp_path / "tables"
    kernels.write_table({"geglu": {"1": {"a": 1}}}, folder, "cuda")
    path = kernels.write_table({"geglu": {"2": {"a": 2}}, "quantize": {}}, folder, "cuda")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["ops"]["geglu"] == {"1": {"a": 1}, "2": {"a": 2}} and found["device"] == "a GPU"
    assert list(folder.iterdir()) == [path]
