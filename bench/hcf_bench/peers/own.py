"""This toolkit's own engines on the CPU: OpenVINO, in bf16 or on INT8 by the default rules.

INT8 is calibrated on the very inputs that NNCF sees in the same run.
"""

from __future__ import annotations

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
            "quantised by the default rules, calibrated on random inputs: its speed and rounding "
            "mean something, its quality does not"
        )
    return Prepared(run, report=report)


def quantise(case: Case, feed: dict[str, Any], folder: Path) -> Path:
    """The case's graph with Q/DQ beside the floating one; written unless it is there."""
    from diffusers import UNet2DConditionModel

    from hcf.export.geglu import split_geglu
    from hcf.export.passes import insert_qdq
    from hcf.quantize.presets import choose_formats
    from hcf.quantize.ranges import calibrate_scales
    from hcf.quantize.statistics import collect_statistics
    from hcf.recipe import QuantizeConfig
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
    return Peer(
        name=name,
        dtype="fp32",
        min_sqnr_db=min_sqnr_db,
        devices=("cpu",),
        kinds=("module",),
        missing=missing_unless(("cpu",), *packages, *checks),
        prepare=lambda case, options: prepare_own(case, options, precision),
        components=("unet",) if precision.startswith("int8") else (),
    )


ADAPTED = (
    _own("hcf-bf16", "bf16", 15.0, bf16_arithmetic),
    _own("hcf-int8", "int8", 10.0),
    _own("hcf-int8-bf16", "int8-bf16", 8.0, bf16_arithmetic),
)
