"""Guidance, thresholding, noise augmentation, and the loop that applies them."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from taiji import presets
from taiji.diffusion.augmentation import ALPHAS_CUMPROD, draw_levels, noise_augment
from taiji.diffusion.condition import Text, check_text_length, encode, text_arguments
from taiji.diffusion.guidance import (
    branches,
    combine,
    dynamic_threshold,
    static_threshold,
    threshold,
)
from taiji.diffusion.sampling import Sampling, guided_output, sample
from taiji.diffusion.schedules import make_scheduler, scheduler_config
from taiji.text import SandwichTextEncoder


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**presets.A_TINY_UNET).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def texts() -> dict[str, Text]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    found = {}
    for name in ("condition", "null"):
        hidden = torch.randn(2, 7, 32, generator=generator) * mask[..., None]
        found[name] = Text(hidden, mask)
    return found


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def plain(unet: Any, x: Tensor, text: Text) -> Tensor:
    return unet(x, 500, **text_arguments(unet, [text])).sample


def test_scale_one_is_the_condition_exactly_and_zero_the_null_branch(
    unet: Any, texts: dict[str, Text]
) -> None:
    rows: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x, t = noise(), torch.tensor(500)
    one, zero, three = (guided_output(unet, x, t, texts, scale, None) for scale in (1.0, 0.0, 3.0))
    hook.remove()
    assert rows == [2, 2, 4]
    cond, null = plain(unet, x, texts["condition"]), plain(unet, x, texts["null"])
    assert torch.equal(one, cond) and torch.equal(zero, null)
    assert torch.allclose(three, null + 3 * (cond - null), atol=1e-4)
    assert not torch.allclose(cond, null, atol=1e-3)


def test_branches_in_the_order_that_combine_takes() -> None:
    assert branches(2.0) == ("null", "condition")
    null, condition = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert combine((null, condition), 2.5).item() == 2.5
    assert combine((condition,), 1.0) is condition


def test_guidance_without_text_is_refused() -> None:
    blocks = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    }
    unet = UNet2DConditionModel(**{**presets.TINY_SR_UNET, **blocks}).eval()
    x, labels = torch.randn(1, 6, 16, 16), torch.zeros(1, dtype=torch.int64)
    assert guided_output(unet, x, torch.tensor(1), {}, 1.0, labels).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a U-Net with text"):
        guided_output(unet, x, torch.tensor(1), {}, 2.0, labels)


def test_what_stands_behind_a_text_does_not_matter(unet: Any, texts: dict[str, Text]) -> None:
    torch.manual_seed(0)
    encoder = SandwichTextEncoder(vocab_size=20, **presets.TINY_SANDWICH).eval()
    ids, mask = torch.tensor([[2, 7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    short = encode(encoder, ids, mask)
    other = encode(encoder, torch.tensor([[2, 7, 8, 9, 4]]), mask)
    assert torch.allclose(short.hidden, other.hidden, atol=1e-6) and not short.hidden[:, 3:].any()
    text, x = texts["condition"], noise()
    unmasked = plain(unet, x, Text(text.hidden))
    assert torch.allclose(plain(unet, x, text)[1], unmasked[1], atol=1e-5)
    assert not torch.allclose(plain(unet, x, text)[0], unmasked[0], atol=1e-5)


def test_a_text_as_long_as_an_attention_block_is_refused(unet: Any) -> None:
    check_text_length(unet, 24, 16, 16)
    with pytest.raises(ValueError, match="64 text tokens are as many as the 8x8"):
        check_text_length(unet, 64, 16, 16)


def test_dynamic_threshold_in_closed_form() -> None:
    x_0 = torch.zeros(2, 1, 1, 5)
    x_0[0, 0, 0] = torch.tensor([-4.0, -1.0, 0.0, 2.0, 3.0])
    x_0[1, 0, 0] = torch.tensor([-0.5, 0.1, 0.2, 0.3, 0.4])
    found = dynamic_threshold(x_0, quantile=0.75)  # |x| sorted 0 1 2 3 4: s = 3, and below 1
    assert torch.allclose(found[0, 0, 0], torch.tensor([-1.0, -1 / 3, 0.0, 2 / 3, 1.0]))
    assert torch.equal(found[1], x_0[1])
    capped = dynamic_threshold(x_0, quantile=0.75, cap=1.5)
    assert torch.allclose(capped[0, 0, 0], torch.tensor([-1.0, -2 / 3, 0.0, 1.0, 1.0]))
    assert torch.equal(dynamic_threshold(x_0, 0.75, cap=1.0), static_threshold(x_0))
    assert dynamic_threshold(x_0.half()).dtype == torch.float16


@pytest.mark.parametrize("rule", ["static", "dynamic"])
def test_thresholds_bound_pixels_and_refuse_latents(rule: Any) -> None:
    x_0 = 5 * noise()
    assert threshold(x_0, rule, space="pixel").abs().max() <= 1
    with pytest.raises(ValueError, match=f"{rule} thresholding is for pixels"):
        threshold(x_0, rule, space="latent")
    assert threshold(x_0, "none", space="latent") is x_0


def test_a_latent_stage_refuses_before_it_samples(unet: Any, texts: dict[str, Text]) -> None:
    scheduler = make_scheduler("cosine", "epsilon")
    settings = Sampling(steps=2, thresholding="dynamic")
    with pytest.raises(ValueError, match="not for latents"):
        sample(unet, scheduler, noise(), texts, settings, space="latent")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loop_thresholds_as_the_ddpm_scheduler_does(
    unet: Any, texts: dict[str, Text], kind: Any
) -> None:
    config = scheduler_config("linear", kind)
    own = DDPMScheduler(
        **config, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5
    )
    settings = Sampling(steps=5, guidance_scale=4.0, quantile=0.9, cap=1.5)
    found = [
        sample(
            unet, scheduler, noise(), texts, settings.changed(thresholding=rule), space="pixel",
            generator=torch.Generator().manual_seed(3),
        )
        for scheduler, rule in ((own, "none"), (DDPMScheduler(**config), "dynamic"))
    ]  # fmt: skip
    assert torch.allclose(found[0], found[1], atol=1e-3)


def test_settings_are_checked() -> None:
    assert Sampling(steps=3).changed(steps=None, guidance_scale=2.0).guidance_scale == 2.0
    with pytest.raises(ValueError, match="noise_level"):
        Sampling().changed(noise_level=1.5)


def test_noise_augmentation_in_closed_form() -> None:
    image, eps = noise(1), noise(2)
    same, labels = noise_augment(image, torch.zeros(2), eps)
    assert torch.equal(same, image) and labels.tolist() == [0, 0]
    found, labels = noise_augment(image, torch.tensor([0.02, 1.0]), eps)
    assert labels.tolist() == [20, 999]
    a = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    assert torch.allclose(ALPHAS_CUMPROD, a)
    assert torch.allclose(found[0], a[20].sqrt() * image[0] + (1 - a[20]).sqrt() * eps[0])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        noise_augment(image, torch.tensor([0.5, -0.1]), eps)


def test_training_levels_are_uniform() -> None:
    levels = draw_levels(1000, 0.35, torch.Generator().manual_seed(0))
    assert levels.min() >= 0 and levels.max() < 0.35
    assert levels.mean().item() == pytest.approx(0.175, abs=0.001)
    some = draw_levels(1000, 0.35, torch.Generator().manual_seed(0), clean_share=0.25)
    assert (some == 0).sum() == 250 and some.max() < 0.35
    assert some[some > 0].mean().item() == pytest.approx(0.175, abs=0.001)
