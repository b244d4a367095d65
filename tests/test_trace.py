"""hcf.trace: what it records equals what the denoiser was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_component import tiny_controlnet, tiny_of

from hcf.errors import HcfError
from hcf.trace import (
    call_denoiser,
    conditioning,
    denoiser_name,
    example_arguments,
    flatten_call,
    own_size,
    record_calls,
)


def test_records_every_step_of_every_prompt(tiny_pipeline: Any) -> None:
    calls = record_calls(
        tiny_pipeline, ["a", "b", "c"], steps=2, guidance_scale=1.0, seed=0, batch_size=2
    )
    assert [tuple(c.sample.shape) for c in calls] == [(2, 4, 8, 8)] * 2 + [(1, 4, 8, 8)] * 2
    assert all(c.timestep.shape == (len(c.sample),) for c in calls)
    assert set(calls[0].kwargs) == {"encoder_hidden_states"}
    assert calls[0].timestep[0] > calls[1].timestep[0]


def test_noise_does_not_depend_on_the_batch_size(tiny_pipeline: Any) -> None:
    options: dict[str, Any] = {"steps": 1, "guidance_scale": 1.0, "seed": 5}
    together = record_calls(tiny_pipeline, ["a", "b"], batch_size=2, **options)
    apart = record_calls(tiny_pipeline, ["a", "b"], batch_size=1, **options)
    assert torch.equal(together[0].sample, torch.cat([c.sample for c in apart]))


def test_max_calls_stops_early_and_leaves_no_hook(tiny_pipeline: Any) -> None:
    calls = record_calls(
        tiny_pipeline, ["a"] * 4, steps=4, guidance_scale=1.0, seed=0, max_calls=3, batch_size=2
    )
    assert len(calls) == 3
    assert not tiny_pipeline.unet._forward_pre_hooks
    assert tiny_pipeline._progress_bar_config == {"disable": True}


def test_conditioning_splits_guidance(tiny_pipeline: Any) -> None:
    cond, uncond = conditioning(tiny_pipeline, ["red cat", "blue dog"], 3.0)
    assert uncond is not None
    assert cond["encoder_hidden_states"].shape == (2, 16, 32)
    empty, none = conditioning(tiny_pipeline, ["", ""], 1.0)
    assert none is None
    assert torch.allclose(
        uncond["encoder_hidden_states"], empty["encoder_hidden_states"], atol=1e-5
    )
    alone, _ = conditioning(tiny_pipeline, ["red cat", "blue dog"], 1.0)
    assert torch.allclose(cond["encoder_hidden_states"], alone["encoder_hidden_states"], atol=1e-5)


@torch.no_grad()
def test_call_denoiser_repeats_a_recorded_call_with_added_conditioning(
    tiny_xl_pipeline: Any,
) -> None:
    call = record_calls(tiny_xl_pipeline, ["cat"], steps=1, guidance_scale=3.0, seed=0)[0]
    assert set(call.kwargs) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    assert len(call.sample) == 2
    unet = tiny_xl_pipeline.unet
    direct = unet(
        call.sample,
        call.timestep[0],
        encoder_hidden_states=call.kwargs["encoder_hidden_states"],
        added_cond_kwargs={k: call.kwargs[k] for k in ("text_embeds", "time_ids")},
    ).sample
    assert torch.equal(call_denoiser(unet, call.sample, call.timestep, call.kwargs), direct)


@torch.no_grad()
@pytest.mark.parametrize("listed", ["down_block", "down_intrablock"])
def test_residuals_are_flattened_and_put_back(tiny_pipeline: Any, listed: str) -> None:
    unet, name = tiny_pipeline.unet, f"{listed}_additional_residuals"
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 32)
    sizes = {"down_block": [(16, 8), (16, 8), (16, 4), (32, 4)], "down_intrablock": [(16, 4)]}
    residuals = [torch.randn(1, c, s, s, generator=generator) for c, s in sizes[listed]]
    kwargs: dict[str, Any] = {name: tuple(residuals)}
    if listed == "down_block":
        kwargs["mid_block_additional_residual"] = torch.randn(1, 32, 4, 4, generator=generator)
    else:
        kwargs[name] = [r.clone() for r in residuals]
    call = flatten_call(unet, (sample, 1, context), kwargs)
    assert [n for n in call.kwargs if n.startswith(name)] == [
        f"{name}_{i}" for i in range(len(residuals))
    ]
    direct = unet(sample, 1, context, **kwargs).sample
    assert torch.equal(call_denoiser(unet, call.sample, call.timestep, call.kwargs), direct)
    plain = unet(sample, 1, context).sample
    assert not torch.allclose(direct, plain)
    reordered = dict(reversed(call.kwargs.items()))
    assert torch.equal(call_denoiser(unet, call.sample, call.timestep, reordered), direct)


def test_arguments_no_engine_takes_are_refused_by_name(tiny_pipeline: Any) -> None:
    sample, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 32)
    images = {"added_cond_kwargs": {"image_embeds": [torch.zeros(1, 1, 32)]}}
    with pytest.raises(HcfError, match="image_embeds") as caught:
        flatten_call(tiny_pipeline.unet, (sample, 1, context), images)
    assert "unload_ip_adapter" in str(caught.value.fix)
    with pytest.raises(HcfError, match="cross_attention_kwargs"):
        flatten_call(
            tiny_pipeline.unet, (sample, 1, context), {"cross_attention_kwargs": {"scale": 0.5}}
        )


def test_text_to_image_needs_no_other_arguments(tiny_pipeline: Any) -> None:
    assert example_arguments(tiny_pipeline, 2) == {}
    assert example_arguments(tiny_pipeline, 2, 24, 32) == {"height": 24, "width": 32}
    assert own_size(tiny_pipeline) == 16


def test_calls_of_image_to_image_and_inpainting_are_recorded() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    options: dict[str, Any] = {"steps": 3, "guidance_scale": 1.0, "seed": 0}
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        pipe = tiny_of(kind)
        given = example_arguments(pipe, 2)
        assert given["image"].shape == (2, 3, 16, 16) and given["strength"] == 1.0
        assert 0 <= given["image"].min() and given["image"].max() <= 1
        # at full strength a run of three steps has three calls
        assert len(record_calls(pipe, ["a", "b"], **options)) == 3
        (call,) = record_calls(pipe, ["a"], max_calls=1, height=24, width=32, **options)
        assert call.sample.shape == (1, 4, 12, 16)


def test_controlnet_calls_are_recorded_without_what_only_scales_them() -> None:
    from diffusers import StableDiffusionControlNetImg2ImgPipeline

    pipe = tiny_of(StableDiffusionControlNetImg2ImgPipeline, controlnet=tiny_controlnet())
    assert set(example_arguments(pipe, 1)) == {"image", "control_image", "strength"}
    (call,) = record_calls(pipe, ["a"], steps=1, guidance_scale=1.0, seed=0, component="controlnet")
    assert set(call.kwargs) == {"encoder_hidden_states", "controlnet_cond"}
    cond, uncond = conditioning(pipe, ["a"], 3.0)
    assert uncond is not None and "mid_block_additional_residual" in cond


def test_a_pipeline_of_one_size_refuses_another(tiny_pipeline: Any) -> None:
    class OneSize(type(tiny_pipeline)):  # type: ignore[misc]
        def __call__(self, prompt: str) -> None: ...

    pipe = tiny_pipeline
    pipe.__class__ = OneSize
    with pytest.raises(HcfError, match="takes no height"):
        example_arguments(pipe, 1, 24, 24)


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    with pytest.raises(HcfError, match="object"):
        denoiser_name(object())
