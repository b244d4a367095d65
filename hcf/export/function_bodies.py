# No `from __future__ import annotations`: onnxscript reads the annotations of attributes.
"""Bodies of the functions that `hcf.export.functions` writes, and what calls them.

`script` functions become ONNX functions of the domain `hcf`; the others are run while torch's
exporter translates a call, and choose among them.
"""

from typing import Any

from onnx.defs import OpSchema
from onnxscript import OnnxFunction, script
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from hcf.errors import HcfError

HCF = Opset("hcf", 1)


@script(HCF, default_opset=op)
def GroupNorm(x, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), weight and bias (C,) -> (B, C, ...)"""
    return op.GroupNormalization(x, weight, bias, num_groups=groups, epsilon=epsilon)


@script(HCF, default_opset=op)
def GroupNormSiLU(x, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), weight and bias (C,) -> (B, C, ...)"""
    y = op.GroupNormalization(x, weight, bias, num_groups=groups, epsilon=epsilon)
    return y * op.Sigmoid(y)


@script(HCF, default_opset=op)
def AddGroupNorm(x, add, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), add (B, C, 1, ...) -> (B, C, ...)"""
    return op.GroupNormalization(x + add, weight, bias, num_groups=groups, epsilon=epsilon)


@script(HCF, default_opset=op)
def AddGroupNormSiLU(x, add, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), add (B, C, 1, ...) -> (B, C, ...)"""
    y = op.GroupNormalization(x + add, weight, bias, num_groups=groups, epsilon=epsilon)
    return y * op.Sigmoid(y)


@script(HCF, default_opset=op)
def ModulatedGroupNorm(x, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), weight and bias (B, C, 1, ...), of each image -> (B, C, ...)"""
    channels = op.Shape(weight, start=1, end=2)
    one = op.Expand(op.CastLike(op.Constant(value_float=1.0), x), channels)
    zero = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), channels)
    v = op.GroupNormalization(x, one, zero, num_groups=groups, epsilon=epsilon)
    return v * weight + bias


@script(HCF, default_opset=op)
def ModulatedGroupNormSiLU(x, weight, bias, groups: int, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (B, C, ...), weight and bias (B, C, 1, ...), of each image -> (B, C, ...)"""
    channels = op.Shape(weight, start=1, end=2)
    one = op.Expand(op.CastLike(op.Constant(value_float=1.0), x), channels)
    zero = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), channels)
    v = op.GroupNormalization(x, one, zero, num_groups=groups, epsilon=epsilon)
    y = v * weight + bias
    return y * op.Sigmoid(y)


@script(HCF, default_opset=op)
def LayerNorm(x, weight, bias, epsilon: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (..., D), weight and bias (D,) -> (..., D)"""
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon)


@script(HCF, default_opset=op)
def GEGLUGate(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (..., 2N) -> (..., N): the first half times gelu of the second"""
    hidden, gate = op.Split(x, axis=-1, num_outputs=2)
    return hidden * op.Gelu(gate)


@script(HCF, default_opset=op)
def GEGLU(x, weight, bias):  # type: ignore[no-untyped-def]  # noqa: N802
    """x (..., K), weight (2N, K), bias (2N,) -> (..., N)"""
    projected = op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias
    hidden, gate = op.Split(projected, axis=-1, num_outputs=2)
    return hidden * op.Gelu(gate)


@script(HCF, default_opset=op)
def Attention(q, k, v, scale: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """q (B, N, L, K), k and v (B, N, S, K) -> (B, N, L, K)"""
    factor = op.CastLike(op.Constant(value_float=scale), q)
    scores = op.MatMul(q * factor, op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


@script(HCF, default_opset=op)
def BiasedAttention(q, k, v, key_bias, scale: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """As Attention, key_bias (B, 1, 1, S) added to the scores"""
    factor = op.CastLike(op.Constant(value_float=scale), q)
    scores = op.MatMul(q * factor, op.Transpose(k, perm=[0, 1, 3, 2])) + key_bias
    return op.MatMul(op.Softmax(scores, axis=-1), v)


BODIES = {
    function.name: function
    for function in (
        GroupNorm, GroupNormSiLU, AddGroupNorm, AddGroupNormSiLU, ModulatedGroupNorm,
        ModulatedGroupNormSiLU, LayerNorm, GEGLU, GEGLUGate, Attention, BiasedAttention,
    )
}  # fmt: skip


def _symbol(function: OnnxFunction) -> Op:
    """A node that calls `function`; the exporter would put the body in place of a call itself."""
    made = function.function_ir
    schema = OpSchema(
        function.name,
        HCF.domain,
        HCF.version,
        inputs=[OpSchema.FormalParameter(value.name, "T") for value in made.inputs],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            OpSchema.Attribute(name, getattr(OpSchema.AttrType, attribute.type.name), "")
            for name, attribute in made.attributes.items()
        ],
    )
    return Op(HCF, function.name, schema)


NODES = {name: _symbol(function) for name, function in BODIES.items()}


def group_norm_silu(
    x: Any, weight: Any, bias: Any, groups: int, eps: float, activation: str = "silu",
    add: Any = None,
) -> Any:  # fmt: skip
    """A call of hcf::group_norm_silu, in the forms that `hcf.fuse` makes; a GELU stands behind."""
    space = list(range(2, len(x.shape)))
    inputs = [x, weight, bias]
    form = ""
    if len(weight.shape) == 2:
        form, inputs[1:] = "Modulated", [op.Unsqueeze(weight, space), op.Unsqueeze(bias, space)]
    if add is not None:
        if form:
            raise HcfError(
                "group_norm_silu with add and a weight for each image has no ONNX function",
                fix="use export.kernels: plain",
            )
        form, inputs[1:] = "Add", [op.Unsqueeze(add, space), weight, bias]
    name = f"{form}GroupNorm{'SiLU' if activation == 'silu' else ''}"
    y = NODES[name](*inputs, groups=groups, epsilon=eps)
    return op.Gelu(y) if activation == "gelu" else y


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """A call of hcf::layer_norm."""
    return NODES["LayerNorm"](x, weight, bias, epsilon=eps)


def geglu(x: Any, weight: Any, bias: Any = None) -> Any:
    """A call of hcf::geglu."""
    if bias is None:
        return NODES["GEGLUGate"](op.MatMul(x, op.Transpose(weight, perm=[1, 0])))
    return NODES["GEGLU"](x, weight, bias)


def geglu_gate(x: Any) -> Any:
    """A call of hcf::geglu_gate."""
    return NODES["GEGLUGate"](x)


def attention(q: Any, k: Any, v: Any, key_bias: Any = None, scale: float | None = None) -> Any:
    """A call of hcf::attention; the default scale needs the head dim, which is fixed."""
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if key_bias is None:
        return NODES["Attention"](q, k, v, scale=scale)
    return NODES["BiasedAttention"](q, k, v, op.Unsqueeze(key_bias, [1, 2]), scale=scale)
