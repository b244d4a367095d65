"""The error a quantised denoiser makes: one row a layer, and end to end.

SQNR of a layer = 10 log10(sum y^2 / sum (y_q - y)^2), y the layer's output on fp inputs, y_q with
its input and weight rounded: only that layer is quantised, so rows can be compared and the worst
layers excluded. End to end: ||eps_q - eps|| / ||eps|| of the denoiser's output with every layer
quantised. 1 bit is 6.02 dB; well behaved INT8 layers lie between 25 and 45 dB, FP8 ones near 30.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hcf.quantize.formats import fake_quantize, weight_on_grid
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import (
    HELD_BYTES,
    SimulatedLayer,
    fake_quantized,
    quantisable,
    timestep_gains,
)
from hcf.quantize.statistics import bucket_of, run_call
from hcf.trace import DenoiserCall

__all__ = [
    "LayerError",
    "fake_quantize",
    "fake_quantized",
    "fake_quantized_weight",
    "layer_errors",
    "layers_by_format",
    "outputs_of",
    "quantisable",
    "relative_error",
    "relative_to",
]


@dataclass(frozen=True)
class LayerError:
    """One quantised layer: its kind, weight shape, scheme, static input range (None without one)
    and SQNR in dB (inf if exact)."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    input_amax: float | None
    sqnr_db: float
    scheme: str = "int8"


def fake_quantized_weight(module: nn.Conv2d | nn.Linear, scale: LayerScale) -> Tensor:
    """The layer's weight (O, ...) as its product sees it: smoothed, less its low-rank part, on
    its grid."""
    return weight_on_grid(module.weight.detach(), scale)


@torch.no_grad()
def layer_errors(
    denoiser: nn.Module, scales: Mapping[str, LayerScale], calls: Sequence[DenoiserCall]
) -> list[LayerError]:
    """SQNR of every layer of `scales` over `calls`, worst first. Costs two forwards a call."""
    modules = {name: quantisable(denoiser, name) for name in scales}
    size = sum(m.weight.numel() * m.weight.element_size() for m in modules.values())
    layers = {
        name: SimulatedLayer(module, scales[name], hold=size <= HELD_BYTES)
        for name, module in modules.items()
    }
    signal = dict.fromkeys(scales, 0.0)
    noise = dict.fromkeys(scales, 0.0)
    gains = timestep_gains(layers)
    with _outputs_seen(layers, signal, noise):
        for call in calls:
            for name, (table, edges) in gains.items():
                gain = table[bucket_of(edges, call.timestep)]
                layers[name].gain = gain.to(modules[name].weight.device)
            run_call(denoiser, call)
    rows = [
        LayerError(
            layer=name,
            kind="Conv2d" if isinstance(module, nn.Conv2d) else "Linear",
            shape=tuple(module.weight.shape),
            input_amax=scales[name].input_amax,
            sqnr_db=round(sqnr(signal[name], noise[name]), 2),
            scheme=scales[name].scheme,
        )
        for name, module in modules.items()
    ]
    return sorted(rows, key=lambda row: row.sqnr_db)


@torch.no_grad()
def relative_error(
    denoiser: nn.Module, scales: Mapping[str, LayerScale], calls: Sequence[DenoiserCall]
) -> float:
    """||quantised - fp|| / ||fp|| of the denoiser's output over `calls`."""
    return relative_to(denoiser, scales, calls, outputs_of(denoiser, calls))


@torch.no_grad()
def relative_to(
    denoiser: nn.Module,
    scales: Mapping[str, LayerScale],
    calls: Sequence[DenoiserCall],
    outputs: Sequence[Tensor],
) -> float:
    """`relative_error` against outputs that were taken before (the weights may have changed)."""
    signal = noise = 0.0
    with fake_quantized(denoiser, scales):
        for call, output in zip(calls, outputs, strict=True):
            rounded = run_call(denoiser, call)
            signal += float(output.double().square().sum())
            noise += float((rounded - output).double().square().sum())
    return math.sqrt(noise / max(signal, 1e-300))


@torch.no_grad()
def outputs_of(denoiser: nn.Module, calls: Sequence[DenoiserCall]) -> list[Tensor]:
    """What the denoiser makes of each call, (B, C, H, W) each."""
    return [run_call(denoiser, call) for call in calls]


def sqnr(signal: float, noise: float) -> float:
    """Energies -> dB; inf without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def layers_by_format(scales: Mapping[str, LayerScale]) -> dict[str, int]:
    """How many layers have each scheme, most first."""
    return dict(Counter(scale.scheme for scale in scales.values()).most_common())


@contextmanager
def _outputs_seen(
    layers: Mapping[str, SimulatedLayer], signal: dict[str, float], noise: dict[str, float]
) -> Iterator[None]:
    """Inside, each call adds the energy of a layer's output and of what rounding does to it."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            signal[name] += float(output.double().square().sum())
            noise[name] += float((layers[name](args[0]) - output).double().square().sum())

        return hook

    handles = [layer.module.register_forward_hook(watch(n)) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
