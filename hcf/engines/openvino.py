"""OpenVINO on the CPU: fp32, fp16, bf16, and INT8 from the same Q/DQ graph as TensorRT.

Built form: an .xml/.bin pair with dynamic shapes. It is compiled for each exact shape that comes
(fixed shapes run faster than dynamic ones), and the last few compilations are kept.

Below float32 the angles of sines and cosines are still computed in float32, in a small model of
their own (`hcf.engines.angles`): in bf16 a timestep of 999 is 1000, and its embedding is wrong.
"""

from __future__ import annotations

import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport, check_precision, missing, require_layers
from hcf.engines.angles import split_angles
from hcf.errors import InvalidArtifact, MissingDependency
from hcf.export.geglu import split_geglu

KEPT_SHAPES = 8
KEPT_ANGLES = 1024  # one for each timestep of a training schedule, a few hundred bytes each
LAYER_TYPES = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
PRECISION_NAMES = {
    "f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"
}  # fmt: skip
# what the layers that are not quantised run in
HINTS = {
    "fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32", "int8-bf16": "bf16",
    "int8-weight": "f32", "int4-weight": "f32",
}  # fmt: skip
ARITHMETIC = {"f16": "FP16", "bf16": "BF16"}

Shapes = Mapping[str, tuple[int, ...]]
Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Compiled:
    """One shape: the model's request, and that of its angles where those are computed apart."""

    request: Any
    angles: Any | None


class OpenVinoEngine:
    """Runs an OpenVINO IR. `shapes` (name -> shape) are compiled at once, others when they come.

    `asked`: the products of the graph it was built from and their precisions; a layer that did not
    get the one the graph gives it is an error.
    """

    def __init__(
        self,
        graph: Path,
        component: str,
        precision: str,
        threads: int,
        shapes: Shapes,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        check_precision("openvino", precision)
        ov = _package()
        self.core = ov.Core()
        require_arithmetic(self.core, precision)
        try:
            self.model = self.core.read_model(str(graph))
        except RuntimeError as error:
            raise InvalidArtifact(
                f"OpenVINO {version()} cannot read {graph.name}: {error}",
                fix="run `hcf build` again",
            ) from error
        self.inputs = [port.get_any_name() for port in self.model.inputs]
        self.types = {port.get_any_name(): port.get_element_type() for port in self.model.inputs}
        self.outputs = [port.get_any_name() for port in self.model.outputs]
        hint = HINTS[precision]
        self.angles = split_angles(self.model) if hint != "f32" else None
        self.known_angles: OrderedDict[tuple[bytes, ...], dict[str, Any]] = OrderedDict()
        self.options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled: OrderedDict[Sizes, Compiled] = OrderedDict()
        first = self.compile(tuple(tuple(shapes[name]) for name in self.inputs))
        runtime = first.request.get_compiled_model().get_runtime_model()
        found = runtime_products(runtime, asked or {})
        self.report = require_layers(
            EngineReport(
                engine="openvino",
                version=version(),
                component=component,
                device="cpu",
                provider=str(self.core.get_property("CPU", "FULL_DEVICE_NAME")),
                precision=precision,
                layer_precisions=dict(Counter(found.values())),
                threads=threads,
                details={
                    "hint": hint,
                    "float32_angles": len(self.angles.outputs) if self.angles else 0,
                    "attention": count_attention(runtime),
                },
            ),
            asked,
            found,
        )

    def compile(self, sizes: Sizes) -> Compiled:
        """What runs these input shapes, in the graph's order; compiled if new."""
        if sizes in self.compiled:
            self.compiled.move_to_end(sizes)
            return self.compiled[sizes]
        shapes = {n: list(size) for n, size in zip(self.inputs, sizes, strict=True)}
        angles = None
        if self.angles is not None:
            small = self.angles.clone()
            small.reshape({p.get_any_name(): shapes[p.get_any_name()] for p in small.inputs})
            options = {**self.options, "INFERENCE_PRECISION_HINT": "f32"}
            angles = self.core.compile_model(small, "CPU", options).create_infer_request()
            shapes |= {port.get_any_name(): list(port.shape) for port in small.outputs}
        model = self.model.clone()
        model.reshape({p.get_any_name(): shapes[p.get_any_name()] for p in model.inputs})
        request = self.core.compile_model(model, "CPU", self.options).create_infer_request()
        self.compiled[sizes] = Compiled(request, angles)
        if len(self.compiled) > KEPT_SHAPES:
            self.compiled.popitem(last=False)
        return self.compiled[sizes]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous CPU tensors share their memory with the arrays, and those with the runtime
        feed = {n: as_array(inputs[n], self.types[n].to_dtype()) for n in self.inputs}
        compiled = self.compile(tuple(array.shape for array in feed.values()))
        if compiled.angles is not None:
            feed |= self._angles(compiled.angles, feed)
        # outputs are copied, once: schedulers keep them over the next call
        found = compiled.request.infer(feed, share_inputs=True, share_outputs=False)
        return {n: torch.from_numpy(as_float(found[i])) for i, n in enumerate(self.outputs)}

    def _angles(self, request: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
        """The sines and cosines of these inputs; a schedule's come again with every image."""
        names = [port.get_any_name() for port in request.model_inputs]
        key = tuple(feed[n].tobytes() for n in names)
        if key not in self.known_angles:
            values = request.infer({n: feed[n] for n in names}, share_outputs=False)
            ports = [port.get_any_name() for port in request.model_outputs]
            self.known_angles[key] = {n: values[i] for i, n in enumerate(ports)}
            if len(self.known_angles) > KEPT_ANGLES:
                self.known_angles.popitem(last=False)
        return self.known_angles[key]


def as_array(tensor: Tensor, dtype: Any) -> Any:
    """A CPU tensor as a contiguous array of the runtime's type, without a copy where it has it."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array if array.dtype == dtype else array.astype(dtype)


def as_float(array: Any) -> Any:
    """float32 for any floating array, others as they are."""
    return array.astype("float32") if array.dtype.kind == "f" and array.itemsize < 4 else array


def version() -> str:
    """Of the installed runtime; MissingDependency without one."""
    return str(_package().__version__)


def capabilities(core: Any) -> list[str]:
    """Precisions the CPU has kernels for: FP32, INT8, BF16, ..."""
    return [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]


def require_arithmetic(core: Any, precision: str) -> None:
    """Raises MissingDependency where the CPU does not compute in what `precision` needs."""
    needed = ARITHMETIC.get(HINTS[precision])
    if needed is not None and needed not in capabilities(core):
        raise MissingDependency(
            f"this CPU has no {needed.lower()} arithmetic (OpenVINO lists {capabilities(core)})",
            fix="use precision fp32 or int8",
        )


def runs_here(precision: str) -> bool:
    """Whether the CPU has the arithmetic that `precision` needs; MissingDependency without it."""
    try:
        require_arithmetic(_package().Core(), precision)
    except MissingDependency:
        return False
    return True


def convert(graph: Path, output: Path) -> None:
    """ONNX file `graph` -> `output` (.xml, with its .bin beside), weights as they are."""
    import onnx

    ov = _package()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".hcf-") as work:
        source = graph
        if any(n.op_type == "DequantizeLinear" for n in _nodes(graph)):
            model = onnx.load(str(graph))
            if split_geglu(model):
                source = Path(work) / graph.name
                onnx.save(
                    model,
                    str(source),
                    save_as_external_data=True,
                    location=f"{graph.name}.data",
                )
            del model
        try:
            ov.save_model(ov.Core().read_model(str(source)), str(output), compress_to_fp16=False)
        except RuntimeError as error:
            raise InvalidArtifact(
                f"OpenVINO {version()} cannot read {graph.name}: {error}",
                fix="export with another opset",
            ) from error


def _nodes(graph: Path) -> Any:
    import onnx

    return onnx.load(str(graph), load_external_data=False).graph.node


def count_layers(compiled: Any) -> dict[str, int]:
    """Convolutions and matrix products of the compiled model by the precision they run in.

    Attention's own products are fused into subgraphs there and are not counted.
    """
    return dict(Counter(runtime_products(compiled.get_runtime_model(), {}).values()))


def runtime_products(runtime: Any, asked: Mapping[str, str]) -> dict[str, str]:
    """Name -> precision of the products a runtime model runs, by the names in `asked` where one of
    those went into it."""
    found: dict[str, str] = {}
    for node in runtime.get_ops():
        info = node.get_rt_info()
        if "layerType" not in info or info["layerType"].astype(str) not in LAYER_TYPES:
            continue
        name = info["runtimePrecision"].astype(str)
        origins = info["originalLayersNames"].astype(str).split(",")
        origins = [origin.removesuffix("/WithoutBiases") for origin in origins]
        own = next((o for o in origins if o in asked), str(node.get_friendly_name()))
        found[own] = PRECISION_NAMES.get(name, name)
    return found


def count_attention(runtime: Any) -> dict[str, int]:
    """Attentions that run as one kernel, and softmaxes that stand alone (attention in pieces)."""
    counts = {"fused": 0, "in_pieces": 0}
    for node in runtime.get_ops():
        info = node.get_rt_info()
        if "layerType" not in info:
            continue
        kind = info["layerType"].astype(str)
        if kind in ("ScaledDotProductAttention", "MHA"):
            counts["fused"] += 1
        elif kind == "Subgraph" and "attention" in info["originalLayersNames"].astype(str).lower():
            counts["fused"] += 1
        elif kind == "Softmax":
            counts["in_pieces"] += 1
    return counts


def _package() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", "openvino", "openvino", error) from error
    return openvino
