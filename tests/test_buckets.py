import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from taiji import presets
from taiji.data.buckets import (
    assign,
    bucket_sizes,
    cut,
    epoch_batches,
    nearest_bucket,
    place,
    sampler,
)
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.text.conditioner import TextConditioner
from taiji.train.phases.unet import UNetObjective, size_condition


def test_sizes_are_those_of_the_rule() -> None:
    sizes = bucket_sizes(1024)
    assert len(sizes) == 33 and sizes[0] == (512, 2048) and sizes[16] == (1024, 1024)
    assert (1088, 960) in sizes and (960, 1088) in sizes and (1600, 512) in sizes
    assert all(h % 64 == 0 and w % 64 == 0 for h, w in sizes)
    with pytest.raises(ValueError, match="step=600"):
        bucket_sizes(1024, 600)


def test_a_turned_image_goes_to_the_turned_bucket() -> None:
    sizes = bucket_sizes(512)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(200, 3000, (200, 2)).tolist():
        h, w = sizes[nearest_bucket((height, width), sizes)]
        assert sizes[nearest_bucket((width, height), sizes)] == (w, h)
    assert sizes[nearest_bucket((512, 512), sizes)] == (512, 512)


def test_empty_buckets_are_named() -> None:
    buckets = ((64, 64), (96, 48), (48, 96))
    with pytest.raises(ValueError, match=r"fewer than 1 images: 96x48 \(0\), 48x96 \(0\)"):
        assign([(100, 100)] * 4, buckets)
    with pytest.raises(ValueError, match=r"fewer than 4 images: 48x96 \(1\)"):
        assign([(100, 100)] * 4 + [(90, 50)] * 4 + [(50, 90)], buckets, least=4)
    with pytest.raises(ValueError, match="ratio"):
        assign([(0, 10)], buckets)


def test_an_image_covers_its_bucket_and_says_where_it_was_cut() -> None:
    centred = place((1080, 1920), (768, 1280))
    assert centred.resized == (768, 1365) and (centred.top, centred.left) == (0, 42)
    assert centred.time_ids() == (1080.0, 1920.0, 0.0, 42.0, 768.0, 1280.0)
    rng = np.random.default_rng(0)
    cuts = {place((1080, 1920), (768, 1280), rng).left for _ in range(300)}
    assert min(cuts) < 5 and max(cuts) > 80 and max(cuts) <= 85
    for size in ((33, 977), (977, 33), (500, 501)):
        found = place(size, (64, 96), rng)
        assert found.resized[0] - found.top >= 64 and found.resized[1] - found.left >= 96


def test_pixels_are_those_of_the_cut() -> None:
    columns = np.broadcast_to(np.arange(96, dtype=np.uint8), (64, 96))
    placement = place((64, 96), (64, 64))
    found = np.asarray(cut(Image.fromarray(columns.copy()), placement))
    assert found.shape == (64, 64) and np.array_equal(found, columns[:, 16:80])


def test_processes_share_a_bucket_and_no_image() -> None:
    assignment = np.array([0] * 21 + [1] * 13 + [2] * 8)
    ranks = [
        list(epoch_batches(assignment, 2, seed=3, epoch=0, rank=r, processes=2)) for r in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 5 + 3 + 2
    for (bucket, images), (other, others) in zip(*ranks, strict=True):
        assert bucket == other
        assert (assignment[images] == bucket).all() and (assignment[others] == bucket).all()
    seen = np.concatenate([images for rank in ranks for _, images in rank])
    assert len(seen) == len(set(seen.tolist())) == 40
    again = list(epoch_batches(assignment, 2, seed=3, epoch=0, rank=1, processes=2))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(again, ranks[1], strict=True))
    later = list(epoch_batches(assignment, 2, seed=3, epoch=1, rank=1, processes=2))
    assert not all(np.array_equal(a, b) for (_, a), (_, b) in zip(later, ranks[1], strict=True))
    with pytest.raises(ValueError, match="rank=2"):
        list(epoch_batches(assignment, 2, seed=3, epoch=0, rank=2, processes=2))


def test_draws_are_of_one_bucket_in_proportion() -> None:
    assignment = np.array([0] * 90 + [4] * 10)
    draw, rng = sampler(assignment), np.random.default_rng(0)
    found = [draw(rng, 8) for _ in range(400)]
    assert all((assignment[images] == bucket).all() for bucket, images in found)
    assert all(len(set(images.tolist())) == 8 for _, images in found)
    assert np.mean([bucket == 4 for bucket, _ in found]) == pytest.approx(0.1, abs=0.04)


def test_the_unet_trains_on_a_bucket_with_its_conditions() -> None:
    torch.manual_seed(0)
    towers = presets.TINY_IMAGE_CLIP
    text = {**towers["text_config"], "vocab_size": 20}
    objective = UNetObjective(
        UNet2DConditionModel(**presets.TINY_SD_A_UNET),
        TextConditioner(
            ChineseCLIPModel(ChineseCLIPConfig(**{**towers, "text_config": text})).eval(),
            SandwichTextEncoder(vocab_size=20, **presets.TINY_SANDWICH),
            TextFusion(**presets.TINY_FUSION),
        ),
        DDIMScheduler(**presets.MINI_SCHEDULER),
        size_condition(64),
    )
    ids = torch.randint(3, 20, (2, 24), generator=torch.Generator().manual_seed(0))
    placements = [place((90, 200), (48, 96)), place((400, 900), (48, 96))]
    batch = {
        "latents": torch.randn(2, 4, 12, 24),
        "clip_ids": ids[:, :16],
        "clip_mask": torch.ones(2, 16),
        "ids": ids,
        "mask": torch.ones(2, 24),
    }

    def loss(**extra: torch.Tensor) -> torch.Tensor:
        value, _ = objective(**batch, **extra, generator=torch.Generator().manual_seed(1))
        return value

    conditions = torch.tensor([p.time_ids() for p in placements])
    loss(time_ids=conditions).backward()
    assert torch.isfinite(objective.unet.conv_in.weight.grad).all()
    assert loss(time_ids=conditions).item() != loss().item()
