"""FP8 E4M3: the grid, per tensor and per channel, against nvidia-modelopt's own rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import unit_calls

from hcf.export.component import relative_error
from hcf.quantize.formats import codes, fake_quantize
from hcf.quantize.quantize import choose_layers
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import fake_quantized, layer_errors
from hcf.quantize.statistics import collect_statistics
from hcf.settings import QuantizeConfig
from hcf.trace import DenoiserCall, call_denoiser


@pytest.fixture
def calls() -> list[DenoiserCall]:
    return unit_calls(999, 333)


def test_the_grid_is_that_of_e4m3() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[torch.isfinite(every)]
    assert float(every.max()) == 448
    one = torch.tensor(1.0)
    assert torch.equal(codes(every, one, "fp8"), every)
    assert codes(torch.tensor([500.0, 1e6, -1e6]), one, "fp8").tolist() == [448, 448, -448]
    # three bits of mantissa: half a step of 1/8, whatever the size
    x = torch.logspace(-1.8, 2.5, 1000)
    assert float(((codes(x, one, "fp8") - x) / x).abs().max()) <= 1 / 16
    assert fake_quantize(x.bfloat16(), one, "fp8").dtype == torch.bfloat16


def test_fake_quantised_model_is_modelopts(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    import modelopt.torch.quantization as mtq

    unet = tiny_pipeline.unet
    layers, _ = choose_layers(unet)
    formats = dict.fromkeys(layers, "fp8")
    config = QuantizeConfig(format="fp8", weight_granularity="tensor")
    scales = calibrate_scales(unet, formats, collect_statistics(unet, layers, calls), config)
    assert all(scale.weight_amax.shape == () for scale in scales.values())
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in layers:
        for part in ("weight", "input"):
            cfg = {"num_bits": (4, 3), "axis": None}
            entries.append({"quantizer_name": f"{name}.{part}_quantizer", "cfg": cfg})

    def run(model: torch.nn.Module) -> list[torch.Tensor]:
        return [call_denoiser(model, c.sample, c.timestep, c.kwargs) for c in calls]

    with torch.no_grad():
        theirs = mtq.quantize(
            copy.deepcopy(unet), {"quant_cfg": entries, "algorithm": "max"}, forward_loop=run
        )
        wanted, plain = run(theirs), run(unet)
        with fake_quantized(unet, scales):
            found = run(unet)
    shares = [
        relative_error(ours, its) / relative_error(ours, fp)
        for ours, its, fp in zip(found, wanted, plain, strict=True)
    ]
    # modelopt multiplies by 448 / amax where ONNX divides by amax / 448: some values on a rounding
    # boundary go the other way
    assert max(shares) < 1.0, shares


def test_layers_lose_what_three_bits_of_mantissa_lose(
    tiny_pipeline: Any, calls: list[DenoiserCall]
) -> None:
    unet = tiny_pipeline.unet
    layers, _ = choose_layers(unet)
    statistics = collect_statistics(unet, layers, calls)
    for granularity in ("tensor", "channel"):
        config = QuantizeConfig(format="fp8", weight_granularity=granularity)
        scales = calibrate_scales(unet, dict.fromkeys(layers, "fp8"), statistics, config)
        rows = layer_errors(unet, scales, calls)
        assert all(24 < row.sqnr_db < 40 for row in rows)
        assert {row.scheme for row in rows} == {"fp8"}
