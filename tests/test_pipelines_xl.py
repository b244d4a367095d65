"""The behaviours of diffusers' SDXL pipelines hold through `hcf.pipelines`.

As `test_pipelines.py` (see there for the list and the bounds), with both text encoders, and with
what SDXL has of its own: second prompts, pooled embeddings, sizes and crops as conditioning,
denoising that one pipeline begins and another ends, clip_skip. Also latent consistency models,
whose U-Net takes the guidance scale as an input, and the Taiji pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    SCHEDULER,
    UNET,
    assert_same_images,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)
from torch import Tensor

import hcf.pipelines
from hcf.errors import HcfError
from hcf.routing import routes_of

ENGINES = ["eager", "openvino", "onnxruntime"]
TASKS = ["text", "image", "inpaint", "control", "control-image", "control-inpaint"]
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
}
MODEL = Path(__file__).parents[1] / "models" / "weights" / "taiji-sd-mini"
NOISE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompts": {"prompt": ["red cat", "a blue dog"]},
    "second": {"prompt_2": "in oil", "negative_prompt": "ugly", "negative_prompt_2": "bad"},
    "images": {"num_images_per_prompt": 2},
    "unguided": {"guidance_scale": 1.0},
    "latent": {"output_type": "latent"},
    "numpy": {"output_type": "np"},
    "pil": {"output_type": "pil"},
    "tuple": {"return_dict": False},
    "size": {"height": 24, "width": 40},
    "conditioned": {
        "original_size": (64, 48), "crops_coords_top_left": (4, 8), "target_size": (32, 40),
        "negative_original_size": (8, 8), "negative_target_size": (16, 16),
    },
    "skipped": {"clip_skip": 1},
}  # fmt: skip
SOMEWHERE: dict[str, dict[str, dict[str, Any]]] = {
    "text": {
        "rescaled": {"guidance_rescale": 0.7},
        "latents": {"latents": NOISE},
        "ended": {"denoising_end": 0.6, "output_type": "latent"},
    },
    "image": {"weak": {"strength": 0.4}, "begun": {"denoising_start": 0.5}},
    "inpaint": {"strong": {"strength": 1.0}},
    "control": {"scale": {"controlnet_conditioning_scale": 0.3}, "guess": {"guess_mode": True}},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", TASKS)
def test_calls_give_what_diffusers_gives(
    drop_in_pairs: Any, draw: Any, task: str, engine: str
) -> None:
    plain, ours = drop_in_pairs("xl", task, engine)
    assert type(ours).__bases__[-1] is type(plain)
    for name, changes in {**EVERYWHERE, **SOMEWHERE.get(task, {})}.items():
        found, wanted = draw(ours, task, **changes), draw(plain, task, **changes)
        try:
            assert_same_images(engine, found, wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    if engine != "eager":
        parts = {"unet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2"}
        assert set(routes_of(ours)) - {"controlnet"} == parts
        assert {(r.engine, r.precision) for r in ours.hcf_report} == {(engine, "fp32")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_can_be_replaced(
    drop_in_pairs: Any, draw: Any, scheduler: str, engine: str
) -> None:
    plain, ours = drop_in_pairs("xl", "text", engine)
    before = plain.scheduler, ours.scheduler
    kind = getattr(diffusers, scheduler)
    try:
        for pipe in (plain, ours):
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **SCHEDULERS[scheduler])
        assert_same_images(engine, draw(ours, "text"), draw(plain, "text"))
    finally:
        plain.scheduler, ours.scheduler = before


@pytest.mark.parametrize("engine", ENGINES)
def test_embeddings_callbacks_and_generators(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("xl", "text", engine)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
             "negative_pooled_prompt_embeds"]  # fmt: skip
    embeds = plain.encode_prompt("red cat", device="cpu", negative_prompt="ugly")
    given = {"prompt": None, **dict(zip(names, embeds, strict=True))}
    assert_same_images(engine, draw(ours, "text", **given), draw(plain, "text", **given))

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == {"latents", "prompt_embeds", "add_time_ids"}
        if step == 0:
            tensors["latents"] = tensors["latents"] * 0.5
            tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(0)
        return tensors

    hooks = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "add_time_ids"],
    }
    assert_same_images(engine, draw(ours, "text", **hooks), draw(plain, "text", **hooks))
    assert torch.equal(draw(ours, "text"), draw(ours, "text"))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_pipeline_ends_what_another_began(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    """The pattern of base and refiner: latents go over at 60 % of the noise."""
    images = []
    for i in (0, 1):
        base = drop_in_pairs("xl", "text", engine)[i]
        refiner = drop_in_pairs("xl", "image", engine)[i]
        latents = draw(base, "text", num_inference_steps=5, denoising_end=0.6, output_type="latent")
        images.append(
            draw(refiner, "image", num_inference_steps=5, denoising_start=0.6, image=latents)
        )
    assert_same_images(engine, images[1], images[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_files_types_and_sharing(
    drop_in: Any, drop_in_pairs: Any, draw: Any, tmp_path: Path, engine: str
) -> None:
    plain, ours = drop_in_pairs("xl", "text", engine)
    wanted = draw(plain, "text")
    ours.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is diffusers.StableDiffusionXLPipeline
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, "text"), wanted)
    low = drop_in(hcf.pipelines, "xl", "text", engine="eager").to(torch.bfloat16)
    assert torch.equal(draw(low, "text"), draw(again.to(torch.bfloat16), "text"))
    image = hcf.pipelines.AutoPipelineForImage2Image.from_pipe(ours)
    assert type(image) is hcf.pipelines.StableDiffusionXLImg2ImgPipeline
    assert image.unet is ours.unet and set(routes_of(image)) == set(routes_of(ours))
    assert ours.components.keys() == plain.components.keys()


def test_an_engine_takes_no_attention_options(drop_in_pairs: Any, draw: Any) -> None:
    ours = drop_in_pairs("xl", "text", "openvino")[1]
    with pytest.raises(HcfError, match="cross_attention_kwargs.*ip_adapter_masks"):
        draw(ours, "text", cross_attention_kwargs={"ip_adapter_masks": []})


def make_tiny_lcm() -> Any:
    """LatentConsistencyModelPipeline: its U-Net takes an embedding of the guidance scale."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**{**UNET, "sample_size": 16}, time_cond_proj_dim=8)
    return diffusers.LatentConsistencyModelPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(), unet=unet,
        scheduler=diffusers.LCMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def test_latent_consistency_models(tmp_path: Path, engine_store: Path) -> None:
    make_tiny_lcm().save_pretrained(tmp_path / "lcm")
    plain = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm")

    def images(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(
            ["red cat", "dog"], num_inference_steps=3, guidance_scale=7.0, generator=generator,
            output_type="pt",
        ).images  # fmt: skip

    for engine in ("eager", "onnxruntime"):
        ours = hcf.pipelines.LatentConsistencyModelPipeline.from_pretrained(
            tmp_path / "lcm", engine=engine, precision="fp32", components=["unet"], threads=1
        )
        assert_same_images(engine, images(ours), images(plain))
        assert {r.engine for r in ours.hcf_report} == {engine}


def test_taiji_pipeline() -> None:
    from hcf.source import open_pipeline

    ours = hcf.pipelines.TaijiStableDiffusionPipeline.from_pretrained(MODEL, engine="eager")
    assert type(ours).__name__ == "TaijiStableDiffusionPipeline"
    automatic = hcf.pipelines.DiffusionPipeline.from_pretrained(MODEL, engine="eager")
    assert type(automatic) is type(ours)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    found, wanted = (
        pipe("红色的圆", generator=torch.Generator().manual_seed(0), **call).images
        for pipe in (ours, open_pipeline(MODEL))
    )
    assert torch.equal(found, wanted)
