"""PyTorch as it is: the reference every other engine is compared with, and bf16."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hcf.engines import EngineReport, check_precision, require_layers
from hcf.export.component import component_module, output_name

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class EagerEngine:
    """Runs the torch module. bf16 runs a converted copy in channels_last, which is faster there.

    torch has one number of threads for the whole process; the caller sets it.
    """

    def __init__(self, pipe: Any, component: str, names: Sequence[str], precision: str) -> None:
        check_precision("eager", precision)
        self.names = tuple(names)
        self.output = output_name(component)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.module = in_precision(component_module(pipe, component, names), self.dtype)
        self.report = require_layers(
            EngineReport(
                engine="eager",
                version=torch.__version__,
                component=component,
                device="cpu",
                provider=torch.backends.cpu.get_cpu_capability(),
                precision=precision,
                layer_precisions=count_layers(self.module),
                threads=torch.get_num_threads(),
            )
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            out = self.module(*cast_inputs(inputs, self.names, self.dtype))
        return {self.output: out.float().contiguous()}


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` itself for float32, else a copy in `dtype` with channels_last weights."""
    if dtype == torch.float32:
        return module
    return copy.deepcopy(module).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cast_inputs(
    inputs: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype
) -> list[Tensor]:
    """Inputs (B, ...) in order, in `dtype`; timesteps stay exact (bf16 has 8 bits: 999 -> 1000)."""
    return [inputs[name].to(inputs[name].dtype if name == "timestep" else dtype) for name in names]


def count_layers(module: nn.Module) -> dict[str, int]:
    """Convolutions and linear layers by the precision of their weights."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    return dict(Counter(PRECISION_NAMES[layer.weight.dtype] for layer in layers))
