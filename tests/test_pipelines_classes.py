"""The classes of `hcf.pipelines`: how they get engines, what they refuse, what they read."""

from __future__ import annotations

import copy
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import assert_same_images
from torch import Tensor

import hcf.pipelines
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError, UnsafeFile
from hcf.export.component import relative_error
from hcf.load import decelerate
from hcf.routing import routes_of


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
    assert_same_images(engine, found, draw(plain, "control", prompt="a <cat-toy>"))
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


def test_keywords_reach_accelerate(drop_in: Any, draw: Any) -> None:
    with pytest.raises(RecipeError, match="'tensorflow'"):
        drop_in(hcf.pipelines, "sd", "text", engine="tensorflow")
    with pytest.raises(RecipeError, match="threads=0"):
        drop_in(hcf.pipelines, "sd", "text", engine="eager", threads=0)
    with pytest.raises(RecipeError, match="prompts are for calibration"):
        drop_in(hcf.pipelines, "sd", "text", engine="eager", prompts=["red cat"])
    with pytest.raises(RecipeError, match="no component"):
        drop_in(hcf.pipelines, "sd", "text", engine="openvino", components=["safety_checker"])
    wanted = draw(drop_in(diffusers, "sd", "text"), "text")
    cached = drop_in(hcf.pipelines, "sd", "text", engine="eager", cache=2)
    assert 0 < relative_error(draw(cached, "text"), wanted) < 0.5
    assert torch.equal(draw(decelerate(cached), "text"), wanted)


def test_a_lora_of_another_base_is_refused_before_it_is_loaded(tiny_folder: Path) -> None:
    pipe = hcf.pipelines.StableDiffusionPipeline.from_pretrained(tiny_folder, engine="eager")
    name = next(n for n, _ in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    state = {
        f"unet.{name}.lora_A.weight": torch.zeros(4, 640),
        f"unet.{name}.lora_B.weight": torch.zeros(640, 4),
    }
    with pytest.raises(InvalidArtifact, match="to_q"):
        pipe.load_lora_weights(state, adapter_name="other")
    assert not getattr(pipe.unet, "peft_config", None)
