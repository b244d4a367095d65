"""OpenVINO on the CPU: fp32, bf16, and INT8 from the same Q/DQ graph as TensorRT.

Built form: an .xml/.bin pair with dynamic shapes. It is compiled for each exact shape that comes
(fixed shapes run faster than dynamic ones), and the last few compilations are kept.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport, check_precision, missing, require_layers
from hcf.errors import InvalidArtifact, MissingDependency

KEPT_SHAPES = 8
LAYER_TYPES = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
PRECISION_NAMES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}
# what the layers that are not INT8 run in: see `hcf build`, bf16 there costs accuracy for little
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}

Shapes = Mapping[str, tuple[int, ...]]


class OpenVinoEngine:
    """Runs an OpenVINO IR. `shapes` (name -> shape) are compiled at once, others when they come."""

    def __init__(
        self, graph: Path, component: str, precision: str, threads: int, shapes: Shapes
    ) -> None:
        check_precision("openvino", precision)
        ov = _package()
        self.core = ov.Core()
        if precision == "bf16" and "BF16" not in capabilities(self.core):
            raise MissingDependency(
                f"this CPU has no bf16 arithmetic (OpenVINO lists {capabilities(self.core)})",
                fix="use precision fp32 or int8",
            )
        try:
            self.model = self.core.read_model(str(graph))
        except RuntimeError as error:
            raise InvalidArtifact(
                f"OpenVINO {version()} cannot read {graph.name}: {error}",
                fix="run `hcf build` again",
            ) from error
        self.inputs = [port.get_any_name() for port in self.model.inputs]
        self.outputs = [port.get_any_name() for port in self.model.outputs]
        self.options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self.report = EngineReport(
            engine="openvino",
            version=version(),
            component=component,
            device="cpu",
            provider=str(self.core.get_property("CPU", "FULL_DEVICE_NAME")),
            precision=precision,
            threads=threads,
        )
        compiled = self.request(tuple(tuple(shapes[name]) for name in self.inputs))
        counts = count_layers(compiled.get_compiled_model())
        self.report = require_layers(replace(self.report, layer_precisions=counts))

    def request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """The infer request for these input shapes, in the graph's order; compiled if new."""
        if shapes in self.requests:
            self.requests.move_to_end(shapes)
            return self.requests[shapes]
        model = self.model.clone()
        model.reshape(dict(zip(self.inputs, (list(shape) for shape in shapes), strict=True)))
        compiled = self.core.compile_model(model, "CPU", self.options)
        self.requests[shapes] = compiled.create_infer_request()
        if len(self.requests) > KEPT_SHAPES:
            self.requests.popitem(last=False)
        return self.requests[shapes]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous CPU tensors share their memory with the arrays, and those with the runtime
        feed = {name: inputs[name].detach().contiguous().numpy() for name in self.inputs}
        request = self.request(tuple(array.shape for array in feed.values()))
        # outputs are copied: schedulers keep them over the next call
        found = request.infer(feed, share_inputs=True, share_outputs=False)
        return {name: torch.from_numpy(found[i]) for i, name in enumerate(self.outputs)}


def version() -> str:
    """Of the installed runtime; MissingDependency without one."""
    return str(_package().__version__)


def capabilities(core: Any) -> list[str]:
    """Precisions the CPU has kernels for: FP32, INT8, BF16, ..."""
    return [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]


def convert(graph: Path, output: Path) -> None:
    """ONNX file `graph` -> `output` (.xml, with its .bin beside), weights as they are."""
    ov = _package()
    try:
        model = ov.Core().read_model(str(graph))
    except RuntimeError as error:
        raise InvalidArtifact(
            f"OpenVINO {version()} cannot read {graph.name}: {error}",
            fix="export with another opset",
        ) from error
    ov.save_model(model, str(output), compress_to_fp16=False)


def count_layers(compiled: Any) -> dict[str, int]:
    """Convolutions and matrix products of the compiled model by the precision they run in.

    Attention's own products are fused into subgraphs there and are not counted.
    """
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in LAYER_TYPES:
            name = info["runtimePrecision"].astype(str)
            counts[PRECISION_NAMES.get(name, name)] += 1
    return dict(counts)


def _package() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", "openvino", "openvino", error) from error
    return openvino
