"""FED (EfficientNet-Lite0): the Frechet distance of image features to those of real images.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))        Dowson and Landau, 1982

over the first 128 principal components of the reference set. This is FID's formula (Heusel et al.
2017) on another network, so it is never called FID and its values compare only with other FED.
The estimate is biased upwards for few images: compare sets of the same size, and print `floor`,
which real images reach at that size, beside it. N images, F features, D dimensions, P prompts, R
resamples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hcf.errors import HcfError, InvalidArtifact
from hcf.quality.features import IMAGE_WIDTH, Images, image_features

Doubles = npt.NDArray[np.float64]

DIMS = 128
REFERENCE_FILE = "reference_stats.safetensors"


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images: PCA pca_mean (F,), components (D, F); mean (D,), covariance
    (D, D) of the projected features (N, D), and where the images came from."""

    pca_mean: Doubles
    components: Doubles
    mean: Doubles
    covariance: Doubles
    projected: Doubles
    source: Mapping[str, Any]

    @property
    def dims(self) -> int:
        return len(self.mean)

    @property
    def count(self) -> int:
        return len(self.projected)


def frechet_distance(mean_1: Doubles, cov_1: Doubles, mean_2: Doubles, cov_2: Doubles) -> float:
    """Squared Frechet distance of two Gaussians: means (D,), covariances (D, D), may be singular.

    tr (C_1 C_2)^(1/2) is the sum of the roots of the eigenvalues of A C_2 A with A = C_1^(1/2):
    that is symmetric, so nothing turns complex where `sqrtm` would need a fudge.
    """
    root = square_root(cov_1)
    inner = root @ ((cov_2 + cov_2.T) / 2) @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    gap = mean_1 - mean_2
    distance = float(gap @ gap + np.trace(cov_1) + np.trace(cov_2) - 2 * cross)
    return max(distance, 0.0)  # rounding can leave -1e-12 for equal sets


def square_root(covariance: Doubles) -> Doubles:
    """The symmetric root (D, D) of a covariance (D, D)"""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def fit_reference(
    features: npt.NDArray[Any], *, dims: int = DIMS, source: Mapping[str, Any] | None = None
) -> Reference:
    """features (N, F) of real images -> their PCA and statistics. Raises HcfError for N <= dims."""
    x = _checked(features, dims, "reference")
    pca_mean = x.mean(0)
    values, vectors = np.linalg.eigh((x - pca_mean).T @ (x - pca_mean))
    components = vectors[:, np.argsort(values)[::-1][:dims]].T
    # eigenvectors have no sign of their own: fix it, so that the same images give the same file
    components *= np.sign(components[np.arange(dims), np.abs(components).argmax(1)])[:, None]
    projected = (x - pca_mean) @ components.T
    return Reference(
        pca_mean=pca_mean,
        components=components,
        mean=projected.mean(0),
        covariance=np.cov(projected, rowvar=False).reshape(dims, dims),
        projected=projected,
        source=dict(source or {}),
    )


def feature_distance(features: npt.NDArray[Any], reference: Reference) -> float:
    """features (N, F) -> FED to the reference. Raises HcfError for N <= D: no covariance then."""
    x = _checked(features, reference.dims, "compared")
    return _distance((x - reference.pca_mean) @ reference.components.T, reference)


def _distance(projected: Doubles, reference: Reference) -> float:
    covariance = np.cov(projected, rowvar=False).reshape(reference.dims, reference.dims)
    return frechet_distance(projected.mean(0), covariance, reference.mean, reference.covariance)


def distance_draws(
    features: npt.NDArray[Any],
    group: npt.NDArray[np.int64],
    reference: Reference,
    weights: Doubles,
    chunk: int = 256,
) -> Doubles:
    """features (N, F), prompts group (N,), weights (R, P) of resamples -> FED of each (R,)

    No resample touches an image: a Gaussian is its moments, and those of a resample are the
    weighted sums of its prompts' (1, x, x x^T), one matrix product for all. A resample holds fewer
    different images than the set, so its FED is biased up once more: the draws are moved by their
    mean excess, which leaves the spread. The set's own bias stays; it falls with 1 / N (Chong and
    Forsyth, arXiv 1911.07023) and is much the same for sets of one size: those are compared.
    """
    x = _checked(features, reference.dims, "compared")
    x = (x - reference.pca_mean) @ reference.components.T
    dims, prompts = reference.dims, weights.shape[1]
    rows, columns = np.triu_indices(dims)
    count = weights @ np.bincount(group, minlength=prompts)
    first, second = np.zeros((len(weights), dims)), np.zeros((len(weights), len(rows)))
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, minlength=prompts))
    for start in range(0, prompts, chunk):
        own = slice(start, min(start + chunk, prompts))
        images = [x[part] for part in np.split(order, ends[:-1])[own]]
        first += weights[:, own] @ np.stack([part.sum(0) for part in images])
        second += weights[:, own] @ np.stack([(part.T @ part)[rows, columns] for part in images])
    root, spread = square_root(reference.covariance), np.trace(reference.covariance)
    draws = np.full(len(weights), np.nan)
    for i in np.flatnonzero(count > 1):
        mean = first[i] / count[i]
        covariance = np.zeros((dims, dims))
        covariance[rows, columns] = second[i]
        covariance = covariance + np.triu(covariance, 1).T
        covariance = (covariance - count[i] * np.outer(mean, mean)) / (count[i] - 1)
        inner = root @ covariance @ root
        cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
        gap = mean - reference.mean
        draws[i] = gap @ gap + np.trace(covariance) + spread - 2 * cross
    draws += _distance(x, reference) - np.nanmean(draws)
    return np.maximum(draws, 0.0)


def floor(reference: Reference, count: int, *, draws: int = 5, seed: int = 0) -> float | None:
    """FED of `count` real images drawn from the reference set itself: what no model can beat.

    None where the set has not more than `count` images, or `count` is too small for a covariance.
    """
    if not reference.dims < count < reference.count:
        return None
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(reference.count)[:count] for _ in range(draws)]
    return float(np.mean([_distance(reference.projected[rows], reference) for rows in chosen]))


def fed(images: Images, reference: Reference) -> float:
    """images (N, H, W, 3) uint8 -> FED (EfficientNet-Lite0). Raises HcfError for N <= D."""
    return feature_distance(image_features(images), reference)


def half_distance(features: npt.NDArray[Any], *, seed: int = 0, dims: int = DIMS) -> float:
    """FED between two random halves of one set: the floor that real images themselves reach."""
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(order) // 2
    return feature_distance(
        features[order[half : 2 * half]], fit_reference(features[order[:half]], dims=dims)
    )


def _checked(features: npt.NDArray[Any], dims: int, name: str) -> Doubles:
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise HcfError(f"{name} features of shape {x.shape} must be (N, F) and finite")
    if len(x) <= dims:
        raise HcfError(
            f"FED over {dims} dimensions needs more than {dims} {name} images, not {len(x)}",
            fix=f"use at least {dims + 1} images (a few hundred give a steadier value)",
        )
    return x


def save_reference(reference: Reference, path: Path) -> None:
    """Writes the statistics as safetensors: float32 for the PCA, float16 for the single images."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[Any]] = {
        "pca_mean": reference.pca_mean.astype(np.float32),
        "components": np.ascontiguousarray(reference.components, np.float32),
        "mean": reference.mean,
        "covariance": np.ascontiguousarray(reference.covariance),
        "projected": reference.projected.astype(np.float16),
    }
    # one key: safetensors writes several in an order that changes from run to run
    source = json.dumps(dict(reference.source), ensure_ascii=False, sort_keys=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(save(tensors, metadata={"source": source}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_reference(path: Path) -> Reference:
    """Reads `save_reference`'s file. Raises InvalidArtifact when missing, damaged or misshapen."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise InvalidArtifact(
            f"no reference statistics at {path}",
            fix="give the folder that holds judge.safetensors and " + REFERENCE_FILE,
        )
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        source = json.loads(metadata.get("source", "{}"))
        arrays = [
            np.asarray(tensors[name], np.float64)
            for name in ("pca_mean", "components", "mean", "covariance", "projected")
        ]
    except (SafetensorError, KeyError, IndexError, OSError, ValueError) as error:
        raise InvalidArtifact(
            f"{path.name} cannot be read: {error}", fix="copy it again"
        ) from error
    dims = len(arrays[2])
    shapes = [(IMAGE_WIDTH,), (dims, IMAGE_WIDTH), (dims,), (dims, dims), (len(arrays[4]), dims)]
    if [array.shape for array in arrays] != shapes:
        raise InvalidArtifact(f"{path.name} has shapes {[a.shape for a in arrays]}, not {shapes}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise InvalidArtifact(f"{path.name} holds values that are not finite", fix="copy it again")
    pca_mean, components, mean, covariance, projected = arrays
    return Reference(pca_mean, components, mean, covariance, projected, source)


def build_reference(
    emoji_folder: Path,
    output: Path,
    *,
    labels: Sequence[str] | None = None,
    vendors: Sequence[str] | None = None,
    size: int = 64,
) -> Reference:
    """Statistics of the generator's art, of all names or `labels`, written to `output`.

    Raises FileNotFoundError without a data set, HcfError for too few images.
    """
    from taiji.data import emoji

    vendors = vendors or emoji.GENERATOR_VENDORS
    images, rows = emoji.load(emoji_folder, size, vendors)
    wanted = {row["label"] for row in rows} if labels is None else set(labels)
    keep = [i for i, r in enumerate(rows) if r["label"] in wanted and r["concept_split"] == "train"]
    source = {
        "art": "emoji of " + ", ".join(vendors),
        "names": len({rows[i]["label"] for i in keep}),
        "pixels": size,
    }
    reference = fit_reference(image_features(images[keep]), source=source)
    save_reference(reference, output)
    return reference
