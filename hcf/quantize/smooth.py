"""Moving range from activations to weights, a factor an input channel: y = (W s) (x / s).

SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4), for layers whose input is rounded too:

    s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)

AWQ (Lin et al., arXiv 2306.00978, eq. 4 and 5), for layers whose weights alone are rounded:

    s_j = mean |x_j|^alpha

Conv2d has one factor an input channel as well, the same at all kernel positions. Layers that read
the same tensor (q, k, v) share s, so the tensor is multiplied and rounded once; max |W_j| is then
over all of them. With "search" alpha is the one of {none, 0, 0.1, .. 1} whose rounded layers come
closest to their own outputs on a sample of the calibration (AWQ's search, there over weights only).
The ranges of the search come from every other image, its errors from the images between: on the
same images alpha = 1 nearly always wins, for it fits every channel to its largest value, and then
prompts that were not among them are clipped.

I input channels, j one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hcf.quantize.formats import is_weight_only
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import SimulatedLayer, quantisable
from hcf.quantize.statistics import Statistics, run_call
from hcf.quantize.weight_ranges import weight_amax
from hcf.trace import DenoiserCall

ALPHAS = tuple(i / 10 for i in range(11))
SEARCH_CALLS = 8
SEARCH_ROWS = 512  # of a Linear's input in one call, spread over all
SEARCH_SIDE = 16  # a Conv2d sees a window of this many pixels of two images
LIMIT = 1e4  # factors outside 1/LIMIT .. LIMIT serve no channel: dead ones would give 0 or inf


def smoothing_factors(
    denoiser: nn.Module,
    formats: Mapping[str, str],
    statistics: Statistics,
    alphas: Mapping[str, float | str],
    calls: Sequence[DenoiserCall],
    block_size: int,
) -> dict[str, tuple[float, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Of each layer that gets any: its alpha and s (I,). `alphas` are numbers or "search".

    Layers without a factor that helps are left out. Grouped convolutions have none.
    """
    chosen = [name for name in alphas if _can_be_smoothed(quantisable(denoiser, name))]
    groups = shared_inputs(denoiser, chosen, calls[0], formats)
    means = mean_inputs(denoiser, [name for name in chosen if is_weight_only(formats[name])], calls)
    found: dict[str, tuple[float, Any]] = {}
    searched: list[list[str]] = []
    for names in groups:
        fixed = [alpha for name in names if isinstance(alpha := alphas[name], float | int)]
        if fixed:  # one tensor, one factor: the first number given holds for all its readers
            ranges = _ranges(statistics, names)
            s = _factor(denoiser, names, formats, ranges, means, float(fixed[0]))
            found |= {name: (float(fixed[0]), s) for name in names}
        else:
            searched.append(names)
    if searched:
        found |= _search(denoiser, searched, formats, statistics, means, calls, block_size)
    return found


def shared_inputs(
    denoiser: nn.Module,
    layers: Sequence[str],
    call: DenoiserCall,
    formats: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """`layers` in groups that read the very same tensor (and have the same format)."""
    groups: dict[tuple[int, str], list[str]] = {}
    seen: list[Tensor] = []  # kept alive: a freed tensor's id would come again

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            key = (id(args[0]), formats[name] if formats else "")
            if not any(name in names for names in groups.values()):
                groups.setdefault(key, []).append(name)

        return hook

    with _hooked(denoiser, {name: look(name) for name in layers}):
        run_call(denoiser, call)
    return list(groups.values())


def mean_inputs(
    denoiser: nn.Module, layers: Sequence[str], calls: Sequence[DenoiserCall]
) -> dict[str, Tensor]:
    """mean |x_j| (I,) of the inputs of `layers` over a few of `calls`."""
    means: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else args[0]
            value = x.float().abs().flatten(0, -2).mean(0)
            means[name] = means[name] + value if name in means else value

        return hook

    hooks = {name: look(name, quantisable(denoiser, name)) for name in layers}
    if layers:
        with _hooked(denoiser, hooks):
            for call in _few(calls):
                run_call(denoiser, call)
    return means


@contextmanager
def smoothed_inputs(denoiser: nn.Module, smooth: Mapping[str, Any]) -> Iterator[None]:
    """Inside, hooks see the input of a layer divided by s (I,); the layer itself the true one."""
    kept: list[tuple[nn.Module, Any]] = []
    hooks: dict[str, Any] = {}
    for name, factor in smooth.items():
        module = quantisable(denoiser, name)
        s = torch.from_numpy(factor).to(module.weight.device)
        s = s.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else s
        kept.append((module, module.__dict__.get("forward")))
        hooks[name] = partial(_divided, s)
        object.__setattr__(module, "forward", partial(_multiplied, module.forward, s))
    try:
        with _hooked(denoiser, hooks):
            yield
    finally:
        for layer, forward in kept:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                object.__setattr__(layer, "forward", forward)


def _divided(s: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] / s.to(args[0].dtype), *args[1:])


def _multiplied(plain: Any, s: Tensor, x: Tensor) -> Tensor:
    return plain(x * s.to(x.dtype))


@torch.no_grad()
def _search(
    denoiser: nn.Module,
    groups: Sequence[Sequence[str]],
    formats: Mapping[str, str],
    statistics: Statistics,
    means: Mapping[str, Tensor],
    calls: Sequence[DenoiserCall],
    block_size: int,
) -> dict[str, tuple[float, Any]]:
    """The best alpha of each group, by the outputs of its rounded layers; none where none helps."""
    group_of = {name: index for index, names in enumerate(groups) for name in names}
    ranges, samples = _halves(denoiser, list(group_of), calls)
    factors = [
        [None, *(_factor(denoiser, n, formats, ranges, means, a) for a in ALPHAS)] for n in groups
    ]
    errors = torch.zeros(len(groups), len(ALPHAS) + 1, dtype=torch.float64)
    for name, index in group_of.items():
        module, parts = quantisable(denoiser, name), samples.pop(name)
        x, sizes = torch.cat(parts), [len(part) for part in parts]
        y = module(x)
        energy = [float(part.double().square().sum()) for part in y.split(sizes)]
        for column, s in enumerate(factors[index]):
            layer = rounded_layer(module, formats[name], ranges[name], s, block_size)
            noise = (layer(x) - y).double().square().split(sizes)
            # every timestep counts alike, however large the layer's output is there
            errors[index, column] += sum(
                float(part.sum()) / max(total, 1e-300)
                for part, total in zip(noise, energy, strict=True)
            )
    found: dict[str, tuple[float, Any]] = {}
    for index, names in enumerate(groups):
        best = int(errors[index].argmin())
        if best:
            alpha = ALPHAS[best - 1]
            s = _factor(denoiser, names, formats, _ranges(statistics, names), means, alpha)
            found |= {name: (alpha, s) for name in names}
    return found


def _halves(
    denoiser: nn.Module, layers: Sequence[str], calls: Sequence[DenoiserCall]
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """max |x_j| (I,) over every other image of `calls`; samples of the images between, a call each.

    Calls of a single image serve for both.
    """
    ranges: dict[str, Tensor] = {}
    samples: dict[str, list[Tensor]] = {}
    sampled = False

    def look(name: str, is_conv: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            rows = (x[::2].movedim(1, -1) if is_conv else x[::2]).float()
            amax = rows.abs().flatten(0, -2).amax(0).cpu()
            ranges[name] = torch.maximum(ranges[name], amax) if name in ranges else amax
            if sampled:
                samples.setdefault(name, []).append(_sample(x[1::2] if len(x) > 1 else x, is_conv))

        return hook

    hooks = {n: look(n, isinstance(quantisable(denoiser, n), nn.Conv2d)) for n in layers}
    few = {id(call) for call in _few(calls)}
    with _hooked(denoiser, hooks):
        for call in calls:
            sampled = id(call) in few
            run_call(denoiser, call)
    return ranges, samples


def rounded_layer(
    module: nn.Conv2d | nn.Linear, scheme: str, channel_amax: Tensor, s: Any, block_size: int
) -> SimulatedLayer:
    """The layer under `scheme` with largest values as ranges, smoothed by s (I,) or not (None)."""
    amax = channel_amax if s is None else channel_amax / torch.from_numpy(s)
    scale = LayerScale(float(amax.max()), np.zeros(1, np.float32), scheme, smooth=s)
    return SimulatedLayer(
        module, replace(scale, weight_amax=weight_amax(module.weight, scale, block_size=block_size))
    )


def _factor(
    denoiser: nn.Module,
    names: Sequence[str],
    formats: Mapping[str, str],
    ranges: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    alpha: float,
) -> Any:
    """s (I,) float32 of layers that read one tensor; its geometric mean is 1."""
    if is_weight_only(formats[names[0]]):
        s = means[names[0]].cpu().double().clamp_min(1e-12) ** alpha
    else:
        x = torch.stack([ranges[name].double() for name in names]).amax(0)
        w = torch.stack([_weight_inputs(quantisable(denoiser, name)) for name in names]).amax(0)
        s = x.clamp_min(1e-12) ** alpha / w.clamp_min(1e-12) ** (1 - alpha)
    s = s / s.log().mean().exp()
    return s.clamp(1 / LIMIT, LIMIT).float().numpy()


def _ranges(statistics: Statistics, names: Sequence[str]) -> dict[str, Tensor]:
    """max |x_j| (I,) of each layer over the whole calibration."""
    return {name: statistics[name].channel_amax for name in names}


def _weight_inputs(module: nn.Conv2d | nn.Linear) -> Tensor:
    """max |W_j| (I,) float64 of each input channel."""
    w = module.weight.detach().abs()
    return w.amax([axis for axis in range(w.ndim) if axis != 1]).double().cpu()


def _can_be_smoothed(module: nn.Conv2d | nn.Linear) -> bool:
    return isinstance(module, nn.Linear) or module.groups == 1


def _sample(x: Tensor, is_conv: bool) -> Tensor:
    """A part of a layer's input that costs little: rows of a Linear, a window of a Conv2d."""
    if is_conv:
        return x[_spread(len(x), 2), :, :SEARCH_SIDE, :SEARCH_SIDE].clone()
    rows = x.flatten(0, -2)
    return rows[_spread(len(rows), SEARCH_ROWS)].clone()


def _few(calls: Sequence[DenoiserCall]) -> Sequence[DenoiserCall]:
    """A few calls over the whole trajectory, its first and last step among them."""
    by_time = sorted(calls, key=lambda call: -float(call.timestep.flatten()[0]))
    return [by_time[i] for i in _spread(len(by_time), SEARCH_CALLS)]


def _spread(length: int, count: int) -> list[int]:
    """At most `count` distinct indices below `length`, the first and the last among them."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


@contextmanager
def _hooked(denoiser: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [
        quantisable(denoiser, name).register_forward_pre_hook(hook) for name, hook in hooks.items()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
