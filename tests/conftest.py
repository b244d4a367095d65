"""Tiny real pipelines with random weights: built in memory, no download, a few MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}
# with v-prediction the latents of a random model keep unit size over all steps
SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def tiny_tokenizer() -> Any:
    """A CLIP byte-level tokenizer without merges: 514 entries."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    entries = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def tiny_text_encoder(projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def make_tiny_pipeline() -> Any:
    """StableDiffusionPipeline: latents 4x8x8, images 16x16, DDIM, random weights of seed 0."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False, rescale_betas_zero_snr=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe


@pytest.fixture
def tiny_pipeline() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def tiny_xl_pipeline() -> Any:
    """StableDiffusionXLPipeline with one text encoder: conditions on text_embeds and time_ids."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=tiny_text_encoder(projection=True),
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(
            **UNET,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder_2):
        module.eval().requires_grad_(False)
    return pipe


@pytest.fixture
def tiny_folder(tiny_pipeline: Any, tmp_path: Path) -> Path:
    """`tiny_pipeline` saved as a plain diffusers folder."""
    target = tmp_path / "tiny"
    tiny_pipeline.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def tiny_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_tiny_pipeline` as an artefact sampled in 4 steps, its U-Net calibrated to INT8."""
    from hcf.artifact import Sampling, clone_artifact, write_manifest
    from hcf.quantize.int8 import quantize
    from hcf.recipe import QuantizeConfig

    root = tmp_path_factory.mktemp("tiny")
    make_tiny_pipeline().save_pretrained(root / "plain")
    manifest = clone_artifact(root / "plain", root / "student")
    manifest.sampling = Sampling(steps=4, guidance_scale=1.0)
    write_manifest(root / "student", manifest)
    config = QuantizeConfig(calibration_prompts=["red cat", "blue dog"], calibration_samples=2)
    return quantize(root / "student", root / "quantized", config, lambda line: None)


@pytest.fixture(scope="session")
def tiny_exported(tiny_quantized: Path) -> Path:
    """`tiny_quantized` with its ONNX graphs: fp32 and both INT8 forms."""
    from hcf.export.onnx import export
    from hcf.recipe import ExportConfig

    output = tiny_quantized.with_name("exported")
    return export(tiny_quantized, output, ExportConfig(), lambda line: None)


@pytest.fixture(scope="session")
def tiny_built(tiny_exported: Path) -> Path:
    """`tiny_exported` with the eager, ONNX Runtime and OpenVINO engines in every precision."""
    from hcf.engines.build import build
    from hcf.recipe import BuildConfig

    config = BuildConfig(threads=1, repeats=3)
    return build(tiny_exported, tiny_exported.with_name("built"), config, lambda line: None)
