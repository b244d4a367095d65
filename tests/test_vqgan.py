"""Quantisation, upkeep of the codebook, the adversarial objective and what measures it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor

from taiji.autoencoder import codebook as vq
from taiji.autoencoder import reconstruction
from taiji.autoencoder.codebook import CodebookConfig, CodebookUpkeep
from taiji.autoencoder.kl import KlFirstStage, encode_images, latents, measure_scaling_factor
from taiji.autoencoder.losses import adaptive_weight, hinge_discriminator, hinge_generator
from taiji.autoencoder.perceptual import PerceptualConfig, load_network, load_perceptual
from taiji.autoencoder.vqgan import AdversarialConfig, AdversarialObjective, VqFirstStage
from taiji.presets import TINY_KL_F4, TINY_VQ_F4

IMAGE_CLIP = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/image_clip"
TINY_GAN = {"perceptual_weight": 0.0, "disc_width": 8, "disc_layers": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(seed)) * 2 - 1


def vq_stage(**config: Any) -> VqFirstStage:
    torch.manual_seed(0)
    model = VQModel(**TINY_VQ_F4)
    torch.nn.init.normal_(model.quantize.embedding.weight)  # so that more than one code is used
    return VqFirstStage(model, CodebookConfig(**config))


def test_codes_are_the_nearest_and_look_up_gives_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    z = torch.tensor([[0.1, 0.2], [0.9, 0.8], [9.0, 0.0], [2.6, 0.0]]).T.view(1, 2, 2, 2)
    codes = vq.nearest_codes(z, book)
    assert codes.tolist() == [[[0, 1], [2, 2]]]
    assert vq.look_up(codes, book)[0, :, 1, 1].tolist() == [4.0, 0.0]
    monkeypatch.setattr(vq, "MAX_DISTANCES", 4)  # a row at a time
    assert torch.equal(vq.nearest_codes(z, book), codes)


def test_the_gradient_goes_straight_through() -> None:
    z, e = torch.randn(1, 2, 3, 3).requires_grad_(), torch.randn(1, 2, 3, 3).requires_grad_()
    out = vq.straight_through(z, e)
    weight = torch.randn_like(z)
    (out * weight).sum().backward()
    assert torch.allclose(out, e) and torch.equal(z.grad, weight) and e.grad is None


def test_the_reconstruction_loss_moves_the_encoder_through_the_codes() -> None:
    stage = vq_stage(weight=0.0)
    output, regulariser, _ = stage(images(), generator())
    assert regulariser == 0
    output.square().mean().backward()
    assert stage.model.encoder.conv_in.weight.grad.norm() > 0
    assert stage.model.quantize.embedding.weight.grad is None


def test_training_and_the_saved_model_give_the_same_image() -> None:
    stage = vq_stage()
    with torch.no_grad():
        output, _, parts = stage(images(), generator())
        assert torch.allclose(output, stage.model(images()).sample, atol=1e-5)
    assert 1 <= parts["perplexity"] <= 64 and 0 < parts["usage"] <= 1


def test_perplexity_and_usage_of_counts() -> None:
    assert vq.perplexity(torch.tensor([3, 3, 3, 0])) == pytest.approx(3.0)
    assert vq.perplexity(torch.tensor([0, 9])) == pytest.approx(1.0)
    halves = torch.tensor([1, 1, 2])
    assert vq.perplexity(halves) == pytest.approx(math.exp(1.5 * math.log(2)))
    assert vq.usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert vq.code_counts(torch.tensor([[[0, 2], [2, 2]]]), 4).tolist() == [1, 0, 3, 0]


def test_ema_codebook_is_the_running_mean() -> None:
    torch.manual_seed(0)
    decay, size, width = 0.9, 5, 2
    book = torch.randn(size, width)
    upkeep = CodebookUpkeep(size, CodebookConfig(update="ema", decay=decay))
    sums, counts = book.double().clone(), torch.ones(size, dtype=torch.float64)
    for step in range(30):
        z = torch.randn(2, width, 3, 3, generator=generator(step))
        codes = vq.nearest_codes(z, book)
        upkeep.update(book, z, codes, generator())
        flat, chosen = vq.vectors(z).double(), codes.flatten()
        for k in range(size):
            counts[k] = decay * counts[k] + (1 - decay) * (chosen == k).sum()
            sums[k] = decay * sums[k] + (1 - decay) * flat[chosen == k].sum(0)
        assert torch.allclose(book.double(), sums / counts[:, None], atol=1e-5)
    assert torch.allclose(upkeep.cluster_size.double(), counts, atol=1e-5)


def test_a_code_out_of_use_stays_in_place_for_ever() -> None:
    book = torch.tensor([[0.0], [100.0]])
    upkeep = CodebookUpkeep(2, CodebookConfig(update="ema", decay=0.5))
    z = torch.zeros(1, 1, 2, 2)
    for _ in range(300):  # 0.5^300 is not a float32
        upkeep.update(book, z, vq.nearest_codes(z, book), generator())
    assert book[1] == 100.0 and upkeep.unused.tolist() == [0, 300]


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    book = torch.tensor([[0.0], [1.0]])
    upkeep = CodebookUpkeep(2, CodebookConfig(update="ema", restart_after=1))
    upkeep.update(
        book, torch.tensor([torch.nan, 0.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1).long(),
        generator(),
    )  # fmt: skip
    assert book.flatten().tolist() == [0, 1] and upkeep.unused.tolist() == [0, 0]
    assert upkeep.cluster_size.tolist() == [1, 1]


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_dead_codes_restart_after_the_batches_named_at_vectors_of_the_batch(update: str) -> None:
    book = torch.tensor([[0.0, 0.0], [90.0, 0.0], [80.0, 0.0]])
    config = CodebookConfig(update=update, restart_after=3, decay=0.5)  # type: ignore[arg-type]
    upkeep = CodebookUpkeep(3, config)
    z = torch.zeros(1, 2, 4, 4)
    z[0, 0, 0, :2] = torch.tensor([1.0, 2.0])  # the rest is background, coded without error
    rows = vq.vectors(z)
    for step in range(3):
        before = book.clone()
        assert torch.equal(before[1:], torch.tensor([[90.0, 0.0], [80.0, 0.0]]))
        upkeep.update(book, z, vq.nearest_codes(z, book), generator(step))
    assert all((rows == code).all(1).any() for code in book[1:])
    assert book[1:].norm(dim=1).min() > 0  # drawn by error: not from the background
    assert upkeep.unused.tolist() == [0, 0, 0] and upkeep.cluster_size[1:].tolist() == [1, 1]
    again = CodebookUpkeep(3, CodebookConfig(update=update))  # type: ignore[arg-type]
    for _ in range(10):
        again.update(before, z, vq.nearest_codes(z, before), generator())
    assert before[1, 0] == 90.0  # never, unless asked


def test_gradients_leave_an_ema_codebook_alone() -> None:
    stage = vq_stage(update="ema")
    output, regulariser, _ = stage(images(), generator())
    before = stage.model.quantize.embedding.weight.detach().clone()
    (output.square().mean() + regulariser).backward()
    assert stage.model.quantize.embedding.weight.grad is None
    with torch.no_grad():
        stage(images(), generator())
    assert torch.equal(before, stage.model.quantize.embedding.weight)


def updated(rank: int | None, restart_after: int | None) -> Tensor:
    """The codebook after four updates by a rank's half of each batch, or all of it without one."""
    torch.manual_seed(0)
    book = torch.randn(6, 2)
    upkeep = CodebookUpkeep(6, CodebookConfig(update="ema", restart_after=restart_after))
    for step in range(4):
        whole = torch.randn(4, 2, 3, 3, generator=generator(step))
        z = whole if rank is None else whole[2 * rank : 2 * rank + 2]
        upkeep.update(book, z, vq.nearest_codes(z, book), generator(10 * (rank or 0) + step))
        book[0] = 50.0  # far off, so unused
    return book


def rank_updates(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain, restarted = updated(rank, None), updated(rank, 1)
    np.save(f"{folder}/{rank}.npy", torch.stack([plain, restarted]))
    dist.destroy_process_group()


def test_two_processes_keep_the_codebook_of_one(tmp_path: Path) -> None:
    mp.spawn(rank_updates, (str(tmp_path),), nprocs=2)
    books = [np.load(tmp_path / f"{rank}.npy") for rank in (0, 1)]
    assert np.array_equal(*books)
    assert np.allclose(books[0][0], updated(None, None), atol=1e-5)


def test_the_discriminator_starts_exactly_at_its_step() -> None:
    objective = AdversarialObjective(
        vq_stage(), AdversarialConfig(disc_start=7, gan_weight=0.75, **TINY_GAN)
    )
    x = images(2)
    for step, on in ((0, False), (6, False), (7, True), (8, True)):
        objective.zero_grad()
        loss, parts = objective(x, generator(), turn="autoencoder", step=step)
        plain = parts["l1"] + parts["codebook"]
        assert ("generator" in parts) == on
        expected = plain + (0.75 * parts["adaptive"] * parts["generator"] if on else 0.0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        objective.zero_grad()
        loss, parts = objective(x, generator(), turn="discriminator", step=step)
        loss.backward()
        gradients = [p.grad for p in objective.discriminator.parameters()]
        assert all(g is not None for g in gradients)
        assert any(bool(g.any()) for g in gradients) == on and ("told_apart" in parts) == on


def test_both_turns_equal_their_formulas() -> None:
    stage = vq_stage(beta=0.25, weight=2.0)
    config = AdversarialConfig(**{**TINY_GAN, "perceptual_weight": 0.5}, gan_weight=0.3)
    perceptual = load_perceptual(PerceptualConfig(network=IMAGE_CLIP))
    objective = AdversarialObjective(stage, config, perceptual)
    x = images(2)
    loss, parts = objective(x, generator(), turn="autoencoder", step=0)
    z = stage.model.encode(x).latents
    book = stage.model.quantize.embedding.weight
    e = vq.look_up(vq.nearest_codes(z, book), book)
    output = stage.model.decode(vq.straight_through(z, e), force_not_quantize=True).sample
    reconstruction = (output - x).abs().mean() + 0.5 * perceptual(output, x).mean()
    fool = hinge_generator(objective.discriminator(output))
    weight = adaptive_weight(reconstruction, fool, stage.model.decoder.conv_out.weight)
    penalty = 2.0 * vq.codebook_loss(z, e, stage.config)
    assert loss.item() == pytest.approx(
        (reconstruction + penalty + 0.3 * weight * fool).item(), rel=1e-5
    )
    assert {"l1", "psnr", "perceptual", "perplexity", "usage", "adaptive"} <= parts.keys()
    loss, _ = objective(x, generator(), turn="discriminator", step=0)
    wanted = hinge_discriminator(objective.discriminator(x), objective.discriminator(output))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in stage.parameters())


def test_kl_has_the_published_units_in_its_adaptive_weight() -> None:
    torch.manual_seed(0)
    stage = KlFirstStage(AutoencoderKL(**TINY_KL_F4), kl_weight=1e-3)
    objective = AdversarialObjective(stage, AdversarialConfig(gan_weight=0.5, **TINY_GAN))
    x = images(2)
    loss, parts = objective(x, generator(), turn="autoencoder", step=0)
    pixels = 3 * 32 * 32
    total = pixels * parts["l1"] + 1e-3 * parts["kl"]
    total += 0.5 * parts["adaptive"] * parts["generator"]
    assert loss.item() == pytest.approx(total / pixels, rel=1e-4)
    output, _, _ = stage(x, generator())
    fool = hinge_generator(objective.discriminator(output))
    wanted = adaptive_weight(pixels * (output - x).abs().mean(), fool, stage.last_layer())
    assert parts["adaptive"] == pytest.approx(wanted.item(), rel=1e-4)


def test_the_discriminator_learns_to_tell_noise_from_reconstructions() -> None:
    objective = AdversarialObjective(vq_stage(), AdversarialConfig(**TINY_GAN))
    optimizer = torch.optim.AdamW(objective.parameters_of("discriminator"), 2e-3)
    found = []
    for step in range(25):
        loss, parts = objective(images(4, seed=step), generator(), turn="discriminator", step=step)
        loss.backward()
        optimizer.step()
        objective.zero_grad()
        found.append((loss.item(), parts["told_apart"]))
    assert found[0][0] == pytest.approx(1.0, abs=0.3) and found[-1][0] < 0.1
    assert found[-1][1] > 0.95


def test_turns_share_no_parameter_and_leave_none_out() -> None:
    objective = AdversarialObjective(vq_stage(), AdversarialConfig(**TINY_GAN))
    first, second = ({id(p) for p in objective.parameters_of(t)} for t in objective.turns)
    assert not first & second
    assert first | second == {id(p) for p in objective.parameters()}
    with pytest.raises(ValueError, match="without a perceptual loss"):
        AdversarialObjective(vq_stage(), AdversarialConfig(disc_width=8, disc_layers=2))


def test_scale_and_latents_of_both_kinds() -> None:
    vq_model = vq_stage().model.eval()
    kl_model = AutoencoderKL(**TINY_KL_F4).eval()
    x = images(3)
    for model in (vq_model, kl_model):
        factor = measure_scaling_factor(model, x, batch_size=2)
        with torch.no_grad():
            assert (latents(model, x) * factor).std().item() == pytest.approx(1.0, abs=1e-3)
        pixels = ((x + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
        assert encode_images(model, pixels).shape == (3, model.config.latent_channels, 8, 8)


def test_measures_repeat_to_the_last_digit_and_see_a_worse_model() -> None:
    model = vq_stage().model.eval()
    network = load_network(IMAGE_CLIP)
    scenes = reconstruction.heldout_scenes(40, size=32)
    first, second = (reconstruction.measure(model, scenes, network) for _ in range(2))
    assert first == second and set(first) == {"psnr", "l1", "usage", "perplexity", "frechet"}
    perfect = reconstruction.make_frechet(network)
    perfect.update(scenes, real=True)
    perfect.update(scenes, real=False)
    assert abs(float(perfect.compute())) < 1e-3 < first["frechet"]


def test_the_script_prints_the_same_line_twice(tmp_path: Path) -> None:
    vq_stage().model.save_pretrained(tmp_path / "vqvae")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    lines: list[str] = []
    network = ["--network", str(IMAGE_CLIP)]
    for source in (["--scenes", "20", "--size", "32"], ["--images", str(pictures)]):
        for _ in range(2):
            reconstruction.main([str(tmp_path / "vqvae"), *network, *source], lines.append)
    assert lines[0] == lines[1] and lines[2] == lines[3] != lines[0]
    found = json.loads(lines[2])
    assert found["images"] == 3 and found["features"]["class"] == "ChineseCLIPVisionModel"


def test_what_is_no_first_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no first stage"):
        reconstruction.load_first_stage(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="UNet2DModel"):
        reconstruction.load_first_stage(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image"):
        reconstruction.read_images(tmp_path, 8)
