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

`test_pipelines_xl.py` has the same of SDXL; LoRA is in `test_lora*.py`.
"""

from __future__ import annotations

import copy
import inspect
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hcf.pipelines
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError, UnsafeFile
from hcf.export.component import relative_error
from hcf.load import decelerate
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


def assert_same(engine: str, found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    if engine == "eager":
        assert torch.equal(found, wanted)
    elif wanted.max() > 8:  # 8 bits: rounding may go either way
        assert (found - wanted).abs().max() <= 1
    else:
        assert relative_error(found, wanted) < 1e-3


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
            assert_same(engine, found, wanted)
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
        assert_same(engine, draw(ours, "text"), draw(plain, "text"))
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
    assert_same(engine, found, wanted)
    for mine, theirs in zip(seen[:steps], seen[steps:], strict=True):
        assert_same(engine, mine, theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_embeds_and_clip_skip(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    embeds, negative = plain.encode_prompt("red cat", "cpu", 1, True, "ugly")
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same(engine, draw(ours, "text", **given), draw(plain, "text", **given))
    # diffusers 0.42 asks for `text_model`, which transformers has dropped
    states = plain.text_encoder(
        plain.tokenizer("red cat", padding="max_length", return_tensors="pt").input_ids,
        output_hidden_states=True,
    ).hidden_states
    skipped = plain.text_encoder.final_layer_norm(states[-2])
    given = {"prompt": None, "prompt_embeds": skipped, "negative_prompt_embeds": negative}
    found = draw(ours, "text", clip_skip=1, negative_prompt="ugly")
    assert_same(engine, found, draw(plain, "text", **given))
    assert not hasattr(ours.text_encoder, "text_model")


@pytest.mark.parametrize("engine", ENGINES)
def test_generators_decide_the_images(drop_in_pairs: Any, draw: Any, engine: str) -> None:
    plain, ours = drop_in_pairs("sd", "text", engine)
    assert torch.equal(draw(ours, "text"), draw(ours, "text"))

    def each(*seeds: int) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {"prompt": ["red cat"] * len(seeds), "generator": generators}

    found = draw(ours, "text", **each(1, 2))
    assert_same(engine, found, draw(plain, "text", **each(1, 2)))
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
    assert_same(engine, draw(ours, "text", **size), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipeline_moves_and_changes_type(drop_in: Any, drop_in_artifacts: Any, draw: Any,
                                           drop_in_pairs: Any, engine: str) -> None:  # fmt: skip
    plain, ours = drop_in_pairs("sd", "text", engine)
    assert ours.to("cpu") is ours and ours.device.type == "cpu"
    assert_same(engine, draw(ours, "text"), draw(plain, "text"))
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
    assert_same(engine, draw(image, "image"), draw(theirs, "image"))
    # plain pipelines made of ours run on its engines, too
    assert torch.equal(
        draw(diffusers.StableDiffusionImg2ImgPipeline(**{
            **{n: getattr(ours, n) for n in theirs.components}, "requires_safety_checker": False,
        }), "image"),
        draw(image, "image"),
    )  # fmt: skip


def test_automatic_pipelines_are_of_these_classes(
    drop_in_folders: dict[str, Path], drop_in_pairs: Any, draw: Any
) -> None:
    names = {"Text2Image": "text", "Image2Image": "image", "Inpainting": "inpaint"}
    for name, task in names.items():
        automatic = getattr(hcf.pipelines, f"AutoPipelineFor{name}")
        plain = drop_in_pairs("sd", task, "eager")[0]
        pipe = automatic.from_pretrained(drop_in_folders["sd"], engine="eager")
        assert type(pipe) is getattr(hcf.pipelines, type(plain).__name__)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(draw(pipe, task), draw(plain, task))
        for other in ("Text2Image", "Image2Image", "Inpainting"):
            derived = getattr(hcf.pipelines, f"AutoPipelineFor{other}").from_pipe(pipe)
            assert type(derived).__module__ == "hcf.pipelines" and derived.unet is pipe.unet
    net = diffusers.ControlNetModel.from_pretrained(drop_in_folders["sd-control"])
    pipe = hcf.pipelines.AutoPipelineForText2Image.from_pretrained(
        drop_in_folders["sd"], controlnet=net, engine="eager"
    )
    assert type(pipe) is hcf.pipelines.StableDiffusionControlNetPipeline
    found = hcf.pipelines.DiffusionPipeline.from_pretrained(drop_in_folders["sd"], engine="eager")
    assert type(found) is hcf.pipelines.StableDiffusionPipeline


def test_a_plain_folder_gets_engines_which_serve_again(drop_in: Any, draw: Any) -> None:
    """Builds through the store; then components are replaced, and the text encoder grows."""
    plain = drop_in(diffusers, "sd", "text")
    given = {"engine": "openvino", "precision": "fp32", "components": ["unet"], "threads": 1}
    ours = drop_in(hcf.pipelines, "sd", "text", **given)
    assert set(routes_of(ours)) == {"unet"}
    wanted = draw(plain, "text")
    assert relative_error(draw(ours, "text"), wanted) < 1e-3
    again = drop_in(hcf.pipelines, "sd", "text", **given)
    assert again.hcf_report == ours.hcf_report

    # another U-Net gets engines of its own
    other = copy.deepcopy(plain.unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(-1)
    plain.unet = ours.unet = other
    theirs = draw(plain, "text")
    assert relative_error(theirs, wanted) > 0.01
    assert relative_error(draw(ours, "text"), theirs) < 1e-3
    assert set(routes_of(ours)) == {"unet"}


def test_a_replaced_component_is_named_where_the_engines_are_an_artefacts(
    drop_in_artifacts: Any, draw: Any
) -> None:
    pipe = hcf.pipelines.StableDiffusionControlNetPipeline.from_pretrained(
        drop_in_artifacts("sd"), engine="onnxruntime", precision="fp32"
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config)
    with pytest.raises(HcfError, match="unet was replaced"):
        draw(pipe, "control")
    decelerate(pipe)
    assert torch.isfinite(draw(pipe, "control")).all()
    with pytest.raises(RecipeError, match="built already"):
        hcf.pipelines.StableDiffusionControlNetPipeline.from_pretrained(
            drop_in_artifacts("sd"), quantize="int8"
        )


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_textual_inversion(
    drop_in: Any, drop_in_artifacts: Any, draw: Any, engine_store: Path, engine: str
) -> None:
    token = {"<cat-toy>": torch.randn(2, 32, generator=torch.Generator().manual_seed(7))}
    plain = drop_in(diffusers, "sd", "control")
    if engine == "eager":
        ours = drop_in(hcf.pipelines, "sd", "control", engine=engine)
    else:
        ours = hcf.pipelines.StableDiffusionControlNetPipeline.from_pretrained(
            drop_in_artifacts("sd"), engine=engine, precision="fp32",
            components=["unet", "controlnet", "vae_decoder"],
        )  # fmt: skip
        ours.set_progress_bar_config(disable=True)
    before = draw(ours, "control", prompt="a <cat-toy>")
    for pipe in (plain, ours):
        pipe.load_textual_inversion(dict(token))
    found = draw(ours, "control", prompt="a <cat-toy>")
    assert_same(engine, found, draw(plain, "control", prompt="a <cat-toy>"))
    assert not torch.equal(found, before)
    ours.unload_textual_inversion()
    assert torch.equal(draw(ours, "control", prompt="a <cat-toy>"), before)


def test_what_engines_cannot_do_is_refused_by_name(drop_in_artifacts: Any, draw: Any) -> None:
    pipe = hcf.pipelines.StableDiffusionControlNetPipeline.from_pretrained(
        drop_in_artifacts("sd"), engine="openvino", precision="fp32"
    )
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(HcfError, match="cross_attention_kwargs.*gligen"):
        draw(pipe, "control", cross_attention_kwargs={"gligen": 1})
    with pytest.raises(HcfError, match="FreeU"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(HcfError, match="hold weights of their own"):
            getattr(pipe, name)()
    wanted = draw(pipe, "control")
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder=None, weight_name=None,
                         image_encoder_folder=None)  # fmt: skip
    embeds = torch.randn(2, 1, 1, 16)
    with pytest.raises(HcfError, match="IP-Adapter"):
        draw(pipe, "control", ip_adapter_image_embeds=[embeds])
    pipe.unload_ip_adapter()
    assert relative_error(draw(pipe, "control"), wanted) < 1e-4


def ip_adapter(unet: Any) -> dict[str, Any]:
    """Random weights of an IP-Adapter for `unet`: images of width 16, four tokens each."""
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    inner = [
        processor_owner.to_k.out_features
        for name, processor_owner in unet.named_modules()
        if name.endswith("attn2")
    ]
    layers: dict[str, Tensor] = {}
    for i, size in enumerate(inner):
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{kind}.weight"] = torch.randn(size, width, generator=generator)
    return {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 16, generator=generator),
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": layers,
    }


def test_engines_wait_for_a_device_where_there_is_a_gpu(
    drop_in: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"engine": "openvino", "precision": "fp32", "components": ["unet"], "threads": 1}
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        pipe = drop_in(hcf.pipelines, "sd", "text", **given)
        image = hcf.pipelines.AutoPipelineForImage2Image.from_pipe(pipe)
        assert not pipe.hcf_report and not routes_of(pipe)
        assert pipe.to(torch.float32) is pipe and not routes_of(pipe)
    pipe.to("cpu")
    assert [r.engine for r in pipe.hcf_report] == ["openvino"] and set(routes_of(pipe)) == {"unet"}
    image.set_progress_bar_config(disable=True)
    assert not image.hcf_report
    draw(image, "image")
    assert [r.engine for r in image.hcf_report] == ["openvino"]
    # what was done by hand since stays
    decelerate(pipe)
    wanted = draw(drop_in(diffusers, "sd", "text"), "text")
    assert torch.equal(draw(pipe.to("cpu"), "text"), wanted) and not routes_of(pipe)


@pytest.mark.gpu
def test_engines_follow_to_a_gpu(drop_in: Any, draw: Any) -> None:
    plain = drop_in(diffusers, "sd", "text").to("cuda")
    ours = drop_in(hcf.pipelines, "sd", "text", engine="compile", precision="bf16")
    assert not ours.hcf_report
    ours.to("cuda")
    assert {(r.engine, r.device) for r in ours.hcf_report} == {("compile", "cuda")}
    assert relative_error(draw(ours, "text").cpu(), draw(plain, "text").cpu()) < 0.1


def test_signatures_are_those_of_diffusers() -> None:
    for name in hcf.pipelines.PIPELINES:
        if name.startswith(("Taiji", "Kolors")):
            continue
        ours, plain = getattr(hcf.pipelines, name), getattr(diffusers, name)
        for method in ("__call__", "__init__", "encode_prompt"):
            mine, theirs = getattr(ours, method), getattr(plain, method)
            assert inspect.signature(mine) == inspect.signature(theirs), (name, method)
        assert pickle_name(ours) == f"hcf.pipelines.{name}" and ours.__doc__ == plain.__doc__


def pickle_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def test_unusable_classes_cost_the_others_nothing() -> None:
    assert set(hcf.pipelines.__all__) <= set(dir(hcf.pipelines))
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        _ = hcf.pipelines.NoSuchPipeline
    kolors = hcf.pipelines.KolorsPipeline
    if find_spec("sentencepiece") is None:
        for use in (kolors, lambda: kolors.from_pretrained("folder")):
            with pytest.raises(MissingDependency, match="sentencepiece") as caught:
                use()
            assert caught.value.fix == "pip install sentencepiece"
    else:
        assert issubclass(kolors, diffusers.KolorsPipeline)
    assert hcf.pipelines.TaijiStableDiffusionPipeline.__bases__[-1].__module__.startswith("taiji")


def test_weights_are_read_from_safetensors_alone(
    drop_in: Any, drop_in_folders: dict[str, Path], draw: Any, tmp_path: Path
) -> None:
    plain = drop_in(diffusers, "sd", "text")
    half = tmp_path / "half"
    plain.save_pretrained(half, variant="fp16")
    pipe = hcf.pipelines.StableDiffusionPipeline.from_pretrained(half, engine="eager")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, "text"), draw(plain, "text"))
    with pytest.raises(UnsafeFile, match="pickles"):
        hcf.pipelines.StableDiffusionPipeline.from_pretrained(half, use_safetensors=False)
    weights = half / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(InvalidArtifact, match="no \\*.safetensors"):
        hcf.pipelines.StableDiffusionPipeline.from_pretrained(half, engine="eager")
    # a component given by hand is not looked for
    pipe = hcf.pipelines.StableDiffusionPipeline.from_pretrained(
        half, unet=plain.unet, engine="eager"
    )
    assert pipe.unet is plain.unet
