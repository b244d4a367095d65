"""Where the time of a module goes: each layer's time beside its floor, the worst first.

A layer is a module that computes something itself: the innermost module around at least one counted
op. Its time is the time inside it less the time inside the layers nested in it, so nothing counts
twice: an attention module keeps its core, its projections are layers of their own; a residual
block keeps its sum. What no layer explains (the top module's own ops, gaps between launches) is
"(outside layers)": the untraced total less all layers. It also takes up the tracing, which can push
it below zero, and noise: medians of layers add up to less than the median of a noisy total.

Tracing marks the entry and the exit of every layer, on a GPU by events on its stream. An event
costs the GPU a microsecond or two, so that layers of a few microseconds look slower than they are.
Launches are queued ahead as far as the queue goes (about 1000), which keeps the host's part out of
the layers. Compiled modules run no hooks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from hcf_bench.opcount import OpCost, count_workload
from hcf_bench.records import LayerTime, Profile
from hcf_bench.roofline import floor_ms
from hcf_bench.timing import (
    Clock,
    collection_paused,
    hold_device,
    synchronise,
    time_once,
)
from hcf_bench.workloads import DTYPES, Case

SHOWN: Final = 10
OTHERS: Final = "(other layers)"
OUTSIDE: Final = "(outside layers)"
NAME_WIDTH: Final = 52


def profile_case(
    case: Case,
    ceilings: Mapping[str, float],
    *,
    device: str = "cpu",
    subject: str = "eager",
    repeats: int = 5,
    budget_s: float | None = None,
    ops: Sequence[OpCost] | None = None,
) -> Profile:
    """Times every layer of a case; medians over traced runs that alternate with untraced ones.

    `layers` of the result are the ten with the largest excess over their floor, worst first, then
    the sums `OTHERS` and `OUTSIDE`: together they add up to `total_ms`.

    Args:
        case: built on `device`, not compiled.
        ceilings: as `roofline.floor_ms` takes them, with the GEMM of the case's dtype.
        device: "cpu" or "cuda[:n]".
        subject: name that the profile carries.
        repeats: runs of each kind; fewer, but at least one, where `budget_s` runs out.
        budget_s: seconds for all runs.
        ops: of the case; counted here by default.

    Raises:
        RecipeError: a ceiling is missing.
        ValueError: no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    dtype, batch = _case_dtype(case), _case_batch(case)
    if ops is None:
        ops = count_workload(case.workload, batch, dtype)
    whole_floor = floor_ms(ops, ceilings, dtype)
    modules = layer_modules(case.module, ops)
    totals, own = _timed_runs(case, list(modules.values()), device, repeats, budget_s)
    total_ms = median(totals)
    by_layer: dict[str, list[OpCost]] = defaultdict(list)
    for op in ops:
        by_layer[op.layer].append(op)
    nested = _with_layers_inside(modules)
    found = [
        _layer_time(
            f"{name} (own ops)" if name in nested else name, ms, by_layer[name], ceilings, dtype
        )
        for name, ms in zip(modules, own, strict=True)
        if ms is not None
    ]
    found.sort(key=lambda layer: layer.excess_ms, reverse=True)
    shown, rest = found[:SHOWN], found[SHOWN:]
    if rest:
        shown.append(_summed(OTHERS, f"{len(rest)} layers", rest))
    ran = {name for name, ms in zip(modules, own, strict=True) if ms is not None}
    outside_ops = [op for op in ops if op.layer not in ran]
    outside_ms = total_ms - sum(layer.time_ms for layer in found)
    shown.append(_layer_time(OUTSIDE, outside_ms, outside_ops, ceilings, dtype, kind="rest"))
    return Profile(
        workload=case.workload.name,
        subject=subject,
        dtype=dtype,
        batch=batch,
        total_ms=round(total_ms, 6),
        floor_ms=round(whole_floor, 6),
        layers=tuple(shown),
    )


def profile_table(profile: Profile) -> str:
    """The profile as plain text of at most 14 lines."""
    share = profile.floor_ms / profile.total_ms if profile.total_ms else 0.0
    lines = [
        f"{profile.workload} {profile.subject} {profile.dtype}, batch {profile.batch}: "
        f"{profile.total_ms:.4g} ms, floor {profile.floor_ms:.4g} ms ({share:.1%} of roofline)",
        f"{'layer':<{NAME_WIDTH}} {'kind':<11} {'ms':>9} {'floor':>9} {'above':>9} {'share':>6}",
    ]
    for layer in profile.layers:
        part = layer.time_ms / profile.total_ms if profile.total_ms else 0.0
        lines.append(
            f"{_shortened(layer.name):<{NAME_WIDTH}} {layer.kind:<11} {layer.time_ms:>9.4g} "
            f"{layer.floor_ms:>9.4g} {layer.excess_ms:>9.4g} {part:>6.1%}"
        )
    return "\n".join(lines)


def layer_modules(module: nn.Module, ops: Sequence[OpCost]) -> dict[str, nn.Module]:
    """The modules that are layers, by the path the ops carry; the top module is none."""
    everything = dict(module.named_modules(remove_duplicate=False))
    paths = dict.fromkeys(op.layer for op in ops if op.layer)
    return {path: everything[path] for path in paths if path in everything}


class _Trace:
    """Marks of one run: at each, the layer that is innermost from there on (-1 for none)."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = device.startswith("cuda")
        self.stack: list[int] = []
        self.owners: list[int] = []
        self.times: list[int] = []
        self.events: list[Any] = []  # kept over runs: creating one takes longer than recording it

    def begin(self) -> None:
        self.stack.clear()
        synchronise(self.device)
        if self.on_gpu:
            hold_device(4 * len(self.events))
        self.owners.clear()
        self.times.clear()
        self.mark()

    def enter(self, layer: int) -> None:
        self.stack.append(layer)
        self.mark()

    def leave(self) -> None:
        self.stack.pop()
        self.mark()

    def mark(self) -> None:
        if self.on_gpu:
            self._record_event()
        else:
            self.times.append(time.perf_counter_ns())
        self.owners.append(self.stack[-1] if self.stack else -1)

    def _record_event(self) -> None:
        number = len(self.owners)
        if number == len(self.events):
            self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[number].record()

    def end(self) -> dict[int, float]:
        """Milliseconds of every layer that ran, without those nested in it."""
        self.mark()
        synchronise(self.device)
        if self.on_gpu:
            events = self.events[: len(self.owners)]
            steps = [float(a.elapsed_time(b)) for a, b in pairwise(events)]
        else:
            steps = [(b - a) / 1e6 for a, b in pairwise(self.times)]
        own: dict[int, float] = defaultdict(float)
        for owner, ms in zip(self.owners, steps, strict=False):  # the last mark begins nothing
            own[owner] += ms
        own.pop(-1, None)
        return own


def _timed_runs(
    case: Case,
    layers: Sequence[nn.Module],
    device: str,
    repeats: int,
    budget_s: float | None,
) -> tuple[list[float], list[float | None]]:
    """Untraced milliseconds of each run; median own milliseconds of each layer, None if unused."""
    clock: Clock = "device" if device.startswith("cuda") else "host"
    trace = _Trace(device)
    totals: list[float] = []
    runs: list[dict[int, float]] = []
    case.run()
    _traced_run(case, layers, trace)
    started = time.perf_counter()
    with collection_paused():
        while len(totals) < repeats:
            totals.append(time_once(case.run, device, clock))
            runs.append(_traced_run(case, layers, trace))
            if budget_s is not None and time.perf_counter() - started > budget_s:
                break
    used = runs[0].keys()
    medians = {layer: median(run[layer] for run in runs) for layer in used}
    return totals, [medians.get(layer) for layer in range(len(layers))]


def _traced_run(case: Case, layers: Sequence[nn.Module], trace: _Trace) -> dict[int, float]:
    current = torch.cuda.device(trace.device) if trace.on_gpu else nullcontext()
    with current, _hooked(layers, trace):
        trace.begin()
        case.run()
        return trace.end()


@contextmanager
def _hooked(layers: Sequence[nn.Module], trace: _Trace) -> Iterator[None]:
    """Hooks on every layer; all are gone afterwards."""
    handles = []
    try:
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(_entry(trace, number)))
            handles.append(layer.register_forward_hook(_exit(trace)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entry(trace: _Trace, number: int) -> Any:
    return lambda module, args: trace.enter(number)


def _exit(trace: _Trace) -> Any:
    return lambda module, args, output: trace.leave()


def _with_layers_inside(modules: Mapping[str, nn.Module]) -> set[str]:
    """Layers that other layers lie in."""
    parents: set[str] = set()
    for path in modules:
        parts = path.split(".")
        parents.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    return parents & modules.keys()


def _layer_time(
    name: str,
    ms: float,
    ops: Sequence[OpCost],
    ceilings: Mapping[str, float],
    dtype: str,
    kind: str = "",
) -> LayerTime:
    floor = floor_ms(ops, ceilings, dtype)
    heaviest = max(ops, key=lambda op: (op.flops, op.bytes), default=None)
    return LayerTime(
        name=name,
        kind=kind or (heaviest.kind if heaviest else ""),
        time_ms=round(ms, 6),
        floor_ms=round(floor, 6),
        excess_ms=round(ms - floor, 6),
        tflop=sum(op.flops for op in ops) / 1e12,
        gbyte=sum(op.bytes for op in ops) / 1e9,
    )


def _summed(name: str, kind: str, layers: Sequence[LayerTime]) -> LayerTime:
    ms = sum(layer.time_ms for layer in layers)
    floor = sum(layer.floor_ms for layer in layers)
    return LayerTime(
        name=name,
        kind=kind,
        time_ms=round(ms, 6),
        floor_ms=round(floor, 6),
        excess_ms=round(ms - floor, 6),
        tflop=sum(layer.tflop for layer in layers),
        gbyte=sum(layer.gbyte for layer in layers),
    )


def _case_dtype(case: Case) -> str:
    """Name of the dtype of the weights, or of the inputs where there are none."""
    for tensor in (*case.module.parameters(), *case.inputs.values()):
        for name, dtype in DTYPES.items():
            if tensor.dtype == dtype:
                return name
    raise ValueError(f"{case.workload.name} has no tensor of {', '.join(DTYPES)}")


def _case_batch(case: Case) -> int:
    """Rows of the first input; of a matrix product, in batches of its M."""
    rows = int(next(iter(case.inputs.values())).shape[0])
    return rows // case.workload.shape[0] if case.workload.component == "gemm" else rows


def _shortened(name: str) -> str:
    """The end of a path, which tells layers apart."""
    return name if len(name) <= NAME_WIDTH else "…" + name[-NAME_WIDTH + 1 :]
