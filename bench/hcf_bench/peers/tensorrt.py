"""TensorRT, or TensorRT-RTX where that is installed: a plan built here from the case's fp16 graph.

TensorRT-RTX builds for compute capabilities 7.5, 8.0, 8.6, 8.9 and 12.x; a Hopper GPU (9.0) is not
among them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hcf.engines import require_layers
from hcf.engines.tensorrt import PlanOptions, build_plan
from hcf.engines.tensorrt_package import package
from hcf.errors import MissingDependency
from hcf_bench.peers import Peer, PeerOptions, Prepared, installed, missing_unless
from hcf_bench.peers.onnx_graph import PIP, export_graph, release

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

LEVEL = 3  # TensorRT's own default


def prepare_tensorrt(case: Case, options: PeerOptions) -> Prepared:
    """Builds (minutes) and loads a plan for the case's shapes, strongly typed as the graph is.

    Raises what `build_plan` and `TensorRTEngine` do.
    """
    from hcf.engines.tensorrt_runtime import TensorRTEngine

    torch.cuda.set_device(options.device)
    graph = export_graph(case, options.folder)
    release(case)
    shapes = {name: list(tensor.shape) for name, tensor in case.inputs.items()}
    plan = build_plan(
        graph,
        options.folder / "plans",
        PlanOptions(opt_shapes=shapes, builder_optimization_level=LEVEL),
    )
    engine = TensorRTEngine(plan, case.workload.name, "fp16")
    inputs = case.inputs

    def run() -> Tensor:
        (output,) = engine(inputs).values()
        return output

    report = asdict(require_layers(engine.report))
    return Prepared(run, report=report | {"builder_optimization_level": LEVEL, "plan": plan.name})


def builds_for(device: str) -> str:
    """Why no installed TensorRT builds for the GPU at `device`, or ""."""
    try:
        driver, trt = package()
    except MissingDependency as error:
        return f"{error.message} ({error.fix})"
    major, minor = torch.cuda.get_device_capability(device)
    known = getattr(trt, "ComputeCapability", None)
    if known is not None and not hasattr(known, f"SM{major}{minor}"):
        return f"{driver} {trt.__version__} does not build for compute capability {major}.{minor}"
    return ""


ADAPTED = (
    Peer(
        name="tensorrt-fp16",
        dtype="fp16",
        min_sqnr_db=35.0,
        devices=("cuda",),
        kinds=("module",),
        missing=missing_unless(
            ("cuda",), installed("onnx", PIP), installed("onnxscript", PIP), builds_for
        ),
        prepare=prepare_tensorrt,
    ),
)
