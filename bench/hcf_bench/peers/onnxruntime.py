"""ONNX Runtime: fp32 and INT8 on the CPU, fp16 on a GPU by its CUDA or its TensorRT provider.

On the CPU the graph is optimised into a file first, so that what runs can be counted in it. On the
GPU inputs and output stay in torch's memory, and a node the provider does not take is an error.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hcf.engines import EngineReport, require_layers
from hcf.engines.onnxruntime import FLOAT_OPERATORS, OnnxRuntimeEngine, optimise
from hcf.engines.reduce_range import int8_saturates
from hcf.errors import HcfError
from hcf_bench.peers import (
    Check,
    Peer,
    PeerOptions,
    Prepared,
    import_package,
    installed,
    missing_unless,
)
from hcf_bench.peers.onnx_graph import PIP, export_graph, feeds, move_in, quiet, release

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

PIP_GPU = "onnxruntime-gpu>=1.28"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
QUANTISED = ("Conv", "MatMul", "Gemm")
TYPES = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}


def prepare_cpu(case: Case, options: PeerOptions, precision: str) -> Prepared:
    """The case on the CPU provider, in fp32 or INT8."""
    graph = export_graph(case, options.folder)
    release(case)
    details: dict[str, Any] = {}
    if precision == "int8":
        graph = quantise(graph, feeds(case))
        details["notes"] = (
            "u8 activations, s8 weights a channel; calibrated on the case's own random input: its "
            "speed and rounding mean something, its quality does not"
        )
        if int8_saturates():
            details["notes"] += "; reduce_range, as this CPU has no VNNI"
    optimised = graph.with_name(f"{graph.stem}-optimised.onnx")
    optimise(graph, optimised, options.threads)
    engine = OnnxRuntimeEngine(optimised, case.workload.name, precision, options.threads)
    inputs = case.inputs

    def run() -> Tensor:
        (output,) = engine(inputs).values()
        return output

    details["threads"] = engine.session.get_session_options().intra_op_num_threads
    return Prepared(run, report=asdict(engine.report) | details)


def quantise(graph: Path, inputs: dict[str, Any]) -> Path:
    """`graph` in the INT8 form of the CPU provider, beside it; written unless it is there.

    Static ranges, from running `inputs` once. Products of two activations stay as they are.
    """
    target = graph.with_name(f"{graph.stem}-u8s8.onnx")
    if target.is_file():
        return target
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = graph.with_name(graph.name + ".data").is_file()
    with tempfile.TemporaryDirectory(dir=graph.parent) as work, quiet():
        prepared, quantised = Path(work) / "prepared.onnx", Path(work) / target.name
        quant_pre_process(
            str(graph), str(prepared), skip_symbolic_shape=True, save_as_external_data=large
        )
        quantize_static(
            str(prepared),
            str(quantised),
            _reader(inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(QUANTISED),
            reduce_range=int8_saturates(),
            use_external_data_format=large,
        )
        move_in(Path(work), target)
    return target


def prepare_gpu(
    case: Case, options: PeerOptions, provider: str, cuda_graph: bool = False
) -> Prepared:
    """The case, built in fp16 on the GPU, on one provider; every node has to run there."""
    ort = import_package("onnxruntime", PIP_GPU)
    graph = export_graph(case, options.folder, for_cuda_provider=provider == CUDA)
    release(case)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = _gpu_session(ort, graph, settings, provider, options, cuda_graph)
    if session.get_providers()[0] != provider:
        raise HcfError(
            f"onnxruntime {ort.__version__} was asked for {provider} and runs "
            f"{session.get_providers()}",
            fix=f"pip install '{PIP_GPU}', without onnxruntime beside it",
        )
    run = _bound(session, case.inputs, torch.device(options.device))
    report = EngineReport(
        engine="onnxruntime",
        version=str(ort.__version__),
        component=case.workload.name,
        device=options.device,
        provider=provider,
        precision="fp16",
        layer_precisions=_stored_layers(graph),
    )
    return Prepared(
        run,
        report=asdict(require_layers(report))
        | {
            "cuda_graph": cuda_graph,
            "provider_options": session.get_provider_options().get(provider, {}),
            "io_binding": True,
            "notes": "layers counted in the exported graph; no node falls back to the CPU",
        },
    )


def _gpu_session(
    ort: Any, graph: Path, settings: Any, provider: str, options: PeerOptions, cuda_graph: bool
) -> Any:
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as torch brings them
    index = torch.device(options.device).index or 0
    chosen: dict[str, Any] = {"device_id": index}
    if provider == CUDA:
        chosen |= {"use_tf32": "0", "enable_cuda_graph": "1" if cuda_graph else "0"}
    else:
        chosen |= {"trt_fp16_enable": "1", "trt_cuda_graph_enable": "1" if cuda_graph else "0"}
    try:
        return ort.InferenceSession(str(graph), settings, providers=[(provider, chosen)])
    except Exception as error:  # its error classes share no base but Exception
        raise HcfError(
            f"onnxruntime {ort.__version__} cannot run {graph.name} on {provider} alone: {error}",
            fix="use a torch peer",
        ) from error


def _bound(
    session: Any, inputs: Mapping[str, Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """A run over inputs and an output that stay where they are on the GPU."""
    inputs = {name: tensor.to(device).contiguous() for name, tensor in inputs.items()}
    (result,) = session.get_outputs()
    output = torch.empty(result.shape, dtype=TYPES[result.type], device=device)
    held = [*inputs.values(), output]  # the binding knows addresses only
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_input(value.name, *_placed(inputs[value.name]))
    binding.bind_output(result.name, *_placed(output))

    def run() -> Tensor:
        # on a stream of its own, which it waits for before it returns
        session.run_with_iobinding(binding)
        return held[-1].clone()

    torch.cuda.synchronize(device)
    return run


def _placed(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Device, its index, numpy type, shape and address, as a binding wants them."""
    kind = getattr(np, str(tensor.dtype).removeprefix("torch."))
    index = tensor.device.index or 0
    return tensor.device.type, index, kind, tuple(tensor.shape), tensor.data_ptr()


def _reader(inputs: dict[str, Any]) -> Any:
    """ONNX Runtime's iterator protocol over one set of inputs."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [inputs]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    return Reader()


def _stored_layers(graph: Path) -> dict[str, int]:
    """Convolutions and products of an exported graph by the type of their weights."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False).graph
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    types = {tensor.name: names.get(tensor.data_type, "other") for tensor in model.initializer}
    layers = [node for node in model.node if node.op_type in FLOAT_OPERATORS]
    return dict(Counter(types[n.input[1]] for n in layers if n.input[1] in types))


def _provides(provider: str) -> Check:
    def check(device: str) -> str:
        import onnxruntime as ort

        if provider not in ort.get_available_providers():
            return f"this onnxruntime has no {provider}: pip install '{PIP_GPU}'"
        if provider == TENSORRT and not (find_spec("tensorrt") or find_spec("tensorrt_libs")):
            return f"{provider} needs the TensorRT libraries: pip install tensorrt"
        return ""

    return check


_EXPORT = (installed("onnx", PIP), installed("onnxscript", PIP))


def _cpu(name: str, precision: str, min_sqnr_db: float) -> Peer:
    return Peer(
        name=name,
        dtype="fp32",
        min_sqnr_db=min_sqnr_db,
        devices=("cpu",),
        kinds=("module",),
        missing=missing_unless(("cpu",), *_EXPORT, installed("onnxruntime", PIP)),
        prepare=lambda case, options: prepare_cpu(case, options, precision),
    )


def _gpu(name: str, provider: str, cuda_graph: bool = False) -> Peer:
    return Peer(
        name=name,
        dtype="fp16",
        min_sqnr_db=35.0,
        devices=("cuda",),
        kinds=("module",),
        missing=missing_unless(
            ("cuda",), *_EXPORT, installed("onnxruntime", PIP_GPU), _provides(provider)
        ),
        prepare=lambda case, options: prepare_gpu(case, options, provider, cuda_graph),
    )


ADAPTED = (
    _cpu("onnxruntime", "fp32", 60.0),
    _cpu("onnxruntime-int8", "int8", 10.0),
    _gpu("onnxruntime-cuda-fp16", CUDA),
    _gpu("onnxruntime-cuda-fp16-graph", CUDA, cuda_graph=True),
    _gpu("onnxruntime-tensorrt-fp16", TENSORRT),
)
