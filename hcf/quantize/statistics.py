"""What every layer of a denoiser reads over its calibration calls: the one source of all ranges.

INT8, FP8, SmoothQuant, low-rank and per-timestep methods choose different ranges from the same
numbers, so these are taken once: one pass over the calls for the largest values (per tensor, per
input channel, per timestep bucket), one for the histogram over the range then known.

File: safetensors; per layer `<layer>.amax` (), `.channel_amax` (I,), `.histogram` (HISTOGRAM_BINS,)
and `.bucket_amax` (T,), and once `bucket_edges` (T + 1,).
I input channels (Conv2d: dimension 1, Linear: the last), T timestep buckets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, RecipeError
from hcf.trace import DenoiserCall, call_denoiser

HISTOGRAM_BINS = 2048
BUCKETS = 8
FIELDS = ("amax", "channel_amax", "histogram", "bucket_amax")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The input x of one layer over all calls.

    amax: max |x|. channel_amax (I,): max |x| of each input channel. histogram (HISTOGRAM_BINS,):
    float64 counts of |x| over 0 .. amax. bucket_amax (T,): max |x| in each timestep bucket, nan
    where no call fell into it.
    """

    amax: float
    channel_amax: Tensor
    histogram: Tensor
    bucket_amax: Tensor


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, LayerStatistics]):
    """Layer name -> statistics; bucket i holds timesteps in bucket_edges[i] .. bucket_edges[i+1].

    bucket_edges (T + 1,) float64 rise; they run from the smallest timestep seen to the largest, and
    what lies outside belongs to the first or last bucket.
    """

    layers: Mapping[str, LayerStatistics]
    bucket_edges: Tensor

    def __getitem__(self, layer: str) -> LayerStatistics:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@torch.no_grad()
def collect_statistics(
    denoiser: nn.Module,
    layers: Sequence[str],
    calls: Sequence[DenoiserCall],
    *,
    buckets: int = BUCKETS,
) -> Statistics:
    """Statistics of `layers` (Conv2d or Linear) over `calls`; two forwards a call.

    Raises RecipeError without calls or buckets; InvalidArtifact naming the layers with NaN or
    infinite weights or inputs, those that the calls never reach, and those that only see zeros.
    """
    if buckets < 1:
        raise RecipeError(f"{buckets} timestep buckets", fix="use 1 or more")
    refuse_non_finite(denoiser, layers, calls)
    edges = bucket_edges(calls, buckets)
    channel: dict[str, Tensor] = {}
    bucket = {name: torch.full((buckets,), torch.nan, dtype=torch.float64) for name in layers}
    for call in calls:
        index = bucket_of(edges, call.timestep)
        rows: dict[str, Tensor] = {}
        with _watch(denoiser, dict.fromkeys(layers, 0.0), _amax_of_rows, rows, torch.maximum):
            run_call(denoiser, call)
        _require_finite(rows)
        for name, amax in rows.items():
            channel[name] = torch.maximum(channel.get(name, amax.amax(0)), amax.amax(0))
            each = amax.amax(1).double().cpu()
            # rows are images unless a layer folds the batch away: then they count everywhere
            where = index if len(index) == len(each) else index.unique()
            if len(index) != len(each):
                each = each.max().expand(len(where))
            for i in where.unique().tolist():
                bucket[name][i] = torch.fmax(bucket[name][i], each[where == i].max())
    _require_reached(layers, channel)
    amax_of = {name: float(channel[name].max()) for name in layers}
    _require_alive(amax_of)

    counts: dict[str, Tensor] = {}
    with _watch(denoiser, amax_of, _histogram, counts, torch.add):
        for call in calls:
            run_call(denoiser, call)
    found = {
        name: LayerStatistics(
            amax_of[name], channel[name].float().cpu(), counts[name].cpu(), bucket[name]
        )
        for name in layers
    }
    return Statistics(found, edges)


def bucket_edges(calls: Sequence[DenoiserCall], buckets: int) -> Tensor:
    """Edges (buckets + 1,) float64 of equal width over the timesteps of `calls`."""
    times = torch.cat([call.timestep.flatten().double().cpu() for call in calls])
    low, high = float(times.min()), float(times.max())
    return torch.linspace(low, high if high > low else low + 1, buckets + 1, dtype=torch.float64)


def bucket_of(edges: Tensor, timestep: Tensor) -> Tensor:
    """edges (T + 1,), timestep (B,) -> bucket (B,) int64: how many inner edges are <= timestep."""
    return torch.bucketize(timestep.flatten().double().cpu(), edges[1:-1], right=True)


def run_call(denoiser: nn.Module, call: DenoiserCall) -> Tensor:
    """The denoiser's prediction (B, C, H, W) for a call that may lie on another device."""
    weight = next(denoiser.parameters())
    device = call.sample.device if weight.is_meta else weight.device  # offloaded: hooks move it
    kwargs = {name: value.to(device) for name, value in call.kwargs.items()}
    return call_denoiser(denoiser, call.sample.to(device), call.timestep.to(device), kwargs)


def refuse_non_finite(
    denoiser: nn.Module, layers: Sequence[str], calls: Sequence[DenoiserCall]
) -> None:
    """RecipeError for no calls; InvalidArtifact for NaN or infinity in weights or in the calls."""
    if not calls:
        raise RecipeError(
            "the calibration set is empty", fix="set quantize.calibration_samples to at least 1"
        )
    weights = {name: _layer(denoiser, name).weight for name in layers}
    broken = [n for n, w in weights.items() if not w.is_meta and not torch.isfinite(w).all()]
    if broken:
        raise InvalidArtifact(
            f"{len(broken)} layer(s) have NaN or infinite weights: " + ", ".join(broken[:12]),
            fix="the model is damaged: train or download it again",
        )
    for index, call in enumerate(calls):
        for name, value in {"sample": call.sample, **call.kwargs}.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise InvalidArtifact(
                    f"calibration call {index}: {name} has NaN or infinite values",
                    fix="check the weights and the calibration prompts",
                )


def save_statistics(statistics: Statistics, path: Path) -> str:
    """Write `path` (safetensors) and return its SHA-256; an atomic rename is the caller's."""
    from safetensors.torch import save_file

    tensors = {"bucket_edges": statistics.bucket_edges}
    for name, layer in statistics.items():
        tensors[f"{name}.amax"] = torch.tensor(layer.amax, dtype=torch.float64)
        tensors[f"{name}.channel_amax"] = layer.channel_amax.contiguous()
        tensors[f"{name}.histogram"] = layer.histogram.contiguous()
        tensors[f"{name}.bucket_amax"] = layer.bucket_amax.contiguous()
    save_file(tensors, str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_statistics(path: Path, sha256: str | None = None) -> Statistics:
    """Read what `save_statistics` wrote; with `sha256` the file must be that very one.

    Raises InvalidArtifact if it is missing, cut short, edited, or no statistics.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise InvalidArtifact(f"{path} does not exist", fix="run the calibration again")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise InvalidArtifact(
            f"{path} has SHA-256 {found[:12]}, expected {sha256[:12]}",
            fix="remove it and calibrate again",
        )
    try:
        tensors = load(content)
        edges = tensors.pop("bucket_edges")
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        layers = {name: [tensors.pop(f"{name}.{field}") for field in FIELDS] for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidArtifact(
            f"{path} holds no layer statistics: {error}", fix="remove it and calibrate again"
        ) from error
    if tensors:
        raise InvalidArtifact(f"{path} holds an unknown tensor {next(iter(tensors))!r}")
    rows = {n: LayerStatistics(float(a), c, h, b) for n, (a, c, h, b) in layers.items()}
    return Statistics(rows, edges)


@contextmanager
def _watch(
    denoiser: nn.Module,
    ranges: Mapping[str, float],
    measure: Callable[[Tensor, float], Tensor],
    into: dict[str, Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Inside, every input x of a layer goes as measure(x, its range) into `into`, joined by `join`.

    Neighbours that read the same tensor over the same range (q, k, v) are measured once. Channels
    come last in x.
    """
    last: tuple[Any, int, float, Tensor] | None = None

    def hook_of(name: str, is_conv: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x: Tensor = args[0]
            version = 0 if x.is_inference() else x._version
            if last is not None and x is last[0] and (version, ranges[name]) == last[1:3]:
                value = last[3]
            else:
                value = measure(x.detach().movedim(1, -1) if is_conv else x.detach(), ranges[name])
                last = (x, version, ranges[name], value)
            into[name] = join(into[name], value) if name in into else value

        return hook

    modules = {name: _layer(denoiser, name) for name in ranges}
    hooks = [
        module.register_forward_pre_hook(hook_of(name, isinstance(module, nn.Conv2d)))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _amax_of_rows(x: Tensor, _: float) -> Tensor:
    """x (B, ..., I) -> max |x| (B, I)"""
    return x.abs().amax(tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x.abs()


def _histogram(x: Tensor, amax: float) -> Tensor:
    """x (...) -> counts of |x| over 0 .. amax (HISTOGRAM_BINS,) float64"""
    return torch.histc(x.float().abs(), HISTOGRAM_BINS, min=0.0, max=amax).double()


def _require_finite(rows: Mapping[str, Tensor]) -> None:
    """`rows` is in the order of the forward pass, so the first one is where it began."""
    for name, amax in rows.items():
        if not torch.isfinite(amax).all():
            raise InvalidArtifact(
                f"calibration met NaN or infinite values: first in the input of {name}",
                fix="check the weights and the calibration prompts",
            )


def _require_reached(layers: Sequence[str], reached: Mapping[str, Tensor]) -> None:
    if unreached := [name for name in layers if name not in reached]:
        raise InvalidArtifact(
            f"{len(unreached)} layer(s) are never reached by the calibration calls: "
            + ", ".join(unreached[:12]),
            fix="add an `exclude` rule, or calibrate with prompts that use them",
        )


def _require_alive(amax: Mapping[str, float]) -> None:
    if dead := [name for name, value in amax.items() if value <= 0]:
        raise InvalidArtifact(
            f"calibration: {len(dead)} layer(s) have a range that is NaN, infinite or zero: "
            + ", ".join(sorted(dead)[:12]),
            fix="look for NaN weights or dead inputs, or add an `exclude` rule",
        )


def _layer(denoiser: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Conv2d or Linear")
    return module
