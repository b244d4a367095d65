"""A model with scales for every layer and format, and the graph that a choice of them is put into.

What a search tries goes through here: the true error of a choice on held-out calls, its ONNX
graph, the cost of every layer on the target engine, the latency of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.engines.layer_cost import (
    attribute,
    check_attributed,
    fastest,
    modelled_costs,
    openvino_times,
    operations,
    tensorrt_times,
)
from hcf.engines.openvino import OpenVinoEngine
from hcf.engines.timing import time_interleaved
from hcf.export.component import example_inputs
from hcf.export.onnx import export_component
from hcf.export.passes import insert_qdq
from hcf.quantize.calibration_cache import open_calibration, probe_of
from hcf.quantize.estimate import estimate_sensitivity, fitted
from hcf.quantize.presets import choose as choose_by_rules
from hcf.quantize.presets import quantisable_layers
from hcf.quantize.quantize import request_of
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.scales import LayerScale
from hcf.quantize.sensitivity import error_of
from hcf.quantize.sensitivity_choice import FLOATING, TRIED_MOVES
from hcf.quantize.statistics import Statistics, run_call
from hcf.settings import ExportConfig, QuantizeConfig, SensitivityConfig
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
# ways to choose the ranges of activations, the default one first; all are as fast
RANGES: tuple[dict[str, Any], ...] = (
    {},
    {"algorithm": "mse"},
    {"algorithm": "percentile", "percentile": 99.999},
)
INSTANCES = 2  # compiled engines of what is timed
SOLVES_ALLOWED = 8  # passes over the held-out calls besides those of exchanges


@dataclass(frozen=True)
class Trial:
    """scales: format -> layer -> scale, with `settings`; `default` are those of the default rules
    without any, the base of comparison. `outputs` are those of the held-out calls, in fp.

    `graph` is the fp32 ONNX file (None for a target without one), `inputs` what it is timed with;
    `content` identifies weights and calls.
    """

    denoiser: nn.Module
    settings: QuantizeConfig
    scales: dict[str, dict[str, LayerScale]]
    default: dict[str, LayerScale]
    calls: list[DenoiserCall]
    held_out: list[DenoiserCall]
    outputs: list[Tensor]
    graph: Path | None
    inputs: dict[str, Tensor]
    threads: int
    content: str

    def scales_of(self, formats: Mapping[str, str]) -> dict[str, LayerScale]:
        """The scales of a choice of formats, floating-point layers left out."""
        return {n: self.scales[f][n] for n, f in formats.items() if f != FLOATING}

    def true_error(self, formats: Mapping[str, str]) -> float:
        """Relative error on the held-out calls."""
        return error_of(self.denoiser, self.scales_of(formats), self.held_out, self.outputs)

    def default_error(self) -> float:
        """Relative error of the default rules on the held-out calls."""
        return error_of(self.denoiser, self.default, self.held_out, self.outputs)


@contextmanager
def open_trial(
    pipe: Any, model: Path, config: SensitivityConfig, folder: Path, log: Log
) -> Iterator[Trial]:
    """Calibrates, scales every layer in every format, exports into `folder` where the target needs
    a graph; says first what the search will take. Weights that do not fit wait elsewhere inside."""
    denoiser: nn.Module = getattr(pipe, config.component)
    layers = quantisable_layers(denoiser)
    request = request_of(pipe, model, config)
    with open_calibration(pipe, request, log, config.offload) as calibration:
        found = probe_of(pipe, request)
        estimate = estimate_sensitivity(
            found, len(layers), len(config.formats), config.calls, config.held_out_calls,
            SOLVES_ALLOWED + config.exchange_rounds * TRIED_MOVES, config.mode,
        )  # fmt: skip
        statistics = calibration.statistics(
            denoiser, layers, count=config.calibration_calls, log=log
        )
        calls = calibration.calls(config.calls)
        held_out = calibration.calls(config.held_out_calls, besides=config.calls)
        with fitted(pipe, estimate, config.offload, log):
            formats = choose_by_rules(denoiser, quantize_config(config), log).formats
            settings, default = _best_ranges(denoiser, formats, statistics, calls, config, log)
            scales = {
                str(format): calibrate_scales(
                    denoiser, dict.fromkeys(layers, format), statistics, settings, calls
                )
                for format in config.formats
            }
            inputs = example_inputs(
                pipe, config.component, batch=config.batch, height=config.height,
                width=config.width,
            )  # fmt: skip
            graph = None
            if config.target != "macs":
                log("sensitivity: exporting the graph that formats are put into")
                graph = export_graph(pipe, config.component, inputs, folder)
            with torch.no_grad():
                outputs = [run_call(denoiser, call) for call in held_out]
            content = f"{calibration.key} {config.component} {config.calls}"
            threads = config.threads or torch.get_num_threads()
            yield Trial(
                denoiser, settings, scales, default, calls, held_out, outputs, graph, inputs,
                threads, content,
            )  # fmt: skip


def _best_ranges(
    denoiser: nn.Module,
    formats: Mapping[str, str],
    statistics: Statistics,
    calls: Sequence[DenoiserCall],
    config: SensitivityConfig,
    log: Log,
) -> tuple[QuantizeConfig, dict[str, LayerScale]]:
    """How to choose activation ranges, by the error of the default `formats`: it costs no time.

    Returns the settings and the scales of the default rules without them.
    """
    default = quantize_config(config)
    with torch.no_grad():
        outputs = [run_call(denoiser, call) for call in calls]
    found: list[tuple[float, QuantizeConfig, dict[str, LayerScale]]] = []
    for changes in RANGES:
        settings = default.model_copy(update=changes)
        scales = calibrate_scales(denoiser, formats, statistics, settings, calls)
        error = error_of(denoiser, scales, calls, outputs)
        log(f"sensitivity: default rules, ranges by {settings.algorithm}: error {error:.5f}")
        found.append((error, settings, scales))
    return min(found, key=lambda entry: entry[0])[1], found[0][2]


def export_graph(pipe: Any, component: str, inputs: Mapping[str, Tensor], folder: Path) -> Path:
    """The component's fp32 ONNX graph in `folder`."""
    # the exporter takes a size of 1 for a constant
    two = {k: v if len(v) > 1 else torch.cat([v, v]) for k, v in inputs.items()}
    export_component(pipe, component, two, folder / "model.onnx", ExportConfig())
    return folder / "model.onnx"


def quantize_config(config: SensitivityConfig) -> QuantizeConfig:
    """The `quantize:` settings that the search's scales are calibrated with."""
    shared = set(QuantizeConfig.model_fields) & set(SensitivityConfig.model_fields)
    # the same word, but here it counts the buckets that errors are reported in
    shared -= {"timestep_buckets"}
    given = {name: getattr(config, name) for name in shared}
    return QuantizeConfig(format=config.formats[0], **given)


def measure_costs(trial: Trial, config: SensitivityConfig, log: Log) -> dict[str, dict[str, float]]:
    """format ("none" too) -> layer -> cost, in the unit of the target."""
    formats = [FLOATING, *trial.scales]
    layers = list(trial.scales[config.formats[0]])
    if trial.graph is None:
        return modelled_costs(trial.denoiser, layers, formats, trial.calls[0])
    import onnx

    weights = operations(trial.denoiser, layers, trial.calls[0])
    graphs = {f: write_graph(trial, dict.fromkeys(layers, f), f"all-{f}") for f in formats}
    precisions = {format: "fp32" if format == FLOATING else format for format in formats}
    if config.target == "openvino":
        times = openvino_times(graphs, precisions, trial.inputs, trial.threads, config.repeats)
    else:
        times = {
            f: tensorrt_times(graphs[f], precisions[f], trial.inputs, config.repeats)
            for f in formats
        }
    found: dict[str, dict[str, float]] = {}
    for format in formats:
        proto = onnx.load(str(graphs[format]), load_external_data=False)
        found[format], rest = attribute(proto, times[format], layers, weights)
        check_attributed(found[format], rest, f"{config.target} {precisions[format]}")
        log(
            f"sensitivity: all layers in {precisions[format]}: {sum(found[format].values()):.2f} "
            f"ms in layers, {rest:.2f} ms in the rest"
        )
    return found


def write_graph(trial: Trial, formats: Mapping[str, str], name: str) -> Path:
    """The ONNX graph with `formats` put in, beside the fp32 one; that one where there are none."""
    assert trial.graph is not None
    return graph_with(trial.graph, trial.scales_of(formats), name)


def graph_with(graph: Path, scales: Mapping[str, LayerScale], name: str) -> Path:
    """The fp32 ONNX file `graph` with Q/DQ for `scales`, as `name`.onnx beside it."""
    import onnx

    if not scales:
        return graph
    model, _ = insert_qdq(onnx.load(str(graph)), scales)
    path = graph.with_name(f"{name}.onnx")
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(
        model, str(path), save_as_external_data=size > 2**31 - 2**20, location=f"{path.name}.data"
    )
    return path


def latencies(trial: Trial, formats: Sequence[Mapping[str, str]], repeats: int) -> list[float]:
    """Milliseconds of the whole graph in each choice of formats, timed in turns on OpenVINO.

    Each is compiled more than once and the faster instance counts: where one happens to lie in
    memory moves it by several percent.
    """
    graphs = [write_graph(trial, each, f"timed-{i}") for i, each in enumerate(formats)]
    engines = [
        open_openvino(graph, trial.scales_of(each), trial.inputs, trial.threads)
        for _ in range(INSTANCES)
        for graph, each in zip(graphs, formats, strict=True)
    ]
    samples = time_interleaved([partial(engine, trial.inputs) for engine in engines], repeats)
    times = [fastest(each) for each in samples]
    return [min(times[i :: len(formats)]) for i in range(len(formats))]


def open_openvino(
    graph: Path, scales: Mapping[str, LayerScale], inputs: Mapping[str, Tensor], threads: int
) -> OpenVinoEngine:
    """An OpenVINO engine of a graph with `scales` in it."""
    used = Counter(scale.scheme for scale in scales.values())
    precision = used.most_common(1)[0][0] if used else "fp32"
    shapes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
    return OpenVinoEngine(graph, "unet", precision, threads, shapes)
