"""Fused kernels as TensorRT plugins: `IPluginV3` classes that launch what `hcf.fuse` launches.

    hcf export -m MODEL -o OUT --set export.kernels=plugins --set 'export.precisions=[fp16]'
    hcf build -m OUT --set 'build.plugins=[GroupNormSiLU, AddGroupNormSiLU]'

A graph exported so has a node of the domain hcf for every kernel. Those that are named become
plugins; of the others TensorRT compiles the function's body. There are plugins for what it does not
fuse by itself: norms that read and write NHWC with SiLU and the time embedding in them, and a
product with the gate in its epilogue. Attention is left to TensorRT's own kernels.

A plan with plugins runs where Python and hcf are. TensorRT-RTX has no plugins: its parser takes the
process down at the first one. Nothing here has run on a GPU yet.

Interface: TensorRT 10.12 and 11, "Adding Custom Layers Using the Python API".
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcf.errors import HcfError, RecipeError
from hcf.export.inspect import read_graph

DOMAIN = "hcf"
VERSION, NAMESPACE = "1", ""  # what TensorRT's parser looks for where a node names neither
NORM: dict[str, type] = {"groups": int, "epsilon": float}
# {ONNX function: its attributes}
PLUGINS: dict[str, dict[str, type]] = {
    "GroupNorm": NORM,
    "GroupNormSiLU": NORM,
    "AddGroupNorm": NORM,
    "AddGroupNormSiLU": NORM,
    "ModulatedGroupNorm": NORM,
    "ModulatedGroupNormSiLU": NORM,
    "LayerNorm": {"epsilon": float},
    "GEGLU": {},
}


def require_plugins(trt: Any, graph: Path, names: Sequence[str]) -> None:
    """RecipeError for a plugin that is unknown, not in `graph`, or that `trt` cannot have."""
    if not names:
        return
    if unknown := [name for name in names if name not in PLUGINS]:
        raise RecipeError(f"no plugin {unknown[0]!r}", fix=f"use {', '.join(PLUGINS)}")
    if not hasattr(trt.INetworkDefinition, "add_plugin_v3"):
        raise RecipeError(
            f"{trt.__name__} {trt.__version__} has no plugins",
            fix="use build.tensorrt_driver: tensorrt, or leave build.plugins out",
        )
    found = _nodes(graph)
    if missing := [name for name in names if name not in found]:
        raise RecipeError(
            f"{graph.name} has no node {missing[0]}: it has {', '.join(found) or 'none'} of hcf",
            fix="export with export.kernels: plugins, and name what the graph has",
        )


def require_in_network(trt: Any, network: Any, graph: Path, names: Sequence[str]) -> None:
    """HcfError unless every node of `graph` with one of these names became a plugin layer."""
    found = _nodes(graph)
    wanted = sum(found[name] for name in names)
    layers = (network.get_layer(i) for i in range(network.num_layers))
    made = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if made != wanted:
        raise HcfError(
            f"{trt.__name__} {trt.__version__} made {made} plugin layers of the {wanted} nodes "
            f"{', '.join(names)} of {graph.name}",
            fix="leave build.plugins out",
        )


def register(trt: Any, names: Sequence[str], alone: bool = False) -> None:
    """Makes the plugins known to TensorRT in this process; `alone`: and no other of ours.

    The parser takes every function that it knows a plugin of.
    """
    registry = trt.get_plugin_registry()
    for name, creator in _creators(trt.__name__).items():
        known = registry.get_creator(name, VERSION, NAMESPACE) is not None
        if name in names and not known and not registry.register_creator(creator, NAMESPACE):
            raise HcfError(f"{trt.__name__} does not take the plugin {name}")
        if alone and known and name not in names:
            registry.deregister_creator(creator)


def compute(name: str, inputs: Sequence[Tensor], y: Tensor, attributes: Mapping[str, Any]) -> None:
    """The function `name` of `inputs` into y; shapes as in `hcf.export.function_bodies`."""
    from hcf_kernels.gpu import geglu, group_norm_silu, layer_norm

    x, *add_of_it, weight, bias = inputs
    if name == "GEGLU":
        geglu.launch(x.flatten(0, -2), weight, bias, out=y.flatten(0, -2))
        return
    if name == "LayerNorm":
        layer_norm.launch(x, weight, bias, attributes["epsilon"], out=y)
        return
    weight, bias = (t.flatten(1) if t.ndim > 1 else t for t in (weight, bias))
    add = add_of_it[0].flatten(1) if add_of_it else None
    activation = "silu" if name.endswith("SiLU") else "none"
    group_norm_silu.launch(
        x, weight, bias, attributes["groups"], attributes["epsilon"], activation, add, out=y
    )


def tensor_at(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: str, nhwc: bool = False
) -> Tensor:
    """A tensor (B, C, ...) over memory that somebody else owns; `nhwc`: channels lie together."""
    dims = (shape[0], *shape[2:], shape[1]) if nhwc else tuple(shape)
    size = int(np.prod(dims)) * dtype.itemsize
    raw = torch.as_tensor(_Memory(address, size), device=device) if device == "cuda" else _on_host(
        address, size
    )  # fmt: skip
    tensor = raw.view(dtype).view(dims)
    return tensor.movedim(-1, 1) if nhwc else tensor


class _Memory:
    """Bytes on the GPU, as torch takes them from others."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def _on_host(address: int, size: int) -> Tensor:
    import ctypes

    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _nodes(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in read_graph(graph).graph.node if node.domain == DOMAIN)


@cache
def _creators(module: str) -> dict[str, Any]:
    """{name: plugin creator} for a TensorRT package; it keeps none of them alive."""
    trt: Any = importlib.import_module(module)
    kinds = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
    }
    fields = {
        int: (np.int32, trt.PluginFieldType.INT32),
        float: (np.float32, trt.PluginFieldType.FLOAT32),
    }

    def collection(values: Mapping[str, np.ndarray], of: Mapping[str, type]) -> Any:
        made = [trt.PluginField(name, values[name], fields[kind][1]) for name, kind in of.items()]
        return trt.PluginFieldCollection(made)

    class Kernel(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """One node. `attributes`: those of its function."""

        device = "cuda"

        def __init__(self, name: str, attributes: Mapping[str, Any]) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version = name, VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = 1
            self.timing_cache_id = self.metadata_string = ""
            self.format_combination_limit = 8
            self.attributes = dict(attributes)
            # TensorRT reads them where they lie
            self.held = {
                key: np.array([attributes[key]], fields[kind][0])
                for key, kind in PLUGINS[name].items()
            }

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = Kernel(self.plugin_name, self.attributes)
            copy.device = self.device
            return copy

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            y = trt.DimsExprs(inputs[0])
            if self.plugin_name == "GEGLU":  # weight (2N, K)
                half = trt.DimensionOperation.FLOOR_DIV
                y[len(y) - 1] = builder.operation(half, inputs[1][0], builder.constant(2))
            return [y]

        def supports_format_combination(
            self, pos: int, in_out: Sequence[Any], num_inputs: int
        ) -> bool:
            here, x = in_out[pos].desc, in_out[0].desc
            if here.type not in kinds or here.type != x.type:
                return False
            is_image = "GroupNorm" in self.plugin_name and len(x.dims) == 4
            if pos == num_inputs and is_image:
                return bool(here.format == x.format)
            if pos == 0 and is_image and here.type != trt.DataType.FLOAT and here.dims[1] % 8 == 0:
                return here.format in (trt.TensorFormat.LINEAR, trt.TensorFormat.HWC8)
            return bool(here.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0  # what the kernels need comes from torch's allocator, in stream order

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return collection(self.held, PLUGINS[self.plugin_name])

        def enqueue(
            self, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int],
            outputs: Sequence[int], workspace: int, stream: int,
        ) -> None:  # fmt: skip
            def tensors(descriptions: Sequence[Any], addresses: Sequence[int]) -> list[Tensor]:
                return [
                    tensor_at(address, tuple(d.dims), kinds[d.type], self.device,
                              nhwc=d.format == trt.TensorFormat.HWC8)
                    for d, address in zip(descriptions, addresses, strict=True)
                ]  # fmt: skip

            on_gpu = self.device == "cuda"
            with torch.cuda.stream(torch.cuda.ExternalStream(stream) if on_gpu else None):
                (y,) = tensors(output_desc, outputs)
                compute(self.plugin_name, tensors(input_desc, inputs), y, self.attributes)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self, name: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            self.held = {key: np.zeros(0, fields[kind][0]) for key, kind in PLUGINS[name].items()}
            self.field_names = collection(self.held, PLUGINS[name])

        def create_plugin(self, layer: str, given: Any, phase: Any) -> Any:
            values = {f.name: np.array(f.data).flatten() for f in given}
            attributes = {key: kind(values[key][0]) for key, kind in PLUGINS[self.name].items()}
            return Kernel(self.name, attributes)

    return {name: Creator(name) for name in PLUGINS}
