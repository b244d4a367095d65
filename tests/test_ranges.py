"""Ranges from shared statistics: how they are chosen, per timestep, and for weights in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hcf.errors import RecipeError
from hcf.quantize.formats import block_of, codes, fake_quantize
from hcf.quantize.ranges import (
    calibrate_scales,
    input_amax,
    layer_scale,
    mse_amax,
    percentile_amax,
    rescale,
    with_buckets,
)
from hcf.quantize.scales import LayerScale
from hcf.quantize.statistics import LayerStatistics, Statistics
from hcf.quantize.weight_ranges import weight_amax
from hcf.settings import QuantizeConfig

EDGES = torch.tensor([0.0, 333.0, 666.0, 999.0], dtype=torch.float64)


def seen(values: torch.Tensor, buckets: tuple[float, ...] = (1.0, 1.0, 1.0)) -> LayerStatistics:
    """Statistics of an input (N, I)."""
    amax = float(values.abs().max())
    return LayerStatistics(
        amax,
        values.abs().amax(0),
        torch.histc(values.abs(), 2048, min=0, max=amax).double(),
        torch.tensor(buckets, dtype=torch.float64),
    )


def test_clipping_algorithms_narrow_the_range() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(100_000), torch.full((3,), 40.0)]).abs()
    counts = torch.histc(values, 2048, min=0, max=40).double()
    exact = float(torch.quantile(values, 0.999))
    assert percentile_amax(counts, 40.0, 99.9) == pytest.approx(exact, abs=2 * 40 / 2048)
    assert percentile_amax(counts, 40.0, 100.0) == pytest.approx(40.0)

    def error(amax: float, grid: str) -> float:
        step = torch.tensor(amax / (127 if grid == "int8" else 448))
        return float((fake_quantize(values, step, grid) - values).square().sum())

    for grid in ("int8", "fp8"):
        chosen = mse_amax(counts, 40.0, grid)
        best = min(error(40.0 * percent / 100, grid) for percent in range(20, 101))
        assert error(chosen, grid) <= 1.02 * best
    assert mse_amax(counts, 40.0, "int8") < 40.0
    statistics = seen(values[:, None])
    assert input_amax(statistics, "max") == 40.0
    assert input_amax(statistics, "percentile", 99.9) < input_amax(statistics, "mse") < 40.0


def test_weight_ranges_have_the_shape_of_their_granularity() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 8, 3, 3)

    def amax(scheme: str, **options: Any) -> Any:
        return weight_amax(weight, LayerScale(None, np.ones(1, np.float32), scheme), **options)

    np.testing.assert_allclose(amax("int8"), weight.abs().amax((1, 2, 3)))
    assert amax("fp8", granularity="tensor").shape == ()
    assert amax("int8", granularity="tensor").shape == (6,)  # INT8 weights are per channel
    assert amax("int4-weight", block_size=32).shape == (6, 1)  # nothing from 16 on divides 72
    assert [block_of(n, 64) for n in (320, 72 * 4, 160, 40, 2880)] == [64, 32, 32, 40, 64]
    wide = torch.randn(6, 128)
    scale = LayerScale(None, np.ones(1, np.float32), "int4")
    np.testing.assert_allclose(
        weight_amax(wide, scale, block_size=32), wide.view(6, 4, 32).abs().amax(2)
    )


@pytest.mark.parametrize("grid", ["int8", "fp8", "int4"])
def test_searched_weight_ranges_round_better(grid: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256) ** 3
    scheme = {"int8": "int8", "fp8": "fp8", "int4": "int4-weight"}[grid]
    error = {}
    for algorithm in ("max", "mse"):
        scale = LayerScale(1.0, np.ones(1, np.float32), scheme)
        amax = weight_amax(weight, scale, algorithm=algorithm)
        step = torch.from_numpy(LayerScale(1.0, amax, scheme).weight_scale)
        rows = weight.view(*step.shape, -1)
        error[algorithm] = float((fake_quantize(rows, step[..., None], grid) - rows).norm())
    assert error["mse"] <= error["max"]
    assert grid != "int4" or error["mse"] < 0.97 * error["max"]


def test_codes_lie_on_their_grids_and_pass_gradients_straight() -> None:
    x = torch.tensor([-900.0, -1.3, 0.0, 0.4, 2.5, 900.0], requires_grad=True)
    one = torch.tensor(1.0)
    assert codes(x, one, "int8").tolist() == [-128, -1, 0, 0, 2, 127]
    assert codes(x, one, "int4").tolist() == [-8, -1, 0, 0, 2, 7]
    assert codes(x, one, "fp8").tolist() == [-448, -1.25, 0, 0.40625, 2.5, 448]
    for grid in ("int8", "fp8", "int4"):
        (gradient,) = torch.autograd.grad(codes(x, one, grid).sum(), x)
        assert gradient.tolist() == [0, 1, 1, 1, 1, 0]
        assert torch.equal(codes(x.detach(), one, grid), codes(x, one, grid))


def test_ranges_per_timestep_only_where_they_move() -> None:
    statistics = seen(torch.randn(64, 8) * 3)
    scale = LayerScale(statistics.amax, np.ones(4, np.float32))
    config = QuantizeConfig(timestep_buckets=3)
    flat = LayerStatistics(
        statistics.amax, statistics.channel_amax, statistics.histogram, torch.tensor([4.0, 3, 4])
    )
    assert with_buckets(scale, flat, EDGES, config) is scale
    moving = LayerStatistics(
        8.0, statistics.channel_amax, statistics.histogram, torch.tensor([8.0, torch.nan, 2.0])
    )
    found = with_buckets(LayerScale(8.0, np.ones(4, np.float32)), moving, EDGES, config)
    assert found.bucket_gain is not None
    assert found.bucket_gain.tolist() == [1.0, 1.0, 4.0]  # the unseen one has the range of all
    with pytest.raises(RecipeError, match="3 timestep buckets.*timestep_buckets is 5"):
        with_buckets(scale, moving, EDGES, QuantizeConfig(timestep_buckets=5))


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    statistics = Statistics({"0": seen(torch.randn(16, 8))}, EDGES)
    with pytest.raises(RecipeError, match="'int3' is not offered"):
        calibrate_scales(model, {"0": "int3"}, statistics)
    with pytest.raises(RecipeError, match="smoothing is searched on calibration calls"):
        calibrate_scales(model, {"0": "int8"}, statistics, QuantizeConfig(smooth=0.5))
    with pytest.raises(RecipeError, match="statistics are missing"):
        layer_scale(model[0], "fp8", None, EDGES, QuantizeConfig())
    only_weights = layer_scale(model[0], "int8-weight", None, EDGES, QuantizeConfig())
    assert only_weights.input_amax is None


def test_other_weights_get_ranges_of_their_own() -> None:
    torch.manual_seed(0)
    layer, other = nn.Linear(64, 8), nn.Linear(64, 8)
    statistics = seen(torch.randn(32, 64))
    settings = {"fp8": {"weight_granularity": "tensor"}, "int4": {"low_rank": 2}}
    for scheme in ("int8", "fp8", "int8-weight", "int4-weight", "int4"):
        config = QuantizeConfig(weight_algorithm="max", **settings.get(scheme, {}))
        before, wanted = (layer_scale(m, scheme, statistics, EDGES, config) for m in (layer, other))
        found = rescale({"a": before, "b": before}, {"a.weight": other.weight.detach()})
        np.testing.assert_allclose(found["a"].weight_amax, wanted.weight_amax, rtol=1e-5)
        assert found["b"] is before and found["a"].input_amax == before.input_amax
        if scheme == "int4":
            assert found["a"].low_rank is not None and wanted.low_rank is not None
            np.testing.assert_allclose(
                found["a"].low_rank[0] @ found["a"].low_rank[1],
                wanted.low_rank[0] @ wanted.low_rank[1],
                atol=1e-5,
            )
