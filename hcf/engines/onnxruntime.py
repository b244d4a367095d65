"""ONNX Runtime: its CPU provider here, its CUDA and TensorRT providers in `onnxruntime_gpu`.

Built form: on the CPU the graph its optimiser wrote for this machine. Which layers run in which
precision is counted in that file: a quantised product is an operator of its own there, and one that
is still dequantised in front of a floating-point product fell back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport, check_precision, missing, require_layers
from hcf.engines.products import external_data, products_of
from hcf.errors import HcfError, InvalidArtifact, MissingDependency

PROVIDER = "CPUExecutionProvider"
INT8_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
    "ConvInteger", "DynamicQuantizeMatMul",
)  # fmt: skip
FLOAT_OPERATORS = (
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm",
)  # fmt: skip
WHEELS = ("onnxruntime", "onnxruntime-gpu")  # both put their files into one onnxruntime/ folder


class OnnxRuntimeEngine:
    """Runs `graph`, one that `optimise` wrote, on the CPU provider and no other.

    `asked`: the products of the graph it was made from and their precisions; a layer that did not
    get the one the graph gives it is an error.
    """

    def __init__(
        self,
        graph: Path,
        component: str,
        precision: str,
        threads: int,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        check_precision("onnxruntime", precision, "cpu")
        ort = package()
        options = session_options(ort, threads)
        # optimised when it was built: loading it again only reads it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = _session(ort, graph, options)
        self.inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        found = runtime_products(graph, weights_alone=precision.endswith("-weight"))
        self.report = require_layers(
            EngineReport(
                engine="onnxruntime",
                version=version(),
                component=component,
                device="cpu",
                provider=", ".join(self.session.get_providers()),
                precision=precision,
                layer_precisions=dict(Counter(found.values())),
                threads=threads,
            ),
            asked,
            found,
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # contiguous CPU tensors share their memory with the arrays
        feed = {name: inputs[name].detach().cpu().contiguous().numpy() for name in self.inputs}
        found = self.session.run(self.outputs, feed)
        return {k: torch.from_numpy(v).float() for k, v in zip(self.outputs, found, strict=True)}


def version() -> str:
    """Of the installed runtime; MissingDependency without one."""
    return str(package().__version__)


def optimise(graph: Path, output: Path, threads: int) -> None:
    """Write to `output` what ONNX Runtime makes of `graph` with every optimisation on."""
    ort = package()
    options = session_options(ort, threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    if external_data(graph).is_file():
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{output.name}.data"
        )
    _session(ort, graph, options)


def count_layers(graph: Path) -> dict[str, int]:
    """Convolutions and matrix products of an optimised graph by the precision they run in."""
    return dict(Counter(runtime_products(graph, weights_alone=False).values()))


def runtime_products(graph: Path, weights_alone: bool) -> dict[str, str]:
    """Name -> precision of the products of an optimised graph, named as before optimisation.

    `weights_alone`: a floating-point product behind dequantised weights counts as what they are
    stored in; otherwise it counts as floating point, which it is.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    stored = products_of(model) if weights_alone else {}
    found: dict[str, str] = {}
    for index, node in enumerate(model.graph.node):
        name = re.sub(r"_token_\d+$", "", node.name) or f"{node.op_type}_{index}"
        if name in found:
            name = f"{name}_{index}"
        if node.op_type in INT8_OPERATORS:
            found[name] = "int8"
        elif node.op_type == "MatMulNBits":
            bits = next(a.i for a in node.attribute if a.name == "bits")
            found[name] = f"int{bits}"
        elif node.op_type in FLOAT_OPERATORS:
            found[name] = stored.get(node.name, "fp32")
    return found


def package() -> Any:
    """The module. Raises MissingDependency without it, and where both wheels are installed."""
    require_one_wheel()
    try:
        import onnx  # noqa: F401  (reads back what the optimiser wrote)
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", "onnxruntime", "onnx", error) from error
    return onnxruntime


def require_one_wheel() -> None:
    """Raises MissingDependency if onnxruntime and onnxruntime-gpu are both installed.

    They overwrite each other's files: which one is imported depends on what was installed last.
    """
    found: dict[str, str] = {}
    for name in WHEELS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if len(found) < 2:
        return
    both = " and ".join(f"{name} {number}" for name, number in found.items())
    wanted = "onnxruntime-gpu" if torch.cuda.is_available() else "onnxruntime"
    raise MissingDependency(
        f"{both} are both installed, into one folder: what runs is a mixture of the two",
        fix=f"pip uninstall -y {' '.join(WHEELS)} && pip install {wanted}",
    )


def session_options(ort: Any, threads: int) -> Any:
    """Options every session here starts from."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _session(ort: Any, graph: Path, options: Any) -> Any:
    try:
        session = ort.InferenceSession(str(graph), options, providers=[PROVIDER])
    except Exception as error:  # its error classes share no base but Exception
        raise InvalidArtifact(
            f"onnxruntime {ort.__version__} cannot load {graph.name}: {error}",
            fix="run `hcf export` and `hcf build` again",
        ) from error
    if session.get_providers()[0] != PROVIDER:
        raise HcfError(
            f"onnxruntime was asked for {PROVIDER} and runs {session.get_providers()}",
            fix=f"pip uninstall -y {' '.join(WHEELS)} && pip install onnxruntime",
        )
    return session
