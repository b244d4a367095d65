"""Tiny decoders taught by a pipeline's VAE: what they learn, and what the pipeline is with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import UNET, make_tiny_pipeline, noise, tiny_vae, tiny_vq
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionImg2ImgPipeline as ImageToImage
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss, mse_loss

from hcf.distill.decoder import (
    DecoderObjective,
    batches,
    check_range,
    make_tiny,
    open_perceptual,
    split,
)
from hcf.distill.trainer import distill
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.settings import DecoderConfig, DistillConfig, PerceptualConfig

SMALL: dict[str, Any] = {"channels": 8, "blocks": [1, 1], "held_out": 4}
SMALLER: dict[str, Any] = {"channels": 16, "blocks": [1, 1, 0], "held_out": 4}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))


def objective(vae: Any, **changes: Any) -> DecoderObjective:
    config = DecoderConfig.model_validate({**SMALL, **changes})
    torch.manual_seed(0)
    return DecoderObjective(make_tiny(vae, config), vae, config, open_perceptual(config.perceptual))


def test_a_tiny_decoder_has_the_shape_of_the_recipe() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        tiny: Any = make_tiny(vae, DecoderConfig())
        plain = AutoencoderTiny()
    # the defaults are TAESD's own architecture
    assert [(n, p.shape) for n, p in tiny.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    assert tiny.config.scaling_factor == 1.0 and tiny.config.shift_factor == 0.0
    small: Any = make_tiny(tiny_vae(), DecoderConfig(channels=8, blocks=[2, 0]))
    assert small.config.num_decoder_blocks == (2, 0) and small.config.num_encoder_blocks == (0, 2)
    assert small.decode(noise(1, 4, 8, 8)).sample.shape == (1, 3, 16, 16)


def test_losses_are_against_what_the_vae_makes_of_the_same_latents() -> None:
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    ours = objective(vae, edge_weight=2.0, encoder_weight=3.0)
    latents = noise(2, 4, 8, 8)
    loss, parts = ours(latents, torch.Generator())
    loss.backward()
    with torch.no_grad():
        images = vae.decode(latents / 0.5 + 0.25).sample.clamp(-1, 1)
        decoded = ours.tiny.decode(latents).sample
        means = (vae.encode(images).latent_dist.mean - 0.25) * 0.5
        encoder = mse_loss(ours.tiny.encode(images).latents, means)
        edges = sum(l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (-1, -2))
    assert parts["l1"] == pytest.approx(l1_loss(decoded, images).item(), rel=1e-4)
    assert parts["encoder"] == pytest.approx(3 * encoder.item(), rel=1e-4)
    assert parts["edge"] == pytest.approx(2 * float(edges), rel=1e-4)
    assert loss.item() == pytest.approx(parts["l1"] + parts["encoder"] + parts["edge"], rel=1e-4)
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad is not None for p in ours.tiny.parameters())
    kept = batches(ours, latents, 2)(np.random.default_rng(0), 2)
    again, _ = ours(generator=torch.Generator(), **kept)
    assert {"latents", "images", "codes"} == kept.keys()
    fresh, _ = ours(kept["latents"], torch.Generator())
    assert again.item() == pytest.approx(fresh.item(), rel=1e-2)  # kept in float16


def test_a_frozen_network_may_judge(tmp_path: Path) -> None:
    from taiji.autoencoder.perceptual import Vgg16

    torch.manual_seed(0)
    network = Vgg16()
    save_file(network.state_dict(), tmp_path / "vgg16.safetensors")
    perceptual = {"network": tmp_path / "vgg16.safetensors", "weight": 0.5}
    ours = objective(tiny_vae(), perceptual=perceptual)
    loss, parts = ours(noise(1, 4, 16, 16), torch.Generator())
    assert parts["perceptual"] > 0
    assert loss.item() == pytest.approx(sum(parts[n] for n in ("l1", "encoder", "perceptual")))
    with pytest.raises(InvalidArtifact, match="perceptual: no feature network"):
        open_perceptual(PerceptualConfig(network=tmp_path / "absent"))


def pictures(count: int, seed: int) -> Any:
    """Coloured patches (count, 3, 32, 32) in [-1, 1]"""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return coarse.repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.fixture
def folder(mini_vae: Any, tmp_path: Path) -> Path:
    """A pipeline with the demonstrator's VAE, and latents of pictures."""
    pipe = make_tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(**{**UNET, "in_channels": 8, "out_channels": 8}).eval()
    pipe.vae = mini_vae
    pipe.save_pretrained(tmp_path / "tiny")
    latents = mini_vae.encode(pictures(24, 1)).latent_dist.mean * mini_vae.config.scaling_factor
    return prepare(tmp_path / "tiny", latents)


def prepare(folder: Path, latents: Any) -> Path:
    data = folder / "hcf_data"
    data.mkdir()
    tensors = {"latents": latents.half(), "row": torch.arange(24)}
    save_file(tensors, data / "latents_distill.safetensors")
    (data / "captions_distill.json").write_text(json.dumps(["cat", "dog", "bird"] * 8))
    return folder


def config(**changes: Any) -> DistillConfig:
    return DistillConfig.model_validate(
        {"method": "decoder", "train_steps": 60, "batch_size": 8, "warmup_steps": 1,
         "learning_rate": 5e-3, "decay_share": 0.3, "ema_decay": 0.5, "decoder": SMALLER, **changes}
    )  # fmt: skip


def test_the_pipeline_decodes_and_encodes_with_the_student(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = config(decoder={**SMALLER, "sampled": 4}, probe={"every": 60, "prompts": 1})
    prompts = [{"id": "0", "prompt": "cat"}]
    (folder / "hcf_data" / "check_prompts.json").write_text(json.dumps(prompts))
    out = distill(folder, tmp_path / "student", settings, said.append)
    assert "4 of 4 latents sampled" in said
    assert "decoder: 60 steps on 24 latents, 4 held out" in said
    assert (out / "grids" / "step-000060.png").stat().st_size > 100
    found = json.loads((out / "hcf_manifest.json").read_text())["distillation"]
    assert found["flop_ratio"] > 5 and found["psnr_db"] > 12 and found["encoder_error"] < 0.8
    assert found["student_parameters"] < found["teacher_parameters"] / 5
    student = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    teacher = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert type(student.vae).__name__ == "AutoencoderTiny"
    assert student.vae_scale_factor == teacher.vae_scale_factor
    # a pipeline's own scaling, there and back: latents -> images, images -> latents
    latents = load_file(folder / "hcf_data" / "latents_distill.safetensors")["latents"][:4].float()
    images, codes = [], []
    for pipe in (student, teacher):
        pipe.set_progress_bar_config(disable=True)
        again = ImageToImage(**pipe.components, requires_safety_checker=False)
        with torch.no_grad():
            images.append(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)
            codes.append(
                again.prepare_latents(
                    pictures(4, 1), torch.tensor([0]), 4, 1, torch.float32, "cpu",
                    generator=torch.Generator().manual_seed(0),
                )
            )  # fmt: skip
    for ours, theirs in (images, codes):
        assert (ours - theirs).square().mean() < 0.5 * theirs.var()
    given = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    assert student("cat", **given).images.shape == teacher("cat", **given).images.shape
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (out / unet).read_bytes() == (folder / unet).read_bytes()
    weights = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.float16}


def test_a_student_of_too_few_steps_is_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HcfError, match="has not learned the VAE's colours"):
        distill(folder, tmp_path / "student", config(train_steps=1), lambda line: None)
    assert not (tmp_path / "student").exists()


def test_what_a_tiny_decoder_cannot_replace_is_named(folder: Path, tmp_path: Path) -> None:
    spec = DecoderConfig.model_validate(SMALL)
    with pytest.raises(RecipeError, match="a VQModel, whose decoder looks codes up in a book"):
        make_tiny(tiny_vq(), spec)
    with pytest.raises(RecipeError, match="no `vae`"):
        make_tiny(None, spec)
    with pytest.raises(RecipeError, match="a AutoencoderTiny"):
        make_tiny(make_tiny(tiny_vae(), spec), spec)
    vae = tiny_vae()
    vae.register_to_config(latents_mean=[0.1] * 4)
    with pytest.raises(RecipeError, match="per channel"):
        make_tiny(vae, spec)
    with pytest.raises(RecipeError, match=r"blocks=\[1, 1, 1\]: the VAE has 2 stages"):
        make_tiny(tiny_vae(), DecoderConfig(blocks=[1, 1, 1]))
    with pytest.raises(RecipeError, match="50% of the latents are beyond 6"):
        check_range(torch.tensor([0.0, 9.0]))
    with pytest.raises(InvalidArtifact, match="6 latents, and 4 of them would only measure"):
        split(noise(6, 4, 8, 8), 4)
    train, held = split(torch.arange(10).view(10, 1, 1, 1), 2)
    assert held.flatten().tolist() == [0, 5] and len(train) == 8
    for changes, message in (
        ({"gradient_checkpointing": True}, "skips the scaling"),
        ({"student": {"kind": "lora"}}, "trains whole weights"),
        ({"structure": {"layers": 1}}, "is for method=structure"),
    ):
        with pytest.raises(ValidationError, match=message):
            config(**changes)
    path = folder / "hcf_data" / "latents_distill.safetensors"
    save_file({**load_file(path), "latents": noise(24, 4, 8, 8)}, path)
    with pytest.raises(InvalidArtifact, match="latents of 4 channels, the VAE has 8"):
        distill(folder, tmp_path / "student", config(), lambda line: None)
