"""The error a quantised denoiser makes: one row a layer, and end to end.

SQNR of a layer = 10 log10(sum y^2 / sum (y_q - y)^2), y the layer's output on fp inputs, y_q with
its input and weight rounded to INT8: only that layer is quantised, so rows can be compared and the
worst layers excluded. End to end: ||eps_q - eps|| / ||eps|| of the denoiser's output with every
layer quantised. 1 bit is 6.02 dB; well behaved layers lie between 25 and 45 dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hcf.quantize.scales import INT8_MAX, LayerScale
from hcf.trace import DenoiserCall, call_denoiser


@dataclass(frozen=True)
class LayerError:
    """One quantised layer: its kind, weight shape, calibrated input range and SQNR in dB (inf if
    exact)."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    input_amax: float
    sqnr_db: float


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x (...), scale broadcastable -> x on the INT8 grid: clip(round(x / s), -128, 127) * s."""
    return (x / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale


def fake_quantized_weight(module: nn.Conv2d | nn.Linear, scale: LayerScale) -> Tensor:
    """The layer's weight (O, ...) on its per-channel INT8 grid."""
    weight = module.weight.detach()
    step = torch.from_numpy(scale.weight_scale).to(weight)
    return fake_quantize(weight, step.view(-1, *[1] * (weight.ndim - 1)))


@contextmanager
def fake_quantized(denoiser: nn.Module, scales: Mapping[str, LayerScale]) -> Iterator[nn.Module]:
    """Inside, `denoiser` computes what INT8 engines compute, in fp arithmetic; then restored."""
    kept: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []
    hooks = []
    try:
        for name, scale in scales.items():
            module = quantisable(denoiser, name)
            kept.append((module, module.weight.data))
            module.weight.data = fake_quantized_weight(module, scale)
            step = torch.tensor(
                scale.input_scale, dtype=module.weight.dtype, device=module.weight.device
            )

            def quantize_input(
                _: nn.Module, args: tuple[Any, ...], step: Tensor = step
            ) -> tuple[Any, ...]:
                return (fake_quantize(args[0], step), *args[1:])

            hooks.append(module.register_forward_pre_hook(quantize_input))
        yield denoiser
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in kept:
            module.weight.data = weight


@torch.no_grad()
def layer_errors(
    denoiser: nn.Module, scales: Mapping[str, LayerScale], calls: Sequence[DenoiserCall]
) -> list[LayerError]:
    """SQNR of every layer of `scales` over `calls`, worst first. Costs two forwards a call."""
    signal = dict.fromkeys(scales, 0.0)
    noise = dict.fromkeys(scales, 0.0)
    hooks = []
    for name, scale in scales.items():
        module = quantisable(denoiser, name)
        weight = fake_quantized_weight(module, scale)
        step = torch.tensor(scale.input_scale, dtype=weight.dtype, device=weight.device)

        def measure(
            module: nn.Module,
            args: tuple[Any, ...],
            output: Tensor,
            name: str = name,
            weight: Tensor = weight,
            step: Tensor = step,
        ) -> None:
            x = fake_quantize(args[0], step)
            if isinstance(module, nn.Conv2d):
                rounded = module._conv_forward(x, weight, module.bias)
            else:
                rounded = nn.functional.linear(x, weight, cast(nn.Linear, module).bias)
            signal[name] += float(output.double().square().sum())
            noise[name] += float((rounded - output).double().square().sum())

        hooks.append(module.register_forward_hook(measure))
    try:
        for call in calls:
            call_denoiser(denoiser, call.sample, call.timestep, call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, scale in scales.items():
        module = quantisable(denoiser, name)
        sqnr = (
            math.inf
            if noise[name] == 0
            else 10 * math.log10(max(signal[name], 1e-300) / noise[name])
        )
        kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        rows.append(
            LayerError(name, kind, tuple(module.weight.shape), scale.input_amax, round(sqnr, 2))
        )
    return sorted(rows, key=lambda row: row.sqnr_db)


@torch.no_grad()
def relative_error(
    denoiser: nn.Module, scales: Mapping[str, LayerScale], calls: Sequence[DenoiserCall]
) -> float:
    """||quantised - fp|| / ||fp|| of the denoiser's output over `calls`."""
    outputs = [call_denoiser(denoiser, call.sample, call.timestep, call.kwargs) for call in calls]
    signal = noise = 0.0
    with fake_quantized(denoiser, scales):
        for call, output in zip(calls, outputs, strict=True):
            rounded = call_denoiser(denoiser, call.sample, call.timestep, call.kwargs)
            signal += float(output.double().square().sum())
            noise += float((rounded - output).double().square().sum())
    return math.sqrt(noise / max(signal, 1e-300))


def quantisable(denoiser: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """The Conv2d or Linear called `name`; TypeError for any other module."""
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Conv2d or Linear")
    return module
