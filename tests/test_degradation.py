import numpy as np
import pytest

from taiji.data import shapes
from taiji.data.degradation import DegradationConfig, Kernel, degrade, reduce


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return shapes.sample(1, 0)[0][2]


def test_the_same_for_the_same_seed(image: np.ndarray) -> None:
    for seed in range(8):
        first, second = (degrade(image, 4, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, second)
        assert first.shape == (16, 16, 3) and first.dtype == np.uint8


def test_half_are_plain_bicubic(image: np.ndarray) -> None:
    plain = reduce(image, 4, Kernel.BICUBIC)
    same = [
        np.array_equal(plain, degrade(image, 4, np.random.default_rng(seed))) for seed in range(400)
    ]
    assert 0.4 < np.mean(same) < 0.6


def test_light_degradation_varies_and_keeps_the_picture(image: np.ndarray) -> None:
    config = DegradationConfig(light_share=1.0)
    rng = np.random.default_rng(0)
    found = np.stack([degrade(image, 4, rng, config) for _ in range(16)]).astype(np.float64)
    error = np.abs(found - reduce(image, 4, Kernel.BOX)).mean((1, 2, 3))
    assert len(np.unique(error)) == 16 and error.min() > 0.5 and error.max() < 40


def test_sizes_that_do_not_divide_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="64x64 cannot be reduced 3 times"):
        degrade(image, 3, np.random.default_rng(0))
