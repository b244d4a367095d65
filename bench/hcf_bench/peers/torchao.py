"""torchao: INT8 or FP8 linear layers, activations quantised as they come, under torch.compile.

Convolutions stay in bf16: these schemes have none. A linear layer that sees at most 16 rows stays
as well (INT8 matrix products on a GPU need 17), which are the embeddings of the timestep.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError
from hcf_bench.peers import Peer, PeerOptions, Prepared, import_package, installed, missing_unless
from hcf_bench.peers.compiled import compile_call, compiler
from hcf_bench.peers.eager import run_without_grad, set_up_torch, to_channels_last, torch_report
from hcf_bench.peers.onnx_graph import require_finite

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIP = "torchao==0.18.*"
MAX_SKIPPED_ROWS = 16
MULTIPLE = 16  # of both sides of a weight


def prepare_torchao(case: Case, options: PeerOptions, precision: str) -> Prepared:
    """The case's module with its linear layers in `precision`, compiled. Changes the module.

    Raises HcfError where no layer was quantised, MissingDependency, InvalidArtifact for weights
    that are not finite.
    """
    torchao = import_package("torchao", PIP)
    quantization = import_package("torchao.quantization", PIP)
    set_up_torch(options)
    require_finite(case)
    inputs = to_channels_last(case.module, list(case.inputs.values()))
    chosen = quantisable_layers(case.module, inputs)
    if precision == "int8":
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        per_row = quantization.PerRow()
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=per_row)
    report = torch_report("torchao", case.module, case.workload.name, "bf16", options)
    quantization.quantize_(case.module, config, filter_fn=lambda layer, name: name in chosen)
    set_up_torch(options)
    torch.set_float32_matmul_precision("highest")  # torchao's own settings allow TF32
    counts = weight_types(case.module)
    quantised = sum(n for name, n in counts.items() if name not in ("fp32", "bf16", "fp16"))
    if quantised != len(chosen) or not chosen:
        raise HcfError(
            f"torchao {torchao.__version__} was asked for {precision} in {len(chosen)} layers of "
            f"{case.workload.name} and quantised {quantised}: {counts}",
            fix="use a peer without quantisation",
        )
    report |= {
        "version": f"{torchao.__version__}, torch {torch.__version__}",
        "precision": precision,
        "layer_precisions": counts,
        "scheme": type(config).__name__,
    }
    return Prepared(
        run_without_grad(compile_call(case.module, options, report), inputs), report=report
    )


def quantisable_layers(module: nn.Module, inputs: list[Tensor]) -> set[str]:
    """Names of the linear layers with enough rows and fitting sides; runs the module once."""
    rows: dict[str, int] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not any(size % MULTIPLE for size in layer.weight.shape):

            def note(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                rows[name] = args[0].numel() // args[0].shape[-1]

            hooks.append(layer.register_forward_pre_hook(note))
    try:
        run_without_grad(module, inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, count in rows.items() if count > MAX_SKIPPED_ROWS}


def weight_types(module: nn.Module) -> dict[str, int]:
    """Convolutions and linear layers by what their weight is stored in, torchao's types by the
    type of their quantised data."""
    names = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    names |= {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    stored = (getattr(layer.weight, "qdata", layer.weight).dtype for layer in layers)
    return dict(Counter(names.get(dtype, str(dtype)) for dtype in stored))


def fp8_arithmetic(device: str) -> str:
    """Why there is no FP8 matrix product on `device`, or ""."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return ""
    return f"FP8 needs compute capability 8.9, this is {major}.{minor}"


_TORCHAO = installed("torchao", PIP)

ADAPTED = (
    Peer(
        name="torchao-int8",
        dtype="bf16",
        min_sqnr_db=10.0,
        devices=("cuda",),
        kinds=("module",),
        missing=missing_unless(("cuda",), _TORCHAO, compiler),
        prepare=lambda case, options: prepare_torchao(case, options, "int8"),
    ),
    Peer(
        name="torchao-fp8",
        dtype="bf16",
        min_sqnr_db=10.0,
        devices=("cuda",),
        kinds=("module",),
        missing=missing_unless(("cuda",), _TORCHAO, compiler, fp8_arithmetic),
        prepare=lambda case, options: prepare_torchao(case, options, "fp8"),
    ),
)
