from pathlib import Path

import numpy as np
import pytest
from scipy import linalg

from hcf.errors import HcfError, InvalidArtifact
from hcf.quality.features import IMAGE_WIDTH, image_features
from hcf.quality.frechet import (
    feature_distance,
    fed,
    fit_reference,
    floor,
    frechet_distance,
    half_distance,
    load_reference,
    save_reference,
)


def covariance(dims: int, seed: int, rank: int | None = None) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(dims, rank or 2 * dims))
    return a @ a.T / a.shape[1]


def features(count: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = np.linspace(2, 0.1, 40)
    low = np.random.default_rng(99).normal(size=(40, IMAGE_WIDTH))
    return ((rng.normal(size=(count, 40)) * spread + shift) @ low).astype(np.float32)


def test_diagonal_gaussians_give_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    gap = np.array([1.0, -2.0, 0.5])
    expected = (gap**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(gap, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected)


def test_one_dimension_by_hand() -> None:
    result = frechet_distance(np.array([3.0]), np.eye(1) * 4, np.array([1.0]), np.eye(1) * 9)
    assert result == pytest.approx(4 + 1)


def test_full_covariances_agree_with_scipy_sqrtm() -> None:
    one, two = covariance(32, 0), covariance(32, 1)
    gap = np.random.default_rng(2).normal(size=32)
    root = linalg.sqrtm(one @ two)
    expected = gap @ gap + np.trace(one + two - 2 * root.real)
    assert frechet_distance(gap, one, np.zeros(32), two) == pytest.approx(expected, rel=1e-3)


def test_singular_covariances_stay_real_and_finite() -> None:
    one, two = covariance(16, 0, rank=3), covariance(16, 1, rank=5)
    zero = np.zeros(16)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(zero, one, zero, two))
    nothing = np.zeros((16, 16))
    assert frechet_distance(zero, one, zero, nothing) == pytest.approx(np.trace(one))


def test_distance_is_symmetric_and_never_negative() -> None:
    one, two = covariance(8, 3), covariance(8, 4)
    a, b = np.zeros(8), np.ones(8)
    assert frechet_distance(a, one, b, two) == pytest.approx(frechet_distance(b, two, a, one))
    assert frechet_distance(a, one, a, one) >= 0


def test_a_set_is_at_no_distance_from_itself_and_further_when_shifted() -> None:
    real = features(300)
    reference = fit_reference(real, dims=16)
    near = feature_distance(features(300, seed=1), reference)
    assert feature_distance(real, reference) == pytest.approx(0, abs=1e-6)
    assert near < feature_distance(features(300, seed=1, shift=1.0), reference)
    assert half_distance(real, dims=16) < feature_distance(features(300, 1, shift=9.0), reference)


def test_the_floor_falls_with_the_number_of_images_and_is_below_other_art() -> None:
    reference = fit_reference(features(300), dims=16)
    few, many = floor(reference, 40), floor(reference, 200)
    assert few is not None and many is not None and few > many > 0
    assert few < feature_distance(features(40, seed=1, shift=2.0), reference)
    assert floor(reference, 300) is None and floor(reference, 16) is None


def test_too_few_images_are_refused_with_the_number_needed() -> None:
    with pytest.raises(HcfError, match="needs more than 16 reference images, not 16"):
        fit_reference(features(16), dims=16)
    reference = fit_reference(features(60), dims=16)
    with pytest.raises(HcfError, match="at least 17 images"):
        feature_distance(features(9), reference)


def test_features_that_are_not_finite_are_refused() -> None:
    broken = features(60)
    broken[3, 5] = np.nan
    with pytest.raises(HcfError, match="finite"):
        fit_reference(broken, dims=16)


def test_reference_survives_the_file_and_the_same_images_give_the_same_bytes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "reference_stats.safetensors"
    reference = fit_reference(features(200), dims=16, source={"vendors": "noto", "size": 64})
    save_reference(reference, path)
    loaded = load_reference(path)
    other = features(100, seed=5)
    assert feature_distance(other, loaded) == pytest.approx(
        feature_distance(other, reference), rel=1e-4
    )
    assert (loaded.count, dict(loaded.source)) == (200, {"vendors": "noto", "size": 64})
    first = path.read_bytes()
    save_reference(fit_reference(features(200), dims=16, source=reference.source), path)
    assert path.read_bytes() == first
    assert sorted(f.name for f in tmp_path.iterdir()) == [path.name]


def test_missing_or_damaged_statistics_are_invalid(tmp_path: Path) -> None:
    path = tmp_path / "reference_stats.safetensors"
    with pytest.raises(InvalidArtifact, match="no reference statistics"):
        load_reference(path)
    save_reference(fit_reference(features(60), dims=16), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        load_reference(path)


def test_fed_of_real_pixels_orders_copies_before_noise() -> None:
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (24, 4, 4, 3)), 8, 1), 8, 2).astype(np.uint8)
    reference = fit_reference(image_features(smooth), dims=8)
    noise = rng.integers(0, 256, smooth.shape).astype(np.uint8)
    assert fed(smooth, reference) == pytest.approx(0, abs=1e-3)
    assert fed(noise, reference) > 1
    assert image_features(smooth[:1]).shape == (1, IMAGE_WIDTH)
