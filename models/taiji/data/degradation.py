"""Low-resolution images for training super-resolution: half plain, half photographed badly.

Half the images are reduced by bicubic interpolation. The others follow the light variant of BSRGAN
(Zhang et al., arXiv 2103.14006), the degradation of latent diffusion's super-resolution: blur,
reduction by a random kernel and noise in random order, then JPEG.

H W pixels of the original, s the reduction.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]
Kernel = Image.Resampling
KERNELS = (Kernel.NEAREST, Kernel.BOX, Kernel.BILINEAR, Kernel.BICUBIC)


class DegradationConfig(BaseModel):
    """Ranges of the light degradation. `blur` and `noise` are standard deviations, the first in
    pixels of the original along each axis, the second of 255; `jpeg` is the quality."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    light_share: float = Field(0.5, ge=0, le=1)
    blur: tuple[float, float] = (0.1, 2.0)
    noise: tuple[float, float] = (1.0, 25.0)
    gray_noise_share: float = Field(0.4, ge=0, le=1)
    jpeg: tuple[int, int] = (30, 95)


def degrade(
    image: Pixels, scale: int, rng: np.random.Generator, config: DegradationConfig | None = None
) -> Pixels:
    """image (H, W, 3) uint8 -> (H/s, W/s, 3) uint8, the same for the same `rng`

    Raises:
        ValueError: H or W is not a multiple of `scale`.
    """
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"an image of {height}x{width} cannot be reduced {scale} times; crop it")
    config = config or DegradationConfig()
    if rng.random() >= config.light_share:
        return reduce(image, scale, Kernel.BICUBIC)
    for step in rng.permutation(("blur", "reduce", "noise")):
        if step == "blur":
            image = _blur(image, rng, config)
        elif step == "reduce":
            image = reduce(image, scale, KERNELS[rng.integers(len(KERNELS))])
        else:
            image = _add_noise(image, rng, config)
    return jpeg(image, int(rng.integers(config.jpeg[0], config.jpeg[1] + 1)))


def reduce(image: Pixels, scale: int, kernel: Kernel) -> Pixels:
    """image (H, W, 3) -> (H/s, W/s, 3)"""
    size = (image.shape[1] // scale, image.shape[0] // scale)
    return np.array(Image.fromarray(image).resize(size, kernel))


def _blur(image: Pixels, rng: np.random.Generator, config: DegradationConfig) -> Pixels:
    """Gaussian, of one width in half of the images and of two along the axes in the others."""
    down, across = rng.uniform(*config.blur, size=2)
    sigma = (down, down if rng.random() < 0.5 else across, 0)
    return _to_pixels(ndimage.gaussian_filter(image.astype(np.float32), sigma, mode="nearest"))


def _add_noise(image: Pixels, rng: np.random.Generator, config: DegradationConfig) -> Pixels:
    sigma, gray = rng.uniform(*config.noise), rng.random() < config.gray_noise_share
    shape = (*image.shape[:2], 1 if gray else 3)
    return _to_pixels(image + sigma * rng.standard_normal(shape, dtype=np.float32))


def jpeg(image: Pixels, quality: int) -> Pixels:
    """image (H, W, 3) -> what is left of it after compression"""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer).convert("RGB"))


def _to_pixels(values: npt.NDArray[np.float32]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
