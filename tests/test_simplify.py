"""hcf.export.simplify: every pass keeps what the graph computes, its layers' scopes and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcf.errors import RecipeError
from hcf.export.component import component_module, example_inputs, relative_error
from hcf.export.graphs import save_graph, write_graph
from hcf.export.parity import graph_runner
from hcf.export.passes import layer_of
from hcf.export.patterns import count_nodes
from hcf.export.simplify import PASSES, simplify
from hcf.settings import ExportConfig

ir = pytest.importorskip("onnx_ir")


class Block(nn.Module):
    """A convolution, a group norm and attention written out in products, twice the same branch."""

    def __init__(self, mask: str = "none") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.mask = mask
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.norm(self.conv(sample)).flatten(2).transpose(1, 2)
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        keys = sample[:, :1].flatten(2)[:, :, None]  # (B, 1, 1, S)
        if self.mask != "none":
            scores = scores + (keys if self.mask == "row" else keys + keys.transpose(-1, -2))
        twice = torch.sigmoid(x) + torch.sigmoid(x)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) + twice * 1.0


def exported(module: nn.Module, folder: Path, opset: int, passes: list[str]) -> tuple[Path, Any]:
    inputs = {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    path = folder / "-".join([str(opset), *passes]) / "model.onnx"
    config = ExportConfig(opset=opset, passes=passes)  # type: ignore[arg-type]
    return path, write_graph(module.eval(), inputs, ["out"], path, config)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


@torch.no_grad()
def require_parity(module: nn.Module, path: Path) -> None:
    run = graph_runner(path)
    for shape in ((2, 3, 8, 8), (1, 3, 6, 10)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert relative_error(run({"sample": x}), module(x)) < 1e-5


def test_each_pass_is_counted_and_changes_nothing_it_computes(tmp_path: Path) -> None:
    module = Block()
    path, records = exported(module, tmp_path, 23, list(PASSES))
    assert [r.name for r in records] == list(PASSES)
    assert all(r.nodes_after <= r.nodes_before for r in records)
    assert [r.nodes_before for r in records[1:]] == [r.nodes_after for r in records[:-1]]
    by_name = {r.name: r for r in records}
    assert by_name["fold"].replaced == 3 and by_name["fold"].nodes_after < 100
    assert by_name["cse"].replaced >= 1
    assert operators(path).count("Sigmoid") == 1
    require_parity(module, path)


@pytest.mark.parametrize("mask", ["none", "full"])
def test_attention_written_out_becomes_one_node_at_opset_23(tmp_path: Path, mask: str) -> None:
    module = Block(mask)
    path, records = exported(module, tmp_path, 23, ["fold", "attention", "dead"])
    assert records[1].replaced == 1
    assert operators(path).count("Attention") == 1 and "Softmax" not in operators(path)
    require_parity(module, path)
    path, records = exported(module, tmp_path, 21, ["fold", "attention", "dead"])
    assert records[1].replaced == 0 and "needs opset 23" in records[1].note
    require_parity(module, path)


def test_a_mask_that_engines_do_not_take_stays_written_out(tmp_path: Path) -> None:
    module = Block("row")
    path, records = exported(module, tmp_path, 23, ["fold", "attention", "dead"])
    assert records[1].replaced == 0 and "Softmax" in operators(path)
    require_parity(module, path)


def test_attention_with_heads_in_the_batch(tmp_path: Path) -> None:
    class Joined(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            x = sample.flatten(0, 1)  # (B * N, L, K)
            unused = torch.empty(x.shape[0], x.shape[1], x.shape[1])  # as diffusers does
            scores = torch.baddbmm(unused, x, x.transpose(1, 2), beta=0, alpha=0.3)
            return scores.softmax(-1) @ (x + 1)

    path, records = exported(Joined(), tmp_path, 23, ["fold", "attention", "dead"])
    assert records[1].replaced == 1 and "Softmax" not in operators(path)
    require_parity(Joined(), path)


def test_a_softmax_that_is_used_elsewhere_stays(tmp_path: Path) -> None:
    class Seen(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            weights = (sample @ sample.transpose(-1, -2)).softmax(-1)
            return weights @ sample + weights.sum(-1, keepdim=True)

    path, records = exported(Seen(), tmp_path, 23, ["fold", "attention", "dead"])
    assert records[1].replaced == 0 and "Softmax" in operators(path)
    require_parity(Seen(), path)


def test_group_norm_is_found_again_once_the_opset_has_it(tmp_path: Path) -> None:
    from onnxscript import version_converter

    module = Block()
    path, records = exported(module, tmp_path, 20, ["fold", "norm"])
    assert records[1].replaced == 0 and "needs opset 21" in records[1].note
    assert "InstanceNormalization" in operators(path)
    model = ir.load(path)
    version_converter.convert_version(model, 22)
    (record,) = simplify(model, ["norm"])
    assert record.replaced == 1 and record.nodes_after < record.nodes_before
    save_graph(model, path)
    assert operators(path).count("GroupNormalization") == 1
    assert "InstanceNormalization" not in operators(path)
    names = {name for node in ir.load(path).graph for v in node.inputs if v for name in [v.name]}
    assert {"norm.weight", "norm.bias"} <= names
    require_parity(module, path)


def test_an_instance_norm_is_no_group_norm(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True))
    path, records = exported(module, tmp_path, 22, ["fold", "norm"])
    assert records[1].replaced == 0 and "InstanceNormalization" in operators(path)


def test_casts_go_where_nothing_is_lost() -> None:
    def graph(*types: Any) -> Any:
        value = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(types[0]))
        inputs, nodes = [value], []
        for index, dtype in enumerate(types[1:]):
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast{index}")
            value = node.outputs[0]
            value.name, value.dtype, value.shape = f"y{index}", dtype, ir.Shape([2])
            nodes.append(node)
        last = ir.node("Neg", [value])
        last.outputs[0].name, last.outputs[0].dtype = "out", value.dtype
        made = ir.Graph(
            inputs, last.outputs, nodes=[*nodes, last], opset_imports={"": 21}, name="casts"
        )
        return ir.Model(made, ir_version=10)

    half, single, brain = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
    for types, left in (
        ((half, single, half), 0),  # there and back
        ((single, single), 0),  # to what it is
        ((half, single, brain), 1),  # float32 holds a float16: one cast does
        ((single, half, single), 2),  # rounds, and has to
        ((single, half, brain), 2),
    ):
        model = graph(*types)
        (record,) = simplify(model, ["casts"])
        assert count_nodes(model) == left + 1, types
        assert record.nodes_before - record.nodes_after == len(types) - 1 - left


@torch.no_grad()
def test_layers_keep_their_scopes_and_parameters_their_names(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    inputs = example_inputs(tiny_pipeline, "unet")
    module = component_module(tiny_pipeline, "unet", list(inputs))
    path = tmp_path / "model.onnx"
    write_graph(module, inputs, ["out_sample"], path, ExportConfig())
    import onnx

    model = onnx.load(path)
    layers = {
        name: layer
        for name, layer in tiny_pipeline.unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    found = {
        name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and (name := layer_of(node, layers))
    }
    assert found == set(layers)
    initializers = {tensor.name.removesuffix("_transposed") for tensor in model.graph.initializer}
    parameters = {f"denoiser.{name}" for name, _ in tiny_pipeline.unet.named_parameters()}
    assert parameters <= initializers
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs_of_products = [n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
    assert sum(name in weights for name in inputs_of_products) == sum(
        isinstance(layer, nn.Linear) for layer in layers.values()
    )


def test_an_unknown_pass_is_named(tmp_path: Path) -> None:
    path, _ = exported(Block(), tmp_path, 21, ["dead"])
    with pytest.raises(RecipeError, match="'fuse_all'"):
        simplify(ir.load(path), ["fuse_all"])
