"""Low-rank branches: the best part of a weight, and what they leave to the grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hcf.quantize.formats import fake_quantize_groups
from hcf.quantize.lowrank import can_have_low_rank, low_rank_of
from hcf.quantize.ranges import layer_scale
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import SimulatedLayer
from hcf.quantize.statistics import LayerStatistics
from hcf.settings import QuantizeConfig

EDGES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def outlier_layer(kind: type[nn.Module]) -> Any:
    """A layer whose weight has four large singular directions over small noise."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(128, 96) if kind is nn.Linear else nn.Conv2d(128, 96, 3, padding=1)
    columns = layer.weight[0].numel()
    large = torch.randn(96, 4) @ torch.randn(4, columns)
    layer.weight.data = (large + 0.2 * torch.randn(96, columns)).view_as(layer.weight) / 30
    return layer.requires_grad_(False)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (16, 8, 3, 3)])
def test_it_is_the_best_of_its_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    smooth = torch.rand(shape[1]).add(0.5).numpy()
    scale = LayerScale(1.0, np.ones(1, np.float32), smooth=smooth)
    up, down = low_rank_of(weight, scale, 5)
    assert up.shape == (shape[0], 5) and down.shape == (5, weight[0].numel())
    w = weight * torch.from_numpy(smooth).view(1, -1, *[1] * (len(shape) - 2))
    left, values, right = torch.linalg.svd(w.flatten(1).double(), full_matrices=False)
    wanted = left[:, :5] * values[:5] @ right[:5]
    np.testing.assert_allclose(up @ down, wanted, atol=1e-4)
    np.testing.assert_allclose(  # neither side takes all the size
        np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=1e-4
    )


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_branch_takes_the_outliers_from_the_grid(kind: type[nn.Module], scheme: str) -> None:
    layer = outlier_layer(kind)
    x = torch.randn(4, 128, 8, 8) if kind is nn.Conv2d else torch.randn(4, 64, 128)
    axis = 1 if kind is nn.Conv2d else -1
    amax = x.abs().movedim(axis, -1).flatten(0, -2).amax(0)
    seen = LayerStatistics(float(x.abs().max()), amax, torch.ones(2048), torch.ones(1))
    error = {}
    for rank in (0, 4):
        scale = layer_scale(layer, scheme, seen, EDGES, QuantizeConfig(low_rank=rank))
        y = SimulatedLayer(layer, scale)(x)
        error[rank] = float((y - layer(x)).norm() / layer(x).norm())
        assert (scale.low_rank is not None) == bool(rank)
    assert error[4] < 0.5 * error[0], error
    assert error[4] < (0.02 if scheme == "int8" else 0.1), error


def test_a_branch_that_would_cost_as_much_as_the_layer_is_left_out() -> None:
    layer = nn.Linear(64, 64)
    assert can_have_low_rank(layer, 16) and not can_have_low_rank(layer, 17)
    assert not can_have_low_rank(nn.Conv2d(64, 64, 3, groups=64), 1)
    config = QuantizeConfig(format="int4", smooth="none")
    assert layer_scale(layer, "int4", None, EDGES, config).low_rank is None
    wide = nn.Linear(256, 256)
    scale = layer_scale(wide, "int4", None, EDGES, config)
    assert scale.low_rank is not None and scale.low_rank[0].shape == (256, 32)
    assert scale.weight_amax.shape == (256, 4)


def test_run_time_groups_have_scales_of_their_own() -> None:
    x = torch.cat([torch.randn(2, 3, 16), 100 * torch.randn(2, 3, 16)], dim=-1)
    found = fake_quantize_groups(x, -1, 16)
    error = ((found - x).norm(dim=(0, 1)) / x.norm(dim=(0, 1))).view(2, 16).mean(1)
    assert float(error.max()) < 0.12  # one scale for all would leave nothing of the first
    assert torch.equal(fake_quantize_groups(x.movedim(-1, 1), 1, 16).movedim(1, -1), found)
    assert torch.equal(fake_quantize_groups(torch.zeros(1, 32), -1, 16), torch.zeros(1, 32))


def test_a_residual_is_what_the_branch_leaves() -> None:
    layer = outlier_layer(nn.Linear)
    scale = LayerScale(None, np.ones((96, 2), np.float32), "int4-weight")
    scale = replace(scale, low_rank=low_rank_of(layer.weight, scale, 96))
    simulated = SimulatedLayer(layer, scale)
    x = torch.randn(3, 128)  # all of the weight is in the branch: nothing is left to round
    torch.testing.assert_close(simulated(x), layer(x), rtol=1e-4, atol=1e-4)
