"""torch.compile: one graph, fixed shapes, channels_last. It compiles in the first run.

On a GPU "max-autotune", which also replays the kernels as a CUDA graph. On the CPU inductor's
default mode: max-autotune took more than three times as long there to compile a 9 M U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcf.engines.compiled import require_compiler
from hcf.errors import HcfError, MissingDependency
from hcf_bench.peers import Check, Peer, PeerOptions, Prepared, missing_unless
from hcf_bench.peers.eager import (
    bf16_arithmetic,
    pipeline_modules,
    pipeline_report,
    run_without_grad,
    set_up_torch,
    to_channels_last,
    torch_report,
)

if TYPE_CHECKING:
    from hcf_bench.workloads import Case


def prepare_compiled(case: Case, options: PeerOptions, precision: str) -> Prepared:
    """The case's module in channels_last through inductor."""
    set_up_torch(options)
    inputs = list(case.inputs.values())
    if case.workload.kind != "kernel":  # whose layout is part of the question
        inputs = to_channels_last(case.module, inputs)
    report = torch_report("compile", case.module, case.workload.name, precision, options)
    compiled = compile_call(case.module, options, report)
    return Prepared(run_without_grad(compiled, inputs), report=report)


def prepare_compiled_pipeline(pipe: Any, options: PeerOptions, precision: str) -> dict[str, Any]:
    """Compiles the denoiser's forward and the decoder in place."""
    set_up_torch(options)
    modules = pipeline_modules(pipe)
    denoiser = modules.get("unet") or modules.get("transformer")
    if denoiser is None:
        raise HcfError(f"{type(pipe).__name__} has neither a unet nor a transformer")
    for module in modules.values():
        to_channels_last(module, [])
    report = pipeline_report("compile", pipe, precision, options)
    denoiser.forward = compile_call(denoiser.forward, options, report)
    if "vae" in modules:
        pipe.vae.decode = compile_call(pipe.vae.decode, options, report)
    return report


def compile_call(
    call: Callable[..., Any], options: PeerOptions, report: dict[str, Any]
) -> Callable[..., Any]:
    """`call` compiled as one graph; `report` gets what inductor did at the first run.

    Raises HcfError then where it cannot be one graph.
    """
    on_gpu = options.device != "cpu"
    mode = "max-autotune" if on_gpu else "default"
    compiled = torch.compile(call, fullgraph=True, dynamic=False, mode=mode)
    report |= {"mode": mode, "fullgraph": True}
    report["provider"] = f"inductor {report['provider'].removeprefix('inductor ')}"

    def run(*args: Any, **kwargs: Any) -> Any:
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            output = compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise HcfError(
                f"torch.compile cannot make one graph of {report['component']}: {error}",
                fix="use another peer",
            ) from error
        if not on_gpu:
            return output
        from torch._dynamo.utils import counters  # a second to import, and here it is

        report["cuda_graphs"] = not counters["inductor"]["cudagraph_skips"]
        # a CUDA graph writes its next output into the same memory
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, output)

    return run


def compiler(device: str) -> str:
    """Why inductor cannot build code for `device` here, or ""."""
    try:
        require_compiler()
    except MissingDependency as error:
        return f"{error.message} ({error.fix})"
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not installed or has no GPU: pip install triton"
    return ""


def _compiled(
    name: str, dtype: str, min_sqnr_db: float, devices: tuple[str, ...], *checks: Check
) -> Peer:
    return Peer(
        name=name,
        dtype=dtype,
        min_sqnr_db=min_sqnr_db,
        devices=devices,
        kinds=("kernel", "module", "pipeline"),
        missing=missing_unless(devices, compiler, *checks),
        prepare=lambda case, options: prepare_compiled(case, options, dtype),
        prepare_pipeline=lambda pipe, options: prepare_compiled_pipeline(pipe, options, dtype),
    )


ADAPTED = (
    _compiled("compile", "fp32", 60.0, ("cpu",)),
    _compiled("compile-bf16", "bf16", 20.0, ("cpu", "cuda"), bf16_arithmetic),
    _compiled("compile-fp16", "fp16", 35.0, ("cuda",)),
)
