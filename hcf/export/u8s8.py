"""The INT8 form ONNX Runtime's CPU kernels run fast: u8 activations with zero points, s8 weights,
QDQ format.

The symmetric graph of `hcf.export.passes` is right but slow there (its Q/DQ does not become
QLinearConv), so the CPU provider gets its own file, calibrated by ONNX Runtime on the same
calibration set, with the same layers left out.
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

from hcf.errors import InvalidArtifact, MissingDependency
from hcf.export.passes import QUANTISABLE, layer_of
from hcf.quantize.calibrate import flat_inputs, spread
from hcf.trace import DenoiserCall

MAX_CALLS = 16  # ONNX Runtime keeps every intermediate tensor of every call while it calibrates


def onnxruntime_form(
    fp32_onnx: Path, calibration: Sequence[DenoiserCall], output: Path, layers: Sequence[str]
) -> dict[str, int]:
    """Write `output` (one file) from the fp32 export; returns its node counts by type.

    `layers` are the module names to quantise (keys of `read_scales`). At most 16 calls are fed.
    Raises `InvalidArtifact` if a layer has no node in the graph, `MissingDependency` without
    onnxruntime.
    """
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
        prepared, quantised = Path(work) / "prepared.onnx", Path(work) / "quantised.onnx"
        quant_pre_process(str(fp32_onnx), str(prepared), skip_symbolic_shape=True)
        # preprocessing fuses MatMul + Add into Gemm and drops the exporter's scopes, but keeps the
        # names of the weights
        layers_of = _layers_by_weight(onnx.load(str(fp32_onnx), load_external_data=False), layers)
        graph = onnx.load(str(prepared)).graph
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
        )
        counts = Counter(node.op_type for node in onnx.load(str(quantised)).graph.node)
        os.replace(quantised, output)
    return dict(counts)


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
