"""Our fused kernels in the modules of an otherwise eager model, alone and under torch.compile."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hcf.fuse import DEFAULTS, OPS, Op, fuse
from hcf_bench.peers import Check, Peer, PeerOptions, Prepared, missing_unless
from hcf_bench.peers.compiled import compile_call, compiler
from hcf_bench.peers.eager import (
    bf16_arithmetic,
    pipeline_modules,
    prepare_eager_pipeline,
    run_without_grad,
    set_up_torch,
    to_channels_last,
    torch_report,
)

if TYPE_CHECKING:
    from hcf_bench.workloads import Case


def _ops(device: str, convolutions: bool) -> tuple[Op, ...]:
    """A GPU's; on a CPU without upsampling in four parts, which is slower by itself there."""
    if convolutions:
        return OPS
    return tuple(op for op in DEFAULTS["cuda"] if device != "cpu" or op != "upsample_conv3x3")


def prepare_fused(
    case: Case, options: PeerOptions, precision: str, compiles: bool, convolutions: bool
) -> Prepared:
    """The case's module in channels_last, fused; its report counts what was swapped."""
    set_up_torch(options)
    inputs = to_channels_last(case.module, list(case.inputs.values()))
    report = torch_report("fused", case.module, case.workload.name, precision, options)
    report["fused"] = fuse(case.module, _ops(options.device, convolutions)).counts()
    call = compile_call(case.module, options, report) if compiles else case.module
    return Prepared(run_without_grad(call, inputs), report=report)


def prepare_fused_pipeline(
    pipe: Any, options: PeerOptions, precision: str, convolutions: bool
) -> dict[str, Any]:
    """The denoiser and first stage of the pipeline, fused."""
    report = prepare_eager_pipeline(pipe, options, precision, channels_last=True)
    modules = pipeline_modules(pipe)
    ops = _ops(options.device, convolutions)
    swapped = {n: fuse(modules[n], ops).counts() for n in ("unet", "vae") if n in modules}
    return report | {"engine": "fused", "fused": swapped}


def _fused(
    name: str, dtype: str, min_sqnr_db: float, devices: tuple[str, ...], *checks: Check,
    compiles: bool = False, convolutions: bool = False,
) -> Peer:  # fmt: skip
    if compiles:
        checks = (compiler, *checks)
    return Peer(
        name=name,
        dtype=dtype,
        min_sqnr_db=min_sqnr_db,
        devices=devices,
        kinds=("module",) if compiles else ("module", "pipeline"),
        missing=missing_unless(devices, *checks),
        prepare=partial(
            prepare_fused, precision=dtype, compiles=compiles, convolutions=convolutions
        ),
        prepare_pipeline=None
        if compiles
        else partial(prepare_fused_pipeline, precision=dtype, convolutions=convolutions),
    )


ADAPTED = (
    _fused("fused", "fp32", 60.0, ("cpu", "cuda")),
    _fused("fused-bf16", "bf16", 20.0, ("cpu", "cuda"), bf16_arithmetic),
    _fused("fused-fp16", "fp16", 35.0, ("cuda",)),
    _fused("fused-conv-bf16", "bf16", 20.0, ("cuda",), bf16_arithmetic, convolutions=True),
    _fused("fused-compile-bf16", "bf16", 20.0, ("cpu", "cuda"), bf16_arithmetic, compiles=True),
)
