"""Graphs of a quantised component, from its fp32 graph, its scales and its calibration calls.

    model.<format>.onnx        explicit Q/DQ in float32: OpenVINO, TensorRT, ONNX Runtime
    model.<format>.fp16.onnx   the same between float16 layers, where there is a model.fp16.onnx
    model.int8.u8s8.onnx       the form ONNX Runtime's CPU kernels want

They are compared, on calibration calls, with the same rounding simulated in torch: a right graph
agrees to 1e-6, or to some 0.05 where a value falls on the other side of a rounding step, and a
wrong one does not come near. Without torch (weights were only exchanged) they are compared with
the fp32 graph, which they may not be far from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.errors import HcfError, RecipeError
from hcf.export.attention import attention_ranges, find_attention, quantize_attention
from hcf.export.component import component_module, graph_inputs, relative_error
from hcf.export.graphs import (
    FP32_GRAPH,
    INT8_ORT_GRAPH,
    describe,
    graph_name,
    record,
    save_graph,
)
from hcf.export.parity import graph_runner
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
Case = Mapping[str, Tensor]
Record = dict[str, Any]

WIRING_LIMIT = 0.25
COMPARED_CALLS = 8


def is_quantized(folder: Path, component: str) -> bool:
    """Whether `folder` has what quantised graphs of `component` are made from."""
    from hcf.quantize.scales import SCALES_FILE

    return (folder / component / SCALES_FILE).is_file()


def export_quantized(
    folder: Path,
    component: str,
    log: Log = print,
    *,
    pipe: Any = None,
    exporter: str = "dynamo",
) -> list[dict[str, Any]]:
    """Writes the quantised graphs beside the fp32 one; returns their records.

    With `pipe` they are compared with torch. Raises RecipeError for graphs of the other exporter,
    which do not name their layers, HcfError for one that computes something else.
    """
    from hcf.quantize.calibrate import CALIBRATION_FILE, load_calibration, spread
    from hcf.quantize.scales import SCALES_FILE, read_scales

    if exporter != "dynamo":
        raise RecipeError(
            f"export.exporter is {exporter!r}, but quantised graphs need the dynamo exporter's "
            "layer names",
            fix="set export.exporter to dynamo",
        )
    scales = read_scales(folder / component / SCALES_FILE)
    calls = [_typed(call) for call in load_calibration(folder / component / CALIBRATION_FILE)]
    cases = [graph_inputs(call) for call in spread(calls, COMPARED_CALLS)]
    wanted, simulated = _references(folder, component, pipe, scales, cases)
    # the file is named after what most layers are
    scheme = Counter(scale.scheme for scale in scales.values()).most_common(1)[0][0]
    facts = {
        "schemes": dict(Counter(scale.scheme for scale in scales.values())),
        "checked_on": "onnxruntime CPU, Q/DQ as written",
        "exporter": exporter,
    }
    records = []
    attention = _wants_attention(folder / component)
    for floating, path in _with_qdq(folder, component, scheme, scales, cases if attention else ()):
        found = _outputs(graph_runner(path, _as_written()), cases)
        error, wiring = relative_error(found, wanted), relative_error(found, simulated)
        limit = WIRING_LIMIT if pipe is not None else 2 * WIRING_LIMIT
        _require_wired(component, path, wiring, limit)
        log(f"{component}: {describe(path)}, relative error {error:.3f}")
        errors = {"calibration": error}
        records.append(
            record(folder, path, scheme, errors, other_layers=floating, wiring=wiring, **facts)
        )
    if scheme == "int8":
        from hcf.export.u8s8 import onnxruntime_form

        path = folder / component / INT8_ORT_GRAPH
        path.unlink(missing_ok=True)
        own_scales = {n: scale for n, scale in scales.items() if scale.scheme == "int8"}
        if any(scale.bucket_amax is not None for scale in own_scales.values()):
            log(f"{component}: ONNX Runtime's own form has no ranges per timestep, and is left out")
            return records
        onnxruntime_form(folder / component / FP32_GRAPH, calls, path, own_scales)
        # its activations are unsigned, with their own calibration: no better reference than fp32
        own = relative_error(_outputs(graph_runner(path, _as_written()), cases), wanted)
        _require_wired(component, path, own, 2 * error + WIRING_LIMIT)
        log(f"{component}: {describe(path)}, relative error {own:.3f}")
        records.append(record(folder, path, scheme, {"calibration": own}, **facts))
    return records


def export_quantized_step(folder: Path, component: str, log: Log = print) -> Record:
    """The quantised graph of one step of a cached U-Net, with the scales of the U-Net's layers.

    Its scales go beside it. Attention stays in floating point, and the graph is compared with
    nothing but its own layers: the calibration calls hold no features.
    """
    import onnx
    import onnx_ir as ir

    from hcf.export.passes import insert_qdq, layer_of
    from hcf.quantize.scales import SCALES_FILE, read_scales, write_scales

    graph = folder / component / FP32_GRAPH
    model = onnx.load(str(graph), load_external_data=False)
    scales = read_scales(folder / "unet" / SCALES_FILE)
    there = {layer_of(node, scales) for node in model.graph.node}
    kept = {name: scale for name, scale in scales.items() if name in there}
    scheme = Counter(scale.scheme for scale in kept.values()).most_common(1)[0][0]
    write_scales(folder / component / SCALES_FILE, kept)
    model, counts = insert_qdq(model, kept, folder=graph.parent)
    path = folder / component / graph_name(scheme)
    save_graph(ir.serde.deserialize_model(model), path)
    log(f"{component}: {describe(path)}, {len(counts.layers)} layers in {scheme}")
    return record(folder, path, scheme, {}, checked_on="not compared: layers alone")


def _with_qdq(
    folder: Path,
    component: str,
    scheme: str,
    scales: Mapping[str, Any],
    attention_cases: Sequence[Case],
) -> Iterator[tuple[str, Path]]:
    """(what the other layers compute in, file) of each graph with Q/DQ, as it is written.

    Attention too where there are `attention_cases` to take its ranges from. Raises HcfError where
    it is one operator, whose weights cannot be rounded.
    """
    import onnx
    import onnx_ir as ir

    from hcf.export.passes import insert_qdq

    for floating in ("fp32", "fp16"):
        source = folder / component / graph_name("fp32", floating)
        if not source.is_file():
            continue
        model, _ = insert_qdq(
            onnx.load(str(source), load_external_data=False), scales, folder=source.parent
        )
        if attention_cases:
            found = find_attention(model)
            if not found:
                raise HcfError(
                    f"{source.name} has no attention as MatMul, Softmax, MatMul",
                    fix="export with opset below 23, or leave quantize.attention out",
                )
            feeds = [{k: v.numpy() for k, v in case.items()} for case in attention_cases]
            fp32 = folder / component / FP32_GRAPH
            quantize_attention(model, found, attention_ranges(fp32, found, feeds))
        path = folder / component / graph_name(scheme, floating)
        save_graph(ir.serde.deserialize_model(model), path)
        yield floating, path


def _wants_attention(folder: Path) -> bool:
    """Whether the component was quantised with `quantize.attention`."""
    from hcf.quantize.scales import REPORT_FILE

    if not (folder / REPORT_FILE).is_file():
        return False
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return bool(report.get("settings", {}).get("attention", False))


def _typed(call: DenoiserCall) -> DenoiserCall:
    """The call in the graph's types: its timestep is float32, whatever the scheduler's was."""
    inputs = graph_inputs(call)
    return DenoiserCall(inputs.pop("sample"), inputs.pop("timestep"), inputs)


def _references(
    folder: Path, component: str, pipe: Any, scales: Mapping[str, Any], cases: Sequence[Case]
) -> tuple[Tensor, Tensor]:
    """Outputs in full precision and with rounding; without `pipe` the fp32 graph's, twice."""
    from hcf.quantize.report import fake_quantized

    if pipe is None:
        plain = _outputs(graph_runner(folder / component / FP32_GRAPH), cases)
        return plain, plain
    module = component_module(pipe, component, list(cases[0]))

    def run(case: Case) -> Tensor:
        found: Tensor = module(*case.values())
        return found

    wanted = _outputs(run, cases)
    with fake_quantized(getattr(pipe, component), scales):
        return wanted, _outputs(run, cases)


def _outputs(run: Callable[[Case], Tensor], cases: Sequence[Case]) -> Tensor:
    """All outputs in one row."""
    with torch.no_grad():
        return torch.cat([run(case).flatten() for case in cases])


def _as_written() -> Any:
    """Options under which ONNX Runtime computes Q/DQ as the graph says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _require_wired(component: str, path: Path, error: float, limit: float) -> None:
    if not error <= limit:
        raise HcfError(
            f"{component}: {path.name} is {error:.2f} from what rounding makes of this model "
            f"(relative L2, limit {limit:.2f}): the graph is wrong",
            fix="run `hcf quantize` and `hcf export` again; try another export.opset",
        )
