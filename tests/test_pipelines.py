"""The behaviours of diffusers' Stable Diffusion pipelines hold through `hcf.pipelines`.

Each of text to image, image to image, inpainting and ControlNet is compared with the plain pipeline
of the same weights: equal on engine "eager", within 1e-3 (relative, L2) on OpenVINO and ONNX
Runtime in float32. What is compared:

    schedulers          DDIM, Euler, Euler ancestral, DPM++ 2M, UniPC, LCM, PNDM; replaced in place
    prompts             one, lists, negative ones, embeddings, clip_skip, several images a prompt
    guidance            none, usual, rescaled, eta of DDIM, ControlNet's scale and guess mode
    sizes               other heights and widths than the model's own
    latents             given, returned; read and changed by callback_on_step_end; strength
    outputs             latent, pt, np, pil, tuples
    randomness          one generator, one an image, the same images again
    places              pipe.to(device), pipe.to(dtype), tiled and sliced first stages
    files               save and load in both libraries, variants, artefacts with engines, pickles
    components          shared by from_pipe, replaced, pipe.components, textual inversion
    refusals by name    cross_attention_kwargs, IP-Adapter, FreeU, offloading, absent packages

The last three are in `test_pipelines_classes.py`, all of it for SDXL in `test_pipelines_xl.py`,
LoRA in `test_lora*.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import assert_same_images
from torch import Tensor

import hcf.pipelines
from hcf.errors import UnsafeFile
from hcf.export.component import relative_error
from hcf.routing import routes_of
from hcf.weights import read_header

ENGINES = ["eager", "openvino", "onnxruntime"]
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
}


EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompts": {"prompt": ["red cat", "a blue dog"]},
    "images": {"num_images_per_prompt": 2},
    "negative": {"negative_prompt": "ugly"},
    "negatives": {"prompt": ["red cat", "dog"], "negative_prompt": ["ugly", "bad"]},
    "unguided": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7},
    "latent": {"output_type": "latent"},
    "numpy": {"output_type": "np"},
    "pil": {"output_type": "pil"},
    "tuple": {"return_dict": False},
    "size": {"height": 24, "width": 40},
}
NOISE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
SOMEWHERE: dict[str, dict[str, dict[str, Any]]] = {
    "text": {"rescaled": {"guidance_rescale": 0.7}, "latents": {"latents": NOISE}},
    "image": {"weak": {"strength": 0.4}},
    "inpaint": {"strong": {"strength": 1.0}, "padded": {"padding_mask_crop": None}},
    "control": {
        "latents": {"latents": NOISE},
        "scale": {"controlnet_conditioning_scale": 0.3},
        "guess": {"guess_mode": True},
        "window": {"control_guidance_start": 0.3, "control_guidance_end": 0.8},
    },
    "control-image": {"weak": {"strength": 0.4}, "scale": {"controlnet_conditioning_scale": 0.3}},
    "control-inpaint": {"strong": {"strength": 1.0}},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", list(SOMEWHERE))
def test_calls_give_what_diffusers_gives(
    drop_in_pairs: Any, draw: Any, task: str, engine: str
) -> None:
    plain, ours = drop_in_pairs("sd", task, engine)
    assert type(ours).__bases__[-1] is type(plain) and type(ours).__name__ == type(plain).__name__
    for name, changes in {**EVERYWHERE, **SOMEWHERE[task]}.items():
        found, wanted = draw(ours, task, **changes), draw(plain, task, **changes)
        try:
            assert_same_images(engine, found, wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_component_ran_on_the_engine(drop_in_pairs: Any, engine: str) -> None:
    for task in ("control", "text", "inpaint"):
        pipe = drop_in_pairs("sd", task, engine)[1]
        wanted = {"unet", "vae_decoder", "vae_encoder", "text_encoder"}
        assert set(routes_of(pipe)) - {"controlnet"} == wanted
        assert {(r.engine, r.precision) for r in pipe.hcf_report} == {(engine, "fp32")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_can_be_replaced(
    drop_in_pairs: Any, draw: Any, scheduler: str, engine: str
) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    before = plain.scheduler, ours.scheduler
    kind = getattr(diffusers, scheduler)
    try:
        for pipe in (plain, ours):
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **SCHEDULERS[scheduler])
            assert pipe.config["scheduler"] == ("diffusers", scheduler)
        assert_same_images(engine, draw(ours, "text"), draw(plain, "text"))
    finally:
        plain.scheduler, ours.scheduler = before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["text", "image", "control-inpaint"])
def test_callbacks_read_and_change_latents(
    drop_in_pairs: Any, draw: Any, task: str, engine: str
) -> None:
    plain, ours = drop_in_pairs("sd", task, engine)
    seen: list[Tensor] = []

    def halve(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"].clone())
        assert given["prompt_embeds"].shape[-1] == 32
        if step == 1:
            pipe._guidance_scale = 0.0  # dynamic guidance
            given["prompt_embeds"] = given["prompt_embeds"][-1:]
            for name in ("latents", "mask", "masked_image_latents"):
                given[name] = given[name] * 0.5 if name == "latents" else given.get(name)
        return {name: value for name, value in given.items() if value is not None}

    changes = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    if task != "text":  # these keep a doubled image beside the guidance

        def halve(  # type: ignore[no-redef]
            pipe: Any, step: int, timestep: Any, given: dict[str, Any]
        ) -> dict[str, Any]:
            seen.append(given["latents"].clone())
            return {"latents": given["latents"] * 0.5} if step == 1 else {}

    found = draw(ours, task, callback_on_step_end=halve, **changes)
    steps = len(seen)
    assert steps >= 2
    wanted = draw(plain, task, callback_on_step_end=halve, **changes)
    assert_same_images(engine, found, wanted)
    for mine, theirs in zip(seen[:steps], seen[steps:], strict=True):
        assert_same_images(engine, mine, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_embeds_and_clip_skip(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    embeds, negative = plain.encode_prompt("red cat", "cpu", 1, True, "ugly")
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same_images(engine, draw(ours, "text", **given), draw(plain, "text", **given))
    # diffusers 0.42 asks for `text_model`, which transformers has dropped
    states = plain.text_encoder(
        plain.tokenizer("red cat", padding="max_length", return_tensors="pt").input_ids,
        output_hidden_states=True,
    ).hidden_states
    skipped = plain.text_encoder.final_layer_norm(states[-2])
    given = {"prompt": None, "prompt_embeds": skipped, "negative_prompt_embeds": negative}
    found = draw(ours, "text", clip_skip=1, negative_prompt="ugly")
    assert_same_images(engine, found, draw(plain, "text", **given))
    assert not hasattr(ours.text_encoder, "text_model")


@pytest.mark.parametrize("engine", ENGINES)
def test_generators_decide_the_images(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    assert torch.equal(draw(ours, "text"), draw(ours, "text"))

    def each(*seeds: int) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {"prompt": ["red cat"] * len(seeds), "generator": generators}

    found = draw(ours, "text", **each(1, 2))
    assert_same_images(engine, found, draw(plain, "text", **each(1, 2)))
    swapped = draw(ours, "text", **each(2, 1))
    assert relative_error(swapped.flip(0), found) < 1e-4
    other = draw(ours, "text", generator=torch.Generator().manual_seed(9))
    assert not torch.equal(other, found[:1])


@pytest.mark.parametrize("engine", ENGINES)
def test_first_stages_in_slices_and_tiles(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    size = {"height": 48, "width": 64, "num_images_per_prompt": 2}
    wanted = draw(plain, "text", **size)
    ours.vae.enable_slicing()
    assert relative_error(draw(ours, "text", **size), wanted) < 1e-3
    for pipe in (plain, ours):
        pipe.vae.enable_tiling()
    tiled, theirs = draw(ours, "text", **size), draw(plain, "text", **size)
    for pipe in (plain, ours):
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()
    # not diffusers' tiles, whose seams show, but ones nearer to the image decoded whole
    assert relative_error(theirs, wanted) > 0.01
    bound = 1e-3 if engine == "eager" else relative_error(theirs, wanted)
    assert relative_error(tiled, wanted) < bound
    assert_same_images(engine, draw(ours, "text", **size), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipeline_moves_and_changes_type(drop_in: Any, drop_in_artifacts: Any, draw: Any,
                                           drop_in_pairs: Any, engine: str) -> None:  # fmt: skip
    plain, ours = drop_in_pairs("sd", "text", engine)
    assert ours.to("cpu") is ours and ours.device.type == "cpu"
    assert_same_images(engine, draw(ours, "text"), draw(plain, "text"))
    low = drop_in(diffusers, "sd", "text").to(torch.bfloat16)
    found = drop_in(hcf.pipelines, "sd", "text", engine="eager").to("cpu", torch.bfloat16)
    assert found.unet.dtype is torch.bfloat16
    assert torch.equal(draw(found, "text"), draw(low, "text"))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_saved_is_the_plain_pipeline(
    drop_in_pairs: Any, draw: Any, tmp_path: Path, engine: str
) -> None:
    plain, ours = drop_in_pairs("sd", "control", engine)
    wanted = draw(plain, "control")
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    names = read_header(tmp_path / "saved" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    for library in (diffusers.DiffusionPipeline, hcf.pipelines.StableDiffusionControlNetPipeline):
        again = library.from_pretrained(
            tmp_path / "saved",
            **({"engine": "eager"} if library is not diffusers.DiffusionPipeline else {}),
        )
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again, "control"), wanted)
    with pytest.raises(UnsafeFile, match="pickles"):
        ours.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_from_pipe_shares_components_and_engines(
    drop_in_pairs: Any, draw: Any, engine: str
) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    image = hcf.pipelines.StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert all(getattr(image, n) is getattr(ours, n) for n in ("unet", "vae", "text_encoder"))
    assert set(image.components) == set(drop_in_pairs("sd", "image", engine)[0].components)
    assert {r.engine for r in image.hcf_report} == {engine}
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(plain)
    image.set_progress_bar_config(disable=True)
    theirs.set_progress_bar_config(disable=True)
    assert_same_images(engine, draw(image, "image"), draw(theirs, "image"))
    # plain pipelines made of ours run on its engines, too
    assert torch.equal(
        draw(diffusers.StableDiffusionImg2ImgPipeline(**{
            **{n: getattr(ours, n) for n in theirs.components}, "requires_safety_checker": False,
        }), "image"),
        draw(image, "image"),
    )  # fmt: skip
