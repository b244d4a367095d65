"""Time, memory and disk that an export will take, from what the component's forwards in torch took.

The peak is the check of the float32 graph on ONNX Runtime. Beside torch's weights:

    weights           of the graph                              torch's meanwhile
    up to 1 GiB       two copies, its own and the runtime's     in memory
    1 to 2 GiB        one, mapped from the file beside it       in memory
    2 GiB and more    one, mapped                               mapped, not touched

and the activations: those of torch, and the scores of attention, which torch never holds whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hcf.export.graphs import EXTERNAL_FROM_BYTES
from hcf.export.offload import OFFLOAD_FROM_BYTES
from hcf.quantize.estimate import Estimate

LIBRARIES = 200 * 2**20  # onnx, onnxscript, onnxruntime and the exporter's own, measured
SCORE_COPIES = 3  # of the largest attention's scores in ONNX Runtime, measured
TRACE_S = 0.12  # seconds a layer to trace and write, on one core: a rule of thumb


@dataclass(frozen=True)
class ExportProbe:
    """What the forwards that a component's graphs are compared with took. Bytes and seconds.

    owner: name in the pipeline of what holds the weights. weights: by component of the pipeline.
    layers: convolutions and products. step_s: one forward. activations: highest above `resident`.
    scores: of the largest attention (`AttentionScores`).
    """

    component: str
    owner: str
    weights: dict[str, int]
    layers: int
    step_s: float
    activations: int
    resident: int
    scores: int


class AttentionScores(TorchFunctionMode):
    """Inside, `bytes` grows to the float32 scores of the largest attention that torch fuses.

    A graph whose attention is MatMul - Softmax - MatMul holds them; torch's kernel does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = (*args, *(kwargs or {}).values())[:2]
            self.bytes = max(self.bytes, 4 * math.prod(query.shape[:-1]) * key.shape[-2])
        return func(*args, **(kwargs or {}))


def estimate_export(found: ExportProbe, precisions: Sequence[str] = ("fp32",)) -> Estimate:
    """Graphs of a component in fp32, always, and in the other `precisions`."""
    weights = found.weights[found.owner]
    low = len(set(precisions) - {"fp32"})
    offloaded = weights >= OFFLOAD_FROM_BYTES
    if weights <= EXTERNAL_FROM_BYTES:
        copies = 2.5 if low else 2.0
    else:
        copies = 0.0 if offloaded else 1.0
    return Estimate(
        stage=f"export of {found.component}",
        seconds=found.layers * TRACE_S + (6 + 3 * low) * found.step_s,
        host_bytes=found.resident
        + LIBRARIES
        + int(copies * weights)
        + found.activations
        + SCORE_COPIES * found.scores,
        disk_bytes=int((1 + low / 2 + offloaded) * weights),
        movable={name: size for name, size in found.weights.items() if name != found.owner},
        fix="export fewer components or precisions at once, or on a machine with more memory",
    )
