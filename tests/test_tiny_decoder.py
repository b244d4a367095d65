"""Tiny decoders in place of a first stage's own, and what they cost: PSNR, SSIM, LPIPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import noise, tiny_vq
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch import nn

from hcf.decode import (
    Lpips,
    TinyDecoder,
    check_latent_space,
    compare_decoders,
    latent_factor,
    open_decoder,
)
from hcf.decode.lpips import SCALE, SHIFT, _unit
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError


def rescaled(vae: Any, factor: float) -> Any:
    """The same decoder, for latents of another scaling factor."""
    twin = AutoencoderKL.from_config(vae.config).eval().requires_grad_(False)
    twin.load_state_dict(vae.state_dict())
    twin.decoder.conv_in.weight.mul_(1 / vae.config.scaling_factor * factor)
    twin.register_to_config(scaling_factor=factor)
    return twin


def test_a_tiny_decoder_gets_latents_of_its_own_scale(mini_vae: Any) -> None:
    latents = noise(1, 8, 16, 16)
    tiny = TinyDecoder(mini_vae, rescaled(mini_vae, 1.0))
    wanted = mini_vae.decode(latents).sample
    assert torch.allclose(tiny(latents), wanted, atol=1e-3)
    assert check_latent_space(mini_vae, tiny) > 0.999
    shifted = rescaled(mini_vae, 2.0)
    shifted.register_to_config(shift_factor=0.5)
    moved = TinyDecoder.__new__(TinyDecoder)
    nn.Module.__init__(moved)
    moved.tiny, moved.given, moved.wanted = shifted, (0.5, 0.25), (2.0, 0.5)
    scaled = (latents - 0.25) * 0.5 / 2.0 + 0.5
    assert torch.allclose(moved(latents), shifted.decode(scaled).sample, atol=1e-5)


def test_decoders_of_other_latents_are_refused(mini_vae: Any) -> None:
    torch.manual_seed(1)
    config = {
        "block_out_channels": (16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
    }
    unrelated = AutoencoderKL(latent_channels=8, **config).eval()
    with pytest.raises(HcfError, match="trained on other latents"):
        TinyDecoder(mini_vae, unrelated)
    with pytest.raises(HcfError, match="4 latent channels, the VAE has 8"):
        TinyDecoder(mini_vae, AutoencoderKL(latent_channels=4, **config))
    tiny = AutoencoderTiny(latent_channels=8)
    assert latent_factor(tiny) == 8 and latent_factor(mini_vae) == 4
    with pytest.raises(HcfError, match="8 pixels a latent, the VAE has 4"):
        TinyDecoder(mini_vae, tiny)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
              "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}  # fmt: skip
    with pytest.raises(HcfError, match="AutoencoderTiny was trained on other latents"):
        TinyDecoder(mini_vae, AutoencoderTiny(latent_channels=8, **blocks).eval())
    with pytest.raises(HcfError, match="VQModel"):
        TinyDecoder(tiny_vq(), mini_vae)
    normalised = AutoencoderKL(latent_channels=8, latents_mean=(0.1,) * 8, **config)
    with pytest.raises(HcfError, match="per channel"):
        TinyDecoder(normalised, mini_vae)


def test_decoder_folders(tmp_path: Path, mini_vae: Any) -> None:
    assert open_decoder(mini_vae) is mini_vae
    mini_vae.save_pretrained(tmp_path / "small")
    opened = open_decoder(tmp_path / "small")
    assert isinstance(opened, AutoencoderKL) and not opened.training
    assert torch.equal(opened.decoder.conv_in.weight, mini_vae.decoder.conv_in.weight)
    with pytest.raises(InvalidArtifact, match="holds no decoder"):
        open_decoder(tmp_path)
    tiny_vq().save_pretrained(tmp_path / "vq")
    with pytest.raises(InvalidArtifact, match="'VQModel'"):
        open_decoder(tmp_path / "vq")
    (tmp_path / "small" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InvalidArtifact, match="cannot be opened"):
        open_decoder(tmp_path / "small")


class Pipe:
    def __init__(self, vae: Any) -> None:
        self.vae = vae


def trained_small_decoder(vae: Any, steps: int = 60) -> Any:
    """A decoder of a quarter of the width, taught the VAE's own decodes of noise."""
    torch.manual_seed(0)
    config = dict(vae.config) | {"block_out_channels": (16, 16, 16), "norm_num_groups": 4}
    small = AutoencoderKL.from_config(config).train()
    optimizer = torch.optim.AdamW(small.decoder.parameters(), lr=3e-3)
    for step in range(steps):
        latents = noise(4, 8, 16, 16, seed=step) / vae.config.scaling_factor
        with torch.no_grad():
            wanted = vae.decode(latents).sample
        loss = (small.decode(latents).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return small.eval().requires_grad_(False)


def test_decoders_are_compared(mini_vae: Any, tmp_path: Path) -> None:
    pipe = Pipe(mini_vae)
    latents = noise(2, 8, 16, 16)
    equal = compare_decoders(pipe, TinyDecoder(mini_vae, mini_vae), latents, rounds=3)
    assert (equal.psnr_db, equal.ssim) == (100.0, pytest.approx(1.0)) and equal.lpips is None
    assert equal.flop_ratio == 1 and equal.images == 2
    small = TinyDecoder(mini_vae, trained_small_decoder(mini_vae))
    torch.manual_seed(0)
    path = tmp_path / "lpips.safetensors"
    save_file({k: v.abs() for k, v in Lpips().state_dict().items()}, path)
    found = compare_decoders(pipe, small, latents, lpips=True, lpips_weights=path, rounds=3)
    assert 10 < found.psnr_db < 50 and 0 < found.ssim < 1 and found.flop_ratio > 2
    assert found.lpips is not None and found.lpips > 0
    assert 0 < found.time_ratio_low <= found.time_ratio <= found.time_ratio_high
    with pytest.raises(MissingDependency, match="LPIPS needs"):
        compare_decoders(pipe, small, latents, lpips=True)
    with pytest.raises(RecipeError, match="the VAE has 8 channels"):
        compare_decoders(pipe, small, noise(1, 4, 16, 16))


def test_lpips_is_a_distance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {k: v.abs() if k.startswith("lin") else v for k, v in Lpips().state_dict().items()}
    assert {"features.10.bias", "lin4.weight"} < set(state)
    path = tmp_path / "lpips.safetensors"
    save_file(state, path)
    network = Lpips.open(path)
    a, b = noise(2, 3, 64, 64).tanh(), noise(2, 3, 64, 64, seed=1).tanh()
    assert torch.equal(network(a, a), torch.zeros(2))
    assert torch.allclose(network(a, b), network(b, a)) and (network(a, b) > 0).all()
    assert (network(a, a + 0.01 * b) < network(a, b)).all()
    del state["lin2.weight"]
    save_file(state, path)
    with pytest.raises(InvalidArtifact, match="lin2"):
        Lpips.open(path)
    with pytest.raises(MissingDependency, match=r"features\.\*"):
        Lpips.open(tmp_path / "absent.safetensors")


def test_lpips_has_the_constants_of_torchmetrics() -> None:
    from torchmetrics.functional.image import lpips

    x = noise(2, 64, 7, 7)
    assert torch.allclose(_unit(x), lpips._normalize_tensor(x), atol=1e-5)
    scaling = lpips.ScalingLayer()
    assert scaling.shift.flatten().tolist() == pytest.approx(SHIFT)
    assert scaling.scale.flatten().tolist() == pytest.approx(SCALE)
