"""Calibrated scales of a denoiser's layers, from statistics of their inputs and their weights.

How a range is chosen from the values v it has to hold:
    max         amax = max |v|: nothing is clipped
    percentile  activations: amax = the given percentile of |v|
    mse         amax of the least squared rounding and clipping error: activations over a histogram,
                weights row by row (`hcf.quantize.weight_ranges`)

Order: smoothing factors, low-rank branch, input range, ranges per timestep, weight range; each step
sees what the ones before it left. One layer at a time: a model's weights are never copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hcf.errors import RecipeError
from hcf.quantize.formats import codes
from hcf.quantize.lowrank import can_have_low_rank, low_rank_of
from hcf.quantize.scales import GRID_MAX, SCHEMES, Array, LayerScale, check_scales
from hcf.quantize.simulate import quantisable
from hcf.quantize.smooth import smoothed_inputs, smoothing_factors
from hcf.quantize.statistics import LayerStatistics, Statistics, collect_statistics
from hcf.quantize.weight_ranges import weight_amax
from hcf.settings import QuantizeConfig
from hcf.trace import DenoiserCall

FOUR_BITS = ("int4", "int4-weight")
DEFAULT_RANK = 32  # SVDQuant's own


def calibrate_scales(
    denoiser: nn.Module,
    formats: Mapping[str, str],
    statistics: Statistics,
    config: QuantizeConfig | None = None,
    calls: Sequence[DenoiserCall] = (),
    alphas: Mapping[str, float] | None = None,
) -> dict[str, LayerScale]:
    """Scales of `formats` (layer -> scheme), ranges from `statistics`; `denoiser` is not changed.

    `alphas` are smoothing strengths that rules give single layers. `calls` are needed only for
    smoothing. Raises RecipeError for an unknown format, for smoothing without calls, or for
    `timestep_buckets` that the statistics were not taken with.
    """
    config = config or QuantizeConfig()
    if unknown := sorted(set(formats.values()) - set(SCHEMES)):
        raise RecipeError(
            f"quantize.format {unknown[0]!r} is not offered", fix=f"use one of {', '.join(SCHEMES)}"
        )
    wanted = {
        name: value
        for name in formats
        if (value := _alpha(name, formats, config, alphas)) is not None
    }
    smooth: dict[str, tuple[float, Array]] = {}
    if wanted:
        if not calls:
            raise RecipeError(
                "smoothing is searched on calibration calls, and there are none",
                fix="set quantize.calibration_samples to at least 1",
            )
        smooth = smoothing_factors(denoiser, formats, statistics, wanted, calls, config.block_size)
    factors = {name: s for name, (_, s) in smooth.items()}
    # the range of a smoothed input is another tensor's, to be seen again
    again = [name for name in factors if SCHEMES[formats[name]][1]]
    buckets = len(statistics.bucket_edges) - 1
    smoothed: Mapping[str, LayerStatistics] = {}
    if again:
        with smoothed_inputs(denoiser, {name: factors[name] for name in again}):
            smoothed = collect_statistics(denoiser, again, calls, buckets=buckets)
    scales = {
        name: layer_scale(
            quantisable(denoiser, name),
            scheme,
            smoothed[name] if name in smoothed else statistics.get(name),
            statistics.bucket_edges,
            config,
            factors.get(name),
        )
        for name, scheme in formats.items()
    }
    check_scales(scales, "calibration")
    return scales


@torch.no_grad()
def layer_scale(
    module: nn.Conv2d | nn.Linear,
    scheme: str,
    statistics: LayerStatistics | None,
    bucket_edges: Tensor,
    config: QuantizeConfig,
    smooth: Array | None = None,
) -> LayerScale:
    """The scale of one layer; `statistics` are those of its (smoothed) input, None where that stays
    as it is. RecipeError for statistics that are missing."""
    scale = LayerScale(None, np.ones(1, np.float32), scheme, smooth=smooth)
    rank = (
        (DEFAULT_RANK if scheme == "int4" else 0) if config.low_rank == "auto" else config.low_rank
    )
    if rank and can_have_low_rank(module, rank):
        scale = replace(scale, low_rank=low_rank_of(module.weight, scale, rank))
    if (grid := scale.input_grid) is not None:
        if statistics is None:
            raise RecipeError(
                f"{scheme} rounds inputs, and their statistics are missing",
                fix="calibrate all layers that are quantised",
            )
        amax = input_amax(statistics, config.algorithm, config.percentile, grid)
        scale = replace(scale, input_amax=amax)
        if config.timestep_buckets:
            scale = with_buckets(scale, statistics, bucket_edges, config)
    return replace(
        scale,
        weight_amax=weight_amax(
            module.weight,
            scale,
            algorithm=weight_algorithm(scheme, config),
            granularity=config.weight_granularity,
            block_size=config.block_size,
        ),
    )


def weight_algorithm(scheme: str, config: QuantizeConfig) -> str:
    """How the weight's range is chosen: "auto" is mse for 4 bits, max otherwise."""
    if config.weight_algorithm != "auto":
        return config.weight_algorithm
    return "mse" if scheme in FOUR_BITS else "max"


def input_amax(
    statistics: LayerStatistics, algorithm: str, percentile: float = 99.99, grid: str = "int8"
) -> float:
    """The range of a layer's input on `grid`, by "max", "percentile" or "mse"."""
    if algorithm == "percentile":
        return percentile_amax(statistics.histogram, statistics.amax, percentile)
    if algorithm == "mse":
        return mse_amax(statistics.histogram, statistics.amax, grid)
    return statistics.amax


def percentile_amax(counts: Tensor, amax: float, percentile: float) -> float:
    """Upper edge of the bin that holds the percentile of |x|; counts (bins,) over 0 .. amax."""
    below = counts.cumsum(0) / counts.sum()
    index = int(torch.searchsorted(below, percentile / 100).clamp(max=len(counts) - 1))
    return amax * (index + 1) / len(counts)


def mse_amax(counts: Tensor, amax: float, grid: str = "int8") -> float:
    """The a in amax * (0.2, 0.21, .. 1) of least sum counts * (q_a(v) - v)^2, v the bin centres.

    Our own: modelopt 0.47 searches histograms with the arguments of an older quantisation function
    and always returns its first candidate.
    """
    values = (torch.arange(len(counts), dtype=torch.float32) + 0.5) * (amax / len(counts))
    candidates = amax * torch.arange(20, 101, dtype=torch.float32)[:, None] / 100
    steps = candidates / GRID_MAX[grid]
    errors = (codes(values, steps, grid) * steps - values).square().double() @ counts.double()
    return float(candidates[int(errors.argmin())])


def with_buckets(
    scale: LayerScale, statistics: LayerStatistics, edges: Tensor, config: QuantizeConfig
) -> LayerScale:
    """`scale` with a range a timestep bucket, if these differ by more than config.bucket_ratio.

    Buckets that no call fell into take the range of the whole. What `algorithm` clips of the whole
    it clips of each.
    """
    found = statistics.bucket_amax
    if len(found) != config.timestep_buckets:
        raise RecipeError(
            f"the statistics were taken in {len(found)} timestep buckets, "
            f"quantize.timestep_buckets is {config.timestep_buckets}",
            fix="calibrate again with as many",
        )
    known = found[torch.isfinite(found) & (found > 0)]
    if len(known) < 2 or float(known.max() / known.min()) <= config.bucket_ratio:
        return scale
    assert scale.input_amax is not None
    clipped = scale.input_amax / statistics.amax
    usable = torch.where(torch.isfinite(found) & (found > 0), found, statistics.amax) * clipped
    return replace(
        scale,
        bucket_amax=usable.float().numpy().copy(),
        bucket_edges=edges.float().numpy().copy(),
    )


def rescale(
    scales: Mapping[str, LayerScale], weights: Mapping[str, Tensor]
) -> dict[str, LayerScale]:
    """The same scales for other weights (<layer>.weight -> (O, I, ...)), as a LoRA gives them.

    Input ranges and smoothing stay; low-rank branches and weight ranges are taken anew, these by
    largest value, in the granularity they had. Layers without an entry in `weights` keep theirs.
    """
    changed = dict(scales)
    for name, scale in scales.items():
        if (weight := weights.get(f"{name}.weight")) is None:
            continue
        if scale.low_rank is not None:
            rank = scale.low_rank[0].shape[1]
            scale = replace(scale, low_rank=low_rank_of(weight, scale, rank))
        columns = weight[0].numel()
        blocks = scale.weight_amax.shape[1] if scale.weight_amax.ndim == 2 else 1
        changed[name] = replace(
            scale,
            weight_amax=weight_amax(
                weight,
                scale,
                granularity="channel" if scale.weight_amax.ndim else "tensor",
                block_size=columns // blocks,
            ),
        )
    return changed


def _alpha(
    name: str,
    formats: Mapping[str, str],
    config: QuantizeConfig,
    alphas: Mapping[str, float] | None,
) -> float | str | None:
    """Smoothing of a layer: a number, "search", or None."""
    if alphas is not None and name in alphas:
        return alphas[name]
    if config.smooth == "auto":
        return "search" if formats[name] in FOUR_BITS else None
    return None if config.smooth == "none" else config.smooth
