"""TaijiImagenPipeline on tiny random models: a pixel stage and a latent one behind the base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, VQModel

from taiji import presets
from taiji.diffusion.schedules import make_scheduler, scheduler_config
from taiji.pipelines import TaijiImagenPipeline
from taiji.text import SandwichTextEncoder
from taiji.text.tokenizer import build_tokenizer
from taiji.unet import EfficientUNet, ImagenUNet


def text_modules(length: int = 16) -> dict[str, Any]:
    tokenizer = build_tokenizer(["红色的猫和狗", "蓝色圆形"], max_length=length)
    encoder = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.TINY_SANDWICH)
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval()}


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    return TaijiImagenPipeline(
        **text_modules(),
        unet=UNet2DConditionModel(**presets.A_TINY_UNET).eval(),
        scheduler=make_scheduler("cosine", "epsilon"),
        sr1_unet=UNet2DConditionModel(**presets.TINY_SR_IF_UNET).eval(),
        sr1_scheduler=make_scheduler("cosine", "v_prediction"),
        sr2_unet=UNet2DConditionModel(**presets.TINY_SR_UNET).eval(),
        sr2_scheduler=make_scheduler("linear", "v_prediction"),
        sr2_vae=VQModel(**presets.TINY_VQ_F4).eval(),
    )


def images(pipe: Any, prompt: Any = "红色的猫", **kwargs: Any) -> Any:
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **{**settings, "output_type": "np", **kwargs}).images


def base(pipe: Any, prompt: Any = "红色的猫", **kwargs: Any) -> Any:
    return images(pipe, prompt, super_resolution_stages=0, **kwargs)


def test_the_whole_cascade_in_one_call_repeats_itself(pipe: Any) -> None:
    first, second = images(pipe), images(pipe)
    assert first.shape == (1, 256, 256, 3) and np.isfinite(first).all()
    assert np.array_equal(first, second)
    other = images(pipe, generator=torch.Generator().manual_seed(1))
    assert not np.allclose(first, other, atol=1e-3)
    assert images(pipe, super_resolution_stages=1).shape == (1, 64, 64, 3)
    assert base(pipe).shape == (1, 16, 16, 3)


def test_save_and_load_the_whole_cascade(pipe: Any, tmp_path: Path) -> None:
    pipe.register_to_config(settings=[{**s, "steps": 2} for s in pipe.config.settings])
    pipe.save_pretrained(tmp_path / "m")
    loaded = TaijiImagenPipeline.from_pretrained(tmp_path / "m")
    assert loaded.sr1_vae is None and loaded.config.settings[1]["noise_level"] == 0.2
    assert np.array_equal(images(pipe), images(loaded, num_inference_steps=None))


def test_a_base_alone_saves_loads_and_moves_to_half_precision(tmp_path: Path) -> None:
    pipe = TaijiImagenPipeline(
        **text_modules(),
        unet=UNet2DConditionModel(**presets.A_TINY_UNET).eval(),
        scheduler=make_scheduler("cosine", "v_prediction"),
    )
    pipe.save_pretrained(tmp_path / "m")
    loaded = TaijiImagenPipeline.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16)
    out = images(loaded)
    assert loaded.unet.dtype == torch.bfloat16 and out.shape == (1, 16, 16, 3)
    assert np.isfinite(out).all()


def test_guidance_one_is_the_conditional_branch_and_zero_the_null_branch(pipe: Any) -> None:
    almost_one = base(pipe, guidance_scale=1.0 + 1e-7)
    assert np.allclose(base(pipe, guidance_scale=1.0), almost_one, atol=1e-4)
    null = base(pipe, "", guidance_scale=1.0)
    assert np.allclose(base(pipe, guidance_scale=0.0), null, atol=1e-4)
    assert not np.allclose(base(pipe, guidance_scale=1.0), null, atol=1e-3)
    negative = base(pipe, guidance_scale=3.0, negative_prompt="蓝色圆形")
    assert not np.allclose(base(pipe, guidance_scale=3.0), negative, atol=1e-3)


def test_batches_repeat_single_images(pipe: Any) -> None:
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = base(pipe, ["红色的猫", "蓝色圆形"], generator=seeds)
    alone = base(pipe, "蓝色圆形", generator=torch.Generator().manual_seed(2))
    assert np.allclose(both[1], alone[0], atol=1e-3)
    assert len(base(pipe, ["红色的猫", "蓝色圆形"], num_images_per_prompt=2)) == 4


def test_settings_a_stage(pipe: Any) -> None:
    found = pipe.stage_settings(
        3, steps=[5, 4, 3], guidance_scale=2.0, thresholding="static", noise_level=[0.1, 0.3]
    )
    assert [s.steps for s in found] == [5, 4, 3] and {s.guidance_scale for s in found} == {2.0}
    assert [s.noise_level for s in found] == [0.0, 0.1, 0.3]
    # one rule for all is for all that can have it
    assert [s.thresholding for s in found] == ["static", "static", "none"]
    defaults = pipe.stage_settings(
        2, steps=None, guidance_scale=None, thresholding=None, noise_level=None
    )
    assert [s.guidance_scale for s in defaults] == [7.5, 8.0]
    with pytest.raises(ValueError, match="num_inference_steps has 2 values for 3 stages"):
        images(pipe, num_inference_steps=[1, 2])
    with pytest.raises(ValueError, match="dynamic thresholding is for pixels"):
        images(pipe, num_inference_steps=1, thresholding=["none", "none", "dynamic"])


def test_the_callback_sees_every_step_of_every_stage(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []

    def callback(p: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, kwargs["latents"].shape[-1]))
        return kwargs

    images(pipe, num_inference_steps=[2, 1, 1], callback_on_step_end=callback)
    assert seen == [(0, 16), (1, 16), (2, 64), (3, 64)]  # the last stage is latent: 256 / 4


def test_the_noise_level_matters(pipe: Any) -> None:
    calm, noisy = (images(pipe, super_resolution_stages=1, noise_level=n) for n in (0.0, 0.3))
    assert not np.allclose(calm, noisy, atol=1e-3)


@pytest.mark.parametrize("name", ["ddpm", "dpm", "edm"])
def test_other_schedulers_with_thresholding(pipe: Any, name: str) -> None:
    config = scheduler_config("cosine", "epsilon")
    pipe.scheduler = {
        "ddpm": DDPMScheduler(**config),
        "dpm": DPMSolverMultistepScheduler(
            **{k: v for k, v in config.items() if k != "clip_sample"}
        ),
        "edm": make_scheduler("edm", "epsilon"),
    }[name]
    for rule in ("none", "static", "dynamic"):
        assert np.isfinite(base(pipe, num_inference_steps=3, thresholding=rule)).all()


def test_family_b_and_the_efficient_u_net(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = TaijiImagenPipeline(
        **text_modules(),
        unet=ImagenUNet(**presets.TINY_B_UNET).eval(),
        scheduler=make_scheduler("cosine", "epsilon"),
        sr1_unet=EfficientUNet(**presets.TINY_EFFICIENT_UNET).eval(),
        sr1_scheduler=make_scheduler("linear", "v_prediction"),
    )
    pipe.save_pretrained(tmp_path / "m")
    loaded = TaijiImagenPipeline.from_pretrained(tmp_path / "m")
    out = images(pipe)
    assert out.shape == (1, 64, 64, 3) and np.array_equal(out, images(loaded))


def test_a_stage_without_text_is_not_guided(pipe: Any) -> None:
    blocks = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    }
    cascade = TaijiImagenPipeline(
        **text_modules(),
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        sr1_unet=UNet2DConditionModel(**{**presets.TINY_SR_UNET, **blocks}).eval(),
        sr1_scheduler=pipe.sr2_scheduler,
        sr1_vae=pipe.sr2_vae,
    )
    assert [s["guidance_scale"] for s in cascade.config.settings] == [7.5, 1.0]
    assert images(cascade, guidance_scale=3.0).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="needs a U-Net with text"):
        images(cascade, guidance_scale=[3.0, 3.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "greater than or equal to 1"),
        ({"guidance_scale": -1.0}, "greater than or equal to 0"),
        ({"noise_level": 2.0}, "less than or equal to 1"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"super_resolution_stages": 3}, "this cascade has 2"),
    ],
)
def test_bad_arguments(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(pipe, **arguments)


def test_models_that_do_not_fit_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        images(pipe, [])
    modules = {**text_modules(), "unet": pipe.unet, "scheduler": pipe.scheduler}
    with pytest.raises(ValueError, match="needs sr1_unet too"):
        TaijiImagenPipeline(**modules, sr2_unet=pipe.sr2_unet, sr2_vae=pipe.sr2_vae)
    with pytest.raises(ValueError, match="needs a U-Net with 6 channels in"):
        TaijiImagenPipeline(**modules, sr1_unet=pipe.unet, sr1_scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="settings for 1 stages, but the cascade has 2"):
        TaijiImagenPipeline(
            **modules, sr1_unet=pipe.sr1_unet, sr1_scheduler=pipe.scheduler, settings=[{}]
        )
    variance = UNet2DConditionModel(**{**presets.A_TINY_UNET, "out_channels": 6})
    with pytest.raises(ValueError, match="learned variances"):
        TaijiImagenPipeline(**{**modules, "unet": variance})
    too_long = TaijiImagenPipeline(**{**modules, **text_modules(64)})
    with pytest.raises(ValueError, match="64 text tokens"):
        base(too_long)


@pytest.mark.gpu
def test_the_cascade_in_half_precision_on_a_gpu(pipe: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pipe.to("cuda", torch.float16)
    first, second = images(pipe), images(pipe)
    assert first.shape == (1, 256, 256, 3) and np.isfinite(first).all()
    assert np.array_equal(first, second)
