"""This toolkit's own engines: `hcf.accelerate` on a pipeline, and the U-Net alone on OpenVINO.

The U-Net's INT8 is calibrated on the very inputs that NNCF sees in the same run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcf.errors import HcfError
from hcf_bench.peers import Check, Peer, PeerOptions, Prepared, installed, missing_unless
from hcf_bench.peers.onnx_graph import PIP, export_graph, feeds, move_in, release, weight_bytes
from hcf_bench.peers.openvino import PIP_OPENVINO, bf16_arithmetic, calibration_feeds

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIP_MODELOPT = "hcf-toolkit[modelopt]"


def prepare_own(case: Case, options: PeerOptions, precision: str) -> Prepared:
    """The case on the engine that `hcf build` would make of it on a CPU with OpenVINO."""
    from hcf.engines.openvino import OpenVinoEngine
    from hcf.engines.reduce_range import int8_saturates

    feed = feeds(case)
    graph = (
        quantise(case, feed, options.folder)
        if precision.startswith("int8")
        else export_graph(case, options.folder)
    )
    inputs = dict(case.inputs)
    release(case)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    engine = OpenVinoEngine(graph, case.workload.name, precision, options.threads, shapes)

    def run() -> Tensor:
        return engine(inputs)["output"]

    report = asdict(engine.report)
    if precision.startswith("int8"):
        report["notes"] = (
            "quantised by the default rules, ranges by percentile, calibrated on random inputs: "
            "its speed and rounding mean something, its quality does not"
            + ("; weights in 7 bits, as this CPU has no VNNI" if int8_saturates() else "")
        )
    return Prepared(run, report=report)


def prepare_own_pipeline(pipe: Any, options: PeerOptions, **accelerating: Any) -> dict[str, Any]:
    """`hcf.accelerate` on the pipeline; its engines are built into the run's folder."""
    import hcf
    from hcf_bench.peers.eager import set_up_torch

    set_up_torch(options)
    os.environ["HCF_HOME"] = str(options.folder / "hcf-home")
    lines: list[str] = []
    # measured choices are logged, and tell why the others lost
    hcf.accelerate(pipe, threads=options.threads, log=lines.append, **accelerating)
    engines = [asdict(report) for report in pipe.hcf_report]
    return engines[0] | {"component": "pipeline", "engines": engines, "log": lines[-60:]}


def quantise(case: Case, feed: dict[str, Any], folder: Path) -> Path:
    """The case's graph with Q/DQ beside the floating one; written unless it is there."""
    from diffusers import UNet2DConditionModel

    from hcf.engines.reduce_range import reduce_range, weights_in_7_bits
    from hcf.export.geglu import split_geglu
    from hcf.export.passes import insert_qdq
    from hcf.quantize.presets import choose_formats
    from hcf.quantize.ranges import calibrate_scales
    from hcf.quantize.statistics import collect_statistics
    from hcf.settings import QuantizeConfig
    from hcf.trace import DenoiserCall

    graph = export_graph(case, folder)
    target = graph.with_name(f"{graph.stem}-own.onnx")
    if target.is_file():
        return target
    unets = [m for m in case.module.modules() if isinstance(m, UNet2DConditionModel)]
    if len(unets) != 1:
        raise HcfError(f"{case.workload.name} holds no U-Net to quantise", fix="time its unet")
    import onnx

    calls = []
    for arrays in calibration_feeds(feed):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        calls.append(DenoiserCall(tensors.pop("sample"), tensors.pop("timestep"), tensors))
    config = QuantizeConfig(algorithm="percentile")
    formats, _ = choose_formats(unets[0], config, lambda line: None)
    statistics = collect_statistics(unets[0], list(formats), calls)
    scales = calibrate_scales(unets[0], formats, statistics, config, calls)
    model, _ = insert_qdq(onnx.load(str(graph)), scales)
    if weights_in_7_bits("int8"):
        reduce_range(model)
    split_geglu(model)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        large = weight_bytes(case.module) // 4 > 2**30
        onnx.save(
            model,
            str(Path(work) / target.name),
            save_as_external_data=large,
            location=f"{target.name}.data",
        )
        move_in(Path(work), target)
    return target


def _own(name: str, precision: str, min_sqnr_db: float, *checks: Check) -> Peer:
    packages = [
        installed("onnx", PIP),
        installed("onnxscript", PIP),
        installed("openvino", PIP_OPENVINO),
    ]
    if precision.startswith("int8"):
        packages.append(installed("modelopt", PIP_MODELOPT))
    asked: dict[str, Any] = {"engine": "openvino", "precision": precision}
    if precision.startswith("int8"):
        asked["quantize"] = "int8"
    return Peer(
        name=name,
        dtype="fp32",
        min_sqnr_db=min_sqnr_db,
        devices=("cpu",),
        kinds=("module", "pipeline"),
        missing=missing_unless(("cpu",), *packages, *checks),
        prepare=lambda case, options: prepare_own(case, options, precision),
        prepare_pipeline=lambda pipe, options: prepare_own_pipeline(pipe, options, **asked),
        components=("unet", "pipeline") if precision.startswith("int8") else (),
    )


def _accelerated(name: str, dtype: str, devices: tuple[str, ...], **asked: Any) -> Peer:
    def no_module(case: Case, options: PeerOptions) -> Prepared:
        raise HcfError(f"{name} takes a pipeline", fix=f"time {case.workload.preset}/pipeline")

    checks = (installed("onnx", PIP), installed("onnxscript", PIP), installed("onnxruntime", PIP))
    return Peer(
        name=name,
        dtype=dtype,
        min_sqnr_db=8.0,
        devices=devices,
        kinds=("pipeline",),
        missing=missing_unless(devices, *checks),
        prepare=no_module,
        prepare_pipeline=lambda pipe, options: prepare_own_pipeline(pipe, options, **asked),
        components=("pipeline",),
    )


ADAPTED = (
    _accelerated("hcf-auto", "fp32", ("cpu",), engine="auto"),
    _accelerated("hcf-auto-fp16", "fp16", ("cuda",), engine="auto"),
    _accelerated("hcf-auto-cache-3", "fp32", ("cpu",), engine="auto", cache=3),
    _own("hcf-bf16", "bf16", 15.0, bf16_arithmetic),
    _own("hcf-int8", "int8", 10.0),
    _own("hcf-int8-bf16", "int8-bf16", 8.0, bf16_arithmetic),
)
