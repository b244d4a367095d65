"""hcf.export.component: every component engines can replace, its inputs, outputs and module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SCHEDULER, UNET, make_tiny_pipeline, tiny_vae
from torch import Tensor

from hcf.errors import RecipeError
from hcf.export.component import (
    component_module,
    components_of,
    default_components,
    example_inputs,
    output_names,
    relative_error,
    why_not,
    with_batch,
)


def tiny_controlnet() -> Any:
    """A ControlNet of the tiny U-Net whose zero convolutions are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    net = ControlNetModel.from_unet(
        make_tiny_pipeline().unet, conditioning_embedding_out_channels=(8, 16)
    )
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def tiny_of(kind: Any, **others: Any) -> Any:
    """The tiny pipeline's parts, some replaced, as another pipeline class."""
    pipe = make_tiny_pipeline()
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    made = kind(**(parts | others), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def outputs(pipe: Any, component: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    module = component_module(pipe, component, list(inputs))
    with torch.no_grad():
        found = module(*inputs.values())
    return found if isinstance(found, tuple) else (found,)


def test_components_of_text_to_image(tiny_pipeline: Any, tiny_xl_pipeline: Any) -> None:
    assert components_of(tiny_pipeline) == ("unet", "vae_decoder", "vae_encoder", "text_encoder")
    assert components_of(tiny_xl_pipeline)[-1] == "text_encoder_2"
    assert default_components(tiny_pipeline) == ("unet", "vae_decoder")
    assert why_not(tiny_pipeline) == {}


def test_every_component_returns_what_its_names_say(tiny_xl_pipeline: Any) -> None:
    for component in components_of(tiny_xl_pipeline):
        inputs = example_inputs(tiny_xl_pipeline, component, batch=3)
        found = outputs(tiny_xl_pipeline, component, inputs)
        assert len(found) == len(output_names(tiny_xl_pipeline, component))
        assert all(len(t) == 3 for t in inputs.values())
        assert {t.dtype for t in inputs.values()} <= {torch.float32, torch.int64}


def test_size_in_pixels(tiny_pipeline: Any) -> None:
    shapes = {
        component: tuple(
            next(iter(example_inputs(tiny_pipeline, component, 1, height=24, width=32).values()))
            .shape
        )
        for component in components_of(tiny_pipeline)
    }  # fmt: skip
    assert shapes == {
        "unet": (1, 4, 12, 16),
        "vae_decoder": (1, 4, 12, 16),
        "vae_encoder": (1, 3, 24, 32),
        "text_encoder": (1, 16),
    }


@torch.no_grad()
def test_modules_compute_what_the_pipeline_parts_do(tiny_pipeline: Any) -> None:
    image = example_inputs(tiny_pipeline, "vae_encoder")
    (moments,) = outputs(tiny_pipeline, "vae_encoder", image)
    posterior = tiny_pipeline.vae.encode(image["image"]).latent_dist
    assert torch.equal(moments.chunk(2, 1)[0], posterior.mean)
    ids = example_inputs(tiny_pipeline, "text_encoder")
    last, pooled, states = outputs(tiny_pipeline, "text_encoder", ids)
    wanted = tiny_pipeline.text_encoder(ids["input_ids"], output_hidden_states=True)
    assert torch.equal(last, wanted.last_hidden_state) and torch.equal(pooled, wanted.pooler_output)
    assert torch.equal(states[-2], wanted.hidden_states[-2]) and states.shape == (3, 2, 16, 32)


@torch.no_grad()
def test_projected_text_encoder_gives_its_projection(tiny_xl_pipeline: Any) -> None:
    ids = example_inputs(tiny_xl_pipeline, "text_encoder_2")
    _, pooled, _ = outputs(tiny_xl_pipeline, "text_encoder_2", ids)
    assert torch.equal(pooled, tiny_xl_pipeline.text_encoder_2(ids["input_ids"]).text_embeds)


@torch.no_grad()
def test_controlnet_and_its_unet() -> None:
    from diffusers import StableDiffusionControlNetPipeline

    pipe = tiny_of(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    assert default_components(pipe) == ("unet", "controlnet", "vae_decoder")
    control = example_inputs(pipe, "controlnet", 1, height=24, width=32)
    assert control["controlnet_cond"].shape == (1, 3, 24, 32)
    names = output_names(pipe, "controlnet")
    found = dict(zip(names, outputs(pipe, "controlnet", control), strict=True))
    assert names[0] == "down_block_res_sample_0" and names[-1] == "mid_block_res_sample"
    unet = example_inputs(pipe, "unet", 1, height=24, width=32)
    for index in range(len(names) - 1):
        given = unet[f"down_block_additional_residuals_{index}"]
        assert torch.allclose(found[f"down_block_res_sample_{index}"], given, atol=1e-5)
    assert torch.allclose(
        found["mid_block_res_sample"], unet["mid_block_additional_residual"], atol=1e-5
    )
    (with_control,) = outputs(pipe, "unet", unet)
    without = {k: v for k, v in unet.items() if "residual" not in k}
    assert relative_error(outputs(pipe, "unet", without)[0], with_control) > 1e-3


def test_several_controlnets_are_no_component() -> None:
    from diffusers import StableDiffusionControlNetPipeline

    nets = [tiny_controlnet(), tiny_controlnet()]
    pipe = tiny_of(StableDiffusionControlNetPipeline, controlnet=nets)
    assert "MultiControlNetModel" in why_not(pipe)["controlnet"]
    assert "down_block_additional_residuals_0" in example_inputs(pipe, "unet")
    with pytest.raises(RecipeError, match="MultiControlNetModel"):
        component_module(pipe, "controlnet", [])


def test_inpainting_unet_takes_nine_channels() -> None:
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(**{**UNET, "in_channels": 9}).eval()
    pipe = tiny_of(StableDiffusionInpaintPipeline, unet=unet)
    assert example_inputs(pipe, "unet")["sample"].shape == (2, 9, 8, 8)
    assert example_inputs(pipe, "vae_decoder")["latents"].shape == (2, 4, 8, 8)


def test_other_text_encoders_and_first_stages_say_why_not(tiny_pipeline: Any) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, VQModel

    from taiji.text import SandwichTextEncoder

    tiny_pipeline.register_modules(
        text_encoder=SandwichTextEncoder(32, 16, 1, 2, 32, 8, sandwich_k=0)
    )
    assert "SandwichTextEncoder" in why_not(tiny_pipeline)["text_encoder"]
    pipe = StableDiffusionPipeline(
        vae=VQModel(block_out_channels=(16,), norm_num_groups=8, latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert "VQModel" in why_not(pipe)["vae_encoder"] and "vae_decoder" in components_of(pipe)


def test_with_batch_keeps_types_and_changes_rows(tiny_pipeline: Any) -> None:
    inputs = example_inputs(tiny_pipeline, "unet", batch=2)
    more = with_batch(inputs, 3)
    assert {n: (len(t), t.dtype) for n, t in more.items()} == {
        n: (3, t.dtype) for n, t in inputs.items()
    }
    assert len(set(more["timestep"].tolist())) == 3
    assert not torch.equal(more["sample"][0], inputs["sample"][0])


def test_a_component_that_is_not_there_is_named(tiny_pipeline: Any) -> None:
    with pytest.raises(RecipeError, match="'controlnet'") as caught:
        example_inputs(tiny_pipeline, "controlnet")
    assert "unet or vae_decoder" in str(caught.value.fix)


def test_tiny_vae_has_no_upcast_of_its_own() -> None:
    # what hcf.export.onnx reads: a default is not what the model's author said
    assert "force_upcast" in tiny_vae().config["_use_default_values"]
