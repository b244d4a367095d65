"""Runs TensorRT plans, on the GPU and the package version they were built for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.engines import EngineReport
from hcf.engines.tensorrt import DRIVERS, Driver, logger, package, version
from hcf.errors import EngineMismatch, HcfError, InvalidArtifact, MissingDependency


class TensorRTEngine:
    """Runs a plan on the current CUDA device, in the order of torch's stream, with no device wait.

    Takes and returns float32 tensors by name; inputs may be on the CPU, outputs are on the GPU.
    Raises MissingDependency without a GPU, EngineMismatch for a plan of another version or GPU.
    """

    def __init__(self, plan: Path, component: str, precision: str) -> None:
        key = read_key(plan)
        driver, trt = package(key["driver"])
        if key["version"] != str(trt.__version__):
            raise EngineMismatch(
                f"{plan.name} was built by {driver} {key['version']}, here is {trt.__version__}",
                fix="build it again on this machine with `hcf build`",
            )
        if not torch.cuda.is_available():
            raise MissingDependency(
                f"running {plan.name} needs an NVIDIA GPU ({key['compute_capability']}); "
                "torch finds none",
                fix="run it on that GPU, or use the openvino or onnxruntime engine here",
            )
        here = "sm{}{}".format(*torch.cuda.get_device_capability())
        anywhere = key["options"]["hardware_compatibility_level"] is not None
        if here != key["compute_capability"] and not anywhere:
            raise EngineMismatch(
                f"{plan.name} was built for {key['compute_capability']}, this GPU is {here}",
                fix="build it again for this GPU with `hcf build`",
            )
        self.log = logger(trt)
        self.runtime = trt.Runtime(self.log)
        if key["options"]["version_compatible"]:
            self.runtime.engine_host_code_allowed = True
        self.engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise EngineMismatch(
                f"{driver} cannot load {plan.name}: {self.log.tail()}", fix="build it again"
            )
        self.context = self.engine.create_execution_context()
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
        self.stream = torch.cuda.Stream()
        # counted from the parsed network: fusion hides the layers of a finished plan
        self.report = EngineReport(
            engine="tensorrt",
            version=version(driver),
            component=component,
            device="cuda",
            provider=f"{driver} on {torch.cuda.get_device_name()}",
            precision=precision,
            layer_precisions=key["layer_precisions"],
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # enqueueing on the default stream makes TensorRT wait for the device: use ours beside it
        caller = torch.cuda.current_stream()
        stream = self.stream if caller == torch.cuda.default_stream() else caller
        stream.wait_stream(caller)
        held: dict[str, Tensor] = {}
        with torch.cuda.stream(stream):
            for name in self.inputs:
                tensor = inputs[name].detach().to("cuda", self.types[name], non_blocking=True)
                held[name] = tensor.contiguous()
                if not self.context.set_input_shape(name, tuple(tensor.shape)):
                    low, _, high = self.engine.get_tensor_profile_shape(name, 0)
                    raise HcfError(
                        f"{name} has shape {tuple(tensor.shape)}; the plan takes {tuple(low)} to "
                        f"{tuple(high)}",
                        fix="build with wider min/max shapes",
                    )
            for name in self.outputs:
                shape = tuple(self.context.get_tensor_shape(name))
                held[name] = torch.empty(shape, dtype=self.types[name], device="cuda")
            for name, tensor in held.items():
                tensor.record_stream(stream)
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise HcfError(f"TensorRT failed while running: {self.log.tail()}")
        caller.wait_stream(stream)
        return {name: held[name].float() for name in self.outputs}


def read_key(plan: Path) -> dict[str, Any]:
    """The key beside a plan; InvalidArtifact where plan or key is missing or broken."""
    sidecar = plan.with_suffix(".json")
    for path in (plan, sidecar):
        if not path.is_file():
            raise InvalidArtifact(f"{path} is missing", fix="build the engine with `hcf build`")
    try:
        key: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        return {"layer_precisions": {}, **key, "driver": _known_driver(key["driver"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{sidecar} is damaged: {error}", "build it again") from error


def _known_driver(name: str) -> Driver:
    for driver in DRIVERS:
        if driver == name:
            return driver
    raise ValueError(f"unknown driver {name!r}")
