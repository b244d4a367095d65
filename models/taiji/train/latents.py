"""Precomputed latents: safetensors in a folder named by the first stage that made them.

A latent means something to its own first stage only. The folder's name begins with the hash of that
stage's configuration and weights, every file carries the whole hash and that of its images, and
reading with another stage is refused. At 512 pixels a latent of KL-f8 is 32 KB in float16.

N images of H x W, latents (N, C, h, w).
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Images = npt.NDArray[np.uint8]


def first_stage_hash(stage: nn.Module) -> str:
    """SHA-256 of a first stage's configuration and weights; the same wherever it was loaded from.

    Weights count as float16, so that a stage and its half-precision copy on disk are one.
    """
    config: Any = getattr(stage, "config", {})
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(stage.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def latents_path(folder: Path, stage_hash: str, shard: str = "latents") -> Path:
    return folder / stage_hash[:16] / f"{shard}.safetensors"


def write_latents(path: Path, latents: Tensor, *, stage_hash: str, images_hash: str = "") -> None:
    """latents (N, C, h, w), kept in float16, beside `path` and then in its place."""
    if not stage_hash:
        raise ValueError("latents need the hash of their first stage: first_stage_hash(stage)")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".tmp")
    tensors = {"latents": latents.half().contiguous()}
    save_file(tensors, staging, {"first_stage": stage_hash, "images": images_hash})
    os.replace(staging, path)


def read_latents(path: Path, stage_hash: str) -> Tensor:
    """(N, C, h, w) float16. Raises ValueError when another first stage, or none, made them."""
    with safe_open(path, "pt") as file:
        made_by = (file.metadata() or {}).get("first_stage")
        if not made_by:
            raise ValueError(
                f"{path} does not say which first stage made it: encode again, with write_latents"
            )
        if made_by != stage_hash:
            raise ValueError(
                f"{path} is of first stage {made_by[:16]}, this one is {stage_hash[:16]}: encode "
                "again, or train on the stage it was made with"
            )
        latents: Tensor = file.get_tensor("latents")
    return latents


def load_or_encode(
    folder: Path,
    stage: nn.Module,
    images: Images,
    encode: Callable[[Images], Tensor],
    shard: str = "latents",
) -> Tensor:
    """Latents of `images` (N, H, W, 3) by `stage`, read where the folder has them, else encoded
    and kept. Changed weights or images are noticed by their hash."""
    stage_hash = first_stage_hash(stage)
    images_hash = hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()
    path = latents_path(folder, stage_hash, shard)
    if path.exists():
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("images") == images_hash
        if known:
            return read_latents(path, stage_hash)
    latents = encode(images).half()
    write_latents(path, latents, stage_hash=stage_hash, images_hash=images_hash)
    return latents
