"""ONNX Runtime, CPU provider. Built form: the graph its optimiser wrote for this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport, check_precision, missing, require_layers
from hcf.errors import HcfError, InvalidArtifact

PROVIDER = "CPUExecutionProvider"
INT8_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
    "ConvInteger", "DynamicQuantizeMatMul",
)  # fmt: skip
FLOAT_OPERATORS = (
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm",
)  # fmt: skip


class OnnxRuntimeEngine:
    """Runs `graph`, one that `optimise` wrote, on the CPU provider and no other."""

    def __init__(self, graph: Path, component: str, precision: str, threads: int) -> None:
        check_precision("onnxruntime", precision)
        ort = _package()
        options = _options(ort, threads)
        # optimised when it was built: loading it again only reads it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = _session(ort, graph, options)
        self.inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.report = require_layers(
            EngineReport(
                engine="onnxruntime",
                version=version(),
                component=component,
                device="cpu",
                provider=", ".join(self.session.get_providers()),
                precision=precision,
                layer_precisions=count_layers(graph),
                threads=threads,
            )
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous CPU tensors share their memory with the arrays
        feed = {name: inputs[name].detach().contiguous().numpy() for name in self.inputs}
        found = self.session.run(self.outputs, feed)
        return {k: torch.from_numpy(v) for k, v in zip(self.outputs, found, strict=True)}


def version() -> str:
    """Of the installed runtime; MissingDependency without one."""
    return str(_package().__version__)


def optimise(graph: Path, output: Path, threads: int) -> None:
    """Write to `output` what ONNX Runtime makes of `graph` with every optimisation on."""
    ort = _package()
    options = _options(ort, threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    if graph.with_name(graph.name + ".data").is_file():
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{output.name}.data"
        )
    _session(ort, graph, options)


def count_layers(graph: Path) -> dict[str, int]:
    """Convolutions and matrix products of an optimised graph by the precision they run in."""
    import onnx

    counts: Counter[str] = Counter()
    for node in onnx.load(str(graph), load_external_data=False).graph.node:
        if node.op_type in INT8_OPERATORS:
            counts["int8"] += 1
        elif node.op_type in FLOAT_OPERATORS:
            counts["fp32"] += 1
    return dict(counts)


def _session(ort: Any, graph: Path, options: Any) -> Any:
    try:
        session = ort.InferenceSession(str(graph), options, providers=[PROVIDER])
    except Exception as error:  # its error classes share no base but Exception
        raise InvalidArtifact(
            f"onnxruntime {ort.__version__} cannot load {graph.name}: {error}",
            fix="run `hcf export` and `hcf build` again",
        ) from error
    if session.get_providers() != [PROVIDER]:
        raise HcfError(
            f"onnxruntime was asked for {PROVIDER} and runs {session.get_providers()}",
            fix="install onnxruntime alone, without onnxruntime-gpu beside it",
        )
    return session


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _package() -> Any:
    try:
        import onnx  # noqa: F401  (reads back what the optimiser wrote)
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", "onnxruntime", "onnx", error) from error
    return onnxruntime
