"""Components to ONNX graphs: fp32, and where the artefact holds calibrated scales also INT8.

    <component>/model.onnx             float32, as torch computes it
    <component>/model.int8.onnx        explicit symmetric Q/DQ, INT8 weights: TensorRT and OpenVINO
    <component>/model.int8.u8s8.onnx   the form ONNX Runtime's CPU kernels want

Every graph is run against torch before it is kept. The fp32 one has to agree within the tolerance
at three batch sizes. INT8 is compared, on its calibration calls, with the same rounding simulated
in torch: a right graph agrees to 1e-6, or to some 0.05 where a value falls on the other side of a
rounding step, and a wrong one does not come near.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.artifact import clone_artifact, hash_file, staged_folder, write_manifest
from hcf.errors import HcfError, MissingDependency, RecipeError
from hcf.export.component import (
    component_module,
    example_inputs,
    graph_inputs,
    output_name,
    relative_error,
    with_batch,
)
from hcf.export.inspect import inspect_onnx
from hcf.recipe import ExportConfig
from hcf.source import open_pipeline

Log = Callable[[str], None]

FP32_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
INT8_ORT_GRAPH = "model.int8.u8s8.onnx"
WIRING_LIMIT = 0.25
COMPARED_CALLS = 8
EXTERNAL_FROM_BYTES = 2 * 2**30 - 2**20  # protobuf cannot hold more in one message
# stack traces would put the paths of the machine that exported into the file
PRIVATE_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def export(model: Path, output: Path, config: ExportConfig, log: Log = print) -> Path:
    """Artefact `model` -> artefact `output` with the ONNX graphs of `config.components` added.

    Raises HcfError where a graph is further from torch than the tolerance, RecipeError for an
    unknown component, MissingDependency without onnx, onnxscript or onnxruntime.
    """
    pipe = open_pipeline(model)
    with staged_folder(output) as folder:
        manifest = clone_artifact(model, folder)
        for component in config.components:
            path = folder / component / FP32_GRAPH
            inputs = example_inputs(pipe, component, seed=config.seed)
            errors = export_component(pipe, component, inputs, path, config)
            log(f"{component}: {_describe(path)}, relative error {max(errors.values()):.1e}")
            records = [_record(folder, path, "fp32", errors)]
            if (folder / component / "quantization.safetensors").is_file():
                for graph, error in _export_int8(pipe, component, folder, config):
                    log(f"{component}: {_describe(graph)}, relative error {error:.3f}")
                    records.append(_record(folder, graph, "int8", {"calibration": error}))
            manifest.exports[component] = records
            # engines of the parent were built from its graphs
            manifest.engines.pop(component, None)
            manifest.chosen.pop(component, None)
            shutil.rmtree(folder / "engines" / component, ignore_errors=True)
        write_manifest(folder, manifest)
    return output


def export_component(
    pipe: Any, component: str, inputs: Mapping[str, Tensor], path: Path, config: ExportConfig
) -> dict[str, float]:
    """Write `path` (fp32) for `inputs` of batch >= 2; returns the relative error at each shape."""
    _require_onnx()
    module = component_module(pipe, component, list(inputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (path, path.with_name(path.name + ".data")):
        stale.unlink(missing_ok=True)  # may be a hard link into another artefact
    write = _write_dynamo if config.exporter == "dynamo" else _write_torchscript
    with _quiet(), torch.no_grad():
        write(module, dict(inputs), path, output_name(component), config)
    cases = [dict(inputs)]
    if config.dynamic:
        batch = len(next(iter(inputs.values())))
        cases += [with_batch(inputs, 1), with_batch(inputs, batch + 1)]
    run = graph_runner(path)
    errors: dict[str, float] = {}
    for case in cases:
        with torch.no_grad():
            wanted = module(*case.values())
        shape = "x".join(str(size) for size in next(iter(case.values())).shape)
        errors[shape] = relative_error(run(case), wanted)
    if max(errors.values()) > config.tolerance:
        raise HcfError(
            f"{component}: the ONNX graph is {max(errors.values()):.2e} from torch (relative L2), "
            f"the tolerance is {config.tolerance:.0e}: {errors}",
            fix="try another export.opset, or raise export.tolerance if that is acceptable",
        )
    return errors


def graph_runner(path: Path, options: Any = None) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that runs an ONNX file on ONNX Runtime's CPU provider: named inputs -> output."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "checking an export against torch needs onnxruntime",
            fix="pip install 'hcf-toolkit[onnx]'",
        ) from error
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _export_int8(
    pipe: Any, component: str, folder: Path, config: ExportConfig
) -> Iterator[tuple[Path, float]]:
    """Write both INT8 graphs from the fp32 one and the scales; yields each with its error."""
    import onnx
    import onnxruntime

    from hcf.export.passes import insert_qdq
    from hcf.export.u8s8 import onnxruntime_form
    from hcf.quantize.calibrate import CALIBRATION_FILE, load_calibration, spread
    from hcf.quantize.report import fake_quantized
    from hcf.quantize.scales import SCALES_FILE, read_scales

    if config.exporter != "dynamo":
        raise RecipeError(
            f"export.exporter is {config.exporter!r}, but INT8 graphs need the dynamo exporter's "
            "layer names",
            fix="set export.exporter to dynamo",
        )
    fp32, scales = folder / component / FP32_GRAPH, read_scales(folder / component / SCALES_FILE)
    # the graph's timestep is float32, whatever the scheduler's was
    calls = [
        replace(call, timestep=call.timestep.float())
        for call in load_calibration(folder / component / CALIBRATION_FILE)
    ]
    symmetric, runtime_form = (folder / component / name for name in (INT8_GRAPH, INT8_ORT_GRAPH))
    for stale in (symmetric, runtime_form):
        stale.unlink(missing_ok=True)
    graph, _ = insert_qdq(onnx.load(str(fp32)), scales)
    _save_proto(graph, symmetric)
    onnxruntime_form(fp32, calls, runtime_form, list(scales))

    module = component_module(pipe, component, list(graph_inputs(calls[0])))
    cases = [graph_inputs(call) for call in spread(calls, COMPARED_CALLS)]
    wanted = _outputs(lambda case: module(*case.values()), cases)
    with fake_quantized(getattr(pipe, component), scales):
        simulated = _outputs(lambda case: module(*case.values()), cases)
    as_written = onnxruntime.SessionOptions()
    as_written.add_session_config_entry("session.disable_quant_qdq", "1")
    found = _outputs(graph_runner(symmetric, as_written), cases)
    error, wiring = relative_error(found, wanted), relative_error(found, simulated)
    _require_wired(component, symmetric, wiring, WIRING_LIMIT)
    yield symmetric, error
    # its activations are unsigned, with their own calibration: no better reference than the other
    found = _outputs(graph_runner(runtime_form), cases)
    own_error = relative_error(found, wanted)
    _require_wired(component, runtime_form, own_error, 2 * error + WIRING_LIMIT)
    yield runtime_form, own_error


def _outputs(run: Callable[[dict[str, Tensor]], Tensor], cases: list[dict[str, Tensor]]) -> Tensor:
    """All outputs in one row."""
    with torch.no_grad():
        return torch.cat([run(case).flatten() for case in cases])


def _require_wired(component: str, path: Path, error: float, limit: float) -> None:
    if error > limit:
        raise HcfError(
            f"{component}: {path.name} is {error:.2f} from what INT8 rounding makes of this model "
            f"(relative L2, limit {limit:.2f}): the graph is wrong",
            fix="run `hcf quantize` and `hcf export` again; try another export.opset",
        )


def _write_dynamo(
    module: nn.Module, inputs: dict[str, Tensor], path: Path, output: str, config: ExportConfig
) -> None:
    axes = _dynamic_axes(inputs) if config.dynamic else None
    shapes: tuple[Any, ...] | None = None
    if axes is not None:
        # forward(sample, timestep, *conditioning): the rest is one argument, a tuple
        each = tuple(axes.values())
        shapes = each if len(each) == 1 else (*each[:2], each[2:])
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=config.opset,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        for key in PRIVATE_METADATA:
            node.metadata_props.pop(key, None)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(str(path), external_data=size > EXTERNAL_FROM_BYTES)


def _write_torchscript(
    module: nn.Module, inputs: dict[str, Tensor], path: Path, output: str, config: ExportConfig
) -> None:
    axes = {**_dynamic_axes(inputs), output: {0: "batch"}} if config.dynamic else None
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        str(path),
        dynamo=False,
        opset_version=min(config.opset, 20),  # where this exporter ends
        input_names=list(inputs),
        output_names=[output],
        dynamic_axes=axes,
    )


def _dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch everywhere, height and width of the latents, the length of a text."""
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in inputs.items():
        axes[name] = {0: "batch"}
        if name in ("sample", "latents"):
            axes[name] |= {2: "height", 3: "width"}
        elif tensor.ndim == 3 or name == "encoder_attention_mask":
            axes[name][1] = "text_length"
    return axes


def _save_proto(model: Any, path: Path) -> None:
    import onnx

    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_FROM_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def _record(folder: Path, path: Path, precision: str, errors: dict[str, float]) -> dict[str, Any]:
    summary = asdict(inspect_onnx(path))
    summary |= {key: len(summary[key]) for key in ("quantized", "floating")}
    return {
        "file": path.relative_to(folder).as_posix(),
        "sha256": hash_file(path),
        "precision": precision,
        "relative_error": errors,
        **summary,
    }


def _describe(path: Path) -> str:
    summary = inspect_onnx(path)
    size = path.stat().st_size / 1e6
    nodes, int8 = sum(summary.operators.values()), len(summary.quantized)
    products = int8 + len(summary.floating)
    return f"{path.name} {size:.1f} MB, {nodes} nodes, {int8} of {products} products INT8"


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"exporting to ONNX needs {error.name}", fix="pip install 'hcf-toolkit[onnx]'"
        ) from error


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
