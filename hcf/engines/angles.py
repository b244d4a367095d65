"""Sines and cosines in float32, of a model whose other arithmetic is coarser.

A sinusoidal embedding multiplies the timestep (up to 999) with frequencies and takes sine and
cosine. OpenVINO rounds that product to bf16 or fp16 with everything else: bf16 has 8 bits, so the
angle of step 999 is off by up to 4 radians. Cutting these few nodes out into a model of their own,
which runs in float32, removes most of bf16's error at the noisy end of the trajectory.
"""

from __future__ import annotations

from typing import Any

PREFIX = "hcf_angle_"
ANGULAR = ("Sin", "Cos")


def split_angles(model: Any) -> Any | None:
    """Cuts every sine and cosine that depends on an input out of `model`, which is changed.

    Returns the model that computes them, its outputs called as the new inputs of `model`; None
    (and `model` as it was) where there are none.
    """
    from openvino import Model
    from openvino import opset13 as ops

    cut = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in ANGULAR and _parameters_above(node)
    ]
    if not cut:
        return None
    results: list[Any] = []
    inputs: dict[str, Any] = {}
    new: list[Any] = []
    for index, node in enumerate(cut):
        name = f"{PREFIX}{index}"
        port = node.output(0)
        parameter = ops.parameter(port.get_partial_shape(), port.get_element_type(), name)
        parameter.output(0).set_names({name})
        for target in list(port.get_target_inputs()):
            target.replace_source_output(parameter.output(0))
        port.set_names({name})
        results.append(ops.result(port))
        inputs |= {above.get_friendly_name(): above for above in _parameters_above(node)}
        new.append(parameter)
    angles = Model(results, list(inputs.values()), "angles").clone()
    model.add_parameters(new)
    model.validate_nodes_and_infer_types()
    return angles


def _parameters_above(node: Any) -> list[Any]:
    """The inputs of the model that `node` is computed from."""
    found: dict[str, Any] = {}
    seen: set[str] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        name = current.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        if current.get_type_name() == "Parameter":
            found[name] = current
        stack += [current.input_value(i).get_node() for i in range(current.get_input_size())]
    return list(found.values())
