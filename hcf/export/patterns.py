"""Patterns of many nodes that are one operator: group normalisation and attention.

    Reshape - InstanceNormalization - Reshape (- Mul - Add) -> GroupNormalization
    MatMul - (scale, mask) - Softmax - MatMul -> Attention

B batch, C channels, G groups, N heads, L queries, S keys, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

GROUP_NORM_OPSET = 21  # before it GroupNormalization had one scale a group, not a channel
ATTENTION_OPSET = 23
SDPA = "aten.scaled_dot_product_attention.default"
SCOPE_KEYS = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
SMALL = 1024  # elements of a constant that is looked into


def fuse_norms(model: ir.Model) -> tuple[int, str]:
    found = [node for node in model.graph if node.op_type == "InstanceNormalization"]
    matches = [match for node in found if (match := _group_norm(node)) is not None]
    if not matches:
        return 0, ""
    if opset_of(model) < GROUP_NORM_OPSET:
        return 0, f"{len(matches)} kept: GroupNormalization needs opset {GROUP_NORM_OPSET}"
    for match in matches:
        _replace_norm(model, match)
    sweep(model)
    return len(matches), ""


@dataclass(frozen=True)
class _GroupNorm:
    """x (B, C, ...) in `groups`; `scale`, `bias` (C,) or None; `last` makes the result."""

    node: ir.Node
    last: ir.Node
    x: ir.Value
    groups: int
    scale: ir.Value | None
    bias: ir.Value | None


def _group_norm(node: ir.Node) -> _GroupNorm | None:
    """The group norm around an InstanceNormalization over (B, G, C/G * ...), if it is one."""
    split = input_of(node, 0).producer()
    ones, zeros = constant_of(input_of(node, 1)), constant_of(input_of(node, 2))
    if split is None or split.op_type != "Reshape" or ones is None or zeros is None:
        return None
    if not (ones == 1).all() or zeros.any():
        return None
    merge = _only_user(node)
    if merge is None or merge.op_type != "Reshape":
        return None
    x, shape = input_of(split, 0), constant_of(input_of(split, 1))
    if x.shape is None or shape is None or len(shape) != 3 or int(shape[1]) != len(ones):
        return None
    if not isinstance(x.shape[1], int) or not _restores(merge, x):
        return None
    scale_node = _only_user(merge)
    scale = _per_channel(scale_node, "Mul", merge.outputs[0], len(x.shape))
    bias_node = _only_user(scale_node) if scale_node is not None and scale is not None else None
    bias = (
        _per_channel(bias_node, "Add", scale_node.outputs[0], len(x.shape))
        if scale_node is not None and bias_node is not None
        else None
    )
    if scale is None or bias is None:
        return _GroupNorm(node, merge, x, len(ones), None, None)
    assert bias_node is not None
    return _GroupNorm(node, bias_node, x, len(ones), scale, bias)


def _restores(reshape: ir.Node, x: ir.Value) -> bool:
    """Whether a Reshape's target is the shape of `x`: Shape(x), or the same sizes."""
    target = input_of(reshape, 1)
    maker = target.producer()
    if maker is not None and maker.op_type == "Shape" and input_of(maker, 0) is x:
        return True
    return reshape.outputs[0].shape is not None and reshape.outputs[0].shape == x.shape


def _per_channel(node: ir.Node | None, op_type: str, other: ir.Value, rank: int) -> ir.Value | None:
    """The (C,) tensor that `node` applies along axis 1 of `other`: Unsqueeze(p) to (C, 1, ...)."""
    if node is None or node.op_type != op_type:
        return None
    side = next((v for v in node.inputs if v is not other), None)
    maker = side.producer() if side is not None else None
    if maker is None or maker.op_type != "Unsqueeze":
        return None
    axes, value = constant_of(input_of(maker, 1)), input_of(maker, 0)
    if axes is None or sorted(int(a) for a in axes) != list(range(1, rank - 1)):
        return None
    return value if value.shape is not None and len(value.shape) == 1 else None


def _replace_norm(model: ir.Model, match: _GroupNorm) -> None:
    import onnx_ir as ir

    epsilon = match.node.attributes.get("epsilon")
    channels = int(match.x.shape[1])
    scale = match.scale or _new_constant(model, match.node, "scale", np.ones(channels, np.float32))
    bias = match.bias or _new_constant(model, match.node, "bias", np.zeros(channels, np.float32))
    made = ir.node(
        "GroupNormalization",
        [match.x, scale, bias],
        {
            "epsilon": 1e-5 if epsilon is None else epsilon.as_float(),
            "num_groups": match.groups,
            "stash_type": 1,
        },
        name=f"{match.node.name}_group",
    )
    _put_in_place(model, match.last, made, match.node)


def fuse_attention(model: ir.Model) -> tuple[int, str]:
    found = [node for node in model.graph if node.op_type == "Softmax"]
    matches = [match for node in found if (match := _softmax_attention(node)) is not None]
    if not matches:
        return 0, ""
    if opset_of(model) < ATTENTION_OPSET:
        return 0, f"{len(matches)} kept decomposed: Attention needs opset {ATTENTION_OPSET}"
    for match in matches:
        _replace_attention(model, match)
    sweep(model)
    return len(matches), ""


@dataclass(frozen=True)
class _Attention:
    """softmax(scale * q k^T + mask) v with q (B, N, L, K), k, v (B, N, S, K), or all without N.

    k is a value in the order `k_order`: the axes that a Transpose has to put it in.
    """

    softmax: ir.Node
    last: ir.Node
    q: ir.Value
    k: ir.Value
    k_order: tuple[int, ...]
    v: ir.Value
    mask: ir.Value | None
    scale: float


def _softmax_attention(softmax: ir.Node) -> _Attention | None:
    last, scores = _only_user(softmax), input_of(softmax, 0)
    if last is None or last.op_type != "MatMul" or input_of(last, 0) is not softmax.outputs[0]:
        return None
    rank = len(scores.shape) if scores.shape is not None else 0
    axis = softmax.attributes.get("axis")
    if rank not in (3, 4) or (-1 if axis is None else axis.as_int()) not in (-1, rank - 1):
        return None
    mask: ir.Value | None = None
    node = scores.producer()
    if node is not None and node.op_type == "Add":
        sides = [input_of(node, 0), input_of(node, 1)]
        for side, other in (sides, sides[::-1]):
            maker = _scaled(side)[0].producer()
            if maker is not None and maker.op_type == "MatMul":
                scores, mask = side, other
    product, scale = _scaled(scores)
    maker = product.producer()
    if maker is None or maker.op_type != "MatMul":
        return None
    q, q_scale = _scaled(input_of(maker, 0))
    transposed, k_scale = _scaled(input_of(maker, 1))
    keys = _swapped(transposed, rank)
    if keys is None:
        return None
    k, inner_scale = _scaled(keys[0])
    whole = scale * q_scale * k_scale * inner_scale
    if mask is not None and _is_zero(mask):
        mask = None
    if mask is not None and not _fits(mask, softmax.outputs[0], rank):
        return None
    return _Attention(softmax, last, q, k, keys[1], input_of(last, 1), mask, whole)


def _swapped(value: ir.Value, rank: int) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(k, order) of a value (B, N, K, S): k with its axes in that order is (B, N, S, K)."""
    same = tuple(range(rank))
    node = value.producer()
    if node is not None and node.op_type == "Reshape":
        inner = input_of(node, 0).producer()
        outer = input_of(inner, 0).producer() if inner is not None else None
        if inner is None or outer is None or inner.op_type != "Transpose":
            return None
        if outer.op_type != "Reshape" or permutation(inner, 3) != [0, 2, 1]:
            return None
        # torch's exporter joins B and N; shapes of the joined axes are not known
        call = _scopes(node)
        return (input_of(outer, 0), same) if call == _scopes(outer) and SDPA in call else None
    if node is None or node.op_type != "Transpose":
        return None
    *batch, columns, rows = permutation(node, rank)
    return input_of(node, 0), (*batch, rows, columns)


def _fits(mask: ir.Value, scores: ir.Value, rank: int) -> bool:
    """Whether engines take the mask: one row a query, not one for all, and heads of its own."""
    if rank != 4 or mask.shape is None or scores.shape is None or len(mask.shape) < 2:
        return False
    return list(mask.shape)[-2:] == list(scores.shape)[-2:]


def _is_zero(value: ir.Value) -> bool:
    """Whether `value` is a constant of zeros, of any shape: torch.baddbmm with beta 0 adds one."""
    array, node = constant_of(value), value.producer()
    if array is not None:
        return not array.any()
    if node is None:
        return False
    if node.op_type in ("Expand", "Reshape", "Cast", "Identity"):
        return _is_zero(input_of(node, 0))
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not fill.as_tensor().numpy().any()
    return node.op_type == "Mul" and any(_is_zero(v) for v in node.inputs if v is not None)


def _scopes(node: ir.Node) -> str:
    """The modules, and the call last, that a node came from; empty where it is not known."""
    return " ".join(node.metadata_props.get(key, "") for key in SCOPE_KEYS)


def _scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, s) of a value s * x or x / t with a scalar constant; (value, 1) of any other."""
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    for index, other in ((1, 0), (0, 1))[: 2 if node.op_type == "Mul" else 1]:
        factor = constant_of(input_of(node, index))
        if factor is not None and factor.size == 1:
            number = float(factor.reshape(()))
            return input_of(node, other), number if node.op_type == "Mul" else 1 / number
    return value, 1.0


def _replace_attention(model: ir.Model, match: _Attention) -> None:
    import onnx_ir as ir

    attributes: dict[str, Any] = {"scale": match.scale, "softmax_precision": 1}
    if match.q.shape is not None and len(match.q.shape) == 3:
        attributes |= {"q_num_heads": 1, "kv_num_heads": 1}  # heads are in the batch already
    k = match.k
    if list(match.k_order) != list(range(len(match.k_order))):
        turn = ir.node("Transpose", [k], {"perm": match.k_order}, name=f"{match.softmax.name}_keys")
        turn.metadata_props.update(match.softmax.metadata_props)
        k, turn.outputs[0].dtype = turn.outputs[0], match.k.dtype
        k.name = f"{match.softmax.name}_keys"
        model.graph.insert_before(match.last, turn)
    inputs = [match.q, k, match.v] + ([match.mask] if match.mask is not None else [])
    made = ir.node("Attention", inputs, attributes, name=f"{match.softmax.name}_attention")
    _put_in_place(model, match.last, made, match.softmax)


def _put_in_place(model: ir.Model, last: ir.Node, made: ir.Node, scoped: ir.Node) -> None:
    """`made` gives what `last` gave, under the same name, with the scopes of `scoped`."""
    old, new = last.outputs[0], made.outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    made.metadata_props.update(scoped.metadata_props)
    model.graph.insert_before(last, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}_replaced"
    model.graph.remove(last, safe=True)


def _new_constant(model: ir.Model, node: ir.Node, what: str, array: Any) -> ir.Value:
    import onnx_ir as ir

    name = f"{node.name}_{what}"
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.name} has no input {index}"
    return value


def _only_user(node: ir.Node) -> ir.Node | None:
    """The node that alone reads the one output of `node`; None for several or a graph output."""
    users = list(_users(node))
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _users(node: ir.Node) -> Iterator[ir.Node]:
    for use in node.outputs[0].uses():
        yield use.node


def constant_of(value: ir.Value) -> Any:
    """The array of a small constant, initializer or Constant node; None for any other value."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= SMALL else None


def permutation(node: ir.Node, rank: int) -> list[int]:
    attribute = node.attributes.get("perm")
    return list(attribute.as_ints()) if attribute is not None else list(reversed(range(rank)))


def sweep(model: ir.Model) -> int:
    """Removes nodes and initializers that nothing reads; returns the number of nodes."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    before = count_nodes(model)
    RemoveUnusedNodesPass()(model)
    return before - count_nodes(model)


def count_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def opset_of(model: ir.Model) -> int:
    """Version of the standard operators in `model`."""
    return int(model.graph.opset_imports.get("", 0))
