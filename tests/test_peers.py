"""Peers on a tiny U-Net: what they compute, what they say they are, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from hcf.artifact import Sampling
from hcf.engines import cpu_flags
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.feature_cache import remove
from hcf.feature_cache.install import CACHE
from hcf_bench.peers import PEERS, Peer, PeerOptions, find_peer, sqnr_db
from hcf_bench.peers.onnx_graph import export_graph, graph_name
from hcf_bench.stages import run_staged
from hcf_bench.workloads import DTYPES, Case, DenoiseForward, Workload

THREADS = 1
TINY = Workload("tiny/unet", "module", "tiny", "unet", 1)
EXPORTED = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8",
            "openvino-int8-bf16", "hcf-bf16", "hcf-int8", "hcf-int8-bf16")  # fmt: skip
ON_CPU = [name for name, peer in PEERS.items() if "cpu" in peer.devices]
ON_GPU = [name for name, peer in PEERS.items() if "cuda" in peer.devices]
UNCOMPILED = ("eager", "eager-bf16", *EXPORTED, "deepcache-3", "deepcache-3-bf16")


def unet_case(pipe: Any, dtype: str = "fp32", device: str = "cpu") -> Case:
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 16, 32)))
    kind = DTYPES[dtype]
    inputs = {
        "sample": sample.to(kind),
        "timestep": torch.full((1,), 501.0),
        "encoder_hidden_states": text.to(kind),
    }
    placed = {name: tensor.to(device) for name, tensor in inputs.items()}
    return Case(TINY, DenoiseForward(pipe.unet.to(device, kind)), placed)


class Small(nn.Module):
    """A convolution and two linear layers: torch.compile takes seconds for them, not minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(self.conv(x).flatten(2).transpose(1, 2))))


class Breaking(Small):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:  # depends on data: no one graph
            return x
        return super().forward(x)


class Masked(Small):
    """Attention whose mask has one row for all queries, as text encoders' have."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)[:, None]
        mask = torch.where(torch.arange(y.shape[2]) < 40, 0.0, -100.0)[None, None, None]
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)


def small_case(module: nn.Module, dtype: str = "fp32") -> Case:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Case(TINY, module.to(DTYPES[dtype]).eval(), {"x": x.to(DTYPES[dtype])})


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the peers of the same case: it is exported once."""
    return tmp_path_factory.mktemp("peers")


def runs_here(peer: Peer) -> bool:
    """Whether this machine has what the peer needs; all that may be missing is bf16."""
    reason = peer.missing("cpu")
    assert reason == "" or (peer.name.endswith("bf16") and "no bf16 arithmetic" in reason)
    return reason == ""


@pytest.mark.parametrize("name", UNCOMPILED)
def test_computes_and_reports_what_was_asked(
    name: str, tiny_pipeline: Any, shared_folder: Path
) -> None:
    peer = find_peer(name)
    if not runs_here(peer):
        return
    wanted = unet_case(tiny_pipeline).run()
    case = unet_case(tiny_pipeline, peer.dtype)
    prepared = peer.prepare(case, PeerOptions("cpu", THREADS, shared_folder))
    found = torch.as_tensor(prepared.run())
    assert found.shape == wanted.shape
    assert sqnr_db(wanted, found) >= peer.min_sqnr_db
    assert torch.equal(found, torch.as_tensor(prepared.run()))
    report = prepared.report
    assert report["threads"] == THREADS
    assert report["version"] and report["provider"]
    precision = report["precision"]
    # all 83 layers of the tiny U-Net, and none in another precision
    layers = {precision: 83}
    if precision.startswith("int8") and name.startswith("hcf"):
        # 12 stay in floating point by the rules, 4 GEGLU projections run in halves
        layers = {"int8": 75, "bf16" if precision == "int8-bf16" else "fp32": 12}
    elif name == "openvino-int8" and "avx512f" not in cpu_flags():
        # attention stays in pieces there: its 16 products are counted too, half of them quantised
        layers = {"int8": 83 + 8, "fp32": 8}
    assert report["layer_precisions"] == layers
    assert precision in name or name in ("eager", "onnxruntime", "openvino", "deepcache-3")


@pytest.mark.parametrize("name", ["compile", "compile-bf16"])
def test_compiles_one_graph(name: str, tmp_path: Path) -> None:
    peer = find_peer(name)
    if not runs_here(peer):
        return
    wanted = small_case(Small()).run()
    case = small_case(Small(), peer.dtype)
    prepared = peer.prepare(case, PeerOptions("cpu", THREADS, tmp_path))
    assert sqnr_db(wanted, prepared.run()) >= peer.min_sqnr_db
    report = prepared.report
    assert report["fullgraph"] and report["mode"] == "default"
    assert report["memory_format"] == "channels_last"
    assert report["layer_precisions"] == {peer.dtype: 3}


def test_a_graph_break_is_an_error(tmp_path: Path) -> None:
    prepared = find_peer("compile").prepare(
        small_case(Breaking()), PeerOptions("cpu", THREADS, tmp_path)
    )
    with pytest.raises(HcfError, match="one graph of tiny/unet"):
        prepared.run()


ALONE = [n for n in ON_CPU if "deepcache" not in n and "module" in PEERS[n].kinds]


@pytest.mark.parametrize("name", ALONE)
def test_nan_weights_are_not_hidden(name: str, tmp_path: Path) -> None:
    peer = find_peer(name)
    if not runs_here(peer) or name.startswith("fused"):
        return  # fused peers refuse a module without a block they know: tests/test_fuse.py
    case = small_case(Small(), peer.dtype)
    case.module.get_parameter("up.weight")[3, 5] = math.nan
    try:
        output = peer.prepare(case, PeerOptions("cpu", THREADS, tmp_path)).run()
    except InvalidArtifact as error:
        assert "up.weight is not finite" in error.message
    else:
        assert torch.as_tensor(output).isnan().any()


def test_nan_weights_pass_through_deepcache(tiny_pipeline: Any, tmp_path: Path) -> None:
    case = unet_case(tiny_pipeline)
    case.module.get_parameter("unet.mid_block.resnets.0.conv1.weight")[0, 0, 0, 0] = math.nan
    prepared = find_peer("deepcache-3").prepare(case, PeerOptions("cpu", THREADS, tmp_path))
    assert prepared.run().isnan().any()
    assert math.isnan(prepared.report["shallow_sqnr_db"])


@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_peers_say_why_they_are_missing(name: str) -> None:
    reason = find_peer(name).missing("cuda")
    if torch.cuda.is_available():
        assert reason == "" or "pip install" in reason or "capability" in reason
    else:
        assert reason == "no CUDA device: torch finds none"
    if "cpu" not in find_peer(name).devices:
        assert find_peer(name).missing("cpu") == "runs on cuda, not on cpu"


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_onnxruntime_without_the_provider_runs_nothing(provider: str, tmp_path: Path) -> None:
    import onnxruntime

    from hcf_bench.peers.onnxruntime import prepare_gpu

    if provider in onnxruntime.get_available_providers():
        return
    with pytest.raises(HcfError, match=provider):
        prepare_gpu(small_case(Small()), PeerOptions("cpu", THREADS, tmp_path), provider)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_GPU)
def test_computes_on_a_gpu(name: str, tiny_pipeline: Any, shared_folder: Path) -> None:
    peer = find_peer(name)
    if peer.missing("cuda"):
        return
    wanted = unet_case(tiny_pipeline).run()
    case = unet_case(tiny_pipeline, peer.dtype, "cuda")
    prepared = peer.prepare(case, PeerOptions("cuda", THREADS, shared_folder))
    found = [torch.as_tensor(prepared.run()).cpu() for _ in range(3)]
    assert sqnr_db(wanted, found[0]) >= peer.min_sqnr_db
    assert torch.equal(found[1], found[2])
    assert prepared.report["layer_precisions"].get(prepared.report["precision"])
    assert not prepared.report.get("tf32")


def test_missing_package_names_the_line_that_installs_it() -> None:
    from hcf_bench.peers import import_package, installed, missing_unless

    absent = missing_unless(("cpu",), installed("no_such_runtime", "no-such-runtime>=2"))
    assert absent("cpu") == "no_such_runtime is not installed: pip install 'no-such-runtime>=2'"
    with pytest.raises(HcfError, match="pip install 'no-such-runtime>=2'"):
        import_package("no_such_runtime", "no-such-runtime>=2")


def test_unknown_peer_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean openvino-int8"):
        find_peer("openvino-int4")


def test_every_peer_is_complete() -> None:
    for name, peer in PEERS.items():
        assert peer.name == name
        assert peer.dtype in DTYPES
        assert set(peer.devices) <= {"cpu", "cuda"} and peer.devices
        assert set(peer.kinds) <= {"kernel", "module", "pipeline"}
        assert ("pipeline" in peer.kinds) == (peer.prepare_pipeline is not None)


def test_the_same_weights_share_a_graph_and_others_do_not(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    case = unet_case(tiny_pipeline)
    first = graph_name(case)
    assert first.startswith("tiny-unet-float32-b1-")
    assert graph_name(unet_case(tiny_pipeline)) == first
    case.module.get_parameter("unet.conv_in.weight")[0] += 1
    assert graph_name(case) != first
    small = small_case(Small())
    path = export_graph(small, tmp_path)
    written = path.stat().st_mtime_ns
    assert export_graph(small, tmp_path) == path and path.stat().st_mtime_ns == written
    assert [part.name for part in tmp_path.iterdir()] == [path.name]


def test_the_cuda_providers_graph_computes_the_same(tiny_pipeline: Any, tmp_path: Path) -> None:
    import onnxruntime

    case = unet_case(tiny_pipeline)
    path = export_graph(case, tmp_path, for_cuda_provider=True)
    model = onnx.load(str(path))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MultiHeadAttention") == 8
    assert not {"Attention", "GroupNormalization", "Softmax"} & set(operators)
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in case.inputs.items()}
    assert sqnr_db(case.run(), torch.from_numpy(session.run(None, feed)[0])) > 60


@pytest.mark.parametrize("for_cuda_provider", [False, True])
def test_a_mask_with_one_row_is_exported_whole(for_cuda_provider: bool, tmp_path: Path) -> None:
    import onnxruntime

    case = small_case(Masked())
    path = export_graph(case, tmp_path, for_cuda_provider=for_cuda_provider)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in case.inputs.items()})[0]
    assert sqnr_db(case.run(), torch.from_numpy(found)) > 60


@pytest.mark.parametrize(
    ("name", "rest"), [("openvino-int8", "fp32"), ("openvino-int8-bf16", "bf16")]
)
def test_int8_says_what_the_rest_runs_in(
    name: str, rest: str, tiny_pipeline: Any, shared_folder: Path
) -> None:
    peer = find_peer(name)
    if runs_here(peer):
        options = PeerOptions("cpu", THREADS, shared_folder)
        report = peer.prepare(unet_case(tiny_pipeline), options).report
        assert report["rest_runs_in"] == rest
        assert "random" in report["notes"]


def test_deepcache_refuses_what_is_no_unet(tmp_path: Path) -> None:
    with pytest.raises(HcfError, match="tiny/unet is none"):
        find_peer("deepcache-3").prepare(small_case(Small()), PeerOptions("cpu", 1, tmp_path))


def test_a_cycle_of_deepcache_is_one_full_step_and_shallow_ones(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    case = unet_case(tiny_pipeline)
    wanted = case.run()
    prepared = find_peer("deepcache-3").prepare(case, PeerOptions("cpu", THREADS, tmp_path))
    memory = tiny_pipeline.unet.__dict__[CACHE].memory
    before = memory.full_calls, memory.shallow_calls
    found = prepared.run()
    assert (memory.full_calls, memory.shallow_calls) == (before[0] + 1, before[1] + 2)
    report = prepared.report
    assert prepared.forwards == report["interval"] == 3 and report["branch"] == 0
    assert report["timesteps"] == [541.0, 521.0, 501.0] and report["shallow_flop_ratio"] < 0.4
    assert sqnr_db(wanted, found) == pytest.approx(report["shallow_sqnr_db"], abs=0.01)


def test_deepcache_starts_afresh_with_each_image(tiny_pipeline: Any, tmp_path: Path) -> None:
    sampling = Sampling(steps=4, guidance_scale=1.0)
    plain = run_staged(tiny_pipeline, ["red cat"], sampling, seed=0).images
    prepare = find_peer("deepcache-3").prepare_pipeline
    assert prepare is not None
    report = prepare(tiny_pipeline, PeerOptions("cpu", THREADS, tmp_path))
    assert report["interval"] == 3 and report["layer_precisions"]["unet"] == {"fp32": 83}
    first = run_staged(tiny_pipeline, ["red cat"], sampling, seed=0)
    second = run_staged(tiny_pipeline, ["red cat"], sampling, seed=0)
    assert first.denoiser_calls == 4
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, plain)
    one_step = Sampling(steps=1, guidance_scale=1.0)
    cached = run_staged(tiny_pipeline, ["red cat"], one_step, seed=0).images
    remove(tiny_pipeline)
    assert torch.equal(cached, run_staged(tiny_pipeline, ["red cat"], one_step, seed=0).images)


@pytest.mark.parametrize("name", ["eager", "eager-bf16"])
def test_eager_pipelines_run_as_built(name: str, tiny_pipeline: Any, tmp_path: Path) -> None:
    peer = find_peer(name)
    if not runs_here(peer):
        return
    tiny_pipeline.to(DTYPES[peer.dtype])
    assert peer.prepare_pipeline is not None
    report = peer.prepare_pipeline(tiny_pipeline, PeerOptions("cpu", THREADS, tmp_path))
    assert report["layer_precisions"]["unet"] == {peer.dtype: 83}
    assert set(report["layer_precisions"]) == {"unet", "vae", "text_encoder"}
    run = run_staged(tiny_pipeline, ["red cat"], Sampling(steps=2, guidance_scale=1.0), seed=0)
    assert torch.isfinite(run.images).all()


@pytest.mark.slow
def test_compiled_pipeline_computes_the_same(tiny_pipeline: Any, tmp_path: Path) -> None:
    sampling = Sampling(steps=2, guidance_scale=1.0)
    wanted = run_staged(tiny_pipeline, ["red cat"], sampling, seed=0).images
    prepare = find_peer("compile").prepare_pipeline
    assert prepare is not None
    report = prepare(tiny_pipeline, PeerOptions("cpu", THREADS, tmp_path))
    found = run_staged(tiny_pipeline, ["red cat"], sampling, seed=0).images
    assert report["fullgraph"]
    assert sqnr_db(wanted, found) > 60
