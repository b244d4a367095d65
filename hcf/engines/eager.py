"""PyTorch as it is: the reference every other engine is compared with, fp16, bf16, and simulation.

A quantised precision is simulated: the layers round as an engine's would, in float32 arithmetic.
That tells what the rounding does to the output and nothing about speed, so `report.provider` says
"simulated" and the choice of an engine passes it over.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.engines import COUNTED_AS, SIMULATED, EngineReport, check_precision, require_layers
from hcf.errors import HcfError, InvalidArtifact, MissingDependency
from hcf.export.component import component_module, output_names

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in PRECISION_NAMES.items()}


class EagerEngine:
    """Runs the torch module. Other types than float32, and other devices, run a converted copy,
    its weights in channels_last, which is faster there.

    torch has one number of threads for the whole process; the caller sets it.
    """

    def __init__(
        self, pipe: Any, component: str, names: Sequence[str], precision: str, device: str = "cpu"
    ) -> None:
        check_precision("eager", precision)
        if precision not in DTYPES:
            raise HcfError(
                f"torch does not run {precision}; eager simulates it",
                fix="use SimulatedEngine, or precision fp32, fp16 or bf16",
            )
        self.names = tuple(names)
        self.outputs = output_names(pipe, component)
        self.dtype = DTYPES[precision]
        self.device = torch.device(device)
        provider = provider_of(self.device)
        module = component_module(pipe, component, names)
        self.module = in_precision(module, self.dtype, self.device)
        self.report = require_layers(
            EngineReport(
                engine="eager",
                version=torch.__version__,
                component=component,
                device=self.device.type,
                provider=provider,
                precision=precision,
                layer_precisions=count_layers(self.module),
                threads=torch.get_num_threads() if self.device.type == "cpu" else None,
            )
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            out = self.module(*cast_inputs(inputs, self.names, self.dtype, self.device))
        return named_outputs(self.outputs, out)


class SimulatedEngine:
    """The torch module with the rounding of a quantised format, from the component's own scales.

    `folder` is the component's in an artefact. Raises InvalidArtifact where it holds no scales of
    this format. While a call runs, the module's weights are rounded ones.
    """

    def __init__(
        self, pipe: Any, component: str, names: Sequence[str], precision: str, folder: Path
    ) -> None:
        from hcf.quantize.scales import SCALES_FILE, read_scales

        if precision not in SIMULATED:
            check_precision("eager", precision)
        if not (folder / SCALES_FILE).is_file():
            raise InvalidArtifact(
                f"{component} is not quantised: eager has no scales to simulate {precision} from",
                fix="run `hcf quantize` first",
            )
        self.scales = read_scales(folder / SCALES_FILE)
        found = {scale.scheme for scale in self.scales.values()}
        if precision not in found:
            raise InvalidArtifact(
                f"{component} is quantised to {', '.join(sorted(found))}, not to {precision}",
                fix=f"run `hcf quantize` with quantize.format {precision}",
            )
        self.names = tuple(names)
        self.outputs = output_names(pipe, component)
        self.module = component_module(pipe, component, names)
        self.quantised: nn.Module = getattr(pipe, component)
        counts = Counter(COUNTED_AS.get(s.scheme, s.scheme) for s in self.scales.values())
        floating = sum(count_layers(self.module).values()) - len(self.scales)
        self.report = require_layers(
            EngineReport(
                engine="eager",
                version=torch.__version__,
                component=component,
                device="cpu",
                provider=f"simulated in {provider_of(torch.device('cpu'))}",
                precision=precision,
                layer_precisions={**counts, "fp32": floating},
                threads=torch.get_num_threads(),
            )
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from hcf.quantize.report import fake_quantized

        arguments = cast_inputs(inputs, self.names, torch.float32, torch.device("cpu"))
        with torch.no_grad(), fake_quantized(self.quantised, self.scales):
            return named_outputs(self.outputs, self.module(*arguments))


def report_of(pipe: Any, component: str) -> EngineReport:
    """What the component runs in while no engine answers for it: its own type and device."""
    module = component_module(pipe, component, [])
    parameter = next(module.parameters())
    return EngineReport(
        engine="eager",
        version=torch.__version__,
        component=component,
        device=parameter.device.type,
        provider=provider_of(parameter.device),
        precision=PRECISION_NAMES[parameter.dtype],
        layer_precisions=count_layers(module),
        threads=torch.get_num_threads() if parameter.device.type == "cpu" else None,
    )


def provider_of(device: torch.device) -> str:
    """What torch computes with there: the CPU's instruction set, or the GPU's name.

    Raises MissingDependency for a GPU that torch does not find.
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        raise MissingDependency(
            f"device {device} was asked for; torch {torch.__version__} finds no GPU",
            fix="set build.device to cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    return torch.cuda.get_device_name(device)


def in_precision(
    module: nn.Module, dtype: torch.dtype, device: torch.device | None = None
) -> nn.Module:
    """`module` itself if it is float32 on the CPU and is to be, else a copy in `dtype` with
    channels_last weights.

    The copy shares nothing with the original and is made one tensor at a time.
    """
    device = device or torch.device("cpu")
    own = {(parameter.dtype, parameter.device.type) for parameter in module.parameters()}
    if dtype == torch.float32 and device.type == "cpu" and own <= {(dtype, "cpu")}:
        return module
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_converted(parameter, dtype, device), False)
    for buffer in module.buffers():
        memo[id(buffer)] = _converted(buffer, dtype, device)
    return copy.deepcopy(module, memo)


def cast_inputs(
    inputs: Mapping[str, Tensor],
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> list[Tensor]:
    """Inputs (B, ...) in order, floats in `dtype`, ids as they are, all on `device`.

    Timesteps stay exact (bf16 has 8 bits: 999 -> 1000).
    """
    cast: list[Tensor] = []
    for name in names:
        tensor = inputs[name]
        plain = name == "timestep" or not tensor.is_floating_point()
        cast.append(tensor.to(device or tensor.device, tensor.dtype if plain else dtype))
    return cast


def named_outputs(names: Sequence[str], out: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """One tensor or several, each (B, ...), by name in float32."""
    values = [out] if isinstance(out, Tensor) else list(out)
    return {n: value.float().contiguous() for n, value in zip(names, values, strict=True)}


def count_layers(module: nn.Module) -> dict[str, int]:
    """Convolutions and linear layers by the precision of their weights."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    return dict(Counter(PRECISION_NAMES[layer.weight.dtype] for layer in layers))


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    found = tensor.detach().to(device, kind)
    if found.ndim == 4:
        found = found.contiguous(memory_format=torch.channels_last)
    return found.clone() if found.data_ptr() == tensor.data_ptr() else found
