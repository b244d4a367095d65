"""hcf.export.precision and parity: float16 and bfloat16 graphs, their islands, what overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_pipeline
from torch import Tensor, nn

import hcf.export.graphs
import hcf.export.parity
from hcf.errors import HcfError, RecipeError
from hcf.export.component import component_module, example_inputs, relative_error
from hcf.export.graphs import save_graph, write_graph
from hcf.export.onnx import export_components
from hcf.export.parity import (
    NOT_CHECKED,
    compare,
    graph_session,
    open_runner,
    require_in_float16,
    torch_outputs,
)
from hcf.export.precision import ROUNDOFF, Lowering, longest_chain, lower
from hcf.settings import ExportConfig

ir = pytest.importorskip("onnx_ir")
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


class Small(nn.Module):
    """Two convolutions with a group norm between, and a time embedding by its name."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 1)
        )
        self.gain = gain

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.net[0](sample) * self.gain
        return self.net[3](self.net[2](self.net[1](hidden))) + sample


def small_inputs(batch: int = 2) -> dict[str, Tensor]:
    return {"sample": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def lowered(
    folder: Path,
    precision: str,
    patterns: tuple[str, ...] = (),
    module: Any = None,
    dynamic: bool = True,
) -> tuple[Path, Lowering]:
    path = folder / "model.onnx"
    config = ExportConfig(dynamic=dynamic)
    write_graph((module or Small()).eval(), small_inputs(), ["out"], path, config)
    model = ir.load(path)
    made = lower(model, precision, patterns)
    low = folder / f"model.{precision}.onnx"
    save_graph(model, low)
    return low, made


def types_of(path: Path, op_type: str) -> set[str]:
    """Element types that nodes of a type compute in."""
    nodes = [node for node in ir.load(path).graph if node.op_type == op_type]
    return {str(v.dtype.name) for node in nodes for v in node.outputs if v.dtype is not None}


@pytest.mark.parametrize(("precision", "name"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_products_are_low_and_norms_are_islands(tmp_path: Path, precision: str, name: str) -> None:
    path, made = lowered(tmp_path, precision)
    model = ir.load(path)
    assert types_of(path, "Conv") == {name} and types_of(path, "GroupNormalization") == {"FLOAT"}
    assert {v.dtype.name for v in (*model.graph.inputs, *model.graph.outputs)} == {"FLOAT"}
    kinds = {n: v.dtype.name for n, v in model.graph.initializers.items() if "net" in n}
    assert kinds["net.0.weight"] == kinds["net.3.bias"] == name
    assert kinds["net.1.weight"] == "FLOAT"  # an island's parameters lose nothing
    assert made.islands == {"GroupNorm": 1} and made.low_products == 2
    assert made.casts == types_count(path, "Cast")
    assert made.depth == 2 and made.limit == pytest.approx(2 * ROUNDOFF[precision] * 2**0.5)
    assert made.opset == (22 if precision == "bf16" else 21)


def types_count(path: Path, op_type: str) -> int:
    return sum(node.op_type == op_type for node in ir.load(path).graph)


def test_a_pattern_makes_a_module_an_island(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Small()

        def forward(self, sample: Tensor) -> Tensor:
            return self.inner(sample)

    _, all_low = lowered(tmp_path / "a", "fp16", module=Wrapped())
    path, made = lowered(tmp_path / "b", "fp16", ("net.3",), module=Wrapped())
    assert all_low.float_products == 0
    assert made.float_products == 1 and made.islands["net.3"] == 1
    kinds = {n: v.dtype.name for n, v in ir.load(path).graph.initializers.items()}
    assert kinds["inner.net.3.weight"] == "FLOAT" and kinds["inner.net.0.weight"] == "FLOAT16"


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_graphs_agree_within_what_their_depth_explains(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("openvino")
    path, made = lowered(tmp_path, precision)
    cases = [small_inputs(), small_inputs(3)]
    run, _ = open_runner(path, precision)
    assert run is not None
    errors = compare(run, cases, torch_outputs(Small().eval(), cases))
    # rounding happens, and no more than that
    assert all(made.limit / 50 < error < made.limit for error in errors.values())


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_large_graphs_run_where_their_weights_are_mapped(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(hcf.export.graphs, "EXTERNAL_FROM_BYTES", 100)
    monkeypatch.setattr(hcf.export.parity, "LARGE_BYTES", 100)
    path, made = lowered(tmp_path, precision)
    assert path.with_name(path.name + ".data").stat().st_size > 100
    run, runtime = open_runner(path, precision)
    assert run is not None and ("bf16 arithmetic" in runtime) == (precision == "bf16")
    cases = [small_inputs()]
    assert max(compare(run, cases, torch_outputs(Small().eval(), cases)).values()) < made.limit


@torch.no_grad()
def test_bf16_on_the_reference_evaluator_or_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = lowered(tmp_path, "bf16")

    def missing(path: Path, arithmetic: str) -> Any:
        raise ImportError("openvino")

    monkeypatch.setattr(hcf.export.parity, "_openvino", missing)
    run, runtime = open_runner(path, "bf16")
    assert run is not None and "reference" in runtime
    cases = [small_inputs()]
    assert max(compare(run, cases, torch_outputs(Small().eval(), cases)).values()) < made.limit
    monkeypatch.setattr(hcf.export.parity, "REFERENCE_BYTES", 10)
    run, runtime = open_runner(path, "bf16")
    assert run is None and runtime.startswith(NOT_CHECKED) and "openvino" in runtime


def test_overflow_names_the_first_layer() -> None:
    module, case = Small(gain=1e6).eval(), small_inputs()
    with pytest.raises(HcfError, match="beyond float16") as caught:
        require_in_float16("unet", module, case)
    assert "mul" in str(caught.value) and "bf16" in str(caught.value.fix)
    assert 0 < require_in_float16("unet", Small().eval(), case) < 100


def test_what_overflows_inside_an_island_does_not_count() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Large()

        def forward(self, sample: Tensor) -> Tensor:
            return self.inner(sample)

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow = Grow()

        def forward(self, sample: Tensor) -> Tensor:
            return torch.sigmoid(self.grow(sample)) * 2

    class Grow(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return (sample * 1e6).clamp(-1, 1)

    module = Wrapped()
    with pytest.raises(HcfError, match=r"grow \(mul"):
        require_in_float16("unet", module, small_inputs())
    assert require_in_float16("unet", module, small_inputs(), ["grow"]) <= 10
    with pytest.raises(HcfError):
        require_in_float16("unet", module, small_inputs(), ["other.*"])


def test_attention_scores_are_looked_at_too() -> None:
    class Attention(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            x = sample * 1e3
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(HcfError, match="beyond float16"):
        require_in_float16("unet", Attention(), small_inputs())


def test_a_weight_beyond_float16_is_an_error(tmp_path: Path) -> None:
    module = Small()
    with torch.no_grad():
        module.net[3].weight[0, 0] = 1e5
    with pytest.raises(HcfError, match=r"net\.3\.weight.*1e\+05"):
        lowered(tmp_path, "fp16", module=module)
    lowered(tmp_path, "bf16", module=module)


@torch.no_grad()
def test_a_mask_of_the_smallest_float_stays_a_mask(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)
            self.register_buffer("mask", torch.full((8, 8), torch.finfo().min).triu(1))

        def forward(self, sample: Tensor) -> Tensor:
            x = self.net(sample)
            scores = x @ x.transpose(-1, -2) + self.mask
            return scores.softmax(-1) @ x

    torch.manual_seed(0)
    module = Masked()
    assert require_in_float16("text_encoder", module, small_inputs()) < 100
    with pytest.raises(HcfError, match="(?s)dynamo exporter failed.*static shape of 8"):
        lowered(tmp_path, "fp16", module=module)
    path, made = lowered(tmp_path, "fp16", module=module, dynamic=False)
    found = graph_session(path)(small_inputs())["out"]
    assert relative_error(found, module(**small_inputs())) < made.limit


def test_a_first_stage_that_says_so_has_no_float16_graph(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    config = ExportConfig(
        components=["text_encoder", "vae_encoder"], precisions=["fp16"], dynamic=False
    )
    lines: list[str] = []
    # the tiny one never said so: it has the class's default, so float16 is measured
    records = export_components(pipe, tmp_path / "a", config, lines.append)
    assert records["vae_encoder"][1]["lowering"]["float_products"] == 0
    pipe.vae.register_to_config(force_upcast=True, _use_default_values=[])
    records = export_components(pipe, tmp_path / "b", config, lines.append)
    assert [len(records[c]) for c in ("text_encoder", "vae_encoder")] == [2, 1]
    assert "vae_encoder: no fp16 graph, its configuration says force_upcast" in lines
    alone = config.model_copy(update={"components": ["vae_encoder"]})
    with pytest.raises(HcfError, match="force_upcast") as caught:
        export_components(pipe, tmp_path / "c", alone, lines.append)
    assert "bf16" in str(caught.value.fix)
    measured = alone.model_copy(update={"force_upcast": "measured"})
    assert len(export_components(pipe, tmp_path / "d", measured, lines.append)["vae_encoder"]) == 2


@torch.no_grad()
def test_overflow_in_an_export_leaves_no_graph_behind(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    pipe.vae.decoder.up_blocks[0].resnets[0].conv1.weight *= 1e8
    config = ExportConfig(components=["vae_decoder"], precisions=["fp16"])
    with pytest.raises(HcfError, match=r"decoder\.up_blocks\.0\.resnets\.0\.conv1") as caught:
        export_components(pipe, tmp_path, config, lambda line: None)
    assert "bf16" in str(caught.value.fix) and "islands" in str(caught.value.fix)
    assert not list(tmp_path.rglob("*.onnx"))
    islands = config.model_copy(update={"islands": ["decoder.up_blocks.0.resnets.0.*"]})
    records = export_components(pipe, tmp_path, islands, lambda line: None)["vae_decoder"]
    assert "decoder.up_blocks.0.resnets.0.*" in records[1]["lowering"]["islands"]


def test_an_island_that_is_no_module_is_named(tmp_path: Path) -> None:
    config = ExportConfig(components=["vae_decoder"], islands=["decoder.up_blocks", "mid"])
    with pytest.raises(RecipeError, match="'mid'"):
        export_components(make_tiny_pipeline(), tmp_path, config)


def test_unet_islands_are_found_by_either_exporter(tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    inputs = example_inputs(pipe, "unet")
    module = component_module(pipe, "unet", list(inputs))
    path = tmp_path / "model.onnx"
    write_graph(module, inputs, ["out_sample"], path, ExportConfig(exporter="torchscript"))
    model = ir.load(path)
    assert longest_chain(model, ("Conv",)) >= 8
    made = lower(model, "fp16")
    assert made.float_products == 2 and "*time_embedding*" in made.islands
    save_graph(model, tmp_path / "model.fp16.onnx")
    errors = compare(
        graph_session(tmp_path / "model.fp16.onnx"), [inputs], torch_outputs(module, [inputs])
    )
    assert max(errors.values()) < made.limit
    assert np.isfinite(made.limit)
