"""Fused kernels in a graph: nodes of the domain `hcf`, whose bodies are the plain operators.

A model that `hcf.fuse` has changed calls operators that ONNX does not know. `export.kernels` says
what becomes of them: "plain", torch's own operators as if the model had never been fused; or
"functions", one node a kernel with an ONNX function of the same name (a model that is not fused is
fused while it is exported). A runtime that knows nothing of it (ONNX Runtime, TensorRT) computes
the function's body; TensorRT's parser takes a plugin of that name where one is registered
(`hcf.engines.tensorrt_plugins`).

OpenVINO does not know functions: graphs for it are plain ones. `hcf.export.function_bodies` lists
the functions. They are float32 islands of fp16 and bf16 graphs, as their operators would be; with
"plugins" they take and give the graph's own precision, because kernels sum in float32 anyway.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from hcf.fuse import Op

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

DOMAIN = "hcf"
FUNCTION_OPS: tuple[Op, ...] = ("group_norm_silu", "layer_norm", "geglu", "attention")


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """{operator: what torch's exporter puts in its place}, for `custom_translation_table`."""
    import hcf_kernels  # noqa: F401  registers the operators
    from hcf.export import function_bodies as bodies

    ops = torch.ops.hcf
    return {
        ops.group_norm_silu.default: bodies.group_norm_silu,
        ops.layer_norm.default: bodies.layer_norm,
        ops.geglu.default: bodies.geglu,
        ops.geglu_gate.default: bodies.geglu_gate,
        ops.attention.default: bodies.attention,
    }


def attach_bodies(model: ir.Model) -> dict[str, int]:
    """Gives `model` the function of every node of the domain; {function: nodes}."""
    import onnx_ir as ir

    from hcf.export.function_bodies import BODIES

    used = Counter(node.op_type for node in model.graph if node.domain == DOMAIN)
    for name in used:
        function = ir.serde.deserialize_function(BODIES[name].to_function_proto())
        model.functions[function.identifier()] = function
    return dict(used)
