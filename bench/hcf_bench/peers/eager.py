"""diffusers as it is, with scaled dot product attention: the baseline in each precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcf.engines import EngineReport, machine_kind, require_layers
from hcf.engines.eager import count_layers
from hcf_bench.peers import Check, Peer, PeerOptions, Prepared, missing_unless

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIPELINE_MODULES = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")


def prepare_eager(
    case: Case, options: PeerOptions, precision: str, channels_last: bool = False
) -> Prepared:
    """The case's own module."""
    set_up_torch(options)
    inputs = list(case.inputs.values())
    if channels_last and case.workload.kind != "kernel":  # whose layout is part of the question
        inputs = to_channels_last(case.module, inputs)
    report = torch_report("eager", case.module, case.workload.name, precision, options)
    return Prepared(run_without_grad(case.module, inputs), report=report)


def prepare_eager_pipeline(
    pipe: Any, options: PeerOptions, precision: str, channels_last: bool = False
) -> dict[str, Any]:
    """The pipeline as it was built, in its precision."""
    set_up_torch(options)
    if channels_last:
        for module in pipeline_modules(pipe).values():
            to_channels_last(module, [])
    return pipeline_report("eager", pipe, precision, options)


def set_up_torch(options: PeerOptions) -> None:
    """Threads of this process, and no TF32: fp32 means fp32."""
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def to_channels_last(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Convolution weights of `module`, in place, and the 4-D inputs in channels_last."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for tensor in inputs
    ]


def run_without_grad(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Tensor]:
    """`call(*inputs)` as a function of nothing."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    return run


def torch_report(
    engine: str, module: nn.Module, component: str, precision: str, options: PeerOptions
) -> dict[str, Any]:
    """What torch runs, read off the module and the process.

    Raises HcfError for a module that has layers, none of them in `precision`.
    """
    on_cpu = options.device == "cpu"
    report = EngineReport(
        engine=engine,
        version=torch.__version__,
        component=component,
        device=options.device,
        provider=torch.backends.cpu.get_cpu_capability()
        if on_cpu
        else torch.cuda.get_device_name(options.device),
        precision=precision,
        layer_precisions=count_layers(module),
        threads=torch.get_num_threads(),
    )
    if report.layer_precisions:  # a kernel's case has none
        require_layers(report)
    convolutions = [p for p in module.parameters() if p.ndim == 4 and max(p.shape[2:]) > 1]
    channels_last = [p.is_contiguous(memory_format=torch.channels_last) for p in convolutions]
    found = asdict(report)
    if convolutions:
        found["memory_format"] = "channels_last" if all(channels_last) else "contiguous"
    processors = {type(m.processor).__name__ for m in module.modules() if hasattr(m, "processor")}
    if processors:
        found["attention"] = sorted(processors)
    if not on_cpu:
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return found


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name, those it has."""
    found = {name: getattr(pipe, name, None) for name in PIPELINE_MODULES}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def pipeline_report(engine: str, pipe: Any, precision: str, options: PeerOptions) -> dict[str, Any]:
    """`torch_report` of the denoiser, with the layers of every network."""
    modules = pipeline_modules(pipe)
    name = next(iter(modules))
    report = torch_report(engine, modules[name], name, precision, options)
    layers = {part: count_layers(module) for part, module in modules.items()}
    return report | {"component": "pipeline", "layer_precisions": layers}


def bf16_arithmetic(device: str) -> str:
    """Why bf16 would only be emulated on `device`, or ""."""
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"bf16 needs compute capability 8.0, this is {major}.{minor}"
    if {"avx512_bf16", "amx_bf16"} & set(machine_kind().split("-")):
        return ""
    return "this CPU has no bf16 arithmetic (neither avx512_bf16 nor amx_bf16)"


def _eager(
    name: str,
    dtype: str,
    min_sqnr_db: float,
    devices: tuple[str, ...],
    *checks: Check,
    channels_last: bool = False,
) -> Peer:
    return Peer(
        name=name,
        dtype=dtype,
        min_sqnr_db=min_sqnr_db,
        devices=devices,
        kinds=("kernel", "module", "pipeline"),
        missing=missing_unless(devices, *checks),
        prepare=lambda case, options: prepare_eager(case, options, dtype, channels_last),
        prepare_pipeline=lambda pipe, options: prepare_eager_pipeline(
            pipe, options, dtype, channels_last
        ),
    )


ADAPTED = (
    _eager("eager", "fp32", 60.0, ("cpu", "cuda")),
    _eager("eager-bf16", "bf16", 20.0, ("cpu", "cuda"), bf16_arithmetic, channels_last=True),
    _eager("eager-fp16", "fp16", 35.0, ("cuda",)),
)
