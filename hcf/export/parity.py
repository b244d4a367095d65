"""Graphs run and compared with torch, and what overflows in float16 found before it does.

fp32 and fp16 graphs run on ONNX Runtime's CPU provider; its fp16 convolutions and products compute
in float32 between float16 tensors. It has no bf16 convolution: bf16 graphs run on OpenVINO, or on
ONNX's reference evaluator where they are small. Where none can run a graph the record says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError, MissingDependency
from hcf.export.component import relative_error
from hcf.export.graphs import EXTERNAL_FROM_BYTES
from hcf.export.precision import FP16_LIMIT, ISLAND_MODULES, MASK, matching

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Case = Mapping[str, Tensor]

NOT_CHECKED = "not checked"
LARGE_BYTES = EXTERNAL_FROM_BYTES  # weights beside the graph are used where they are mapped
REFERENCE_BYTES = 32 * 2**20  # of graph: the reference evaluator is slow


def torch_outputs(module: nn.Module, cases: Sequence[Case]) -> list[tuple[Tensor, ...]]:
    """What `module` gives for each case: its tensors in order."""
    found: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for case in cases:
            out = module(*case.values())
            found.append(out if isinstance(out, tuple) else (out,))
    return found


def compare(
    run: Runner, cases: Sequence[Case], wanted: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """{shape of the first input: relative L2 error of the worst output}."""
    errors: dict[str, float] = {}
    for case, tensors in zip(cases, wanted, strict=True):
        found = run(case).values()
        shape = "x".join(str(size) for size in next(iter(case.values())).shape)
        errors[shape] = max(relative_error(f, w) for f, w in zip(found, tensors, strict=True))
    return errors


def open_runner(path: Path, precision: str) -> tuple[Runner | None, str]:
    """(a function that runs `path`, on what it runs): (None, why not) where nothing here can."""
    if precision != "bf16":
        return graph_session(path), _version("onnxruntime") + " CPU"
    # converted to float32, large weights would take twice their memory and once more repacked
    arithmetic = "bf16" if _is_large(path) else "f32"
    try:
        return _openvino(path, arithmetic), f"{_version('openvino')} CPU, {arithmetic} arithmetic"
    except ImportError:
        pass
    if path.stat().st_size <= REFERENCE_BYTES and not _external(path).exists():
        return _reference(path), _version("onnx") + " reference evaluator"
    return None, f"{NOT_CHECKED}: bf16 needs openvino here (pip install openvino)"


def graph_runner(path: Path, options: Any = None) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that runs an ONNX file on ONNX Runtime's CPU provider: inputs -> first output."""
    run = graph_session(path, options)
    return lambda inputs: next(iter(run(inputs).values()))


def graph_session(path: Path, options: Any = None) -> Runner:
    """A function that runs an ONNX file on ONNX Runtime's CPU provider: inputs -> outputs."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "checking an export against torch needs onnxruntime",
            fix="pip install 'hcf-toolkit[onnx]'",
        ) from error
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if _is_large(path):
        # nothing that copies weights, folded to float32 or repacked, is worth it for a few runs
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = session.run(None, feed)
        return {n: torch.from_numpy(array) for n, array in zip(names, found, strict=True)}

    return run


def _openvino(path: Path, arithmetic: str) -> Runner:
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        return {
            output.any_name: torch.from_numpy(found[output].copy()) for output in compiled.outputs
        }

    return run


def _reference(path: Path) -> Runner:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        arrays = evaluator.run(None, feed)
        return {
            name: torch.from_numpy(array.astype("float32"))
            for name, array in zip(evaluator.output_names, arrays, strict=True)
        }

    return run


def require_in_float16(
    component: str, module: nn.Module, case: Case, patterns: Sequence[str] = ()
) -> float:
    """Largest value that a fp16 graph of `module` holds outside its islands, for one case.

    The module runs in float32 and every tensor is looked at, attention scores included. Raises
    HcfError naming the first layer whose output float16 cannot hold.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    stack: list[tuple[str, str]] = []  # (module, its class) of the calls that are going on
    largest = [0.0]

    class Look(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
                if not _in_island(stack, patterns):
                    largest.append(_amax(out))
                    if largest[-1] > FP16_LIMIT:
                        raise _overflow(component, stack, func, largest[-1])
            return out

    look = Look()  # type: ignore[no-untyped-call]
    with _followed(module, stack), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), look:
        module(*case.values())
    return max(largest)


def _amax(x: Tensor) -> float:
    """Largest absolute value; what hides keys from a softmax does not count."""
    low, high = (float(v) for v in torch.aminmax(x))
    if low > MASK:
        return max(-low, high)
    seen = x[x > MASK]
    return float(seen.abs().max()) if seen.numel() else 0.0


def _in_island(stack: Sequence[tuple[str, str]], patterns: Sequence[str]) -> bool:
    if any(kind in ISLAND_MODULES for _, kind in stack):
        return True
    return matching((name for name, _ in stack), patterns) is not None


def _overflow(component: str, stack: Sequence[tuple[str, str]], func: Any, amax: float) -> HcfError:
    name = stack[-1][0].partition(".")[2] if stack else ""
    return HcfError(
        f"{component}: {name or component} ({func.__name__}) reaches {amax:.3g}, beyond float16's "
        f"{FP16_LIMIT:.0f}",
        fix=f"use bf16, or keep it in float32 with export.islands: [{name or component}]",
    )


@contextlib.contextmanager
def _followed(module: nn.Module, stack: list[tuple[str, str]]) -> Iterator[None]:
    """Inside, `stack` holds the names and classes of the modules that are being called."""

    def enter(entry: tuple[str, str], called: nn.Module, args: Any) -> None:
        stack.append(entry)

    def leave(called: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles: list[Any] = []
    for name, child in module.named_modules():
        hook = partial(enter, (name, type(child).__name__))
        handles.append(child.register_forward_pre_hook(hook))
        handles.append(child.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _external(path: Path) -> Path:
    """Where the weights of a graph too large for one file are."""
    return path.with_name(path.name + ".data")


def _is_large(path: Path) -> bool:
    data = _external(path)
    return data.exists() and data.stat().st_size > LARGE_BYTES


def _version(package: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)}"
