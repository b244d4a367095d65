"""What TensorRT made of a graph: the parsed network before the build, the engine's layers after.

The network is strongly typed, so its layers' types are what was asked for; the inspector tells what
the finished engine really runs, one entry a kernel with the ONNX nodes that went into it.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

from hcf.engines.tensorrt_plugins import register, require_in_network, require_plugins
from hcf.errors import HcfError, InvalidArtifact, MissingDependency

PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
MOVES = ("SHUFFLE", "UNSQUEEZE", "SQUEEZE", "IDENTITY", "CAST")  # may be between Q/DQ and product
PRECISION_NAMES = {"FLOAT": "fp32", "HALF": "fp16"}  # the others are called as we call them
ONNX_NAMES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# how the inspector writes types, in TensorRT 10 ("Channel major FP16 format", "Half") and 11
INSPECTED = (
    ("int8", r"int8|\bi8\b|\bs8\b"),
    ("fp8", r"fp8|e4m3"),
    ("int4", r"int4|\bi4\b"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|\bf16\b"),
    ("fp32", r"fp32|float32|\bfloat\b|\bf32\b"),
)
TACTICS = (("int8", r"imma|int8|_i8|s8_|i8i8"), ("fp8", r"e4m3|fp8|qmma"))
TYPE_KEYS = ("Format/Datatype", "DataType", "Datatype", "Format")


@dataclass(frozen=True)
class LayerPrecision:
    """A layer of a parsed network: its kind ("convolution") and the precision it computes in."""

    kind: str
    precision: str


@dataclass(frozen=True)
class EngineLayer:
    """A kernel of a built engine: its kind, precision ("" if it tells none), ONNX nodes in it."""

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]


class Listener:
    """What TensorRT said since this was made: its complaints, and how much it had to skip.

    `handle` is the logger to give to TensorRT.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.errors: list[str] = []
        self.skipped_tactics = 0
        self.out_of_memory = 0

    def hear(self, message: str, is_error: bool) -> None:
        lower = message.lower()
        if "skipping tactic" in lower or "tactic skipped" in lower:
            self.skipped_tactics += 1
        if is_out_of_memory(lower):
            self.out_of_memory += 1
        if is_error:
            self.errors.append(message.strip())

    def tail(self) -> str:
        return "; ".join(dict.fromkeys(self.errors[-3:])) or "TensorRT gave no reason"


def listen(trt: Any) -> Listener:
    """A new listener to what TensorRT says from now on, as long as it is held."""
    handle = _handle(trt.__name__)
    listener = Listener(handle)
    handle.listeners.add(listener)
    return listener


@cache
def _handle(module: str) -> Any:
    """The one logger of a TensorRT package in this process.

    TensorRT keeps the first that it is given for as long as any of its objects lives, and ignores
    the others: each builder with its own would lose its messages, or call into one that is gone.
    """
    trt: Any = importlib.import_module(module)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: WeakSet[Listener] = WeakSet()

        def log(self, severity: Any, message: str) -> None:
            kinds = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            for listener in list(self.listeners):
                listener.hear(message, severity in kinds)

    return Log()


def is_out_of_memory(message: str) -> bool:
    """Whether a line of the log says that memory ran out."""
    lower = message.lower()
    return any(words in lower for words in ("out of memory", "outofmemory", "insufficient memory"))


def parse(trt: Any, graph: Path, plugins: Sequence[str] = ()) -> tuple[Any, tuple[Any, ...]]:
    """(network, what has to live as long as it does: listener, builder, parser).

    Nodes named in `plugins` become plugin layers (`hcf.engines.tensorrt_plugins`).
    """
    if not graph.is_file():
        raise InvalidArtifact(f"{graph} does not exist", fix="run `hcf export` on this model first")
    require_plugins(trt, graph, plugins)
    log = listen(trt)
    try:
        builder = trt.Builder(log.handle)
    except (TypeError, RuntimeError) as error:  # the full TensorRT without a GPU
        raise MissingDependency(
            f"{trt.__name__} {trt.__version__} cannot start: {log.tail()}",
            fix="it needs an NVIDIA GPU and driver; tensorrt-rtx builds without one",
        ) from error
    # TensorRT 10 must be told; later ones know nothing else
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(typed) if typed is not None else 0)
    parser = trt.OnnxParser(network, log.handle)
    if plugins:
        register(trt, plugins, alone=True)
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [
            f"{error.node_operator()} {error.node_name()}: {error.desc().strip()}"
            for error in found[:3]
        ]
        raise HcfError(
            f"{trt.__name__} {trt.__version__} cannot parse {graph.name}: "
            + "; ".join(errors or [log.tail()]),
            fix="export with another opset, or leave the layer out of quantisation",
        )
    if plugins:
        require_in_network(trt, network, graph, plugins)
    return network, (log, builder, parser)


def precisions_of(network: Any) -> dict[str, LayerPrecision]:
    """Every layer of a parsed network by name.

    A product computes in INT8 (or FP8) when both its inputs are dequantised from it. One whose
    weights alone are counts as what those are stored in. Every other layer computes in the type of
    its first output.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def dequantised_from(tensor: Any) -> tuple[str, bool] | None:
        """Type a tensor was dequantised from, and whether that is a constant; or None."""
        layer = maker.get(tensor.name)
        while layer is not None and layer.type.name in MOVES:
            layer = maker.get(layer.get_input(0).name)
        if layer is None or layer.type.name != "DEQUANTIZE":
            return None
        source = maker.get(layer.get_input(0).name)
        while source is not None and source.type.name in MOVES:
            source = maker.get(source.get_input(0).name)
        constant = source is not None and source.type.name == "CONSTANT"
        return _precision(layer.get_input(0).dtype), constant

    found: dict[str, LayerPrecision] = {}
    for layer in layers:
        precision = _precision(layer.get_output(0).dtype) if layer.num_outputs else "none"
        if layer.type.name in PRODUCTS and layer.num_inputs > 1:
            sides = [dequantised_from(layer.get_input(i)) for i in (0, 1)]
            kinds = {side[0] for side in sides if side is not None}
            weight_alone = sides[0] is None and sides[1] is not None and sides[1][1]
            if len(kinds) == 1 and (None not in sides or weight_alone):
                precision = kinds.pop()
        found[layer.name] = LayerPrecision(layer.type.name.lower(), precision)
    return found


def products_in(layers: Mapping[str, LayerPrecision]) -> dict[str, str]:
    """Name -> precision of the convolutions and matrix products among them."""
    return {n: layer.precision for n, layer in layers.items() if layer.kind.upper() in PRODUCTS}


def engine_layers(information: Mapping[str, Any]) -> list[EngineLayer]:
    """The layers in what the engine inspector writes as JSON, of TensorRT 10 or 11."""
    found: list[EngineLayer] = []
    for layer in information.get("Layers", []):
        if isinstance(layer, str):  # a plan built without detailed verbosity tells names alone
            found.append(EngineLayer(layer, "", "", ()))
            continue
        types = [_type_text(tensor) for tensor in layer.get("Inputs", [])]
        found.append(
            EngineLayer(
                name=str(layer.get("Name", "")),
                kind=str(layer.get("LayerType", "")),
                precision=_kernel_precision(types, str(layer.get("TacticName", ""))),
                nodes=tuple(ONNX_NAMES.findall(str(layer.get("Metadata", "")))),
            )
        )
    return found


def engine_products(layers: Sequence[EngineLayer], asked: Mapping[str, str]) -> dict[str, str]:
    """Name -> precision of the products in `asked` that a kernel with a known type computes.

    A kernel that only moves or converts values may name a product too: the most quantised of the
    kernels that name one is the one that computes it.
    """
    order = ["int4", "int8", "fp8", "fp16", "bf16", "fp32"]
    found: dict[str, str] = {}
    for layer in layers:
        if not layer.precision:
            continue
        for name in set(layer.nodes) & set(asked):
            best = min(found.get(name, layer.precision), layer.precision, key=order.index)
            found[name] = best
    return found


def summary(layers: Sequence[EngineLayer]) -> dict[str, Any]:
    """What goes beside the plan: how many kernels, of which precision, how many tell none."""
    return {
        "kernels": len(layers),
        "precisions": dict(Counter(layer.precision for layer in layers if layer.precision)),
        "untold": sum(not layer.precision for layer in layers),
    }


def _precision(kind: Any) -> str:
    return PRECISION_NAMES.get(kind.name, kind.name.lower())


def _type_text(tensor: Any) -> str:
    if not isinstance(tensor, Mapping):
        return ""
    return " ".join(str(tensor[key]) for key in TYPE_KEYS if key in tensor)


def _kernel_precision(types: Sequence[str], tactic: str) -> str:
    """The most quantised type among a kernel's inputs and in its name; else its first input's."""
    texts = [text.lower() for text in types]
    for name, pattern in INSPECTED[:3]:
        if any(re.search(pattern, text) for text in texts):
            return name
    for name, pattern in TACTICS:
        if re.search(pattern, tactic.lower()):
            return name
    for text in texts:
        for name, pattern in INSPECTED[3:]:
            if re.search(pattern, text):
                return name
    return ""
