"""Runs TensorRT plans, on the GPU and the package version they were built for.

For each combination of input shapes there is one execution context with the profile that fits, its
buffers bound once, and from its second call on a CUDA graph that is replayed. A call copies the
inputs that changed, enqueues, and copies the outputs out: nothing waits for the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport
from hcf.engines.device_buffers import InputBuffer, ShapeCache, Sizes, handed_out
from hcf.engines.tensorrt_memory import ActivationMemory, shared_memory
from hcf.engines.tensorrt_network import listen
from hcf.engines.tensorrt_package import DRIVERS, Driver, numbers, package, version
from hcf.engines.tensorrt_plugins import register
from hcf.engines.tensorrt_profiles import describe, pick_profile
from hcf.engines.tensorrt_refit import Weights, load_plan, require_refittable
from hcf.errors import EngineMismatch, HcfError, InvalidArtifact, MissingDependency

KEPT_SHAPES = 4


@dataclass
class Bound:
    """Everything of one shape. `generation` is that of the activation memory it was given."""

    context: Any
    inputs: dict[str, InputBuffer]
    outputs: dict[str, Tensor]
    memory: int
    generation: int = -1
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class TensorRTEngine:
    """Runs a plan on the current CUDA device, in the order of torch's stream, with no device wait.

    Takes and returns tensors by name, floats in float32; inputs may be on the CPU, outputs are on
    the GPU. `weights` (ONNX initialiser name -> array) replace those of a plan built with refit.
    Raises MissingDependency without a GPU, EngineMismatch for a plan of another version or GPU,
    HcfError that lists the plan's profiles for a shape outside of them.
    """

    def __init__(
        self,
        plan: Path,
        component: str,
        precision: str,
        *,
        cuda_graphs: bool = True,
        weights: Weights | None = None,
        memory: ActivationMemory | None = None,
    ) -> None:
        key, trt, self.log, self.runtime = open_runtime(plan)
        if weights:
            require_refittable(plan, key)
        self.plan = plan.name
        self.profiles = key["profiles"]
        self.pixels_per_latent = key.get("pixels_per_latent")
        self.cuda_graphs = cuda_graphs
        self.memory = memory or shared_memory(torch.cuda.current_device())
        self.engine = load_plan(trt, self.runtime, self.log, plan, key, weights)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = [self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names]
        self.inputs = [n for n, given in zip(names, is_input, strict=True) if given]
        self.outputs = [n for n, given in zip(names, is_input, strict=True) if not given]
        kinds = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.BOOL: torch.bool,
        }
        self.types = {name: kinds[self.engine.get_tensor_dtype(name)] for name in names}
        self.user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.bound: ShapeCache[Bound] = ShapeCache(
            KEPT_SHAPES, self._bind, self.memory.stream.synchronize
        )
        # counted from the parsed network, and held against the engine's own layers when it was
        # built on a GPU
        self.report = EngineReport(
            engine="tensorrt",
            version=version(key["driver"]),
            component=component,
            device="cuda",
            provider=f"{key['driver']} on {torch.cuda.get_device_name()}",
            precision=precision,
            layer_precisions=key["layer_precisions"],
            details={
                "profiles": describe(self.profiles, self.pixels_per_latent),
                "cuda_graphs": "on" if cuda_graphs else "off",
                "engine": key.get("engine", {}),
                "refitted": bool(weights) or key.get("weights") is not None,
            },
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.memory.lock, torch.cuda.device(self.memory.device):
            caller, stream = torch.cuda.current_stream(), self.memory.stream
            bound = self.bound(inputs, self.inputs)
            for name, buffer in bound.inputs.items():
                buffer.fill(inputs[name])
            # enqueueing on the default stream makes TensorRT wait for the device: use one beside it
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                self._run(bound, stream)
            caller.wait_stream(stream)
            return {name: handed_out(tensor) for name, tensor in bound.outputs.items()}

    def _bind(self, sizes: Sizes) -> Bound:
        """Context, buffers and addresses of one combination of input shapes."""
        shapes = dict(zip(self.inputs, sizes, strict=True))
        profile = pick_profile(self.profiles, shapes, self.plan, self.pixels_per_latent)
        device, stream = self.memory.device, self.memory.stream
        context = self.engine.create_execution_context(self.user_managed)
        if context is None:
            raise HcfError(
                f"TensorRT has no memory left for {self.plan}: {self.log.tail()}",
                fix="use a smaller batch or size, or free memory on the GPU",
            )
        if not context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise HcfError(f"{self.plan} refuses profile {profile}: {self.log.tail()}")
        inputs = {n: InputBuffer(tuple(s), self.types[n], device) for n, s in shapes.items()}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise HcfError(f"{self.plan} refuses {name} {tuple(shape)}: {self.log.tail()}")
        outputs: dict[str, Tensor] = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self.types[name], device=device)
        addresses = {name: buffer.tensor for name, buffer in inputs.items()} | outputs
        for name, tensor in addresses.items():
            context.set_tensor_address(name, tensor.data_ptr())
        size = int(self.engine.get_device_memory_size_for_profile_v2(profile))
        stream.synchronize()  # once a shape: the profile's switch copies on this stream
        return Bound(context, inputs, outputs, size)

    def _run(self, bound: Bound, stream: torch.cuda.Stream) -> None:
        """Enqueues one call; captures it the second time, replays it from then on."""
        self.memory.reserve(bound.memory)
        if bound.generation != self.memory.generation:  # the block moved: so do all addresses in it
            assert self.memory.block is not None
            bound.context.set_device_memory(self.memory.block.data_ptr(), len(self.memory))
            bound.generation, bound.runs, bound.graph = self.memory.generation, 0, None
        if bound.graph is not None:
            bound.graph.replay()
            return
        # the first run after a change has updates of its own to make, which a capture must not hold
        if not bound.context.execute_async_v3(stream.cuda_stream):
            raise HcfError(f"TensorRT failed while running {self.plan}: {self.log.tail()}")
        bound.runs += 1
        if self.cuda_graphs and bound.runs > 1:
            bound.graph = self._capture(bound, stream)

    def _capture(self, bound: Bound, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """The CUDA graph of a call; None, and reported so, where the plan cannot be captured."""
        capturable = getattr(bound.context, "is_stream_capturable", None)
        try:
            if capturable is not None and not capturable(stream.cuda_stream):
                raise RuntimeError("the context says its stream cannot be captured")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                enqueued = bound.context.execute_async_v3(stream.cuda_stream)
            if not enqueued:
                raise RuntimeError(self.log.tail())
        except RuntimeError as error:
            self.cuda_graphs = False
            self.report.details["cuda_graphs"] = f"off: {error}"
            return None
        return graph


def open_runtime(plan: Path) -> tuple[dict[str, Any], Any, Any, Any]:
    """(key, module, logger, runtime) of a plan that may run here.

    Raises as `TensorRTEngine`.
    """
    key = read_key(plan)
    driver, trt = package(key["driver"])
    require_version(plan.name, key, driver, str(trt.__version__))
    if not torch.cuda.is_available():
        raise MissingDependency(
            f"running {plan.name} needs an NVIDIA GPU ({key['compute_capability']}); "
            "torch finds none",
            fix="run it on that GPU, or use the openvino or onnxruntime engine here",
        )
    require_gpu(plan.name, key, "sm{}{}".format(*torch.cuda.get_device_capability()))
    log = listen(trt)
    if plugins := key["options"].get("plugins"):
        register(trt, plugins)
    runtime = trt.Runtime(log.handle)
    if key["options"]["version_compatible"]:
        runtime.engine_host_code_allowed = True
    return key, trt, log, runtime


def require_version(plan: str, key: Mapping[str, Any], driver: str, here: str) -> None:
    """Raises EngineMismatch for a plan that the package `here` does not read.

    A version-compatible plan is read by the same major version, from the one that built it on.
    """
    built = key["version"]
    newer = numbers(here)[:1] == numbers(built)[:1] and numbers(here) >= numbers(built)
    if built == here or (key["options"]["version_compatible"] and newer):
        return
    raise EngineMismatch(
        f"{plan} was built by {driver} {built}, here is {here}",
        fix="build it again on this machine with `hcf build`",
    )


def require_gpu(plan: str, key: Mapping[str, Any], here: str) -> None:
    """Raises EngineMismatch for a plan that does not run on a GPU of compute capability `here`."""
    built, level = key["compute_capability"], key["options"]["hardware_compatibility_level"]
    ampere_plus = level == "ampere_plus" and int(here.removeprefix("sm")) >= 80
    if here != built and not ampere_plus:
        raise EngineMismatch(
            f"{plan} was built for {built}"
            + (f" ({level})" if level else "")
            + f", this GPU is {here}",
            fix="build it again for this GPU with `hcf build`",
        )


def read_key(plan: Path) -> dict[str, Any]:
    """The key beside a plan; InvalidArtifact where plan or key is missing or broken."""
    sidecar = plan.with_suffix(".json")
    for path in (plan, sidecar):
        if not path.is_file():
            raise InvalidArtifact(f"{path} is missing", fix="build the engine with `hcf build`")
    try:
        key: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        return {
            "layer_precisions": {},
            "profiles": [key["shapes"]],  # plans of before there were several
            **key,
            "driver": _known_driver(key["driver"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{sidecar} is damaged: {error}", "build it again") from error


def _known_driver(name: str) -> Driver:
    for driver in DRIVERS:
        if driver == name:
            return driver
    raise ValueError(f"unknown driver {name!r}")
