"""Super-resolution in latents and pixels on tiny random models: sizes, tiles, text, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from taiji import presets
from taiji.diffusion.schedules import make_scheduler
from taiji.diffusion.tiling import tile_starts, tile_weight, tiled
from taiji.pipelines import TaijiSuperResolutionPipeline
from taiji.pipelines.super_resolution import back_project, condition_image
from taiji.text import SandwichTextEncoder
from taiji.text.tokenizer import build_tokenizer

TEXT_FREE = {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
}


def make(unet: dict[str, Any], *, latent: bool = True, text: bool = True, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["红色的猫"], max_length=8)
    encoder = SandwichTextEncoder(vocab_size=len(tokenizer), **presets.TINY_SANDWICH)
    settings = {"steps": 2, "noise_level": 0.02}
    return TaijiSuperResolutionPipeline(
        UNet2DConditionModel(**unet).eval(),
        make_scheduler("linear", "v_prediction"),
        VQModel(**presets.TINY_VQ_F4).eval() if latent else None,
        tokenizer if text else None,
        encoder.eval() if text else None,
        settings=settings,
        **kwargs,
    )


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make(presets.TINY_SR_UNET)


def picture(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def enlarge(pipe: Any, image: Any, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(image, **{"generator": generator, "output_type": "pt", **kwargs}).images


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (23, 37), (1, 5)])
def test_one_model_enlarges_any_size_four_times(pipe: Any, size: tuple[int, int]) -> None:
    out = enlarge(pipe, picture(*size))
    assert out.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("size", [(16, 16), (17, 22)])
def test_twice_by_unshuffled_pixels(size: tuple[int, int]) -> None:
    pipe = make(presets.TINY_SR_X2_UNET, scale=2)
    assert enlarge(pipe, picture(*size)).shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("size", [(16, 16), (5, 7)])
def test_pixel_space(size: tuple[int, int]) -> None:
    pipe = make(presets.TINY_SR_IF_UNET, latent=False)
    out = enlarge(pipe, picture(*size), thresholding="dynamic", guidance_scale=3.0)
    assert out.shape == (1, 3, 4 * size[0], 4 * size[1])


def test_the_condition_has_the_grid_of_the_latent() -> None:
    low = picture(8, 12)
    assert condition_image(low, 4, 4) is not None
    assert torch.equal(condition_image(low, 4, 4), low)
    assert condition_image(low, 2, 4).shape == (1, 12, 4, 6)
    assert torch.equal(condition_image(low, 2, 4)[0, :4, 0, 0], low[0, 0, :2, :2].flatten())
    assert condition_image(low, 4, 1).shape == (1, 3, 32, 48)
    assert torch.allclose(condition_image(low, 4, 1).mean(), low.mean(), atol=0.01)


def test_deterministic_and_the_same_after_loading(pipe: Any, tmp_path: Path) -> None:
    first = enlarge(pipe, picture(8, 8), prompt="红色的猫", guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "m")
    loaded = TaijiSuperResolutionPipeline.from_pretrained(tmp_path / "m")
    assert loaded.config.scale == 4 and loaded.config.settings["steps"] == 2
    second = enlarge(loaded, picture(8, 8), prompt="红色的猫", guidance_scale=2.0)
    assert torch.equal(first, second)


def test_rows_of_a_batch_are_the_single_images(pipe: Any) -> None:
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = enlarge(pipe, picture(8, 8, 2), prompt=["红色的猫", ""], generator=seeds)
    alone = enlarge(pipe, picture(8, 8, 2)[1:], generator=torch.Generator().manual_seed(2))
    # the codebook's nearest vector may be another one after rounding
    assert (both[1] - alone[0]).abs().mean() < 1e-3


def test_kinds_of_images_in_and_out(pipe: Any) -> None:
    array = (picture(8, 12)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    out = pipe(Image.fromarray(array), generator=torch.Generator().manual_seed(0)).images[0]
    assert out.size == (48, 32)
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    same = np.asarray(out, np.float32) / 255 - enlarge(pipe, tensor)[0].permute(1, 2, 0).numpy()
    assert np.abs(same).max() < 0.01


def test_text_and_noise_level_matter(pipe: Any) -> None:
    plain = enlarge(pipe, picture(8, 8))
    assert not torch.allclose(plain, enlarge(pipe, picture(8, 8), prompt="红色的猫"), atol=1e-3)
    assert not torch.allclose(plain, enlarge(pipe, picture(8, 8), noise_level=0.3), atol=1e-3)


def test_a_model_without_text() -> None:
    pipe = make({**presets.TINY_SR_UNET, **TEXT_FREE}, text=False)
    assert enlarge(pipe, picture(8, 8)).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="takes no text"):
        enlarge(pipe, picture(8, 8), prompt="红色的猫")


def test_back_projection_brings_the_output_to_the_image(pipe: Any) -> None:
    low = picture(6, 8) * 0.5 + 0.25
    flat = low.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.allclose(back_project(flat, low, 1.0), flat, atol=1e-6)
    grey = back_project(torch.full_like(flat, 0.5), torch.full_like(low, 0.7), 0.5)
    assert torch.allclose(grey, torch.full_like(grey, 0.6))

    def error(out: Tensor) -> float:
        return float((avg_pool2d(out, 4) - low).abs().mean())

    def gain(level: float) -> float:
        outs = [enlarge(pipe, low, noise_level=level, back_projection=w) for w in (0.0, 1.0)]
        return error(outs[1]) / error(outs[0])

    # the less, the more noise the image was given
    assert gain(0.0) < 0.6 < gain(0.3) < 1
    default = make(presets.TINY_SR_UNET, back_projection=1.0)
    same = enlarge(pipe, low, back_projection=1.0)
    assert torch.equal(enlarge(default, low), same)


def test_one_tile_is_the_whole_and_several_cover_it(pipe: Any) -> None:
    image = picture(16, 24)
    whole = enlarge(pipe, image)
    assert torch.allclose(enlarge(pipe, image, tile=32, overlap=8), whole, atol=1e-4)
    parts = enlarge(pipe, image, tile=12, overlap=4)
    assert parts.shape == whole.shape and parts.isfinite().all()


def test_blended_tiles_of_a_local_function_are_that_function() -> None:
    x = picture(21, 34)
    out = tiled(lambda t: t.repeat_interleave(2, -1).repeat_interleave(2, -2), x, 8, 4, factor=2)
    assert torch.allclose(out, x.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)
    assert tile_starts(256, 128, 32) == [0, 96, 128] and tile_starts(100, 128, 32) == [0]
    with pytest.raises(ValueError, match="overlap=8 must be at least 0 and below tile=8"):
        tiled(lambda t: t, x, 8, 8)


def test_tiles_that_disagree_are_blended_without_a_step() -> None:
    """Each tile says its own number: at any border the blend moves by less than a twentieth."""
    numbers = iter([0.0, 1.0])
    x = torch.zeros(1, 1, 8, 56)
    out = tiled(lambda t: torch.full_like(t, next(numbers)), x, 32, 8)[0, 0, 4]
    assert out[0] == 0 and out[-1] == 1 and (out.diff() >= 0).all()
    assert out[24] < 0.05 and out[31] > 0.95 and tile_weight(5, 7).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 13}, "must be multiples of 2"),
        ({"image": torch.zeros(1, 1, 8, 8)}, "1 channels; give RGB"),
        ({"thresholding": "dynamic"}, "not for latents"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 images"),
        ({"noise_level": -0.1}, "greater than or equal to 0"),
        ({"back_projection": 1.5}, r"back_projection=1.5 is outside 0 \(none\) to 1"),
    ],
)
def test_bad_arguments(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enlarge(pipe, **{"image": picture(8, 8), **arguments})


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="x2 over a first stage of factor 4 .* 15 channels in"):
        make(presets.TINY_SR_UNET, scale=2)
    with pytest.raises(ValueError, match="scale=3 must divide the first stage's factor 4"):
        make(presets.TINY_SR_UNET, scale=3)
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        make({**presets.TINY_SR_UNET, "class_embed_type": None})
    with pytest.raises(ValueError, match="no text encoder"):
        enlarge(make(presets.TINY_SR_UNET, text=False), picture(8, 8))
