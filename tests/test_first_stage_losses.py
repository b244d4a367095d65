"""Losses, discriminator and perceptual distance of the first stages against closed forms."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import VectorQuantizer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from taiji.autoencoder.codebook import CodebookConfig, codebook_loss
from taiji.autoencoder.discriminator import PatchDiscriminator
from taiji.autoencoder.kl import KlFirstStage
from taiji.autoencoder.losses import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    psnr,
)
from taiji.autoencoder.perceptual import (
    PerceptualConfig,
    PerceptualLoss,
    Vgg16,
    layer_distance,
    load_network,
    load_perceptual,
)
from taiji.presets import TINY_KL_F4

IMAGE_CLIP = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/image_clip"


def logits(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 2, 2)


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hinge_losses() -> None:
    real, fake = logits(2.0, 1.0, 0.5, -1.0), logits(-2.0, -1.0, 0.0, 3.0)
    # relu(1 - real) = 0, 0, 0.5, 2 and relu(1 + fake) = 0, 0, 1, 4
    assert hinge_discriminator(real, fake) == pytest.approx((2.5 / 4 + 5 / 4) / 2)
    assert hinge_generator(fake) == pytest.approx(0.0)
    assert hinge_generator(logits(1.0, 2.0, 3.0, 4.0)) == pytest.approx(-2.5)


def test_psnr_is_that_of_the_range_of_two_and_clips_the_output() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    output = truth.clone()
    output[0] += 0.2
    assert psnr(output, truth)[0] == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)
    assert psnr(truth + 5, truth + 1)[1] == pytest.approx(10 * math.log10(4 / 1e-8), abs=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 0.0])
def test_adaptive_weight_is_the_ratio_of_the_gradients_by_hand(scale: float) -> None:
    torch.manual_seed(0)
    hidden, layer = torch.randn(5, 4), nn.Linear(4, 3, bias=False)
    target, direction = torch.randn(5, 3), scale * torch.randn(3)
    output = layer(hidden)
    reconstruction, fool = (output - target).square().mean(), -(output @ direction).mean()
    found = adaptive_weight(reconstruction, fool, layer.weight)
    # d/dW mean (Wh - t)^2 = 2/(5 3) sum (Wh - t) h^T;  d/dW -mean d Wh = -d (mean h)^T
    pull = 2 / 15 * (output.detach() - target).T @ hidden
    push = -torch.outer(direction, hidden.mean(0))
    wanted = min(float(pull.norm() / (push.norm() + 1e-4)), 1e4)
    assert found == pytest.approx(wanted, rel=1e-5) and not found.requires_grad
    (reconstruction + found * fool).backward()  # the graph is still there
    assert torch.allclose(layer.weight.grad, pull + found * push, atol=1e-6)


def test_adaptive_weight_is_clamped() -> None:
    layer = nn.Linear(1, 1, bias=False)
    output = layer(torch.ones(1, 1))
    assert adaptive_weight(100 * output.sum(), 0 * output.sum(), layer.weight) == 1e4


def test_codebook_loss_weighs_the_encoder_not_the_codes() -> None:
    z = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).requires_grad_()
    e = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    config = CodebookConfig(beta=0.25)
    loss = codebook_loss(z, e, config)
    loss.backward()
    assert loss.item() == pytest.approx(1.25 * (1 + 4) / 2)
    assert z.grad is not None and e.grad is not None
    # mean over two elements of (z - e)^2: beta 2 (z - e) / 2 for z, -2 (z - e) / 2 for e
    assert z.grad.flatten().tolist() == pytest.approx([0.25, 0.5])
    assert e.grad.flatten().tolist() == pytest.approx([-1.0, -2.0])
    assert codebook_loss(z, e, CodebookConfig(update="ema")).item() == pytest.approx(0.25 * 2.5)


def test_it_equals_diffusers_without_its_legacy_form() -> None:
    torch.manual_seed(0)
    quantiser = VectorQuantizer(8, 3, beta=0.25, legacy=False)
    z = torch.randn(2, 3, 4, 4)
    _, wanted, (_, _, codes) = quantiser(z)
    e = quantiser.embedding(codes.view(2, 4, 4)).movedim(-1, 1)
    assert torch.allclose(codebook_loss(z, e, CodebookConfig()), wanted)


def test_published_discriminator_has_its_parameters_and_patches() -> None:
    published = PatchDiscriminator(3, 64, 3)
    assert sum(p.numel() for p in published.parameters()) == 2_765_633
    assert published(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    two = PatchDiscriminator(3, 64, 2)
    # 4x4 convolutions 3-64 (bias), 64-128, 128-256 with two norm vectors each, 256-1 (bias)
    assert sum(p.numel() for p in two.parameters()) == 3136 + 131_328 + 524_800 + 4097
    assert two(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 14, 14)


def test_discriminator_starts_as_published_and_names_its_least_image() -> None:
    torch.manual_seed(0)
    body = PatchDiscriminator().body
    convolutions = [m for m in body if isinstance(m, nn.Conv2d)]
    assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.1) for m in convolutions[:4])
    assert PatchDiscriminator(layers=2)(torch.zeros(1, 3, 12, 12)).shape[-1] == 1
    with pytest.raises(ValueError, match="24 pixels and more"):
        PatchDiscriminator(layers=3)(torch.zeros(1, 3, 23, 64))


def test_kl_is_the_published_sum_over_the_image() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(**TINY_KL_F4)
    stage = KlFirstStage(model, kl_weight=0.5)
    x = images(2)
    _, regulariser, parts = stage(x, torch.Generator().manual_seed(0))
    mean, logvar = model.encode(x).latent_dist.parameters.chunk(2, dim=1)
    by_hand = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    assert torch.allclose(regulariser, 0.5 * by_hand) and stage.sums
    assert parts["kl"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_layer_distance_of_unit_vectors() -> None:
    a = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])  # one image, two places
    b = torch.tensor([[[0.0, 5.0], [0.0, 1.0]]])
    assert layer_distance(a, b) == pytest.approx(1.0)  # places 2 and 0 apart
    assert layer_distance(a, b, torch.tensor([1.0, 3.0])) == pytest.approx(2.0)
    assert layer_distance(a, 7 * a) == pytest.approx(0.0, abs=1e-6)


def test_perceptual_loss_of_the_own_tower_sums_its_layers() -> None:
    loss = load_perceptual(PerceptualConfig(network=IMAGE_CLIP))
    assert loss.network.card["class"] == "ChineseCLIPVisionModel"
    assert loss.network.card["parameters"] == 628_352
    x, y = images(2, 64), images(2, 64, seed=1)
    maps = list(zip(loss.network(x), loss.network(y), strict=True))
    wanted = sum(layer_distance(a, b) for a, b in maps)
    assert len(maps) == 4 and torch.allclose(loss(x, y), torch.as_tensor(wanted))
    assert torch.equal(loss(x, x), torch.zeros(2))
    one = PerceptualLoss(loss.network, layers=(2,))
    assert torch.allclose(one(x, y), layer_distance(*maps[2]))


def test_the_gradient_reaches_the_image_and_not_the_network() -> None:
    loss = load_perceptual(PerceptualConfig(network=IMAGE_CLIP)).train()
    output = images(1).requires_grad_()  # resized to the tower's 64 pixels
    loss(output, images(1, seed=1)).sum().backward()
    assert output.grad is not None and output.grad.norm() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(m.training for m in loss.network.modules())


def test_any_folder_of_transformers_serves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}'
    )
    network = load_network(tmp_path)
    x = images(2)
    maps = network(x)
    assert [m.shape for m in maps] == [(2, 64, 8), (2, 64, 8), (2, 16, 16)]
    scaled = ((x + 1) / 2 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.2
    wanted = model.eval()(scaled).last_hidden_state
    assert torch.allclose(maps[-1].mT.reshape(wanted.shape), wanted, atol=1e-5)


def vgg16_file(path: Path) -> Vgg16:
    torch.manual_seed(0)
    body = Vgg16()
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
        for i, width in enumerate((64, 128, 256, 512, 512))
    }
    save_file({**body.state_dict(), **linear, "classifier.0.weight": torch.zeros(1)}, path)
    return body


def test_lpips_of_a_vgg16_file_with_linear_weights(tmp_path: Path) -> None:
    path = tmp_path / "vgg16.safetensors"
    body = vgg16_file(path)
    assert sum(p.numel() for p in body.parameters()) == 14_714_688
    loss = load_perceptual(PerceptualConfig(network=path, linear=path))
    x, y = images(1), images(1, seed=1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled = [
        ((t + 1) / 2 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
        for t in (x, y)
    ]
    maps = list(zip(*(body(t) for t in scaled), strict=True))
    assert [a.shape[1] for a, _ in maps] == [1024, 256, 64, 16, 4]
    assert loss.linear is not None
    wanted = [layer_distance(a, b, w) for (a, b), w in zip(maps, loss.linear, strict=True)]
    assert torch.allclose(loss(x, y), torch.stack(wanted).sum(0), rtol=1e-4)
    with pytest.raises(ValueError, match="5 linear weights for 1 layers"):
        PerceptualLoss(loss.network, loss.linear, (0,))(x, y)


def test_wrong_networks_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no feature network"):
        load_network(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_network(tmp_path)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="not a VGG16"):
        load_network(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="lpips' names"):
        odd = PerceptualConfig(network=IMAGE_CLIP, linear=tmp_path / "odd.safetensors")
        load_perceptual(odd)
    with pytest.raises(FileNotFoundError, match="linear weights"):
        load_perceptual(PerceptualConfig(network=IMAGE_CLIP, linear=tmp_path / "absent"))
