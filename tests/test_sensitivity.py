"""The sensitivity search: errors of single layers, costs, the choice, and a recipe out of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unit_calls
from torch import nn

from hcf.errors import RecipeError
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.scales import LayerScale
from hcf.quantize.sensitivity import (
    ErrorRow,
    error_of,
    measure_errors,
    read_journal,
    shared_inputs,
    summarise,
)
from hcf.quantize.sensitivity_choice import (
    Option,
    choose,
    cost_of,
    draw_front,
    exchange,
    layer_formats,
    pareto,
    predicted_error,
)
from hcf.quantize.simulate import fake_quantized
from hcf.quantize.statistics import collect_statistics, run_call
from hcf.trace import DenoiserCall


@pytest.fixture
def calls() -> list[DenoiserCall]:
    return unit_calls(900, 100)


def all_layers(denoiser: nn.Module) -> list[str]:
    return [n for n, m in denoiser.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def int8_scales(
    denoiser: nn.Module, layers: list[str], calls: list[DenoiserCall]
) -> dict[str, LayerScale]:
    statistics = collect_statistics(denoiser, layers, calls)
    return calibrate_scales(denoiser, dict.fromkeys(layers, "int8"), statistics)


def test_a_layers_error_is_that_of_the_whole_denoiser(
    tiny_pipeline: Any, calls: list[DenoiserCall], tmp_path: Path
) -> None:
    unet, layers = tiny_pipeline.unet, all_layers(tiny_pipeline.unet)[::3]
    scales = int8_scales(unet, layers, calls)
    rows = measure_errors(unet, {"int8": scales}, calls, tmp_path / "j.jsonl", content="c")
    assert len(rows) == len(layers) * 2
    with torch.no_grad():
        for row in rows[::5]:
            call = calls[row.call]
            wanted = run_call(unet, call)
            with fake_quantized(unet, {row.layer: scales[row.layer]}):
                found = run_call(unet, call)
            # everything before the layer was replayed, to the same bits
            assert row.noise == float((found - wanted).double().square().sum()), row.layer
            assert row.signal == float(wanted.double().square().sum())
            assert row.timestep == float(call.timestep[0])
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert not any(module._forward_hooks for module in unet.modules())


def test_errors_add_up_in_squares(
    tiny_pipeline: Any, calls: list[DenoiserCall], tmp_path: Path
) -> None:
    unet, layers = tiny_pipeline.unet, all_layers(tiny_pipeline.unet)[::4]
    scales = int8_scales(unet, layers, calls)
    rows = measure_errors(unet, {"int8": scales}, calls, tmp_path / "j.jsonl", content="c")
    each = summarise(rows, torch.tensor([100.0, 500.0, 900.0]))
    assert all(value is not None for row in each for value in row.by_bucket)
    predicted = math.sqrt(sum(row.error**2 for row in each))
    with torch.no_grad():
        outputs = [run_call(unet, call) for call in calls]
    true = error_of(unet, scales, calls, outputs)
    assert predicted == pytest.approx(true, rel=0.5)


def test_a_killed_search_goes_on_and_measures_what_changed(
    tiny_pipeline: Any, calls: list[DenoiserCall], tmp_path: Path
) -> None:
    unet, journal = tiny_pipeline.unet, tmp_path / "sub" / "j.jsonl"
    layers = all_layers(unet)[:6]
    scales = int8_scales(unet, layers, calls)
    wanted = measure_errors(unet, {"int8": scales}, calls, journal, content="c")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:7]) + lines[7][:20])  # killed in the middle of a line
    assert len(read_journal(journal)) == 7
    journal.write_text("".join(lines[:7]))
    found = measure_errors(unet, {"int8": scales}, calls, journal, content="c")
    assert sorted(map(str, found)) == sorted(map(str, wanted))
    assert len(journal.read_text().splitlines()) == 12
    # nothing is left to do: a denoiser that cannot run is not run
    broken = nn.Linear(1, 1)
    again = measure_errors(broken, {"int8": scales}, calls, journal, content="c")
    assert sorted(map(str, again)) == sorted(map(str, wanted))
    wider = replace(scales[layers[0]], input_amax=2 * (scales[layers[0]].input_amax or 1))
    measure_errors(unet, {"int8": {**scales, layers[0]: wider}}, calls, journal, content="c")
    assert len(journal.read_text().splitlines()) == 14
    measure_errors(unet, {"int8": scales}, calls, journal, content="another model")
    assert len(journal.read_text().splitlines()) == 26


def test_layer_mode_needs_one_pass(
    tiny_pipeline: Any, calls: list[DenoiserCall], tmp_path: Path
) -> None:
    unet, layers = tiny_pipeline.unet, all_layers(tiny_pipeline.unet)
    scales = int8_scales(unet, layers, calls)
    rows = measure_errors(
        unet, {"int8": scales}, calls, tmp_path / "j.jsonl", content="c", mode="layer"
    )
    each = summarise(rows, torch.tensor([0.0, 1000.0]))
    assert {row.layer for row in each} == set(layers)
    assert all(0 < row.error < 0.1 for row in each)  # 20 dB and better


def test_layers_that_read_one_tensor_are_one_group(
    tiny_pipeline: Any, calls: list[DenoiserCall]
) -> None:
    layers = all_layers(tiny_pipeline.unet)
    groups = shared_inputs(tiny_pipeline.unet, layers, calls[0])
    assert sorted(layer for group in groups for layer in group) == sorted(layers)
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert tuple(f"{block}.attn1.to_{n}" for n in "qkv") in groups
    assert tuple(f"{block}.attn2.to_{n}" for n in "kv") in groups
    assert ("conv_in",) in groups and (f"{block}.ff.net.2",) in groups


def options_of(*rows: tuple[str, str, float, float]) -> list[Option]:
    return [Option((name,), format, error, cost) for name, format, error, cost in rows]


THREE = options_of(
    ("a", "none", 0.0, 4.0), ("a", "int8", 0.30, 1.0),
    ("b", "none", 0.0, 4.0), ("b", "int8", 0.01, 1.0), ("b", "fp8", 0.005, 2.0),
    ("c", "none", 0.0, 1.0), ("c", "int8", 0.02, 1.5),
)  # fmt: skip


def test_the_choice_is_optimal() -> None:
    best = layer_formats(choose(THREE, budget=7.0))
    assert best == {"a": "none", "b": "fp8", "c": "none"}
    assert layer_formats(choose(THREE, budget=6.0)) == {"a": "none", "b": "int8", "c": "none"}
    assert layer_formats(choose(THREE, budget=3.0)) == {"a": "int8", "b": "int8", "c": "none"}
    assert layer_formats(choose(THREE, max_error=0.01)) == {"a": "none", "b": "int8", "c": "none"}
    assert layer_formats(choose(THREE, max_error=0.0)) == {"a": "none", "b": "none", "c": "none"}
    assert cost_of(choose(THREE, max_error=1.0)) == 3.0
    with pytest.raises(RecipeError, match="the cheapest costs 3"):
        choose(THREE, budget=2.9)
    with pytest.raises(RecipeError, match="the least is 0.3"):
        choose([o for o in THREE if o.layers != ("a",) or o.format == "int8"], max_error=0.1)


def test_the_choice_agrees_with_trying_everything() -> None:
    generator = np.random.default_rng(0)
    names = "abcdefg"
    options = options_of(
        *((n, "none", 0.0, 1 + float(generator.random())) for n in names),
        *((n, "int8", float(generator.random()), float(generator.random())) for n in names),
    )
    by_name = {n: [o for o in options if o.layers == (n,)] for n in names}
    for budget in (5.0, 7.0, 10.0):
        best = min(
            math.sqrt(sum(o.error**2 for o in picked))
            for mask in range(2 ** len(names))
            for picked in [[by_name[n][mask >> i & 1] for i, n in enumerate(names)]]
            if sum(o.cost for o in picked) <= budget
        )
        assert predicted_error(choose(options, budget=budget)) == pytest.approx(best, rel=1e-3)


def test_the_front_falls_from_cheap_to_exact(tmp_path: Path) -> None:
    front = pareto(THREE)
    assert front[0].cost == 3.0 and front[-1].error == 0.0
    assert all(
        a.cost < b.cost and a.error > b.error for a, b in zip(front, front[1:], strict=False)
    )
    assert sum(front[0].formats.values()) == 3
    draw_front(front, {"default": (5.0, 0.1)}, "ms", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_exchange_follows_the_true_error() -> None:
    """Truth differs from prediction: c in int8 is far worse than it looked."""

    def true_error(formats: dict[str, str]) -> float:
        return {"a": 0.3, "b": 0.01, "c": 0.02}["a"] * (formats["a"] == "int8") + 5 * (
            formats["c"] == "int8"
        )

    start = {o.layers: o for o in THREE if (o.layers[0], o.format) in
             {("a", "int8"), ("b", "none"), ("c", "int8")}}  # fmt: skip
    best, error = exchange(THREE, start, true_error, rounds=3, budget=6.5)
    assert layer_formats(best) == {"a": "none", "b": "int8", "c": "none"} and error == 0.0
    assert cost_of(best) <= 6.5
    same, error = exchange(THREE, start, true_error, rounds=0, budget=6.5)
    assert same == start and error == 5.3


def test_rows_are_summed_over_calls_and_buckets() -> None:
    rows = [
        ErrorRow("k1", "a", "int8", 0, 900.0, 4.0, 100.0),
        ErrorRow("k2", "a", "int8", 1, 100.0, 1.0, 100.0),
    ]
    (row,) = summarise(rows, torch.tensor([0.0, 300.0, 600.0, 1000.0]))
    assert row.error == pytest.approx(math.sqrt(5 / 200))
    assert row.by_bucket == pytest.approx((0.1, None, 0.2))
