"""What each layer of a denoiser costs in each format: read from an engine's profile, or modelled.

One graph a format, with every layer in it, is compiled and run with the engine's own timers. The
time of a runtime node goes to the layers whose product it computes; the time of a node that only
quantises goes to the layers that read its output; what belongs to no layer (norms, attention's own
products) is the same whatever is chosen, and left out. Node names come from the exporter's scopes.

"macs" needs no engine: max(operations / rate, bytes / bandwidth), in units of one such time, with
INT8 and FP8 at twice the rate of 16 bits and weights at their stored size.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.engines.openvino import OpenVinoEngine
from hcf.errors import HcfError, MissingDependency
from hcf.export.passes import QUANTISABLE, layer_of
from hcf.quantize.simulate import quantisable
from hcf.quantize.statistics import run_call
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
PASSED_THROUGH = ("QuantizeLinear", "DequantizeLinear", "Mul", "Cast", "Reshape", "Transpose")
# relative to 16-bit arithmetic; bytes of a weight, bytes of an activation
RATES = {"none": 1.0, "int8": 2.0, "fp8": 2.0, "int8-weight": 1.0, "int4-weight": 1.0, "int4": 2.0}
WEIGHT_BYTES = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "int8-weight": 1.0, "int4-weight": 0.5625}
OPERATIONS_PER_BYTE = 200.0  # multiply-adds at 16 bits in the time one byte comes from memory: A100


@dataclass(frozen=True)
class NodeTime:
    """One node of a compiled graph: the ONNX nodes it was made of, and its time."""

    name: str
    sources: tuple[str, ...]
    ms: float


def openvino_times(
    graphs: Mapping[str, Path],
    precisions: Mapping[str, str],
    inputs: Mapping[str, Tensor],
    threads: int,
    repeats: int,
) -> dict[str, list[NodeTime]]:
    """Times of the nodes of each of `graphs` on OpenVINO: of each the least of `repeats` runs.

    The graphs run in turns, so that what else the machine does falls on all of them; it only ever
    adds time. Raises MissingDependency without openvino, InvalidArtifact for a graph it cannot
    read.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    requests: dict[str, Any] = {}
    sources: dict[str, dict[str, tuple[str, ...]]] = {}
    feed: dict[str, Any] = {}
    for key, graph in graphs.items():
        engine = OpenVinoEngine(graph, "unet", precisions[key], threads, shapes)
        model = engine.model.clone()
        model.reshape({name: list(shapes[name]) for name in engine.inputs})
        compiled = engine.core.compile_model(model, "CPU", {**engine.options, "PERF_COUNT": True})
        requests[key] = compiled.create_infer_request()
        feed = {name: inputs[name].contiguous().numpy() for name in engine.inputs}
        sources[key] = {
            node.get_friendly_name(): _words(node.get_rt_info())
            for node in compiled.get_runtime_model().get_ops()
        }
    times: dict[str, dict[str, float]] = {key: {} for key in graphs}
    for turn in range(repeats + 2):
        for key, request in requests.items():
            request.infer(feed, share_inputs=True)  # the caches hold the other graph's weights
            request.infer(feed, share_inputs=True)
            if turn < 2:
                continue  # weights are still being laid out
            for entry in request.get_profiling_info():
                ms = entry.real_time.total_seconds() * 1e3
                times[key][entry.node_name] = min(ms, times[key].get(entry.node_name, ms))
    return {
        key: [NodeTime(name, sources[key].get(name, ()), ms) for name, ms in each.items()]
        for key, each in times.items()
    }


def tensorrt_times(
    graph: Path, precision: str, inputs: Mapping[str, Tensor], repeats: int
) -> list[NodeTime]:
    """Times of the kernels of a TensorRT engine of `graph`, as `openvino_times` takes them.

    A kernel that fuses many ONNX nodes names them in its metadata. The plan is built beside the
    graph. Raises MissingDependency without tensorrt or a GPU.
    """
    if not torch.cuda.is_available():
        raise MissingDependency(
            "a TensorRT profile needs an NVIDIA GPU; torch finds none",
            fix="use sensitivity.target: openvino or macs",
        )
    from hcf.engines.tensorrt import PlanOptions, build_plan
    from hcf.engines.tensorrt_network import engine_layers
    from hcf.engines.tensorrt_package import package
    from hcf.engines.tensorrt_runtime import TensorRTEngine

    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    plan = build_plan(graph, graph.parent, PlanOptions(opt_shapes=shapes))
    _, trt = package()
    engine = TensorRTEngine(plan, "unet", precision, cuda_graphs=False)
    times: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    for _ in range(3):
        engine(inputs)
    profiler = Profiler()  # kept: the context holds no reference
    engine.bound(inputs, engine.inputs).context.profiler = profiler
    for _ in range(repeats):
        engine(inputs)
        torch.cuda.synchronize()
    inspector = engine.engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    sources = {layer.name: layer.nodes for layer in engine_layers(told)}
    return [NodeTime(name, sources.get(name, ()), fastest(each)) for name, each in times.items()]


def fastest(samples: Sequence[float]) -> float:
    """10th percentile: whatever else the machine does only adds time."""
    return statistics.quantiles([*samples, *samples], n=10, method="inclusive")[0]


def attribute(
    model: Any, times: Sequence[NodeTime], layers: Sequence[str], weights: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Times of nodes to times of `layers`, and what belongs to none; `model` is the ONNX graph.

    A node of several layers is split by `weights` (their operations). Layers that no node names
    get 0: the engine has folded them into others.
    """
    known = dict.fromkeys(layers)
    owners: dict[str, tuple[str, ...]] = {}  # ONNX node -> layers whose product it computes
    readers: dict[str, list[str]] = {}  # tensor -> layers that read it through quantisers
    for node in reversed(model.graph.node):
        layer = layer_of(node, known)
        if layer is not None:  # its product, its bias
            owners[node.name] = (layer,)
        if layer is not None and node.op_type in QUANTISABLE:
            readers.setdefault(node.input[0], []).append(layer)
        elif node.op_type in PASSED_THROUGH:
            through = [name for output in node.output for name in readers.get(output, [])]
            if through and node.input:
                readers.setdefault(node.input[0], []).extend(through)
    quantisers = {
        node.name: tuple(dict.fromkeys(readers.get(node.output[0], [])))
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    found = dict.fromkeys(layers, 0.0)
    rest = 0.0
    for time in times:
        # a change of layout is called <from>_<layouts>_<to>, and comes from no ONNX node
        words = time.sources or (f"node_{time.name.rpartition('_node_')[2]}",)
        names = [word.partition("/")[0] for word in words]
        own = dict.fromkeys(layer for name in names for layer in owners.get(name, ()))
        if not own:
            own = dict.fromkeys(layer for name in names for layer in quantisers.get(name, ()))
        if not own:
            rest += time.ms
            continue
        total = sum(weights[layer] for layer in own)
        for layer in own:
            found[layer] += time.ms * (weights[layer] / total if total else 1 / len(own))
    return found, rest


@torch.no_grad()
def operations(denoiser: nn.Module, layers: Sequence[str], call: DenoiserCall) -> dict[str, float]:
    """Multiply-adds of each layer in `call`."""
    found = dict.fromkeys(layers, 0.0)
    with _outputs(denoiser, layers) as seen:
        run_call(denoiser, call)
        for name, _, output in seen:
            weight = quantisable(denoiser, name).weight
            found[name] += output.numel() * math.prod(weight.shape[1:])
    return found


@torch.no_grad()
def modelled_costs(
    denoiser: nn.Module, layers: Sequence[str], formats: Sequence[str], call: DenoiserCall
) -> dict[str, dict[str, float]]:
    """format -> layer -> max(operations / rate, bytes); one byte's time is the unit."""
    found: dict[str, dict[str, float]] = {f: dict.fromkeys(layers, 0.0) for f in formats}
    with _outputs(denoiser, layers) as seen:
        run_call(denoiser, call)
        for name, x, output in seen:
            weight = quantisable(denoiser, name).weight
            macs = output.numel() * math.prod(weight.shape[1:])
            for format in formats:
                size = WEIGHT_BYTES.get(format, 0.5625) * weight.numel()
                activation = 1.0 if format in ("int8", "fp8") else 2.0
                moved = size + activation * x.numel() + 2.0 * output.numel()
                found[format][name] += max(macs / RATES[format] / OPERATIONS_PER_BYTE, moved)
    return found


def check_attributed(found: Mapping[str, float], rest: float, what: str) -> None:
    """HcfError where the profile names next to no layer: its figures would mean nothing."""
    total = sum(found.values())
    if total <= 0 or sum(value > 0 for value in found.values()) < len(found) / 4:
        raise HcfError(
            f"the profile of {what} names {sum(v > 0 for v in found.values())} of {len(found)} "
            f"layers ({total:.2f} of {total + rest:.2f} ms)",
            fix="use sensitivity.target: macs",
        )


@contextmanager
def _outputs(
    denoiser: nn.Module, layers: Sequence[str]
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Inside, (layer, input, output) of every call of a layer are added to the list."""
    seen: list[tuple[str, Tensor, Tensor]] = []
    hooks = []
    for name in layers:

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            # shapes are wanted, not values
            seen.append((name, args[0].to("meta"), output.to("meta")))

        hooks.append(denoiser.get_submodule(name).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def _words(info: Any) -> tuple[str, ...]:
    if "originalLayersNames" not in info:
        return ()
    text = info["originalLayersNames"].astype(str)
    return tuple(word for word in text.split(",") if word)
