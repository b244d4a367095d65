"""INT8 weights in 7 bits, where a processor's kernels overflow on 8.

Those of x86 without VNNI multiply unsigned 8-bit activations with 8-bit weights by vpmaddubsw,
which adds two products in 16 bits and saturates: 2 * 255 * 127 is beyond 32767, 2 * 255 * 64 is
not. ONNX Runtime's quantisation calls the remedy `reduce_range`, NNCF `overflow_fix`. The graph on
disk keeps its 8 bits, which are right on every other machine; an engine is built from a copy.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hcf.engines import cpu_flags
from hcf.engines.products import MOVES, PRODUCTS, external_data

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

X86 = ("x86_64", "amd64", "i386", "i686")
NO_OVERFLOW = ("avx512_vnni", "avx_vnni", "amx_int8")


def int8_saturates() -> bool:
    """Whether this CPU is x86 without VNNI; one that does not say what it can do is taken to be."""
    return platform.machine().lower() in X86 and not cpu_flags().intersection(NO_OVERFLOW)


def weights_in_7_bits(precision: str) -> bool:
    """Whether the CPU form of this precision has its INT8 weights in 7 bits on this machine."""
    return precision in ("int8", "int8-bf16") and int8_saturates()


@contextmanager
def for_this_cpu(source: Path, precision: str, folder: Path) -> Iterator[Path]:
    """The graph to build from: `source`, or for a while a copy of it inside `folder`."""
    if not weights_in_7_bits(precision):
        yield source
        return
    import onnx

    model = onnx.load(str(source))
    reduce_range(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".hcf-") as work:
        graph = Path(work) / source.name
        large = external_data(source).is_file()
        location = external_data(graph).name
        onnx.save(model, str(graph), save_as_external_data=large, location=location)
        del model
        yield graph


def reduce_range(model: ModelProto) -> int:
    """Halves every stored INT8 weight of a product in place, to [-64, 64], and doubles its scale;
    its 32-bit bias, whose scale is that of weight times activation, likewise. Returns the number of
    weights; their external data must be loaded."""
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    halved: dict[str, int] = {}  # data type by initializer
    rescaled: set[str] = set()  # outputs of DequantizeLinear
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        for name, kind in zip(node.input[1:3], (TensorProto.INT8, TensorProto.INT32), strict=False):
            dequantize = makers.get(_origin(name, makers, (*MOVES, "Cast")))
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            stored = tensors.get(_origin(dequantize.input[0], makers, MOVES))
            if stored is None or stored.data_type != kind or dequantize.output[0] in rescaled:
                continue
            if stored.name not in halved:
                values = numpy_helper.to_array(stored)
                half = np.rint(values.astype(np.float64) / 2).astype(values.dtype)
                stored.CopyFrom(numpy_helper.from_array(half, stored.name))
                halved[stored.name] = kind
            scale = numpy_helper.to_array(tensors[dequantize.input[1]])
            own = f"{dequantize.output[0]}_doubled_scale"
            graph.initializer.append(numpy_helper.from_array(scale * scale.dtype.type(2), own))
            dequantize.input[1] = own
            rescaled.add(dequantize.output[0])
    return sum(kind == TensorProto.INT8 for kind in halved.values())


def _origin(name: str, makers: Mapping[str, NodeProto], moves: tuple[str, ...]) -> str:
    """The tensor that `name` is, before what only moves its values."""
    while (node := makers.get(name)) is not None and node.op_type in moves:
        name = node.input[0]
    return name
