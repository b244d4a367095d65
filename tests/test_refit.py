"""A refitted graph computes what a fresh export of the merged model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tiny_pipeline
from onnx import numpy_helper
from test_lora import ATTENTION, CONVOLUTIONS, TEXT, lora, prefixed
from torch import Tensor, nn

from hcf.errors import HcfError, InvalidArtifact
from hcf.export.component import (
    component_module,
    example_inputs,
    output_names,
    relative_error,
)
from hcf.export.onnx import export_component, export_components, graph_runner
from hcf.export.parity import graph_session
from hcf.export.refit import refit_graph, refit_weights, rescale
from hcf.lora import clean_module, effective_weights
from hcf.quantize.scales import LayerScale
from hcf.settings import ExportConfig


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's pristine U-Net and decoder as unet.onnx and vae_decoder.onnx."""
    folder = tmp_path_factory.mktemp("graphs")
    pipe = make_tiny_pipeline()
    for component in ("unet", "vae_decoder"):
        write(pipe, component, folder / f"{component}.onnx")
    return folder


def write(pipe: Any, component: str, path: Path) -> None:
    inputs = example_inputs(pipe, component)
    export_component(pipe, component, inputs, path, ExportConfig(dynamic=False))


def run(pipe: Any, component: str, path: Path, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the graph computes, and what torch does with adapters beside its layers."""
    inputs = example_inputs(pipe, component, seed=seed)
    found = graph_runner(path)(inputs)
    with torch.no_grad():
        wanted = component_module(pipe, component, list(inputs))(*inputs.values())
    return found, wanted


def load(pipe: Any, targets: list[str], seed: int) -> None:
    pipe.load_lora_weights(prefixed(lora(pipe.unet, targets, seed), "unet"))


def test_refit_is_a_fresh_export_of_the_merged_model(
    exported: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    pipe = tiny_pipeline
    before = run(pipe, "unet", exported / "unet.onnx")[1]
    load(pipe, ATTENTION + CONVOLUTIONS, 1)
    counts = refit_graph(exported / "unet.onnx", effective_weights(pipe.unet), tmp_path / "a.onnx")
    layers = [name for name in effective_weights(pipe.unet).touched if name.endswith("weight")]
    assert counts.changed == len(layers) and counts.unused == 0
    assert counts.found == len(effective_weights(pipe.unet))
    found, wanted = run(pipe, "unet", tmp_path / "a.onnx")
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(found, before) > 1e-2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx"]
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    pipe.unet = clean_module(pipe.unet)
    write(pipe, "unet", tmp_path / "fresh.onnx")
    inputs = example_inputs(pipe, "unet")
    assert relative_error(found, graph_runner(tmp_path / "fresh.onnx")(inputs)) < 1e-6


def test_a_then_b_then_a_again_is_bit_for_bit_a(
    exported: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    pipe, graph = tiny_pipeline, exported / "unet.onnx"
    for index, (targets, seed) in enumerate([(ATTENTION, 1), (CONVOLUTIONS, 2), (ATTENTION, 1)]):
        load(pipe, targets, seed)
        refit_graph(graph, effective_weights(pipe.unet), tmp_path / f"{index}.onnx")
        pipe.unload_lora_weights()
    counts = refit_graph(graph, effective_weights(pipe.unet), tmp_path / "none.onnx")
    assert (counts.changed, counts.bytes) == (0, 0)
    a, b, again, none = (
        (tmp_path / f"{name}.onnx").read_bytes() for name in ("0", "1", "2", "none")
    )
    assert a == again and a != b and a != none
    same = graph_runner(graph), graph_runner(tmp_path / "none.onnx")
    inputs = example_inputs(pipe, "unet")
    assert torch.equal(same[0](inputs), same[1](inputs))


def test_parameters_that_were_one_tensor_part(
    exported: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    """Every norm of a new model is ones and zeros, stored once; here all parameters change."""
    pipe = tiny_pipeline
    parts = stored_once(exported / "unet.onnx", tmp_path / "model.onnx")
    assert parts > 20
    with torch.no_grad():
        for index, parameter in enumerate(pipe.unet.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape) + 1e-3 * index)
    for graph in (exported / "unet.onnx", tmp_path / "model.onnx"):
        counts = refit_graph(graph, effective_weights(pipe.unet), tmp_path / "a.onnx")
        assert counts.changed == counts.found == len(list(pipe.unet.parameters()))
        assert relative_error(*run(pipe, "unet", tmp_path / "a.onnx")) < 1e-5
    with pytest.raises(HcfError, match="has shared the tensor"):
        refit_weights(tmp_path / "model.onnx", effective_weights(pipe.unet))


def stored_once(path: Path, output: Path) -> int:
    """The same graph with equal initializers made one, as torch's exporter does; how many went."""
    model = onnx.load(str(path))
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for tensor in list(model.graph.initializer):
        key = (tensor.data_type, *tensor.dims, tensor.raw_data)
        names[tensor.name] = first.setdefault(key, tensor.name)
        if names[tensor.name] != tensor.name:
            model.graph.initializer.remove(tensor)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, str(output))
    return len(names) - len(first)


def test_a_decoder_leaves_the_encoder_out(
    exported: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    pipe = tiny_pipeline
    with torch.no_grad():
        for parameter in pipe.vae.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    counts = refit_graph(
        exported / "vae_decoder.onnx", effective_weights(pipe.vae), tmp_path / "a.onnx"
    )
    names = [name for name, _ in pipe.vae.named_parameters()]
    outside = [name for name in names if name.startswith(("encoder.", "quant_conv."))]
    assert counts.unused == len(outside)
    assert counts.changed == counts.found == len(names) - len(outside)
    assert relative_error(*run(pipe, "vae_decoder", tmp_path / "a.onnx")) < 1e-5


def test_sdxl(tiny_xl_pipeline: Any, tmp_path: Path) -> None:
    pipe = tiny_xl_pipeline
    write(pipe, "unet", tmp_path / "model.onnx")
    load(pipe, ATTENTION + CONVOLUTIONS, 1)
    pipe.load_lora_weights(prefixed(lora(clean_module(pipe.unet), ATTENTION, 3), "unet"), "second")
    pipe.set_adapters(["default_0", "second"], [0.3, 1.0])
    refit_graph(tmp_path / "model.onnx", effective_weights(pipe.unet), tmp_path / "a.onnx")
    assert relative_error(*run(pipe, "unet", tmp_path / "a.onnx")) < 1e-5


def test_text_encoder(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe, encoder = tiny_pipeline, tiny_pipeline.text_encoder
    write(pipe, "text_encoder", tmp_path / "model.onnx")
    inputs = example_inputs(pipe, "text_encoder")
    pipe.load_lora_weights(prefixed(lora(encoder, TEXT, 1), "text_encoder"))
    counts = refit_graph(tmp_path / "model.onnx", effective_weights(encoder), tmp_path / "a.onnx")
    assert counts.changed == len(effective_weights(encoder).touched) / 2  # weights, no biases
    found = graph_session(tmp_path / "a.onnx")(inputs)
    with torch.no_grad():
        wanted = component_module(pipe, "text_encoder", list(inputs))(*inputs.values())
    names = output_names(pipe, "text_encoder")
    assert relative_error(found["hidden_states"], wanted[names.index("hidden_states")]) < 1e-5
    encoder.get_input_embeddings().weight.data[3] += 1.0
    counts = refit_graph(tmp_path / "model.onnx", effective_weights(encoder), tmp_path / "b.onnx")
    assert counts.changed == len(effective_weights(encoder).touched) / 2 + 1


def external(path: Path, output: Path) -> None:
    """The same graph with its weights in a second file, as those over 2 GB have."""
    onnx.save(
        onnx.load(str(path)),
        str(output),
        save_as_external_data=True,
        location=f"{output.name}.data",
        size_threshold=512,
    )


def test_weights_in_a_second_file(exported: Path, tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline
    (tmp_path / "in").mkdir()
    external(exported / "unet.onnx", tmp_path / "in" / "model.onnx")
    pristine = (tmp_path / "in" / "model.onnx.data").read_bytes()
    load(pipe, ATTENTION, 1)
    with torch.no_grad():  # parts from the other norms
        pipe.unet.conv_norm_out.weight.add_(1.0)
    output = tmp_path / "out" / "model.onnx"
    refit_graph(tmp_path / "in" / "model.onnx", effective_weights(pipe.unet), output)
    assert sorted(p.name for p in output.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert relative_error(*run(pipe, "unet", output)) < 1e-5
    assert (tmp_path / "in" / "model.onnx.data").read_bytes() == pristine
    first = (output.read_bytes(), output.with_name("model.onnx.data").read_bytes())
    refit_graph(tmp_path / "in" / "model.onnx", effective_weights(pipe.unet), output)
    assert (output.read_bytes(), output.with_name("model.onnx.data").read_bytes()) == first
    (tmp_path / "in" / "model.onnx.data").write_bytes(pristine[:1000])
    with pytest.raises(InvalidArtifact, match="not whole"):
        refit_graph(tmp_path / "in" / "model.onnx", effective_weights(pipe.unet), output)
    assert (output.read_bytes(), output.with_name("model.onnx.data").read_bytes()) == first


def as_type(path: Path, output: Path, kind: int) -> None:
    """Every float32 initializer stored in another type, with a Cast behind it."""
    model = onnx.load(str(path))
    casts = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims:
            continue
        values = numpy_helper.to_array(tensor)
        name, stored = tensor.name, onnx.helper.tensor_dtype_to_np_dtype(kind)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(stored), f"{name}_stored"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_stored"], [name], to=1))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(output))


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_half_precision_graphs(
    exported: Path, tiny_pipeline: Any, tmp_path: Path, kind: int
) -> None:
    pipe = tiny_pipeline
    as_type(exported / "unet.onnx", tmp_path / "half.onnx", kind)
    unchanged = effective_weights(pipe.unet)
    assert refit_graph(tmp_path / "half.onnx", unchanged, tmp_path / "a.onnx").changed == 0
    load(pipe, ATTENTION, 1)
    counts = refit_graph(tmp_path / "half.onnx", effective_weights(pipe.unet), tmp_path / "a.onnx")
    assert counts.changed == len(effective_weights(pipe.unet).touched - bias_names(pipe.unet))
    assert relative_error(*run(pipe, "unet", tmp_path / "a.onnx")) < 0.02
    state = {name: tensor.clone() for name, tensor in clean_module(pipe.unet).state_dict().items()}
    state["conv_in.weight"][0] = 3.4e38 if kind == onnx.TensorProto.BFLOAT16 else 1e6
    before = (tmp_path / "a.onnx").read_bytes()
    with pytest.raises(HcfError, match=r"conv_in\.weight has values up to .*float16 cannot hold"):
        refit_graph(tmp_path / "half.onnx", state, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == before


def test_the_exports_own_fp16_graph(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline
    config = ExportConfig(components=["unet"], precisions=["fp32", "fp16"], dynamic=False)
    export_components(pipe, tmp_path, config, lambda line: None)
    graph = tmp_path / "unet" / "model.fp16.onnx"
    assert refit_graph(graph, effective_weights(pipe.unet), tmp_path / "a.onnx").changed == 0
    load(pipe, ATTENTION + CONVOLUTIONS, 1)
    refit_graph(graph, effective_weights(pipe.unet), tmp_path / "a.onnx")
    assert relative_error(*run(pipe, "unet", tmp_path / "a.onnx")) < 5e-3


def bias_names(unet: nn.Module) -> set[str]:
    return {name for name in effective_weights(unet) if name.endswith("bias")}


def test_values_for_engines_that_take_them_by_name(exported: Path, tiny_pipeline: Any) -> None:
    pipe = tiny_pipeline
    graph = exported / "unet.onnx"
    assert refit_weights(graph, effective_weights(pipe.unet)) == {}
    load(pipe, ATTENTION, 1)
    values = refit_weights(graph, effective_weights(pipe.unet))
    model = onnx.load(str(graph))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [name for name in effective_weights(pipe.unet).touched if name.endswith("weight")]
    assert len(values) == len(layers)
    for name, value in values.items():
        before = numpy_helper.to_array(stored[name])
        assert value.shape == before.shape and value.dtype == before.dtype
        assert not np.array_equal(value, before)
        stored[name].CopyFrom(numpy_helper.from_array(value, name))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = example_inputs(pipe, "unet")
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    with torch.no_grad():
        wanted = component_module(pipe, "unet", list(inputs))(*inputs.values())
    assert relative_error(torch.from_numpy(found), wanted) < 1e-5


def test_weights_of_another_model_are_refused(
    exported: Path, tiny_pipeline: Any, tmp_path: Path
) -> None:
    graph, output = exported / "unet.onnx", tmp_path / "a.onnx"
    state = tiny_pipeline.unet.state_dict()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    with pytest.raises(InvalidArtifact, match=r"to_q\.weight \(48, 32\) .* is not in"):
        refit_graph(graph, {**state, name: torch.zeros(48, 32)}, output)
    with pytest.raises(InvalidArtifact, match=r"mid_block\.extra\.weight"):
        refit_graph(graph, {**state, "mid_block.extra.weight": torch.ones(3)}, output)
    with pytest.raises(InvalidArtifact, match=r"conv_in\.weight .* is not in"):
        refit_graph(exported / "vae_decoder.onnx", state, output)
    model = onnx.load(str(graph))
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, str(tmp_path / "nameless.onnx"))
    with pytest.raises(HcfError, match="names a layer of this model"):
        refit_graph(tmp_path / "nameless.onnx", state, output)
    with pytest.raises(HcfError, match="would be overwritten"):
        refit_graph(graph, state, graph)
    with pytest.raises(InvalidArtifact, match="does not exist"):
        refit_graph(tmp_path / "gone.onnx", state, output)
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(InvalidArtifact, match="not an ONNX file"):
        refit_graph(tmp_path / "broken.onnx", state, output)
    assert not output.exists()


def test_a_quantised_graph_is_refused(exported: Path, tiny_pipeline: Any, tmp_path: Path) -> None:
    model = onnx.load(str(exported / "unet.onnx"))
    scale = numpy_helper.from_array(np.ones((), np.float32), "scale")
    model.graph.initializer.append(scale)
    node = onnx.helper.make_node("QuantizeLinear", ["sample", "scale"], ["sample_int8"])
    model.graph.node.insert(0, node)
    onnx.save(model, str(tmp_path / "int8.onnx"))
    state = tiny_pipeline.unet.state_dict()
    with pytest.raises(HcfError, match=r"is quantised \(QuantizeLinear\)"):
        refit_graph(tmp_path / "int8.onnx", state, tmp_path / "a.onnx")


def test_ranges_follow_the_weights(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = unet.get_submodule(name).weight.abs().amax(1).numpy()
    load(tiny_pipeline, ATTENTION, 1)
    scales = {name: LayerScale(2.0, before)}
    found = rescale(scales, effective_weights(unet))
    wanted = effective_weights(unet)[f"{name}.weight"].abs().amax(1).numpy()
    assert found[name].input_amax == 2.0
    np.testing.assert_allclose(found[name].weight_amax, wanted, rtol=1e-6)
    assert not np.allclose(wanted, before)
