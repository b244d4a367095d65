"""Smoothing: exact where nothing is rounded, better where channels differ, shared where read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import fake_quantized, relative_error
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import SimulatedLayer
from hcf.quantize.smooth import shared_inputs, smoothed_inputs, smoothing_factors
from hcf.quantize.statistics import collect_statistics
from hcf.settings import QuantizeConfig
from hcf.trace import DenoiserCall


class Outliers(nn.Module):
    """A convolution and two Linear layers whose input channels differ by 100x; called as a
    denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("gain", torch.logspace(-1, 1, 32))

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> tuple[Tensor, ...]:
        """sample (B, 32, H, W) -> (B, 32, H, W)"""
        x = self.conv(sample * self.gain.view(-1, 1, 1)).tanh() * self.gain.flip(0).view(-1, 1, 1)
        rows = x.movedim(1, -1)
        return ((self.query(rows) * self.key(rows)).movedim(-1, 1),)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Outliers().eval().requires_grad_(False)


@pytest.fixture
def calls() -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(1)
    return [
        DenoiserCall(torch.randn(4, 32, 8, 8, generator=generator), torch.full((4,), time))
        for time in (999.0, 500.0, 1.0)
    ]


LAYERS = ["conv", "query", "key"]


def test_smoothing_itself_changes_nothing(model: nn.Module) -> None:
    x = torch.randn(2, 32, 6, 6)
    for name, value in (("conv", x), ("query", x.movedim(1, -1))):
        layer = model.get_submodule(name)
        smooth = torch.logspace(-1, 1, 32).numpy()
        amax = 1e-9 * np.ones((), np.float32)  # no weight rounding: nothing is an FP8 weight
        scale = LayerScale(None, amax, "int8-weight", smooth=smooth)
        simulated = SimulatedLayer(layer, scale)
        s = torch.from_numpy(smooth).view(1, -1, *[1] * (layer.weight.ndim - 2))
        simulated.weight = layer.weight * s
        torch.testing.assert_close(simulated(value), layer(value), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smooth", [0.5, "search"])
def test_smoothing_helps_where_channels_differ(
    model: nn.Module, calls: list[DenoiserCall], smooth: Any
) -> None:
    statistics = collect_statistics(model, LAYERS, calls)
    formats = dict.fromkeys(LAYERS, "int8")
    errors = {
        value: relative_error(
            model,
            calibrate_scales(model, formats, statistics, QuantizeConfig(smooth=value), calls),
            calls,
        )
        for value in ("none", smooth)
    }
    assert errors[smooth] < 0.7 * errors["none"], errors


def test_layers_that_read_one_tensor_share_their_factor(
    model: nn.Module, calls: list[DenoiserCall]
) -> None:
    assert shared_inputs(model, LAYERS, calls[0]) == [["conv"], ["query", "key"]]
    formats = {"conv": "int8", "query": "int8", "key": "fp8"}
    assert len(shared_inputs(model, LAYERS, calls[0], formats)) == 3
    statistics = collect_statistics(model, LAYERS, calls)
    same = dict.fromkeys(LAYERS, "int8")
    found = smoothing_factors(model, same, statistics, dict.fromkeys(LAYERS, "search"), calls, 64)
    assert np.array_equal(found["query"][1], found["key"][1])
    # SmoothQuant's equation 4, the weight's part over both readers; the geometric mean is 1
    given = smoothing_factors(model, same, statistics, {"query": 0.25, "key": 0.25}, calls, 64)
    x = statistics["query"].channel_amax
    w = torch.stack([model.get_submodule(n).weight.abs().amax(0) for n in ("query", "key")]).amax(0)
    wanted = x**0.25 / w**0.75
    np.testing.assert_allclose(given["query"][1], wanted / wanted.log().mean().exp(), rtol=1e-4)
    assert set(given) == {"query", "key"}


def test_a_rule_gives_a_layer_its_own_strength(model: nn.Module, calls: list[DenoiserCall]) -> None:
    statistics = collect_statistics(model, LAYERS, calls)
    formats = dict.fromkeys(LAYERS, "int8")
    scales = calibrate_scales(
        model, formats, statistics, QuantizeConfig(), calls, alphas={"conv": 0.5}
    )
    assert scales["conv"].smooth is not None and scales["query"].smooth is None
    # the range is that of the smoothed input
    smooth = torch.from_numpy(scales["conv"].smooth)
    amax = float((statistics["conv"].channel_amax / smooth).max())
    assert scales["conv"].input_amax == pytest.approx(amax, rel=1e-5)


def test_hooks_see_smoothed_inputs_and_the_model_is_left_alone(
    model: nn.Module, calls: list[DenoiserCall]
) -> None:
    call = calls[0]
    wanted = model(call.sample, call.timestep)[0]
    smooth = {"conv": np.full(32, 4.0, np.float32)}
    plain = collect_statistics(model, ["conv"], calls)["conv"].amax
    with smoothed_inputs(model, smooth):
        assert collect_statistics(model, ["conv"], calls)["conv"].amax == pytest.approx(plain / 4)
        torch.testing.assert_close(model(call.sample, call.timestep)[0], wanted)
    assert "forward" not in model.get_submodule("conv").__dict__
    assert torch.equal(model(call.sample, call.timestep)[0], wanted)


def test_four_bit_weights_are_smoothed_by_mean_inputs(
    model: nn.Module, calls: list[DenoiserCall]
) -> None:
    statistics = collect_statistics(model, LAYERS, calls)
    formats = dict.fromkeys(LAYERS, "int4-weight")
    errors = {}
    for smooth in ("none", "auto"):
        config = QuantizeConfig(format="int4-weight", smooth=smooth, block_size=32)
        scales = calibrate_scales(model, formats, statistics, config, calls)
        assert all(scale.input_amax is None for scale in scales.values())
        errors[smooth] = relative_error(model, scales, calls)
    assert errors["auto"] < errors["none"], errors


def test_ranges_per_timestep_follow_the_timestep(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    calls = [
        DenoiserCall(size * torch.randn(4, 32, 8, 8, generator=generator), torch.full((4,), time))
        for time, size in ((999.0, 8.0), (500.0, 2.0), (1.0, 0.25))
    ]
    statistics = collect_statistics(model, ["conv"], calls, buckets=3)
    errors = {}
    for buckets in (0, 3):
        config = QuantizeConfig(timestep_buckets=buckets)
        scales = calibrate_scales(model, {"conv": "int8"}, statistics, config)
        errors[buckets] = relative_error(model, scales, calls[2:])
        if buckets:
            # rows of one batch may be at different timesteps, each with the gain of its own
            samples = torch.cat([call.sample[:1] for call in calls])
            times = torch.cat([call.timestep[:1] for call in calls])
            with fake_quantized(model, scales):
                together = model(samples, times)[0]
                for i, call in enumerate(calls):
                    torch.testing.assert_close(
                        together[i], model(call.sample, call.timestep)[0][0], rtol=1e-4, atol=1e-4
                    )
    assert errors[3] < 0.2 * errors[0], errors
