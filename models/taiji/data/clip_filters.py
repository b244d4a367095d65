"""Columns from a Chinese CLIP: features of the image, their cosine with the caption, scores that a
head reads from them.

B batch, C channels, H = W image side, S text tokens, D projection width, K outputs of a head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from safetensors import safe_open
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, ChineseCLIPModel

from taiji.data.filter_config import ClipFilter, HeadFilter
from taiji.data.metadata import read_images

Features = npt.NDArray[np.float32]

BATCH = 32
CONTEXT = 52  # text tokens of the published Chinese-CLIP


@dataclass(frozen=True)
class Clip:
    """A model with its tokenizer and how images are prepared for it."""

    model: ChineseCLIPModel
    tokenizer: Any
    side: int
    mean: Tensor
    std: Tensor
    tokens: int

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """B images -> features (B, D) of unit length"""
        pixels = torch.stack([self._prepare(image) for image in images])
        pooled = self.model.vision_model(pixel_values=pixels)[1]
        return normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> features (B, D) of unit length; (B, S) tokens are cut to the context"""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        hidden = self.model.text_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )[0]
        return normalize(self.model.text_projection(hidden[:, 0]).float(), dim=-1)

    def _prepare(self, image: Image.Image) -> Tensor:
        """An RGB image -> (C, H, W): the whole image, its aspect given up as Chinese-CLIP does"""
        resized = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


@lru_cache(maxsize=1)
def load_clip(model: Path, tokenizer: Path) -> Clip:
    """A ChineseCLIPModel folder; mean and standard deviation from its preprocessor_config.json,
    0.5 where it has none.

    Raises:
        FileNotFoundError: no such folder.
    """
    for folder in (model, tokenizer):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: filters.clip needs a ChineseCLIPModel")
    network = ChineseCLIPModel.from_pretrained(model, local_files_only=True).eval()
    about = model / "preprocessor_config.json"
    found = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    config = network.config
    return Clip(
        network,
        AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        config.vision_config.image_size,
        torch.tensor(found.get("image_mean", [0.5] * 3)).view(3, 1, 1),
        torch.tensor(found.get("image_std", [0.5] * 3)).view(3, 1, 1),
        min(CONTEXT, config.text_config.max_position_embeddings),
    )


def clip_columns(rows: pa.Table, root: Path, config: ClipFilter) -> dict[str, pa.Array]:
    """rows (N; file, offset, bytes, caption) -> clip_image (N, D) float16, relevance (N)

    Null where the image cannot be read. One thread: with another number the last bits of the sums
    differ, and with them the files.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _clip_columns(rows, root, load_clip(config.model, config.tokenizer_folder))
    finally:
        torch.set_num_threads(threads)


def _clip_columns(rows: pa.Table, root: Path, clip: Clip) -> dict[str, pa.Array]:
    width = clip.model.config.projection_dim
    features = np.zeros((len(rows), width), np.float16)
    relevance = np.zeros(len(rows), np.float32)
    readable = np.zeros(len(rows), np.bool_)
    stream = zip(read_images(root, rows), rows["caption"].to_pylist(), strict=True)
    start = 0
    while chunk := list(islice(stream, BATCH)):
        places = [start + i for i, (item, _) in enumerate(chunk) if not isinstance(item, str)]
        if places:
            images = clip.images([item[1] for item, _ in chunk if not isinstance(item, str)])
            texts = clip.texts([chunk[place - start][1] or "" for place in places])
            features[places] = images.numpy()
            relevance[places] = (images * texts).sum(-1).numpy()
            readable[places] = True
        start += len(chunk)
    return {
        "clip_image": pa.FixedSizeListArray.from_arrays(
            pa.array(features.ravel()), width, mask=pa.array(~readable)
        ),
        "relevance": pa.array(relevance, mask=~readable),
    }


def features_of(column: pa.ChunkedArray) -> tuple[Features, npt.NDArray[np.bool_]]:
    """clip_image (N) -> features (N, D) of unit length, zero where null, and which are there (N)"""
    joined = column.combine_chunks()
    width = joined.type.list_size
    # .values, not .flatten(): that would leave the null rows out
    flat = joined.values.slice(joined.offset * width, len(joined) * width)
    features = flat.to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float32)
    known = ~joined.is_null().to_numpy(zero_copy_only=False)
    features[~known] = 0
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, 1e-6), known


def apply_head(features: Features, path: Path) -> Features:
    """features (B, D) -> (B, K) by the linear layers of a safetensors file, in name order

    The file holds `<layer>.weight` (out, in) and `<layer>.bias` (out). Its metadata may name an
    `activation` between the layers (relu; none is the default, as in the LAION aesthetic
    predictor, christophschuhmann/improved-aesthetic-predictor) and an `output` (sigmoid).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the layers do not fit the features.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no head at {path}: write its layers as safetensors")
    with safe_open(path, "np") as tensors:
        about = tensors.metadata() or {}
        weights = {name: tensors.get_tensor(name).astype(np.float32) for name in tensors.keys()}
    names = sorted(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    x = features
    for number, name in enumerate(names):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"{path.name}: layer {name} has shape {weight.shape}, but its input is "
                f"{x.shape[1]} wide: the head belongs to another CLIP"
            )
        x = x @ weight.T + (0 if bias is None else bias)
        if number + 1 < len(names) and about.get("activation", "none") == "relu":
            x = np.maximum(x, 0)
    return expit(x) if about.get("output") == "sigmoid" else x


def head_columns(rows: pa.Table, config: HeadFilter) -> dict[str, pa.Array]:
    """rows (N; clip_image) -> one column (N) float32 a head, null where there is no image"""
    features, known = features_of(rows["clip_image"])
    return {
        name: pa.array(apply_head(features, path)[:, 0], pa.float32(), mask=~known)
        for name, path in config.files.items()
    }
