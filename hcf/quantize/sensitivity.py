"""How much one layer alone, in one format, changes what a denoiser predicts.

Call by call: the blocks before the layer give what they gave without it, so only what comes after
it is computed again. For call c, layer l in format f:

    noise = ||eps_lf - eps||^2,  signal = ||eps||^2          mode "output", eps the prediction
    noise / signal = 10 ** (-SQNR / 10)                      mode "layer", of the layer's own output

Errors of different layers are nearly uncorrelated, so that those of a choice of formats add up in
squares: error(choice)^2 ~ sum of error_lf^2. `hcf.quantize.sensitivity_choice` chooses by it.

Every row is appended to a JSON lines file as soon as it is known, under a key of content: a search
that was killed goes on, and what changed is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hcf.errors import StorageError
from hcf.quantize.report import layer_errors
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import fake_quantized
from hcf.quantize.statistics import bucket_of, run_call
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
Scales = Mapping[str, Mapping[str, LayerScale]]  # format -> layer -> scale
LOG_EVERY = 50


@dataclass(frozen=True)
class ErrorRow:
    """One layer in one format on one call; `key` is the content it was measured on."""

    key: str
    layer: str
    format: str
    call: int
    timestep: float
    noise: float
    signal: float


@dataclass(frozen=True)
class LayerSensitivity:
    """Relative error (not squared) over all calls and in each timestep bucket, None where none."""

    layer: str
    format: str
    error: float
    by_bucket: tuple[float | None, ...]


@torch.no_grad()
def measure_errors(
    denoiser: nn.Module,
    scales: Scales,
    calls: Sequence[DenoiserCall],
    journal: Path,
    *,
    content: str,
    mode: str = "output",
    log: Log = lambda line: None,
) -> list[ErrorRow]:
    """A row for every call, format and layer of `scales`; rows in `journal` are not measured again.

    `content` identifies weights and calls (the calibration's key and which calls were taken).
    Raises StorageError where `journal` cannot be written.
    """
    known = read_journal(journal)
    found: list[ErrorRow] = []
    pairs = [(layer, format) for format, each in scales.items() for layer in each]
    keys = {
        (layer, format): _key(content, mode, layer, format, scales[format][layer])
        for layer, format in pairs
    }
    total = len(pairs) * len(calls)
    for index, call in enumerate(calls):
        ids = {pair: f"{key}-{index}" for pair, key in keys.items()}
        found += [known[id] for id in ids.values() if id in known]
        missing = [pair for pair, id in ids.items() if id not in known]
        if not missing:
            continue
        timestep = float(call.timestep.flatten()[0])
        measure = _output_errors if mode == "output" else _layer_errors
        for (layer, format), noise, signal in measure(denoiser, scales, call, missing):
            row = ErrorRow(ids[layer, format], layer, format, index, timestep, noise, signal)
            _append(journal, row)
            found.append(row)
            if len(found) % LOG_EVERY == 0:
                log(f"sensitivity: {len(found)} of {total} errors measured")
    return found


def summarise(rows: Sequence[ErrorRow], edges: Tensor) -> list[LayerSensitivity]:
    """Rows of all calls to one figure a layer and format, and one a bucket; edges (T + 1,)."""
    noise: dict[tuple[str, str], list[float]] = {}
    signal: dict[tuple[str, str], list[float]] = {}
    buckets = len(edges) - 1
    for row in rows:
        pair = row.layer, row.format
        bucket = int(bucket_of(edges, torch.tensor([row.timestep])))
        for into, value in ((noise, row.noise), (signal, row.signal)):
            each = into.setdefault(pair, [0.0] * buckets)
            each[bucket] += value
    return [
        LayerSensitivity(
            *pair,
            math.sqrt(sum(each) / max(sum(signal[pair]), 1e-300)),
            tuple(
                math.sqrt(n / s) if s > 0 else None for n, s in zip(each, signal[pair], strict=True)
            ),
        )
        for pair, each in noise.items()
    ]


@torch.no_grad()
def shared_inputs(
    denoiser: nn.Module, layers: Sequence[str], call: DenoiserCall
) -> list[tuple[str, ...]]:
    """`layers` in groups that read one tensor in one module (q, k, v): these share a quantiser.

    One format for such a group costs one quantiser, and engines fuse its products.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    alive: list[Any] = []  # ids of tensors are only distinct while these live
    hooks = []
    for name in layers:

        def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            alive.append(args[0])
            key = name.rpartition(".")[0], id(args[0])
            if name not in groups.setdefault(key, []):
                groups[key].append(name)

        hooks.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
    try:
        run_call(denoiser, call)
    finally:
        for handle in hooks:
            handle.remove()
    order = {name: i for i, name in enumerate(layers)}
    return sorted((tuple(group) for group in groups.values()), key=lambda group: order[group[0]])


def error_of(
    denoiser: nn.Module,
    scales: Mapping[str, LayerScale],
    calls: Sequence[DenoiserCall],
    outputs: Sequence[Tensor],
) -> float:
    """||quantised - fp|| / ||fp|| over `calls`, whose fp `outputs` are known."""
    noise = signal = 0.0
    with torch.no_grad(), fake_quantized(denoiser, scales):
        for call, output in zip(calls, outputs, strict=True):
            found = run_call(denoiser, call)
            noise += float((found - output).double().square().sum())
            signal += float(output.double().square().sum())
    return math.sqrt(noise / max(signal, 1e-300))


def read_journal(path: Path) -> dict[str, ErrorRow]:
    """Rows by key; a last line that was cut off by a kill is left out."""
    rows: dict[str, ErrorRow] = {}
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = ErrorRow(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rows[row.key] = row
    return rows


Errors = Iterator[tuple[tuple[str, str], float, float]]


def _output_errors(
    denoiser: nn.Module, scales: Scales, call: DenoiserCall, pairs: Sequence[tuple[str, str]]
) -> Errors:
    """((layer, format), noise, signal) of the prediction, each layer quantised alone."""
    blocks = _blocks(denoiser)
    outputs: dict[str, Any] = {}
    order: list[str] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            order.append(name)
            outputs[name] = output

        return hook

    hooks = [denoiser.get_submodule(n).register_forward_hook(keep(n)) for n in blocks]
    try:
        wanted = run_call(denoiser, call)
    finally:
        for handle in hooks:
            handle.remove()
    signal = float(wanted.double().square().sum())
    once = [name for name in order if order.count(name) == 1]
    for layer, format in pairs:
        own = next((i for i, n in enumerate(once) if layer.startswith(f"{n}.")), None)
        if own is None and layer in once:
            own = once.index(layer)
        before = {n: outputs[n] for n in once[: own or 0]}
        with _replayed(denoiser, before), fake_quantized(denoiser, {layer: scales[format][layer]}):
            found = run_call(denoiser, call)
        yield (layer, format), float((found - wanted).double().square().sum()), signal


def _layer_errors(
    denoiser: nn.Module, scales: Scales, call: DenoiserCall, pairs: Sequence[tuple[str, str]]
) -> Errors:
    """((layer, format), noise / signal, 1) of each layer's own output, one pass a format."""
    for format in dict.fromkeys(format for _, format in pairs):
        chosen = {layer: scales[format][layer] for layer, f in pairs if f == format}
        for row in layer_errors(denoiser, chosen, [call]):
            yield (row.layer, format), 10 ** (-row.sqnr_db / 10), 1.0


def _blocks(denoiser: nn.Module) -> list[str]:
    """The parts a forward pass goes through: children, and the members of lists of them."""
    names: list[str] = []
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(child))]
        else:
            names.append(name)
    return names


@contextmanager
def _replayed(denoiser: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the modules named in `outputs` return these and compute nothing."""
    modules = [denoiser.get_submodule(name) for name in outputs]
    before = [module.__dict__.get("forward") for module in modules]  # offloading sets one
    for module, output in zip(modules, outputs.values(), strict=True):
        module.__dict__["forward"] = _constant(output)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _append(journal: Path, row: ErrorRow) -> None:
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    except OSError as error:
        raise StorageError(f"{journal} cannot be written: {error}", "free some space") from error


def _key(content: str, mode: str, layer: str, format: str, scale: LayerScale) -> str:
    digest = hashlib.sha256(f"{content} {mode} {layer} {format}".encode())
    for name, value in sorted(vars(scale).items()):
        for part in value if isinstance(value, tuple) else (value,):
            is_array = isinstance(part, np.ndarray)
            digest.update(f"{name} {part.shape if is_array else part}".encode())
            digest.update(part.tobytes() if is_array else b"")
    return digest.hexdigest()[:16]
