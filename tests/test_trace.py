"""hcf.trace: what it records equals what the denoiser was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hcf.errors import HcfError
from hcf.trace import call_denoiser, conditioning, denoiser_name, flatten_call, record_calls


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


def test_arguments_no_engine_takes_are_refused(tiny_pipeline: Any) -> None:
    sample, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 32)
    with pytest.raises(HcfError, match="mid_block|down_block"):
        flatten_call(
            tiny_pipeline.unet,
            (sample, 1, context),
            {"down_block_additional_residuals": (sample,)},
        )


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    with pytest.raises(HcfError, match="object"):
        denoiser_name(object())
