"""Weights of a built plan: replaced without a rebuild, or put back where they were left out.

Always from the plan's own bytes, never from an engine that has been refitted before: adapters A, B
and A again end where they began. A plan built with `refit` takes other weights; one built with
`strip_weights` holds none and gets those of the graph it was built from, whose hash is in its key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcf.artifact import save_text
from hcf.engines.products import hash_graph
from hcf.errors import EngineMismatch, HcfError, InvalidArtifact

Weights = Mapping[str, NDArray[Any]]


def load_plan(
    trt: Any, runtime: Any, log: Any, plan: Path, key: Mapping[str, Any], weights: Weights | None
) -> Any:
    """The ICudaEngine of `plan`, its weights the plan's own, its graph's, or `weights`.

    Raises EngineMismatch where the plan cannot be loaded or its graph is another, HcfError where
    weights do not fit.
    """
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineMismatch(
            f"{key['driver']} cannot load {plan.name}: {log.tail()}", fix="build it again"
        )
    graph = key.get("weights")
    if graph is None and key["options"]["strip_weights"]:
        graph = {"file": key["source"], "sha256": key["graph"]}
    if graph is not None:
        refit_from_graph(trt, log, engine, plan, weights_file(plan, graph))
    if weights:
        refit_weights(trt, log, engine, plan, weights, weights_source(plan, key))
    return engine


def refit_plan(plan: Path, weights: Weights) -> Any:
    """The ICudaEngine of `plan` with `weights` (ONNX initialiser name -> array) in place.

    Weights that TensorRT has combined with the given ones come from the plan's graph. Raises
    RecipeError or HcfError for a plan that was not built with refit, and for names or sizes that
    it does not have; EngineMismatch, MissingDependency as `TensorRTEngine`.
    """
    from hcf.engines.tensorrt_runtime import open_runtime

    key, trt, log, runtime = open_runtime(plan)
    require_refittable(plan, key)
    return load_plan(trt, runtime, log, plan, key, weights)


def require_refittable(plan: Path, key: Mapping[str, Any]) -> None:
    """Raises HcfError for a plan that takes no other weights."""
    if not key["options"]["refit"]:
        raise HcfError(
            f"{plan.name} was built without refit: its weights cannot be replaced",
            fix="build it with build.refit true",
        )


def attach_weights(plan: Path, target: Path, graph: Path) -> Path:
    """A copy of `plan` under `target` that is loaded with the weights of `graph`.

    The copy is of the pristine plan; `graph` has its nodes and other weights.
    """
    import shutil

    key = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    require_refittable(plan, key)
    target.mkdir(parents=True, exist_ok=True)
    copy = target / plan.name
    shutil.copyfile(plan, copy)
    relative = Path(_relative(graph, target))
    key["source"] = relative.as_posix()
    key["weights"] = {"file": relative.as_posix(), "sha256": hash_graph(graph)}
    save_text(copy.with_suffix(".json"), json.dumps(key, indent=1))
    return copy


def weights_file(plan: Path, graph: Mapping[str, str]) -> Path:
    """The graph whose weights a plan is loaded with; EngineMismatch if it is not the one meant."""
    path = plan.parent / graph["file"]
    if not path.is_file():
        raise InvalidArtifact(
            f"{plan.name} needs the weights of {path}, which is missing",
            fix="build it again with `hcf build`",
        )
    if (found := hash_graph(path)) != graph["sha256"]:
        raise EngineMismatch(
            f"{plan.name} needs the weights of a graph with hash {graph['sha256'][:12]}; "
            f"{path.name} has {found[:12]}",
            fix="build it again with `hcf build`",
        )
    return path


def weights_source(plan: Path, key: Mapping[str, Any]) -> Path | None:
    """The graph beside a plan, for weights that have to be given together; None if it is gone."""
    path = plan.parent / str(key.get("source", ""))
    return path if path.is_file() else None


def refit_from_graph(trt: Any, log: Any, engine: Any, plan: Path, graph: Path) -> None:
    """Puts every weight of an ONNX file into `engine`."""
    refitter = trt.Refitter(engine, log.handle)
    parser = trt.OnnxParserRefitter(refitter, log.handle)
    if not parser.refit_from_file(str(graph)):
        errors = [parser.get_error(i).desc().strip() for i in range(parser.num_errors)]
        raise HcfError(
            f"{plan.name} does not take the weights of {graph.name}: "
            + "; ".join(errors[:3] or [log.tail()]),
            fix="build it again from this graph",
        )
    _finish(refitter, log, plan, list(refitter.get_missing_weights()))


def refit_weights(
    trt: Any, log: Any, engine: Any, plan: Path, weights: Weights, graph: Path | None
) -> None:
    """Puts `weights` into `engine`, and those that TensorRT wants together with them."""
    refitter = trt.Refitter(engine, log.handle)
    known = set(refitter.get_all_weights())
    if unknown := sorted(set(weights) - known):
        raise HcfError(
            f"{plan.name} has no weights {', '.join(unknown[:5])}; it has {len(known)} that can be "
            f"replaced, like {', '.join(sorted(known)[:3])}",
            fix="give them by their names in the ONNX graph",
        )
    held = [_set(trt, refitter, plan, name, array) for name, array in weights.items()]
    missing = list(refitter.get_missing_weights())
    if missing and graph is not None:
        own = initialisers(graph, missing)
        held += [_set(trt, refitter, plan, name, array) for name, array in own.items()]
        missing = list(refitter.get_missing_weights())
    _finish(refitter, log, plan, missing)
    del held  # the arrays have to live until the refit has read them


def initialisers(graph: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """The stored tensors `names` of an ONNX file, those that it has."""
    import onnx
    from onnx import numpy_helper

    wanted = set(names)
    model = onnx.load(str(graph), load_external_data=False)
    found: dict[str, NDArray[Any]] = {}
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            found[tensor.name] = np.asarray(numpy_helper.to_array(tensor, str(graph.parent)))
    return found


def _set(trt: Any, refitter: Any, plan: Path, name: str, array: NDArray[Any]) -> torch.Tensor:
    prototype = refitter.get_weights_prototype(name)
    kinds = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
    }
    if prototype.dtype not in kinds:
        raise HcfError(f"{name} is stored as {prototype.dtype}, which cannot be replaced by array")
    if prototype.size != array.size:
        raise HcfError(
            f"{name} of {plan.name} has {prototype.size} numbers, the new one {array.size}",
            fix="give weights of the model the plan was built from",
        )
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(kinds[prototype.dtype])
    weights = trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())
    if not refitter.set_named_weights(name, weights):
        raise HcfError(f"{plan.name} refuses new weights for {name}", fix="build it again")
    return tensor


def _finish(refitter: Any, log: Any, plan: Path, missing: list[str]) -> None:
    if missing:
        raise HcfError(
            f"{plan.name} needs {len(missing)} more weights together with these: "
            f"{', '.join(missing[:5])}",
            fix="give them too, or keep the graph it was built from beside it",
        )
    if not refitter.refit_cuda_engine():
        raise HcfError(f"{plan.name} could not be refitted: {log.tail()}", fix="build it again")


def _relative(path: Path, start: Path) -> str:
    import os

    return os.path.relpath(path, start)
