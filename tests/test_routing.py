"""Routing: the component stays the diffusers object, only its calls go to an engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcf.engines import EngineReport
from hcf.engines.forms import open_torch
from hcf.errors import HcfError
from hcf.export.component import example_inputs
from hcf.load import decelerate, load
from hcf.routing import ROUTES, guard_decoder, route, routes_of, unroute, unrouted


def shapes_of(inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in inputs.items()}


def routed(pipe: Any, component: str, **example: Any) -> Any:
    """`component` of `pipe` on the eager bf16 engine, whose numbers differ from float32's."""
    inputs = example_inputs(pipe, component, batch=1, **example)
    engine = open_torch(pipe, component, "eager", "bf16", list(inputs))
    route(pipe, component, engine, shapes_of(inputs))
    return engine


def draw(pipe: Any, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "red cat", num_inference_steps=2, generator=generator, output_type="pt", **kwargs
    ).images


def test_the_component_stays_what_it_was_and_can_be_given_back(tiny_pipeline: Any) -> None:
    wanted, unet, config = draw(tiny_pipeline), tiny_pipeline.unet, tiny_pipeline.unet.config
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    routed(tiny_pipeline, "unet")
    assert tiny_pipeline.unet is unet and unet.config is config
    assert type(unet).__name__ == "UNet2DConditionModel" and unet.dtype is torch.float32
    assert not torch.equal(draw(tiny_pipeline), wanted)
    unroute(tiny_pipeline)
    assert ROUTES not in unet.__dict__ and "forward" not in unet.__dict__
    assert torch.equal(draw(tiny_pipeline), wanted)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_saving_a_routed_pipeline_writes_the_plain_model(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    wanted = draw(tiny_pipeline)
    routed(tiny_pipeline, "unet")
    routed(tiny_pipeline, "vae_decoder")
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), wanted)


def test_a_twin_shares_weights_and_computes_in_torch(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    wanted = tiny_pipeline.unet(**inputs).sample
    routed(tiny_pipeline, "unet")
    twin = unrouted(tiny_pipeline.unet)
    assert torch.equal(twin(**inputs).sample, wanted)
    assert twin.conv_in is tiny_pipeline.unet.conv_in


def test_a_deep_copy_is_a_plain_model(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    wanted = tiny_pipeline.unet(**inputs).sample
    routed(tiny_pipeline, "unet")
    copied = copy.deepcopy(tiny_pipeline.unet)
    assert torch.equal(copied(**inputs).sample, wanted)
    with torch.no_grad():
        copied.conv_out.bias += 1
    assert not torch.equal(copied(**inputs).sample, wanted)
    assert torch.equal(unrouted(tiny_pipeline.unet)(**inputs).sample, wanted)


def test_decoder_engines_slice_and_tile(tiny_pipeline: Any) -> None:
    routed(tiny_pipeline, "vae_decoder")
    z = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = tiny_pipeline.vae.decode(z).sample
    tiny_pipeline.vae.enable_slicing()
    assert torch.allclose(tiny_pipeline.vae.decode(z).sample, whole, atol=0.02)  # bf16
    tiny_pipeline.vae.disable_slicing()
    tiny_pipeline.vae.enable_tiling()
    tiny_pipeline.vae.tile_latent_min_size = 16
    tiled = tiny_pipeline.vae.decode(z, return_dict=False)[0]
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()


def test_the_plain_decoder_is_guarded_and_tiles_exactly(tiny_pipeline: Any) -> None:
    vae = tiny_pipeline.vae
    z = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    wanted = vae.decode(z).sample
    guard_decoder(tiny_pipeline)
    assert torch.equal(vae.decode(z, return_dict=False)[0], wanted)
    vae.enable_tiling()
    vae.tile_latent_min_size = 16
    assert torch.allclose(vae.decode(z).sample, wanted, atol=1e-5)
    with pytest.raises(HcfError, match="not finite|NaN|finite"):
        vae.decode(torch.full_like(z, float("nan")))
    unroute(tiny_pipeline)
    assert "decode" not in vae.__dict__


def test_what_an_engine_cannot_take_is_named(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    routed(tiny_pipeline, "unet")
    with pytest.raises(HcfError, match="timestep_cond"):
        tiny_pipeline.unet(**inputs, timestep_cond=torch.zeros(1, 8))
    with pytest.raises(HcfError, match="cross_attention_kwargs .'gligen'"):
        tiny_pipeline.unet(**inputs, cross_attention_kwargs={"gligen": {}})
    # without an adapter a LoRA scale has no effect, as in diffusers
    wanted = tiny_pipeline.unet(**inputs).sample
    found = tiny_pipeline.unet(**inputs, cross_attention_kwargs={"scale": 0.5}).sample
    assert torch.equal(found, wanted)
    tiny_pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(HcfError, match="IP-Adapter"):
        tiny_pipeline.unet(**inputs)


def test_an_engine_without_residuals_in_the_call_gets_zeros(tiny_pipeline: Any) -> None:
    """from_pipe shares a U-Net between a ControlNet pipeline and a plain one."""
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    shapes = shapes_of(inputs)
    shapes["down_block_additional_residuals_0"] = [1, 16, 8, 8]
    shapes["mid_block_additional_residual"] = [1, 32, 4, 4]

    class Record:
        report = EngineReport("eager", "0", "unet", "cpu", "", "fp32", {"fp32": 1})
        seen: dict[str, Tensor] = {}

        def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.seen.update(given)
            return {"out_sample": given["sample"]}

    engine = Record()
    route(tiny_pipeline, "unet", engine, shapes)
    sample = torch.randn(2, 4, 10, 7)
    given = {name: torch.cat([t, t]) for name, t in inputs.items() if name != "sample"}
    tiny_pipeline.unet(sample=sample, **given)
    assert engine.seen["down_block_additional_residuals_0"].shape == (2, 16, 10, 7)
    assert engine.seen["mid_block_additional_residual"].shape == (2, 32, 5, 4)
    assert not engine.seen["mid_block_additional_residual"].any()


def test_outputs_come_back_in_the_type_of_the_caller(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    routed(tiny_pipeline, "unet")
    low = {name: tensor.to(torch.bfloat16) for name, tensor in inputs.items()}
    assert tiny_pipeline.unet(**low).sample.dtype is torch.bfloat16


def test_text_encoder_engine_answers_as_transformers_does(tiny_pipeline: Any) -> None:
    ids = torch.randint(0, 514, (2, 16), generator=torch.Generator().manual_seed(0))
    wanted = tiny_pipeline.text_encoder(ids, output_hidden_states=True)
    inputs = example_inputs(tiny_pipeline, "text_encoder", batch=1)
    engine = open_torch(tiny_pipeline, "text_encoder", "eager", "fp32", list(inputs))
    twin = unrouted(tiny_pipeline.text_encoder)
    assert twin is not tiny_pipeline.text_encoder
    pipe, original = tiny_pipeline, tiny_pipeline.text_encoder
    pipe.text_encoder = twin
    engine = open_torch(pipe, "text_encoder", "eager", "fp32", list(inputs))
    pipe.text_encoder = original
    route(pipe, "text_encoder", engine, shapes_of(inputs))
    found = pipe.text_encoder(ids, output_hidden_states=True)
    assert torch.allclose(found[0], wanted[0]) and torch.allclose(found[1], wanted[1])
    assert len(found.hidden_states) == len(wanted.hidden_states)
    assert torch.allclose(found.hidden_states[-2], wanted.hidden_states[-2])
    with pytest.raises(HcfError, match="attention_mask"):
        pipe.text_encoder(ids, attention_mask=torch.ones_like(ids))


def test_changed_weights_without_a_way_to_rebuild_are_an_error(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=1)
    routed(tiny_pipeline, "unet")
    routes_of(tiny_pipeline)["unet"].token = "of other weights"
    with pytest.raises(HcfError, match="hcf.accelerate"):
        tiny_pipeline.unet(**inputs)


def test_decelerate_takes_everything_out(tiny_pipeline: Any) -> None:
    wanted = draw(tiny_pipeline)
    routed(tiny_pipeline, "unet")
    routed(tiny_pipeline, "vae_decoder")
    assert torch.equal(draw(decelerate(tiny_pipeline)), wanted)
    assert not routes_of(tiny_pipeline)
