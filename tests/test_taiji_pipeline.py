"""TaijiStableDiffusionPipeline on a tiny random model: what an application developer relies on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from taiji.pipelines import TaijiStableDiffusionPipeline
from taiji.presets import MINI_SCHEDULER, SD_A_UNET
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.tokenizer import build_tokenizer


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["红色的猫和狗", "蓝色圆形"], max_length=8)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    clip = ChineseCLIPModel(
        ChineseCLIPConfig(
            text_config={**size, "vocab_size": len(tokenizer), "max_position_embeddings": 6},
            vision_config={**size, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )
    return TaijiStableDiffusionPipeline(
        tokenizer=tokenizer,
        image_clip=clip.eval(),
        text_encoder=SandwichTextEncoder(
            vocab_size=len(tokenizer), width=16, layers=2, heads=2, ffn_width=32, max_length=8,
            sandwich_k=1,
        ).eval(),
        fusion=TextFusion(16, 16, 6, 16, 8, 24).eval(),
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1, norm_num_groups=8, cross_attention_dim=24, attention_head_dim=2,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 48,
        ).eval(),
        vae=AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        ).eval(),
        scheduler=DDIMScheduler(**MINI_SCHEDULER),
        default_steps=2,
    )  # fmt: skip


def images(pipe: Any, prompt: Any = "红色的猫", **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, output_type="np", generator=generator, **kwargs).images


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler],
)
def test_any_scheduler(pipe: Any, scheduler: Any) -> None:
    settings = {k: v for k, v in MINI_SCHEDULER.items() if k != "rescale_betas_zero_snr"}
    pipe.scheduler = scheduler.from_config({**settings, "num_train_timesteps": 1000})
    out = images(pipe)
    assert out.shape == (1, 16, 16, 3) and np.isfinite(out).all()


def test_guidance_one_is_the_conditional_branch_and_zero_the_null_branch(pipe: Any) -> None:
    # a batch of two rows may take other kernels than one row
    almost_one = images(pipe, guidance_scale=1.0 + 1e-7)
    assert np.allclose(images(pipe, guidance_scale=1.0), almost_one, atol=1e-5)
    null = images(pipe, "", guidance_scale=1.0)
    assert np.allclose(images(pipe, guidance_scale=0.0), null, atol=1e-5)
    assert not np.allclose(images(pipe, guidance_scale=1.0), null, atol=1e-5)


def test_batches_repeat_single_images(pipe: Any) -> None:
    prompts = ["红色的猫", "蓝色圆形"]
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = pipe(prompts, generator=seeds, output_type="np").images
    alone = pipe(prompts[1], generator=torch.Generator().manual_seed(2), output_type="np").images
    assert np.allclose(both[1], alone[0], atol=1e-4)
    assert len(images(pipe, prompts, num_images_per_prompt=2)) == 4


def test_latents_in_and_out_callback_and_negative_prompt(pipe: Any) -> None:
    seen: list[int] = []

    def callback(p: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return kwargs

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = pipe("猫", latents=noise, output_type="latent", callback_on_step_end=callback).images
    assert out.shape == (1, 4, 8, 8) and seen == [0, 1]
    assert not np.allclose(images(pipe), images(pipe, negative_prompt="蓝色圆形"), atol=1e-6)


def test_save_and_load_give_the_same_image(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "m")
    loaded = TaijiStableDiffusionPipeline.from_pretrained(tmp_path / "m")
    assert loaded.config.default_steps == 2
    assert np.array_equal(images(pipe), images(loaded))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 18}, "multiples of 4"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"needed \(1, 4, 8, 8\)"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_bad_arguments(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("猫", **arguments)


def test_full_size_unet_has_its_published_parameter_count() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_A_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 872_139_204
