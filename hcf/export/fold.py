"""Smoothing factors taken into the affine of the norm that makes the smoothed tensor.

LayerNormalization and GroupNormalization end with x_hat * w + b, and so does a GroupNorm written as
Mul and Add: dividing w and b by s divides the output by s, exactly. Possible where every reader of
the output is a layer smoothed by that same s.

I channels of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

NORMS = ("LayerNormalization", "GroupNormalization")


def fold_smoothing(
    model: ModelProto, readers: Mapping[int, tuple[NodeProto, Any]], folder: Path | None = None
) -> set[str]:
    """Folds what can be folded, in place; returns the tensors that are smoothed now.

    `readers`: id of a node -> (node, s (I,) of its first input, or None).
    """
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    producers = {output: node for node in model.graph.node for output in node.output}
    outputs = {value.name for value in model.graph.output}
    folded: set[str] = set()
    for node, smooth in readers.values():
        source = node.input[0]
        if smooth is None or source in folded or source in outputs or source not in producers:
            continue
        users = consumers[source]
        if not all(
            id(user) in readers
            and (s := readers[id(user)][1]) is not None
            and np.array_equal(s, smooth)
            and list(user.input).count(source) == 1
            for user in users
        ):
            continue
        places = _affine(producers[source], producers, consumers)
        is_conv = {user.op_type == "Conv" for user in users}
        if places and len(is_conv) == 1:
            if _divide(model, places, smooth, is_conv == {True}, source, folder):
                folded.add(source)
    return folded


def _affine(
    maker: NodeProto, producers: Mapping[str, NodeProto], consumers: Mapping[str, list[NodeProto]]
) -> list[tuple[NodeProto, int]]:
    """Where w and b are: (node, number of its input) each; [] where the tensor is no norm's."""
    if maker.op_type in NORMS:
        return [(maker, i) for i in range(1, len(maker.input)) if maker.input[i]]
    if maker.op_type != "Add":
        return []
    for scaled, bias in ((0, 1), (1, 0)):
        inner = producers.get(maker.input[scaled])
        if inner is None or inner.op_type != "Mul" or len(consumers[maker.input[scaled]]) != 1:
            continue
        for weight in (1, 0):
            if inner.input[weight] not in producers:
                return [(inner, weight), (maker, bias)]
    return []


def _divide(
    model: ModelProto,
    places: list[tuple[NodeProto, int]],
    smooth: Any,
    is_conv: bool,
    source: str,
    folder: Path | None,
) -> bool:
    """Divide the initializers at `places` by s; False, and nothing changed, if one is not (I,)."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: list[tuple[NodeProto, int, Any]] = []
    for node, number in places:
        tensor = tensors.get(node.input[number])
        if tensor is None or not _is_per_channel(list(tensor.dims), len(smooth), node, is_conv):
            return False
        values = numpy_helper.to_array(tensor, "" if folder is None else str(folder))
        divided = values.astype(np.float32) / smooth.reshape(values.shape)
        found.append((node, number, divided.astype(values.dtype)))
    for index, (node, number, values) in enumerate(found):
        name = f"{source}_folded_{index}"
        model.graph.initializer.append(numpy_helper.from_array(values, name))
        node.input[number] = name
    return True


def _is_per_channel(dims: list[int], channels: int, node: NodeProto, is_conv: bool) -> bool:
    """Whether an affine of shape `dims` is one number a channel of the tensor the readers see."""
    if node.op_type == "LayerNormalization":
        return not is_conv and dims == [channels]
    if node.op_type == "GroupNormalization":
        return is_conv and dims == [channels]
    wanted = [channels, 1, 1] if is_conv else [channels]
    return [d for i, d in enumerate(dims) if d != 1 or i >= len(dims) - len(wanted)] == wanted
