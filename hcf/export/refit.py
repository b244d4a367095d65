"""Other weights into an exported graph: another LoRA set in seconds, without exporting again.

The exporter keeps a parameter under its name ("denoiser.conv_in.weight"), or folds it: a Linear's
weight is stored transposed under a name of its own, a group norm's as (C, 1, 1), and tensors with
equal contents are one. So parameters are found by the nodes that read them: the module that made a
node (its scopes) and the operator's input say which one it is. Where two parameters that were one
tensor differ now, each reader gets its own.

Always refit from the graph that was exported, never from one that was refitted: A, then B, then A
then ends where it began.
"""

from __future__ import annotations

import ast
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcf.errors import HcfError, InvalidArtifact, MissingDependency
from hcf.export.passes import SCOPES_KEY
from hcf.quantize.ranges import rescale as rescale

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# (operator, input) -> the parameter of the module that made the node
INPUTS = {
    ("Conv", 1): "weight", ("Conv", 2): "bias",
    ("ConvTranspose", 1): "weight", ("ConvTranspose", 2): "bias",
    ("Gemm", 1): "weight", ("Gemm", 2): "bias",
    ("MatMul", 1): "weight", ("Gather", 0): "weight",
    ("Add", 0): "bias", ("Add", 1): "bias", ("Mul", 0): "weight", ("Mul", 1): "weight",
    ("LayerNormalization", 1): "weight", ("LayerNormalization", 2): "bias",
    ("GroupNormalization", 1): "weight", ("GroupNormalization", 2): "bias",
    ("RMSNormalization", 1): "weight",
    ("BatchNormalization", 1): "weight", ("BatchNormalization", 2): "bias",
    ("BatchNormalization", 3): "running_mean", ("BatchNormalization", 4): "running_var",
}  # fmt: skip
SAME_ORDER = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze")
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "MatMulInteger", "MatMulNBits")
TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}  # TensorProto
ALIGNMENT = 4096  # of external tensors, so that runtimes can map them
PIECE = 2**20  # bytes compared at a time
REEXPORT = "export the model again: `hcf export`, or hcf.accelerate on the pipeline"


@dataclass(frozen=True)
class RefitCounts:
    """`found` parameters have a tensor in the graph, of which `changed` now has other values;
    `unused` belong to parts that are not in the graph. `tensors`, `bytes`: what was written."""

    found: int
    changed: int
    unused: int
    tensors: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.changed} of {self.found} parameters changed, {self.tensors} tensors, "
            f"{self.bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class _Site:
    """Input `index` of the node at `position`, an initializer, is parameter `name`."""

    name: str
    node: NodeProto
    position: int
    index: int
    transposed: bool

    @property
    def source(self) -> str:
        return str(self.node.input[self.index])


@dataclass(frozen=True)
class _Change:
    """Readers of initializer `source` that need `value`, which it does not have."""

    name: str
    source: str
    sites: tuple[_Site, ...]
    value: Tensor


@dataclass(frozen=True)
class _Plan:
    """Where each parameter is read; parameters of parts that the graph does not have."""

    sites: dict[str, list[_Site]]
    unused: list[str]


def refit_graph(graph: Path, weights: Mapping[str, Tensor], output: Path) -> RefitCounts:
    """Write `output`: floating-point export `graph` with `weights` {name in the module: tensor}.

    Tensors are converted to the graph's types. Raises InvalidArtifact where a parameter is not in
    the graph though its part is, or has another shape; HcfError for values that the graph's type
    cannot hold, and for a graph that is quantised, has no scopes, or is `output`. Then `output` is
    as it was.
    """
    if output.exists() and output.samefile(graph):
        raise HcfError(f"{graph} would be overwritten by its refit", fix="write another file")
    model = _load(graph)
    plan = _plan(model.graph, weights, graph)
    output.parent.mkdir(parents=True, exist_ok=True)
    data = output.with_name(f"{output.name}.data")
    temporary, temporary_data = (p.with_name(f".{p.name}.tmp") for p in (output, data))
    changes, written, moved = Counter[str](), 0, set[str]()
    external = any(map(_is_external, model.graph.initializer))
    readers = _readers(model.graph)
    try:
        with open(temporary_data, "wb") as stream:
            for change in _changes(model.graph, plan, weights, graph):
                tensor = _own_tensor(model.graph, change, readers)
                values = _bytes(change.value)
                if external:
                    _write_external(tensor, values, stream, data.name)
                    moved.add(tensor.name)
                else:
                    _clear(tensor)
                    tensor.raw_data = values.tobytes()
                changes[change.name] += 1
                written += values.nbytes
            for tensor in model.graph.initializer:
                if _is_external(tensor) and tensor.name not in moved:
                    _write_external(tensor, _raw(tensor, graph), stream, data.name)
        temporary.write_bytes(model.SerializeToString())
        if external:
            temporary_data.replace(data)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_data.unlink(missing_ok=True)
    if not external:
        data.unlink(missing_ok=True)  # of what was there before
    return RefitCounts(len(plan.sites), len(changes), len(plan.unused), changes.total(), written)


def refit_weights(graph: Path, weights: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """{initializer: new value} of what differs from `graph`, for engines that take weights by name.

    bfloat16 values are ml_dtypes' arrays, as onnx's own. They belong into an engine as it was built
    from `graph`, not into one that was refitted before. Raises as `refit_graph`, and HcfError where
    parameters that share an initializer differ now.
    """
    from onnx.helper import tensor_dtype_to_np_dtype

    model = _load(graph)
    readers = _readers(model.graph)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found: dict[str, NDArray[Any]] = {}
    plan = _plan(model.graph, weights, graph)
    for change in _changes(model.graph, plan, weights, graph):
        if len(change.sites) < readers[change.source]:
            raise HcfError(
                f"{change.name} has shared the tensor {change.source} of {graph.name} with other "
                "parameters, and differs from them now",
                fix="build the engine from the output of refit_graph",
            )
        kind = tensor_dtype_to_np_dtype(kinds[change.source])
        found[change.source] = _bytes(change.value).view(kind).reshape(tuple(change.value.shape))
    return found


def _plan(graph: GraphProto, weights: Mapping[str, Tensor], path: Path) -> _Plan:
    """Finds every parameter; InvalidArtifact for one that should be in the graph and is not."""
    kinds = sorted({node.op_type for node in graph.node} & set(QUANTISED))
    if kinds:
        raise HcfError(
            f"{path} is quantised ({kinds[0]}): other weights need other ranges",
            fix="refit the fp32 graph, rescale the ranges and quantise it again",
        )
    scopes = [_scopes(node) for node in graph.node]
    wrapper = _wrapper(scopes, weights, path)
    sites: dict[str, list[_Site]] = defaultdict(list)
    for site in _sites(graph, weights, scopes, wrapper):
        sites[site.name].append(site)
    parts = {_inner(name, wrapper).partition(".")[0] for names in scopes for name in names}
    unused = []
    for name in weights:
        if name in sites:
            continue
        if name.partition(".")[0] not in parts:
            unused.append(name)
        elif not _is_held(graph, weights[name].detach(), path):
            raise InvalidArtifact(
                f"{name} {tuple(_held(weights, name).shape)} of the model is not in {path}, or in "
                "another shape: the graph is of another model, or the exporter folded it",
                fix=REEXPORT,
            )
    return _Plan(dict(sites), unused)


def _changes(
    graph: GraphProto, plan: _Plan, weights: Mapping[str, Tensor], path: Path
) -> Iterator[_Change]:
    """What has to be written, found by comparing bits with what `graph` holds."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    claims: dict[tuple[int, int], set[str]] = defaultdict(set)
    for site in (site for sites in plan.sites.values() for site in sites):
        claims[site.position, site.index].add(site.name)
    for name in weights:  # in its order: the tensors of an adapted layer are computed together
        groups: dict[tuple[str, bool], list[_Site]] = defaultdict(list)
        for site in plan.sites.get(name, []):
            groups[site.source, site.transposed].append(site)
        value = weights[name].detach() if groups else torch.empty(0)
        for (source, transposed), sites in groups.items():
            new = _stored(value, tensors[source], transposed)
            if _equal(_bytes(new), _raw(tensors[source], path)):
                continue
            if not torch.isfinite(new).all():
                raise HcfError(
                    f"{name} has values up to {float(value.float().abs().max()):.3g}, which "
                    f"{str(new.dtype).removeprefix('torch.')} cannot hold",
                    fix="refit the fp32 graph",
                )
            for other in {o for site in sites for o in claims[site.position, site.index]} - {name}:
                same = _stored(weights[other].detach(), tensors[source], transposed)
                if not torch.equal(same, new):
                    raise HcfError(
                        f"{name} and {other} were equal and are read as one in {path}; now they "
                        "differ",
                        fix=REEXPORT,
                    )
            yield _Change(name, source, tuple(sites), new)


def _sites(
    graph: GraphProto, weights: Mapping[str, Tensor], scopes: list[list[str]], wrapper: int
) -> Iterator[_Site]:
    """Every read of a parameter, also through casts and transpositions of what is stored."""
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in TYPES}
    nodes = list(graph.node)
    producers = {output: i for i, node in enumerate(nodes) for output in node.output}
    layers = {name.rpartition(".")[0] for name in weights}
    layers |= {layer[:i] for layer in layers for i, letter in enumerate(layer) if letter == "."}
    seen: set[tuple[int, int, str]] = set()
    for place, node in enumerate(nodes):
        around = [_inner(name, wrapper) for name in scopes[place][:-1]]
        layer = next((name for name in reversed(around) if name in layers), None)
        if node.op_type == "InstanceNormalization" and "group_norm" in scopes[place][-1]:
            continue  # how a group norm begins: its ones and zeros are no parameters
        for index in range(len(node.input)):
            reader, at, transposed = _through(nodes, place, index, producers)
            if (tensor := tensors.get(nodes[reader].input[at])) is None:
                continue
            stored_as, kind = _inner(tensor.name, wrapper), INPUTS.get((node.op_type, index), "")
            of_layer = f"{layer}.{kind}" if layer else kind
            candidates = (stored_as, of_layer)
            if layer is not None and stored_as.rpartition(".")[0] != layer:
                candidates = (of_layer, stored_as)  # the name of another that had equal contents
            for name in candidates:
                if name in weights and _fits(_held(weights, name), tensor, transposed):
                    if (reader, at, name) not in seen:
                        seen.add((reader, at, name))
                        yield _Site(name, nodes[reader], reader, at, transposed)
                    break


def _through(
    nodes: Sequence[NodeProto], place: int, index: int, producers: Mapping[str, int]
) -> tuple[int, int, bool]:
    """Which node reads at which input what `nodes[place]` gets at `index`, before casts and
    transpositions; and whether a torch weight (O, I) arrives there as (I, O)."""
    node = nodes[place]
    transposed = index == 1 and (
        node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB", 0))
    )
    while (maker := producers.get(nodes[place].input[index])) is not None:
        node = nodes[maker]
        if node.op_type == "Transpose" and list(_attribute(node, "perm", [1, 0])) == [1, 0]:
            transposed = not transposed
        elif node.op_type not in SAME_ORDER:
            break
        place, index = maker, 0
    return place, index, transposed


def _scopes(node: NodeProto) -> list[str]:
    """Names of the modules around a node, outermost first, then its torch function."""
    text = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "")
    names = ast.literal_eval(text) if text.startswith("[") else []
    return [str(name) for name in names] or [""]


def _wrapper(scopes: Iterable[list[str]], weights: Mapping[str, Tensor], path: Path) -> int:
    """How many names an exported wrapper put in front: 1 where it says "denoiser.conv_in"."""
    layers = {name.rpartition(".")[0] for name in weights} - {""}
    depths = Counter[int]()
    for name in (name for names in scopes for name in names):
        for depth in (0, 1, 2):
            depths[depth] += name.count(".") >= depth and _inner(name, depth) in layers
    depth, count = max(depths.items(), key=lambda item: (item[1], -item[0]), default=(0, 0))
    if not count:
        raise HcfError(
            f"no node of {path} names a layer of this model: it is another one's, or was written "
            "by the torchscript exporter",
            fix="export this model with export.exporter dynamo",
        )
    return depth


def _inner(name: str, wrapper: int) -> str:
    return name.split(".", wrapper)[-1] if name.count(".") >= wrapper else ""


def _held(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of the shape of `weights[name]`, without adapters being merged for it."""
    return getattr(weights, "base", weights.__getitem__)(name)


def _fits(value: Tensor, tensor: TensorProto, transposed: bool) -> bool:
    """Whether the shapes are the same but for sizes of 1."""
    shape = [size for size in value.shape if size != 1]
    stored = [size for size in tensor.dims if size != 1]
    return stored == (shape[::-1] if transposed else shape)


def _stored(value: Tensor, tensor: TensorProto, transposed: bool) -> Tensor:
    """`value` in the type, order and shape of `tensor`."""
    value = value.to("cpu", TYPES[tensor.data_type])
    value = value.squeeze().T if transposed else value
    return value.reshape(tuple(tensor.dims)).contiguous()


def _is_held(graph: GraphProto, value: Tensor, path: Path) -> bool:
    """Whether an initializer is `value` as it is now: a parameter whose reader does not say what
    it reads. Position embeddings are folded to their first rows, (1, S, D) of (S', D)."""
    for tensor in graph.initializer:
        size, dims = prod(tensor.dims), [n for n in tensor.dims if n != 1]
        whole = size == value.numel()
        rows = len(dims) == 2 and value.ndim == 2 and dims[1] == value.shape[1]
        if tensor.data_type not in TYPES or not (whole or (rows and size < value.numel())):
            continue
        held = _raw(tensor, path)
        for order in (value, value.T) if whole and value.ndim == 2 else (value,):
            row = order.reshape(-1)[:size].to("cpu", TYPES[tensor.data_type])
            constant = bool((row == row[0]).all())  # which says nothing of other rows
            if _equal(_bytes(row), held) and (whole or not constant):
                return True
    return False


def _readers(graph: GraphProto) -> Counter[str]:
    """How many inputs of nodes each tensor is."""
    return Counter(name for node in graph.node for name in node.input)


def _own_tensor(graph: GraphProto, change: _Change, readers: Counter[str]) -> TensorProto:
    """The initializer to write: `source` itself, or a copy where others still read that one."""
    tensor = next(t for t in graph.initializer if t.name == change.source)
    if readers[change.source] == len(change.sites):
        return tensor
    names = {t.name for t in graph.initializer}
    name = next(n for i in itertools.count() if (n := f"{change.name}.refit{i}") not in names)
    own = graph.initializer.add()
    own.CopyFrom(tensor)
    own.name = name
    for site in change.sites:
        site.node.input[site.index] = name
    readers[change.source] -= len(change.sites)
    readers[name] = len(change.sites)
    return own


def _load(path: Path) -> ModelProto:
    """The graph, external tensors left where they are."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency(
            f"refitting needs {error.name}", fix="pip install 'hcf-toolkit[onnx]'"
        ) from error
    if not path.is_file():
        raise InvalidArtifact(f"{path} does not exist", fix="run `hcf export` first")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, whose package has no types
        raise InvalidArtifact(f"{path} is not an ONNX file: {error}", fix=REEXPORT) from error


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == 1  # TensorProto.EXTERNAL


def _raw(tensor: TensorProto, path: Path) -> NDArray[np.uint8]:
    """The bytes of an initializer of graph `path`, mapped where they are in another file."""
    if not _is_external(tensor):
        if tensor.HasField("raw_data"):
            return np.frombuffer(tensor.raw_data, np.uint8)
        from onnx import numpy_helper

        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    where = {entry.key: entry.value for entry in tensor.external_data}
    file, size = path.with_name(where["location"]), int(where["length"])
    offset = int(where.get("offset", 0))
    if not file.is_file() or file.stat().st_size < offset + size:
        raise InvalidArtifact(f"{file}, the weights of {path.name}, is not whole", fix=REEXPORT)
    return np.memmap(file, np.uint8, "r", offset, (size,)) if size else np.empty(0, np.uint8)


def _bytes(value: Tensor) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """In pieces: one that differs is as a rule told by its first, and not read from disk."""
    return len(one) == len(other) and all(
        np.array_equal(one[i : i + PIECE], other[i : i + PIECE]) for i in range(0, len(one), PIECE)
    )


def _clear(tensor: TensorProto) -> None:
    for name in ("float_data", "int32_data", "double_data", "raw_data", "external_data"):
        tensor.ClearField(name)


def _write_external(
    tensor: TensorProto, values: NDArray[np.uint8], stream: BinaryIO, location: str
) -> None:
    """Appends `values` to `stream`, which becomes file `location` beside the graph."""
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    offset = stream.tell()
    stream.write(values.data)
    _clear(tensor)
    tensor.data_location = 1
    for key, value in (("location", location), ("offset", offset), ("length", len(values))):
        tensor.external_data.add(key=key, value=str(value))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
