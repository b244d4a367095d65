"""ONNX files: written from a torch module by either of torch's exporters, saved, described."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcf.artifact import hash_file
from hcf.errors import HcfError, MissingDependency
from hcf.export.component import PIXELS
from hcf.export.functions import FUNCTION_OPS, attach_bodies, translations
from hcf.export.inspect import inspect_onnx
from hcf.export.simplify import PassRecord, simplify
from hcf.fuse import fused, unfused
from hcf.settings import ExportConfig

if TYPE_CHECKING:
    import onnx_ir as ir

FP32_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
INT8_ORT_GRAPH = "model.int8.u8s8.onnx"
TORCHSCRIPT_OPSET = 20  # where that exporter ends
# protobuf cannot hold 2 GiB in one message, and takes thrice the memory while it writes one
EXTERNAL_FROM_BYTES = 2**30
# stack traces would put the paths of the machine that exported into the file
PRIVATE_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def graph_name(precision: str, floating: str = "fp32") -> str:
    """File of a graph: model.onnx, model.fp16.onnx, model.int8.onnx; among fp16 layers
    model.int8.fp16.onnx."""
    parts = ["model", *(word for word in (precision, floating) if word != "fp32"), "onnx"]
    return ".".join(parts)


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    config: ExportConfig,
) -> list[PassRecord]:
    """Writes `path`, float32, of `module` called with `inputs`; returns what the passes did.

    Raises HcfError with the exporter's own words where torch cannot export the module.
    """
    require_onnx()
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = _dynamo if config.exporter == "dynamo" else _torchscript
    kernels = unfused(module) if config.kernels == "plain" else fused(module, FUNCTION_OPS)
    with _quiet(), torch.no_grad(), _exporter_errors(config), kernels:
        with trace(module, inputs, outputs, path, config) as model:
            records = simplify(model, config.passes)
            save_graph(model, path)
    return records


@contextlib.contextmanager
def _exporter_errors(config: ExportConfig) -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        words = str(error).strip()
        cause = words.rpartition("Exception summary")[2].strip() or words
        raise HcfError(
            f"torch's {config.exporter} exporter failed: {cause[:800]}",
            fix="try export.exporter torchscript, or export.dynamic false",
        ) from error


def save_graph(model: ir.Model, path: Path) -> None:
    """`model` as `path`, its weights in `<path>.data` where one file cannot hold them."""
    import onnx_ir as ir

    for stale in (path, path.with_name(path.name + ".data")):
        stale.unlink(missing_ok=True)  # may be a hard link into another artefact
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    if sum(tensor.nbytes for tensor in tensors) > EXTERNAL_FROM_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
        return
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            array = tensor.numpy().copy()
            value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
    ir.save(model, path)


def describe(path: Path) -> str:
    """One line about a graph, for the log."""
    summary = inspect_onnx(path)
    data = path.with_name(path.name + ".data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    nodes, low = sum(summary.operators.values()), len(summary.quantized)
    products = low + len(summary.floating)
    text = f"{path.name} {size / 1e6:.1f} MB, {nodes} nodes"
    return text + (f", {low} of {products} products quantised" if low else "")


def record(folder: Path, path: Path, precision: str, errors: dict[str, float], **more: Any) -> Any:
    """What a manifest says of one graph: its file and hash, parity, contents, and `more`."""
    summary = asdict(inspect_onnx(path))
    summary |= {key: len(summary[key]) for key in ("quantized", "floating")}
    return {
        "file": path.relative_to(folder).as_posix(),
        "sha256": hash_file(path),
        "precision": precision,
        "relative_error": errors,
        "torch": str(torch.__version__),
        **more,
        **summary,
    }


def require_onnx() -> None:
    """Raises MissingDependency without onnx or onnxscript."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"exporting to ONNX needs {error.name}", fix="pip install 'hcf-toolkit[onnx]'"
        ) from error


@contextlib.contextmanager
def _dynamo(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    config: ExportConfig,
) -> Iterator[ir.Model]:
    shapes: tuple[Any, ...] | None = None
    if config.dynamic:
        # forward(sample, timestep, *conditioning): the rest is one argument, a tuple
        each = tuple(_dynamic_axes(inputs).values())
        own = [p.kind for p in inspect.signature(module.forward).parameters.values()]
        named = own.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shapes = (*each[:named], each[named:]) if inspect.Parameter.VAR_POSITIONAL in own else each
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=config.opset,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=shapes,
        verbose=False,
        optimize=False,  # ours count what they do, and keep the names of parameters
        custom_translation_table=translations() if config.kernels != "plain" else None,
    )
    assert program is not None
    attach_bodies(program.model)
    for node in program.model.graph.all_nodes():
        for key in PRIVATE_METADATA:
            node.metadata_props.pop(key, None)
    yield program.model


@contextlib.contextmanager
def _torchscript(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    config: ExportConfig,
) -> Iterator[ir.Model]:
    import onnx_ir as ir

    axes = None
    if config.dynamic:
        axes = {**_dynamic_axes(inputs), **{name: {0: "batch"} for name in outputs}}
        if "hidden_states" in axes:
            axes["hidden_states"] = {1: "batch"}
    raw = path.with_name(f"{path.name}.raw")  # a folder: large weights become many files
    raw.mkdir()
    try:
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(raw / path.name),
            dynamo=False,
            opset_version=min(config.opset, TORCHSCRIPT_OPSET),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
        )
        yield ir.load(raw / path.name)
    finally:
        shutil.rmtree(raw)


def _dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Batch everywhere, height and width of what has them, the length of a text.

    Sizes that follow from the latents' are left to the exporter: f times as many pixels, a
    ControlNet's residuals halved and rounded up.
    """
    axes: dict[str, dict[int, Any]] = {}
    for name, tensor in inputs.items():
        axes[name] = {0: "batch"}
        if name in ("sample", "latents"):
            axes[name] |= {2: "height", 3: "width"}
        elif name in PIXELS or tensor.ndim == 4:
            axes[name] |= {2: f"{name}_height", 3: f"{name}_width"}
        elif tensor.ndim == 3 or name in ("encoder_attention_mask", "input_ids"):
            axes[name][1] = "text_length"
    return axes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
