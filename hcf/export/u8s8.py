"""The INT8 form ONNX Runtime's CPU kernels run fast: u8 activations with zero points, s8 weights,
QDQ format.

The symmetric graph of `hcf.export.passes` is right but slow there (its Q/DQ does not become
QLinearConv), so the CPU provider gets its own file, calibrated by ONNX Runtime on the same
calibration set, with the same layers left out. Smoothing and low-rank branches are put into the
floating-point graph first, so that ONNX Runtime sees the ranges they leave.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcf.errors import HcfError, InvalidArtifact, MissingDependency
from hcf.export.passes import QUANTISABLE, insert_qdq, layer_of
from hcf.quantize.calibrate import flat_inputs, spread
from hcf.quantize.scales import LayerScale
from hcf.trace import DenoiserCall

EXTERNAL_FROM_BYTES = 2 * 2**30 - 2**24  # protobuf cannot hold more in one message
MAX_CALLS = 16  # ONNX Runtime keeps every intermediate tensor of every call while it calibrates


def onnxruntime_form(
    fp32_onnx: Path,
    calibration: Sequence[DenoiserCall],
    output: Path,
    layers: Sequence[str] | Mapping[str, LayerScale],
) -> dict[str, int]:
    """Write `output` from the fp32 export, beside it its weights (`.data`) where the fp32 graph is
    larger than one protobuf file can be; returns its node counts by type.

    `layers` are the module names to quantise, or the scales of `read_scales`, whose smoothing and
    low-rank branches are then kept. At most 16 calls are fed. Raises `HcfError` for scales that are
    not INT8, `InvalidArtifact` if a layer has no node in the graph, `MissingDependency` without
    onnxruntime.
    """
    _require_int8(layers)
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingDependency(
            f"the ONNX Runtime form needs onnxruntime: {error}",
            fix="pip install 'onnxruntime>=1.24'",
        ) from error
    import onnx

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as work:
        prepared, quantised = Path(work) / "prepared.onnx", Path(work) / output.name
        large = _bytes_of(fp32_onnx) > EXTERNAL_FROM_BYTES
        fp32_onnx = _restructured(fp32_onnx, layers, Path(work) / "restructured.onnx", large)
        quant_pre_process(
            str(fp32_onnx),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=large,
            all_tensors_to_one_file=True,
            external_data_location=f"{prepared.name}.data",
        )
        # preprocessing fuses MatMul + Add into Gemm and drops the exporter's scopes, but keeps the
        # names of the weights
        layers_of = _layers_by_weight(
            onnx.load(str(fp32_onnx), load_external_data=False), list(layers)
        )
        graph = onnx.load(str(prepared), load_external_data=False).graph
        nodes = [
            node
            for node in graph.node
            if node.op_type in QUANTISABLE and node.input[1] in layers_of
        ]
        found = {layer for node in nodes for layer in layers_of[node.input[1]]}
        missing = sorted(set(layers) - found)
        if missing:
            raise InvalidArtifact(
                f"{len(missing)} of {len(layers)} quantised layers have no node in the graph that "
                "ONNX Runtime prepared: " + ", ".join(missing[:8]),
                fix="export the same model that was quantised, with the dynamo exporter",
            )
        quantize_static(
            str(prepared),
            str(quantised),
            _reader(spread(calibration, MAX_CALLS), [value.name for value in graph.input]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=[node.name for node in nodes],
            op_types_to_quantize=list(QUANTISABLE),
            use_external_data_format=large,
        )
        written = onnx.load(str(quantised), load_external_data=False).graph
        counts = Counter(node.op_type for node in written.node)
        data = f"{output.name}.data"
        if (Path(work) / data).is_file():
            os.replace(Path(work) / data, output.with_name(data))
        os.replace(quantised, output)
    return dict(counts)


def _require_int8(layers: Sequence[str] | Mapping[str, LayerScale]) -> None:
    """Raises HcfError for scales of another scheme, or that only a symmetric graph can have."""
    if not isinstance(layers, Mapping):
        return
    others = sorted({scale.scheme for scale in layers.values()} - {"int8"})
    if others:
        raise HcfError(
            f"ONNX Runtime's own form is INT8 throughout, the scales have {', '.join(others)} too",
            fix="use the explicit Q/DQ graph, or set quantize.format=int8 without such rules",
        )
    if bucketed := [name for name, scale in layers.items() if scale.bucket_amax is not None]:
        raise HcfError(
            f"ONNX Runtime's own form has no ranges per timestep; {len(bucketed)} layers have them",
            fix="use the explicit Q/DQ graph, or set quantize.timestep_buckets=0",
        )


def _restructured(
    fp32_onnx: Path,
    layers: Sequence[str] | Mapping[str, LayerScale],
    target: Path,
    large: bool,
) -> Path:
    """The graph with smoothing and low-rank branches in it; itself where there are none."""
    if not isinstance(layers, Mapping) or all(
        scale.smooth is None and scale.low_rank is None for scale in layers.values()
    ):
        return fp32_onnx
    import onnx

    model = onnx.load(str(fp32_onnx), load_external_data=False)
    model, _ = insert_qdq(model, layers, folder=fp32_onnx.parent, quantise=False)
    onnx.save(model, str(target), save_as_external_data=large, location=f"{target.name}.data")
    return target


def _bytes_of(graph: Path) -> int:
    """Size of a graph with its external data."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))


def _layers_by_weight(model: Any, layers: Sequence[str]) -> dict[str, set[str]]:
    """{initializer name: layers of `layers` that read it} of the graph as exported."""
    wanted, weights = dict.fromkeys(layers), {tensor.name for tensor in model.graph.initializer}
    found: dict[str, set[str]] = {}
    for node in model.graph.node:
        if node.op_type in QUANTISABLE and node.input[1] in weights:
            if (layer := layer_of(node, wanted)) is not None:
                found.setdefault(node.input[1], set()).add(layer)
    return found


def feeds(
    calls: Sequence[DenoiserCall], inputs: Sequence[str]
) -> Iterator[Mapping[str, NDArray[np.generic]]]:
    """Each call as the arrays a session takes; `InvalidArtifact` for an input no call has."""
    for call in calls:
        tensors = flat_inputs(call)
        if missing := sorted(set(inputs) - set(tensors)):
            raise InvalidArtifact(
                f"the graph wants the inputs {missing}, the calibration set has {sorted(tensors)}",
                fix="export and calibrate the same model",
            )
        yield {name: tensors[name].numpy() for name in inputs}


def _reader(calls: Sequence[DenoiserCall], inputs: Sequence[str]) -> Any:
    """ONNX Runtime's iterator protocol over `calls`."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = feeds(calls, inputs)

        def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
            return next(self.feeds, None)

    return Reader()
