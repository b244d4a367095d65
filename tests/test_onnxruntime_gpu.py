"""GPU engines: buffers, partitions and wheels are checked anywhere, the rest on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hcf.engines.device_buffers import InputBuffer, ShapeCache, Sizes, handed_out
from hcf.engines.onnxruntime import package, require_one_wheel
from hcf.engines.onnxruntime_gpu import (
    OnnxRuntimeGpuEngine,
    assigned_nodes,
    fallback_nodes,
    require_provider,
)
from hcf.errors import HcfError, MissingDependency
from hcf.export.component import relative_error

CPU = torch.device("cpu")


def test_an_input_is_copied_only_when_it_changed() -> None:
    buffer = InputBuffer((2, 3), torch.float16, CPU)
    source = torch.randn(2, 3)
    assert buffer.fill(source) and not buffer.fill(source)
    assert not buffer.fill(source.detach())  # another object over the same memory
    source.mul_(2)
    assert buffer.fill(source)  # changed in place
    assert torch.equal(buffer.tensor, source.half())
    assert buffer.fill(source.clone())  # other memory
    assert buffer.copies == 3


def test_tensors_without_a_version_are_always_copied() -> None:
    buffer = InputBuffer((2,), torch.float32, CPU)
    with torch.inference_mode():
        source = torch.ones(2)
        assert buffer.fill(source) and buffer.fill(source)


def test_another_view_of_the_same_memory_is_another_input() -> None:
    buffer = InputBuffer((2, 2), torch.float32, CPU)
    source = torch.arange(4.0).reshape(2, 2)
    buffer.fill(source)
    assert buffer.fill(source.t()) and torch.equal(buffer.tensor, source.t())


def test_outputs_outlive_the_next_call() -> None:
    single, half = torch.ones(3), torch.ones(3, dtype=torch.float16)
    kept = [handed_out(single), handed_out(half)]
    single.zero_()
    half.zero_()
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in kept)
    assert handed_out(torch.ones(1, dtype=torch.int64)).dtype == torch.int64


def test_the_shapes_used_last_are_kept() -> None:
    made: list[Sizes] = []
    waits: list[int] = []

    def make(sizes: Sizes) -> int:
        made.append(sizes)
        return len(made)

    cache: ShapeCache[int] = ShapeCache(2, make, lambda: waits.append(len(made)))
    for rows in (1, 2, 1, 3, 1, 2):
        cache({"x": torch.zeros(rows, 4)}, ["x"])
    assert [sizes[0][0] for sizes in made] == [1, 2, 3, 2]  # 2 had to go for 3
    assert len(waits) == 2 and len(cache.values) == 2


def product_graph(path: Path, kind: int = TensorProto.FLOAT) -> Path:
    """x (b, 16) -> softmax(x W) (b, 8)."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(dtype)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Softmax", ["h"], ["y"], name="softmax"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", kind, ["b", 16])],
        [helper.make_tensor_value_info("y", kind, ["b", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(path))
    return path


def test_the_partition_is_read_back(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(product_graph(tmp_path / "g.onnx")), options, providers=["CPUExecutionProvider"]
    )
    nodes = assigned_nodes(session)
    assert nodes == {"CPUExecutionProvider": {"MatMul": 1, "Softmax": 1}}
    assert fallback_nodes(nodes) == {"MatMul": 1, "Softmax": 1}
    on_gpu = {"CUDAExecutionProvider": {"Conv": 9}, "CPUExecutionProvider": {"Shape": 4, "Cast": 1}}
    assert fallback_nodes(on_gpu) == {}


def install(folder: Path, name: str, number: str) -> None:
    """Metadata of a distribution, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


def test_both_wheels_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_one_wheel()
    install(tmp_path, "onnxruntime-gpu", "1.31.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependency, match="both installed") as caught:
        package()
    assert "onnxruntime-gpu 1.31.1" in caught.value.message
    assert caught.value.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_a_missing_gpu_or_provider_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    graph = product_graph(tmp_path / "g.onnx")
    with pytest.raises(MissingDependency, match="finds no GPU"):
        OnnxRuntimeGpuEngine(graph, "unet", "fp32", "cuda")
    with pytest.raises(MissingDependency, match="CUDAExecutionProvider") as caught:
        require_provider(onnxruntime, "cuda")
    assert "onnxruntime-gpu" in caught.value.fix
    with pytest.raises(HcfError, match="does not run int8 on cuda"):
        OnnxRuntimeGpuEngine(graph, "unet", "int8", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_bound_runs_agree_and_outputs_are_kept(tmp_path: Path, provider: str) -> None:
    graph = product_graph(tmp_path / "g.onnx", TensorProto.FLOAT16)
    try:
        engine = OnnxRuntimeGpuEngine(graph, "unet", "fp16", provider)
    except MissingDependency as error:
        pytest.skip(error.message)
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float16)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows in (2, 5, 2):
        x = torch.randn(rows, 16)
        wanted = torch.softmax(x @ torch.from_numpy(weight).float(), -1)
        kept.append((engine({"x": x.cuda()})["y"], wanted))
    for found, wanted in kept:
        assert found.is_cuda and relative_error(found.cpu(), wanted) < 0.02
    assert engine.report.details["fallback_nodes"] == {}
