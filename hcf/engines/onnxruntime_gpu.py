"""ONNX Runtime on a GPU: its CUDA or its TensorRT provider, with IO binding.

Inputs and outputs are torch's device memory, bound once a shape; work is enqueued on torch's stream
and nobody waits for the device. Which provider took which node is read back from the session: nodes
on the CPU that only compute shapes are normal, any other is an error unless it is allowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport, check_precision, require_layers
from hcf.engines.device_buffers import InputBuffer, ShapeCache, Sizes, handed_out
from hcf.engines.eager import provider_of
from hcf.engines.onnxruntime import WHEELS, package, session_options, version
from hcf.engines.products import graph_products
from hcf.errors import HcfError, InvalidArtifact, MissingDependency

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
KEPT_SHAPES = 8
TYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16, "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
}  # fmt: skip
# what computes sizes; ONNX Runtime keeps it on the CPU, where the sizes are needed
SHAPE_OPERATORS = frozenset({
    "Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Cast", "Add", "Sub",
    "Mul", "Div", "Mod", "Floor", "Ceil", "Min", "Max", "Range", "Equal", "Where", "Expand",
    "ConstantOfShape", "Reshape", "ReduceProd", "Constant", "Identity", "Transpose", "Split",
})  # fmt: skip


@dataclass
class Bound:
    """Everything of one shape: the binding, and the memory whose addresses it holds."""

    binding: Any
    inputs: dict[str, InputBuffer]
    outputs: dict[str, Tensor]


class OnnxRuntimeGpuEngine:
    """Runs an ONNX graph on one provider of the current GPU ("cuda" or "tensorrt").

    Raises MissingDependency without a GPU or the provider, HcfError where the session runs another
    provider first or leaves nodes that are no shape arithmetic on the CPU.
    """

    def __init__(
        self,
        graph: Path,
        component: str,
        precision: str,
        provider: str,
        allow_cpu_fallback: bool = False,
        cache: Path | None = None,
    ) -> None:
        check_precision("onnxruntime", precision, provider)
        device = torch.device("cuda")
        name = provider_of(device)
        ort = package()
        require_provider(ort, provider)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)
        options = session_options(ort, 0)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.session = _gpu_session(ort, graph, options, provider, precision, self.stream, cache)
        if self.session.get_providers()[0] != PROVIDERS[provider]:
            raise HcfError(
                f"onnxruntime {ort.__version__} was asked for {PROVIDERS[provider]} and runs "
                f"{self.session.get_providers()}",
                fix=f"pip uninstall -y {' '.join(WHEELS)} && pip install onnxruntime-gpu",
            )
        nodes = assigned_nodes(self.session)
        fallen = fallback_nodes(nodes)
        if fallen and not allow_cpu_fallback:
            raise HcfError(
                f"{component}: {sum(fallen.values())} nodes of {graph.name} fall back to the CPU "
                f"under {PROVIDERS[provider]}: {fallen}",
                fix="export with another opset or precision, or set build.allow_cpu_fallback",
            )
        self.options = ort.RunOptions()
        # torch's stream orders the work; waiting for the device would stall the host every step
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = {value.name: TYPES[value.type] for value in self.session.get_inputs()}
        self.outputs = {value.name: TYPES[value.type] for value in self.session.get_outputs()}
        self.bound: ShapeCache[Bound] = ShapeCache(KEPT_SHAPES, self._bind, self.stream.synchronize)
        self.report = require_layers(
            EngineReport(
                engine="onnxruntime",
                version=version(),
                component=component,
                device="cuda",
                provider=f"{PROVIDERS[provider]} on {name}",
                precision=precision,
                layer_precisions=dict(Counter(graph_products(graph).values())),
                details={
                    "provider": provider,
                    "providers": self.session.get_providers(),
                    "nodes": {ep: sum(ops.values()) for ep, ops in nodes.items()},
                    "fallback_nodes": fallen,
                    "io_binding": True,
                    "counted_in": "the graph: the provider takes whole nodes",
                },
            )
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        caller = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            bound = self.bound(inputs, list(self.inputs))
            for name, buffer in bound.inputs.items():
                buffer.fill(inputs[name])
            self.stream.wait_stream(caller)
            self.session.run_with_iobinding(bound.binding, self.options)
            caller.wait_stream(self.stream)
            return {name: handed_out(tensor) for name, tensor in bound.outputs.items()}

    def _bind(self, sizes: Sizes) -> Bound:
        """Buffers and binding of one shape; a first run says how large the outputs are."""
        binding = self.session.io_binding()
        inputs = {
            name: InputBuffer(size, dtype, self.device)
            for (name, dtype), size in zip(self.inputs.items(), sizes, strict=True)
        }
        index = self.device.index
        for name, buffer in inputs.items():
            buffer.tensor.zero_()
            binding.bind_input(name, "cuda", index, *_placed(buffer.tensor))
        for name in self.outputs:
            binding.bind_output(name, "cuda", index)
        torch.cuda.synchronize(self.device)  # once a shape
        self.session.run_with_iobinding(binding)
        shapes = [tuple(value.shape()) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        outputs: dict[str, Tensor] = {}
        for (name, dtype), shape in zip(self.outputs.items(), shapes, strict=True):
            outputs[name] = torch.empty(shape, dtype=dtype, device=self.device)
            binding.bind_output(name, "cuda", index, *_placed(outputs[name]))
        return Bound(binding, inputs, outputs)


def require_provider(ort: Any, provider: str) -> None:
    """Raises MissingDependency where the installed wheel has no such provider."""
    known = ort.get_available_providers()
    if PROVIDERS[provider] not in known:
        raise MissingDependency(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]}; it has "
            f"{', '.join(known)}",
            fix=f"pip uninstall -y {' '.join(WHEELS)} && pip install onnxruntime-gpu",
        )


def assigned_nodes(session: Any) -> dict[str, dict[str, int]]:
    """{provider: {operator: how many nodes}}, as the session partitioned its graph."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts = found.setdefault(str(part.ep_name), Counter())
        counts.update(str(node.op_type) for node in part.get_nodes())
    return {provider: dict(counts) for provider, counts in found.items()}


def fallback_nodes(nodes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{operator: how many} of what runs on the CPU and is not the arithmetic of sizes."""
    on_cpu = nodes.get("CPUExecutionProvider", {})
    return {kind: count for kind, count in on_cpu.items() if kind not in SHAPE_OPERATORS}


def _gpu_session(
    ort: Any,
    graph: Path,
    options: Any,
    provider: str,
    precision: str,
    stream: Any,
    cache: Path | None,
) -> Any:
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as torch brings them
    chosen: dict[str, Any] = {
        "device_id": torch.cuda.current_device(),
        "user_compute_stream": str(stream.cuda_stream),
    }
    if provider == "cuda":
        chosen |= {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
    else:
        chosen |= {"trt_fp16_enable": "0" if precision == "fp32" else "1"}
        chosen |= {"trt_int8_enable": "1" if precision == "int8" else "0"}
    if provider == "tensorrt" and cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
        }
    try:
        return ort.InferenceSession(
            str(graph),
            options,
            providers=[(PROVIDERS[provider], chosen), "CPUExecutionProvider"],
            enable_fallback=0,  # else a failing provider is replaced by the CPU in silence
        )
    except Exception as error:  # its error classes share no base but Exception
        raise InvalidArtifact(
            f"onnxruntime {ort.__version__} cannot run {graph.name} on {PROVIDERS[provider]}: "
            f"{error}",
            fix="export with another opset or precision, or use another engine",
        ) from error


def _placed(tensor: Tensor) -> tuple[Any, tuple[int, ...], int]:
    """Element type, shape and address, as IO binding wants them."""
    from onnx import TensorProto

    kinds: dict[torch.dtype, int] = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.int64: TensorProto.INT64,
        torch.int32: TensorProto.INT32,
        torch.bool: TensorProto.BOOL,
    }
    return kinds[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
