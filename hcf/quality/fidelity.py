"""How close two sets of images are, pixel by pixel: PSNR and SSIM, for the same seeds and prompts.

N images, H W pixels. Both metrics say what changed, not whether it got worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hcf.errors import HcfError, MissingDependency
from hcf.quality.features import PIP, Images, check_images

PSNR_CAP_DB = 100.0  # equal images, whose PSNR is infinite, count as this


@dataclass(frozen=True)
class Fidelity:
    """Per image, (N,) each, and over all of them. Decibels against a peak of 255."""

    psnr_db: float
    """PSNR of the squared error averaged over all images: the strict one, bad images weigh most."""
    psnr_mean_db: float
    """Mean of the images' own PSNR."""
    ssim: float
    psnr_each_db: npt.NDArray[np.float64]
    ssim_each: npt.NDArray[np.float64]


def fidelity(baseline: Images, candidate: Images) -> Fidelity:
    """baseline, candidate (N, H, W, 3) uint8 -> PSNR and SSIM (11x11 Gaussian, Wang et al. 2004).

    Raises HcfError for shapes that differ or images under 11 pixels, MissingDependency.
    """
    check_images(baseline, "baseline images")
    check_images(candidate, "candidate images")
    if baseline.shape != candidate.shape:
        raise HcfError(
            f"baseline images are {baseline.shape}, candidate images {candidate.shape}",
            fix="compare images of the same prompts, seeds and size",
        )
    if min(baseline.shape[1:3]) < 11:
        raise HcfError(f"SSIM needs images of at least 11 pixels, not {baseline.shape[1:3]}")
    error = np.array(
        [
            np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
            for a, b in zip(baseline, candidate, strict=True)
        ]
    )
    each = _psnr_db(error)
    ssim_each = _ssim(baseline, candidate)
    return Fidelity(
        psnr_db=float(_psnr_db(error.mean())),
        psnr_mean_db=float(each.mean()),
        ssim=float(ssim_each.mean()),
        psnr_each_db=each,
        ssim_each=ssim_each,
    )


def _psnr_db(mean_squared_error: npt.ArrayLike) -> npt.NDArray[np.float64]:
    floor = 255.0**2 / 10 ** (PSNR_CAP_DB / 10)
    return 10 * np.log10(255.0**2 / np.maximum(np.asarray(mean_squared_error, np.float64), floor))


def _ssim(baseline: Images, candidate: Images, batch_size: int = 64) -> npt.NDArray[np.float64]:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError as error:
        raise MissingDependency(f"SSIM needs {error.name}", fix=PIP) from error
    found = []
    for start in range(0, len(baseline), batch_size):
        pair = [
            torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float()
            for images in (baseline, candidate)
        ]
        found.append(ssim(pair[1], pair[0], reduction="none", data_range=255.0).reshape(-1))
    return torch.cat(found).double().numpy()
