"""OpenVINO on the CPU: f32, bf16, and INT8 by NNCF's post-training quantisation.

Fixed shapes, one stream, every precision asked for by name: without a hint a machine with AMX
would run bf16 under the name of f32.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hcf.engines import EngineReport, require_layers
from hcf.engines.openvino import PRECISION_NAMES, capabilities, count_layers, version
from hcf.engines.reduce_range import int8_saturates
from hcf.errors import HcfError
from hcf_bench.peers import (
    Check,
    Peer,
    PeerOptions,
    Prepared,
    import_package,
    installed,
    missing_unless,
)
from hcf_bench.peers.onnx_graph import PIP, export_graph, feeds, move_in, quiet, release

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIP_OPENVINO = "hcf-toolkit[openvino]"
PIP_NNCF = "hcf-toolkit[peers]"
CALIBRATION_CALLS = 2


def prepare_openvino(case: Case, options: PeerOptions, precision: str, hint: str) -> Prepared:
    """The case compiled for its shapes. `hint` ("f32", "bf16") is what layers run in that are not
    INT8.

    Raises HcfError where the runtime did not take the hint or no layer got `precision`.
    """
    graph = export_graph(case, options.folder)
    release(case)
    feed = feeds(case)
    if precision == "int8":
        graph = quantise(graph, feed)
    prepared = compile_graph(graph, feed, case.workload.name, options, precision, hint)
    if precision == "int8":
        nncf = import_package("nncf", PIP_NNCF)
        prepared.report["notes"] = (
            f"NNCF {nncf.__version__} post-training quantisation, calibrated on "
            f"{CALIBRATION_CALLS} random inputs: its speed and rounding mean something, its "
            "quality does not"
            + ("; overflow_fix, as this CPU has no VNNI" if int8_saturates() else "")
        )
    return prepared


def compile_graph(
    graph: Path, feed: dict[str, Any], name: str, options: PeerOptions, precision: str, hint: str
) -> Prepared:
    """`graph` compiled for the shapes of `feed`, with what really runs read back."""
    ov = import_package("openvino", PIP_OPENVINO)
    core = ov.Core()
    properties = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", properties)
    found = {name: compiled.get_property(name) for name in properties}
    runs_in = found["INFERENCE_PRECISION_HINT"].get_type_name()
    if runs_in != hint:
        raise HcfError(
            f"OpenVINO {version()} was asked for {hint} and runs {runs_in}",
            fix="use a precision this machine has (`hcf doctor`)",
        )
    report = require_layers(
        EngineReport(
            engine="openvino",
            version=version(),
            component=name,
            device="cpu",
            provider=str(core.get_property("CPU", "FULL_DEVICE_NAME")),
            precision=precision,
            layer_precisions=count_layers(compiled),
            threads=int(found["INFERENCE_NUM_THREADS"]),
        )
    )
    request = compiled.create_infer_request()

    def run() -> Tensor:
        result = request.infer(feed, share_inputs=True, share_outputs=False)
        return torch.from_numpy(result[0])

    details: dict[str, Any] = {
        "streams": int(found["NUM_STREAMS"]),
        "rest_runs_in": PRECISION_NAMES.get(runs_in, runs_in),
    }
    return Prepared(run, report=asdict(report) | details)


def quantise(graph: Path, feed: dict[str, Any]) -> Path:
    """`graph` through NNCF as an OpenVINO IR beside it; written unless it is there.

    Ranges come from `feed` and inputs like it. SD1.5's U-Net takes minutes and 10 GB.
    """
    target = graph.with_name(f"{graph.stem}-nncf.xml")
    if target.is_file():
        return target
    nncf, ov = import_package("nncf", PIP_NNCF), import_package("openvino", PIP_OPENVINO)
    calls = calibration_feeds(feed)
    with quiet():
        model = nncf.quantize(
            ov.Core().read_model(str(graph)),
            nncf.Dataset(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calls),
            fast_bias_correction=True,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if int8_saturates() else None
            ),
        )
    with tempfile.TemporaryDirectory(dir=graph.parent) as work:
        ov.save_model(model, str(Path(work) / target.name), compress_to_fp16=False)
        move_in(Path(work), target)
    return target


def calibration_feeds(feed: dict[str, Any]) -> list[dict[str, Any]]:
    """What every quantiser of a run sees: the case's inputs, and others like them."""
    return [feed, *(_perturbed(feed, seed) for seed in range(1, CALIBRATION_CALLS))]


def _perturbed(feed: dict[str, Any], seed: int) -> dict[str, Any]:
    """`feed` with other noise of the same spread; timesteps and tokens as they are."""
    rng = np.random.default_rng(seed)
    return {
        name: (array.std() * rng.standard_normal(array.shape)).astype(array.dtype)
        if array.ndim >= 3
        else array
        for name, array in feed.items()
    }


def bf16_arithmetic(device: str) -> str:
    """Why OpenVINO has no bf16 kernels on this CPU, or ""."""
    ov = import_package("openvino", PIP_OPENVINO)
    found = capabilities(ov.Core())
    return "" if "BF16" in found else f"this CPU has no bf16 arithmetic (OpenVINO lists {found})"


def _openvino(name: str, precision: str, hint: str, min_sqnr_db: float, *checks: Check) -> Peer:
    export = (installed("onnx", PIP), installed("onnxscript", PIP))
    return Peer(
        name=name,
        dtype="fp32",
        min_sqnr_db=min_sqnr_db,
        devices=("cpu",),
        kinds=("module",),
        missing=missing_unless(("cpu",), *export, installed("openvino", PIP_OPENVINO), *checks),
        prepare=lambda case, options: prepare_openvino(case, options, precision, hint),
    )


_NNCF = installed("nncf", PIP_NNCF)

ADAPTED = (
    _openvino("openvino", "fp32", "f32", 60.0),
    _openvino("openvino-bf16", "bf16", "bf16", 15.0, bf16_arithmetic),
    _openvino("openvino-int8", "int8", "f32", 10.0, _NNCF),
    _openvino("openvino-int8-bf16", "int8", "bf16", 8.0, _NNCF, bf16_arithmetic),
)
