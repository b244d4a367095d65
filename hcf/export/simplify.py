"""Passes over an exported graph, each counted: what it found, replaced, and the nodes left over.

    fold        constants computed once; a Linear's Transpose(weight) becomes the initializer
                "<weight>_transposed"
    cse         equal nodes, and equal constants that are not parameters, become one
    casts       a Cast to the type a value has already, or after one that lost nothing, goes
    norm        Reshape - InstanceNormalization - Reshape (- Mul - Add) -> GroupNormalization
    attention   MatMul - (scale, mask) - Softmax - MatMul -> Attention
    dead        nodes, initializers and opsets that nothing needs

Nodes keep the scopes of the modules they came from and parameters keep their names as initializers:
Q/DQ insertion and refitting find layers by them. So nothing that reads a parameter is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hcf.errors import MissingDependency, RecipeError
from hcf.export.patterns import (
    count_nodes,
    fuse_attention,
    fuse_norms,
    input_of,
    permutation,
    sweep,
)

if TYPE_CHECKING:
    import onnx_ir as ir

SMALL = 1024  # elements; constants above are not compared with each other
# {type: types whose every value it holds}, by the names of onnx_ir.DataType
WIDENS = {
    "FLOAT": ("FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "BOOL"),
    "DOUBLE": ("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "INT32", "BOOL"),
    "INT64": ("INT32", "INT16", "INT8", "UINT8", "BOOL"),
    "INT32": ("INT16", "INT8", "UINT8", "BOOL"),
}


@dataclass(frozen=True)
class PassRecord:
    """One pass: nodes and initializers before and after, patterns `replaced`, why not where not."""

    name: str
    nodes_before: int
    nodes_after: int
    initializers_before: int
    initializers_after: int
    replaced: int
    note: str = ""


def simplify(model: ir.Model, passes: Sequence[str]) -> list[PassRecord]:
    """Runs `passes` over `model`, in order and in place. RecipeError for one that does not exist.

    Names of the initializers on entry are taken for parameters and kept.
    """
    try:
        from onnx_ir.passes.common import NameFixPass, OutputFixPass
    except ImportError as error:
        raise MissingDependency(
            f"graph passes need {error.name}", fix="pip install 'hcf-toolkit[onnx]'"
        ) from error

    if unknown := [name for name in passes if name not in PASSES]:
        raise RecipeError(f"there is no graph pass {unknown[0]!r}", fix=f"use {', '.join(PASSES)}")
    parameters = frozenset(model.graph.initializers)
    records: list[PassRecord] = []
    for name in passes:
        nodes, initializers = count_nodes(model), len(model.graph.initializers)
        replaced, note = PASSES[name](model, parameters)
        records.append(
            PassRecord(
                name,
                nodes,
                count_nodes(model),
                initializers,
                len(model.graph.initializers),
                replaced,
                note,
            )
        )
    OutputFixPass()(model)
    NameFixPass()(model)
    return records


def _fold(model: ir.Model, parameters: frozenset[str]) -> tuple[int, str]:
    from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass
    from onnxscript import optimizer, rewriter

    # the optimizer drops what nothing reads; a parameter in front of its Transpose is read
    replaced = _transpose_weights(model, parameters)

    def should_fold(node: ir.Node) -> bool | None:
        reads = any(v is not None and v.name in parameters and _is_weight(v) for v in node.inputs)
        return False if reads else None

    for _ in range(2):  # rewriting opens up constants that fold, and the other way round
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.rewrite(model)
    IdentityEliminationPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return replaced, f"{replaced} weights stored transposed" if replaced else ""


def _is_weight(value: ir.Value) -> bool:
    """Floating point and on no graph input: a parameter or buffer, not a size or an index."""
    return value.is_initializer() and value.dtype is not None and value.dtype.is_floating_point()


def _transpose_weights(model: ir.Model, parameters: frozenset[str]) -> int:
    """MatMul(x, Transpose(w)) -> MatMul(x, w_transposed), evaluated when the graph is saved."""
    import onnx_ir as ir

    made = 0
    for node in list(model.graph):
        weight = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or weight is None or weight.name not in parameters:
            continue
        tensor, out = weight.const_value, node.outputs[0]
        if tensor is None or len(tensor.shape) != 2 or permutation(node, 2) != [1, 0]:
            continue
        if any(use.node.op_type != "MatMul" for use in out.uses()):
            continue
        name = f"{weight.name}_transposed"
        transposed = model.graph.initializers.get(name)
        if transposed is None:
            shape = ir.Shape(list(reversed(tensor.shape.numpy())))
            lazy = ir.LazyTensor(
                _transposer(tensor, name), dtype=tensor.dtype, shape=shape, name=name
            )
            transposed = ir.Value(
                name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy
            )
            model.graph.register_initializer(transposed)
        out.replace_all_uses_with(transposed)
        model.graph.remove(node, safe=True)
        if not weight.uses():
            model.graph.initializers.pop(weight.name)
        made += 1
    return made


def _transposer(tensor: Any, name: str) -> Callable[[], Any]:
    import onnx_ir as ir

    def make() -> Any:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    return make


def _cse(model: ir.Model, parameters: frozenset[str]) -> tuple[int, str]:
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    merged = 0
    seen: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in parameters or tensor is None or tensor.size > SMALL:
            continue
        if name.endswith("_transposed") or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        if (first := seen.setdefault(key, value)) is not value:
            value.replace_all_uses_with(first)
            model.graph.initializers.pop(name)
            merged += 1
    before = count_nodes(model)
    CommonSubexpressionEliminationPass()(model)
    return before - count_nodes(model), f"{merged} constants merged" if merged else ""


def _casts(model: ir.Model, parameters: frozenset[str]) -> tuple[int, str]:
    removed = 0
    for node in list(model.graph):
        if node.op_type != "Cast" or node.outputs[0].is_graph_output():
            continue
        source, target = input_of(node, 0), node.attributes["to"].as_int()
        first = source.producer()
        if first is not None and first.op_type == "Cast":
            origin = input_of(first, 0)
            if origin.dtype is not None and origin.dtype.name in WIDENS.get(
                _type_name(first.attributes["to"].as_int()), ()
            ):
                node.replace_input_with(0, origin)
                source = origin
                removed += 1
        if source.dtype is not None and int(source.dtype) == target:
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            removed += first is None or first.op_type != "Cast"
    sweep(model)
    return removed, ""


def _dead(model: ir.Model, parameters: frozenset[str]) -> tuple[int, str]:
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedOpsetsPass

    removed = sweep(model)
    RemoveUnusedFunctionsPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return removed, ""


def _type_name(number: int) -> str:
    import onnx_ir as ir

    return str(ir.DataType(number).name)


PASSES: dict[str, Callable[[ir.Model, frozenset[str]], tuple[int, str]]] = {
    "fold": _fold,
    "cse": _cse,
    "casts": _casts,
    "norm": lambda model, _: fuse_norms(model),
    "attention": lambda model, _: fuse_attention(model),
    "dead": _dead,
}
