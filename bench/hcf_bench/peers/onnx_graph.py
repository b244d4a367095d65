"""The ONNX file of a case, with fixed shapes; peers of one run share it through their folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hcf.errors import HcfError, InvalidArtifact
from hcf_bench.peers import import_package

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIP = "hcf-toolkit[onnx]"
OPSET = 23  # the first with Attention, which runtimes have one kernel for
# ONNX Runtime's CUDA provider has no kernels for several operators as opset 22 redefined them
CUDA_OPSET = 20
IR_VERSION = 10  # what onnx writes by default, ONNX Runtime reads only from 1.31 on
EXTERNAL_FROM_BYTES = 2 * 2**30 - 2**20  # protobuf cannot hold more in one message
FINGERPRINT_VALUES = 8


def export_graph(case: Case, folder: Path, *, for_cuda_provider: bool = False) -> Path:
    """The case as `folder/<workload>-<dtype>-b<batch>-<weights>-opset<n>.onnx`, exported unless it
    is there. Weights above 2 GB lie beside it in `.onnx.data`.

    `for_cuda_provider` writes what ONNX Runtime's CUDA provider has kernels for, with attention as
    its own MultiHeadAttention. Raises InvalidArtifact for weights that are not finite, HcfError
    where the exporter fails, MissingDependency.
    """
    for package in ("onnx", "onnxscript"):
        import_package(package, PIP)
    opset = f"opset{CUDA_OPSET}-ort" if for_cuda_provider else f"opset{OPSET}"
    path = folder / f"{graph_name(case)}-{opset}.onnx"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        _export(case, Path(work) / path.name, for_cuda_provider)
        move_in(Path(work), path)
    return path


def move_in(work: Path, path: Path) -> None:
    """Moves `work/<name of path>` and what lies beside it there, the named file last: where it
    stands, all of it does."""
    parts = [part for part in work.iterdir() if part.stem == path.stem or part.stem == path.name]
    for part in sorted(parts, key=lambda part: part.name == path.name):
        part.replace(path.with_name(part.name))


def graph_name(case: Case) -> str:
    """Says what the graph computes: a name that is met again stands for the same graph."""
    require_finite(case)
    tensors = [*case.module.named_parameters(), *case.module.named_buffers()]
    digest = hashlib.sha256()
    for name, tensor in [*tensors, *case.inputs.items()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    for _, tensor in tensors:
        values = tensor.detach().flatten()[:FINGERPRINT_VALUES]
        digest.update(str(values.tolist()).encode())
    dtypes = {p.dtype for p in case.module.parameters()}
    dtype = "-".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    batch = len(next(iter(case.inputs.values())))
    workload = re.sub(r"[^a-z0-9]+", "-", case.workload.name.lower())
    return f"{workload}-{dtype}-b{batch}-{digest.hexdigest()[:8]}"


def require_finite(case: Case) -> None:
    """Raises InvalidArtifact for a NaN or an infinity in the weights: rounding to INT8 or a
    runtime's own folding could turn it into a number."""
    for name, tensor in case.module.named_parameters():
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            raise InvalidArtifact(
                f"{case.workload.name}: the weight {name} is not finite",
                fix="build the case again; time no model that does not compute",
            )


def _export(case: Case, path: Path, for_cuda_provider: bool) -> None:
    try:
        with quiet(), TracedAttention(contrib=for_cuda_provider), torch.no_grad():
            program = torch.onnx.export(
                case.module,
                tuple(case.inputs.values()),
                dynamo=True,
                opset_version=CUDA_OPSET if for_cuda_provider else OPSET,
                input_names=list(case.inputs),
                output_names=["output"],
                verbose=False,
            )
    except Exception as error:  # its errors share no base
        raise HcfError(
            f"{case.workload.name} cannot be exported to ONNX: {error}", fix="use a torch peer"
        ) from error
    assert program is not None
    program.model.ir_version = IR_VERSION
    program.save(str(path), external_data=weight_bytes(case.module) > EXTERNAL_FROM_BYTES)


class TracedAttention(TorchFunctionMode):
    """While it is entered, attention is traced as ONNX Runtime takes it: a mask with a row for
    every query, and with `contrib` no mask at all as its own MultiHeadAttention."""

    def __init__(self, contrib: bool) -> None:
        super().__init__()
        self.contrib = contrib

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """query (B, N, L, K), key, value (B, N, S, K), mask (..., 1 or L, S) -> (B, N, L, K)"""
        if attn_mask is not None:
            length = query.shape[-2]
            attn_mask = attn_mask.expand(*attn_mask.shape[:-2], length, key.shape[-2])
        elif self.contrib and not options.get("enable_gqa"):
            return contrib_attention(query, key, value, is_causal, options.get("scale"))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )


def contrib_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """query (B, N, L, K), key, value (B, N, S, K) -> (B, N, L, K), as a node of ONNX Runtime's."""
    heads = query.shape[1]
    rows = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]  # (B, L, N K)
    settings: dict[str, Any] = {"num_heads": heads, "unidirectional": int(is_causal)}
    if scale is not None:
        settings["scale"] = float(scale)
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        rows,
        settings,
        dtype=query.dtype,
        shape=(*rows[0].shape[:2], heads * value.shape[-1]),
        version=1,
    )
    return output.unflatten(2, (heads, -1)).transpose(1, 2)


def weight_bytes(module: nn.Module) -> int:
    """Size of all parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def feeds(case: Case) -> dict[str, Any]:
    """The case's inputs as arrays by name."""
    return {name: t.detach().cpu().contiguous().numpy() for name, t in case.inputs.items()}


def release(case: Case) -> None:
    """Frees the weights of an exported case; its module then computes shapes only."""
    case.module.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps exporters' and quantisers' progress off the screen; errors still come through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
