import numpy as np
import pytest

from hcf.errors import HcfError
from hcf.quality.fidelity import PSNR_CAP_DB, fidelity


def noise(count: int = 4, side: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_psnr_of_a_known_error_is_its_closed_form() -> None:
    images = np.full((3, 16, 16, 3), 100, np.uint8)
    result = fidelity(images, images + 5)
    assert result.psnr_db == pytest.approx(20 * np.log10(255 / 5))
    assert result.psnr_mean_db == pytest.approx(result.psnr_db)
    assert result.psnr_each_db.shape == (3,)


def test_the_pooled_psnr_weighs_the_bad_image_more_than_the_mean_does() -> None:
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    other = images.copy()
    other[0] += 1
    other[1] += 40
    result = fidelity(images, other)
    assert result.psnr_db == pytest.approx(10 * np.log10(255**2 / ((1 + 1600) / 2)))
    assert result.psnr_mean_db == pytest.approx(result.psnr_each_db.mean())
    assert result.psnr_db < result.psnr_mean_db


def test_equal_images_reach_the_cap_and_ssim_one() -> None:
    result = fidelity(noise(), noise())
    assert result.psnr_db == result.psnr_mean_db == PSNR_CAP_DB
    assert result.ssim == pytest.approx(1.0)


def test_ssim_falls_with_noise_and_is_given_per_image() -> None:
    rng = np.random.default_rng(1)
    ramp = np.broadcast_to(np.linspace(0, 255, 32)[None, None, :, None], (3, 32, 32, 3))
    images = ramp.astype(np.uint8)
    noisy = [np.clip(ramp[0] + rng.normal(0, s, ramp[0].shape), 0, 255) for s in (1, 10, 60)]
    each = fidelity(images, np.stack(noisy).astype(np.uint8)).ssim_each
    assert 1 > each[0] > each[1] > each[2]


def test_many_images_are_batched_without_changing_the_result() -> None:
    a, b = noise(70, 12, 0), noise(70, 12, 1)
    whole = fidelity(a, b)
    assert whole.ssim_each[-1] == pytest.approx(fidelity(a[-1:], b[-1:]).ssim, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (noise(2), noise(3), "baseline images are"),
        (noise(2).astype(np.float32), noise(2), "float32"),
        (noise(2)[..., :1], noise(2), "baseline images have shape"),
        (noise(2, 8), noise(2, 8), "at least 11 pixels"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(
    a: np.ndarray, b: np.ndarray, message: str
) -> None:
    with pytest.raises(HcfError, match=message):
        fidelity(a, b)
