"""INT8 ranges of a denoiser's layers, by nvidia-modelopt and, where that falls short, a histogram.

Algorithms (how a range is chosen from the calibration values v):
    max         amax = max |v|: nothing is clipped
    percentile  activations: amax = the given percentile of |v|; weights: max
    mse         amax of the least squared rounding and clipping error: activations over a histogram,
                weights a channel (modelopt's search)
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, MissingDependency, RecipeError
from hcf.quantize.report import fake_quantize, quantisable
from hcf.quantize.scales import INT8_MAX, LayerScale, check_scales
from hcf.trace import DenoiserCall, call_denoiser

ALGORITHMS = ("max", "percentile", "mse")
HISTOGRAM_BINS = 2048


def calibrate_scales(
    denoiser: nn.Module,
    layers: Sequence[str],
    calls: Sequence[DenoiserCall],
    algorithm: str = "max",
    percentile: float = 99.99,
) -> dict[str, LayerScale]:
    """Ranges of `layers` over `calls`. `denoiser` (fp32) is not changed: modelopt has a copy.

    Raises `RecipeError` for an unknown algorithm; `InvalidArtifact` naming the layers that have NaN
    or infinite values, are never reached by the calibration, or only ever see zeros;
    `MissingDependency` without nvidia-modelopt.
    """
    if algorithm not in ALGORITHMS:
        raise RecipeError(
            f"quantize.algorithm {algorithm!r} is not offered",
            fix=f"use one of {', '.join(ALGORITHMS)}",
        )
    mtq = _modelopt()
    _refuse_non_finite(denoiser, layers, calls)

    def run(model: nn.Module) -> None:
        for call in calls:
            call_denoiser(model, call.sample, call.timestep, call.kwargs)

    config = {
        "quant_cfg": quant_cfg(layers),
        "algorithm": {
            "method": "mse",
            "start_multiplier": 0.5,
            "stop_multiplier": 1.0,
            "step_size": 0.025,
        }
        if algorithm == "mse"
        else "max",
    }
    model = copy.deepcopy(denoiser).eval().requires_grad_(False)
    with _quiet(), torch.no_grad():
        try:
            model = mtq.quantize(model, config, forward_loop=run)
        except AssertionError as error:
            raise InvalidArtifact(
                "calibration met NaN or infinite values: first in the input of "
                + _first_non_finite(denoiser, layers, calls),
                fix="check the weights and the calibration prompts",
            ) from error
        quantizers = {name: model.get_submodule(name).input_quantizer for name in layers}
        unreached = [name for name, quantizer in quantizers.items() if quantizer.amax is None]
        if unreached:
            raise InvalidArtifact(
                f"{len(unreached)} layer(s) are never reached by the calibration calls: "
                + ", ".join(unreached[:12]),
                fix="add an `exclude` rule, or calibrate with prompts that use them",
            )
    input_amax = {name: float(quantizer.amax) for name, quantizer in quantizers.items()}
    if algorithm == "percentile":
        input_amax = histogram_amax(
            denoiser,
            input_amax,
            calls,
            lambda counts, amax: percentile_amax(counts, amax, percentile),
        )
    elif algorithm == "mse":
        input_amax = histogram_amax(denoiser, input_amax, calls, mse_amax)
    scales = {
        name: LayerScale(
            input_amax[name],
            model.get_submodule(name).weight_quantizer.amax.float().flatten().cpu().numpy().copy(),
        )
        for name in layers
    }
    check_scales(scales, "calibration")
    return scales


def quant_cfg(layers: Sequence[str]) -> list[dict[str, Any]]:
    """modelopt's ordered list: all off, then weights (axis 0) and inputs (per tensor) of `layers`.

    Our own list: the default ones leave out `*proj_out.*` and quantise the inputs of norms.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in layers:
        entries.append(
            {"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
        )
        entries.append(
            {"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": 8, "axis": None}}
        )
    return entries


@torch.no_grad()
def histogram_amax(
    denoiser: nn.Module,
    input_amax: Mapping[str, float],
    calls: Sequence[DenoiserCall],
    choose: Callable[[Tensor, float], float],
) -> dict[str, float]:
    """Per layer choose(histogram (HISTOGRAM_BINS,) of |x| over 0 .. amax, amax), x its inputs.

    Our own histogram: modelopt 0.47 searches its MSE with the arguments of an older quantisation
    function and always returns its first candidate.
    """
    counts = {name: torch.zeros(HISTOGRAM_BINS, dtype=torch.float64) for name in input_amax}

    def collect(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().abs()
            counts[name] += (
                torch.histc(x, HISTOGRAM_BINS, min=0.0, max=input_amax[name]).cpu().double()
            )

        return hook

    hooks = [
        quantisable(denoiser, name).register_forward_pre_hook(collect(name)) for name in input_amax
    ]
    try:
        for call in calls:
            call_denoiser(denoiser, call.sample, call.timestep, call.kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: choose(counts[name], amax) for name, amax in input_amax.items()}


def percentile_amax(counts: Tensor, amax: float, percentile: float) -> float:
    """Upper edge of the bin that holds the percentile of |x|; counts (bins,) over 0 .. amax."""
    below = counts.cumsum(0) / counts.sum()
    index = int(torch.searchsorted(below, percentile / 100).clamp(max=len(counts) - 1))
    return amax * (index + 1) / len(counts)


def mse_amax(counts: Tensor, amax: float) -> float:
    """The a in amax * (0.2, 0.21, .. 1) of least sum counts * (q_a(v) - v)^2, v the bin centres."""
    values = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (amax / len(counts))
    candidates = amax * torch.arange(20, 101, dtype=torch.float64)[:, None] / 100
    errors = (fake_quantize(values, candidates / INT8_MAX) - values).square() @ counts
    return float(candidates[int(errors.argmin())])


def _refuse_non_finite(
    denoiser: nn.Module, layers: Sequence[str], calls: Sequence[DenoiserCall]
) -> None:
    if not calls:
        raise RecipeError(
            "the calibration set is empty", fix="set quantize.calibration_samples to at least 1"
        )
    broken = [
        name for name in layers if not torch.isfinite(quantisable(denoiser, name).weight).all()
    ]
    if broken:
        raise InvalidArtifact(
            f"{len(broken)} layer(s) have NaN or infinite weights: " + ", ".join(broken[:12]),
            fix="the model is damaged: train or download it again",
        )
    for index, call in enumerate(calls):
        for name, value in {"sample": call.sample, **call.kwargs}.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise InvalidArtifact(
                    f"calibration call {index}: {name} has NaN or infinite values"
                )


@torch.no_grad()
def _first_non_finite(
    denoiser: nn.Module, layers: Sequence[str], calls: Sequence[DenoiserCall]
) -> str:
    """Name of the first layer, in call order, whose input is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not found and not torch.isfinite(args[0]).all():
                found.append(name)

        return hook

    hooks = [quantisable(denoiser, name).register_forward_pre_hook(look(name)) for name in layers]
    try:
        for call in calls:
            call_denoiser(denoiser, call.sample, call.timestep, call.kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else "an unknown layer"


def _modelopt() -> Any:
    try:
        with _quiet():
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise MissingDependency(
            f"quantisation needs nvidia-modelopt: {error}",
            fix="pip install 'nvidia-modelopt==0.47.*'",
        ) from error
    return mtq


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """modelopt warns about versions it was not tested with and prints what it inserts; errors still
    come through."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
