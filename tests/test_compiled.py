"""torch.compile: whole components or repeated blocks, and never uncompiled in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hcf.engines import compiled
from hcf.engines.compiled import CompiledEngine, repeated_blocks, structural_copy
from hcf.engines.eager import EagerEngine, in_precision
from hcf.errors import HcfError, MissingDependency
from hcf.export.component import component_module, example_inputs, relative_error


@pytest.mark.slow
def test_regional_compilation_agrees_and_leaves_the_model_alone(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet")
    names = list(inputs)
    engine = CompiledEngine(tiny_pipeline, "unet", names, "fp32", mode="regional")
    wanted = EagerEngine(tiny_pipeline, "unet", names, "fp32")(inputs)["out_sample"]
    assert relative_error(engine(inputs)["out_sample"], wanted) < 1e-5
    assert engine.report.details["mode"] == "regional"
    assert engine.report.details["blocks"] == ["BasicTransformerBlock"]
    blocks = [m for m in engine.module.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    assert all(m._compiled_call_impl is None for m in tiny_pipeline.unet.modules())
    own = {id(p) for p in tiny_pipeline.unet.parameters()}
    assert {id(p) for p in engine.module.parameters()} == own  # no second set of weights


def test_a_model_without_repeated_blocks_is_refused(tiny_pipeline: Any) -> None:
    with pytest.raises(HcfError, match="names no repeated blocks") as caught:
        CompiledEngine(tiny_pipeline, "vae_decoder", ["latents"], "fp32", mode="regional")
    assert "compile_mode" in caught.value.fix
    assert repeated_blocks(component_module(tiny_pipeline, "text_encoder", ["input_ids"])) == ()


def test_running_out_of_recompilations_is_an_error(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would run the rest uncompiled without a word."""
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 1)
    torch._dynamo.reset()
    engine = CompiledEngine(tiny_pipeline, "vae_decoder", ["latents"], "fp32")
    latents = torch.zeros(1, 4, 8, 8)
    engine.compiled = torch.compile(engine.module, fullgraph=True, dynamic=False, backend="eager")
    engine({"latents": latents})
    with pytest.raises(HcfError, match="torch.compile failed on vae_decoder"):
        engine({"latents": latents.repeat(2, 1, 1, 1)})


def test_no_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependency, match=r"no g\+\+"):
        compiled.require_compiler()


def test_copies_in_another_precision_share_nothing(tiny_pipeline: Any) -> None:
    module = component_module(tiny_pipeline, "vae_decoder", ["latents"])
    half = in_precision(module, torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    convolution = next(p for p in half.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert in_precision(module, torch.float32) is module
    twin = structural_copy(module)
    assert twin is not module and next(twin.parameters()) is next(module.parameters())


@pytest.mark.gpu
def test_engines_run_on_the_gpu(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet")
    names = list(inputs)
    wanted = EagerEngine(tiny_pipeline, "unet", names, "fp32")(inputs)["out_sample"]
    for kind, precision, limit in ((EagerEngine, "fp16", 0.02), (CompiledEngine, "bf16", 0.1)):
        engine = kind(tiny_pipeline, "unet", names, precision, "cuda")
        found = engine(inputs)["out_sample"]
        assert found.is_cuda and relative_error(found.cpu(), wanted) < limit
        assert engine.report.device == "cuda" and set(engine.report.layer_precisions) == {precision}


def test_a_gpu_that_is_not_here_is_named(tiny_pipeline: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MissingDependency, match="finds no GPU"):
        EagerEngine(tiny_pipeline, "vae_decoder", ["latents"], "fp16", "cuda")
