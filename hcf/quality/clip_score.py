"""CLIP-zh: how well an image shows the concept its Chinese caption names, by a judge of our own.

Frozen EfficientNet-Lite0 and USE-m3 features under two small heads, trained by `judge_training`
with the contrastive loss of CLIP (Radford et al. 2021) on emoji art that no generator has seen. It
knows about a thousand emoji names; it is no general CLIP. Print `ClipZh.accuracy` beside every
score. N images, T texts, E embedding width, L labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.errors import HcfError, InvalidArtifact
from hcf.quality.features import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    Floats,
    Images,
    image_features,
    text_features,
)

WIDTH, HIDDEN = 256, 512
WEIGHTS_FILE, INFO_FILE = "judge.safetensors", "judge.json"
CANDIDATES, TOP = 64, 5
TIE = 1e-5  # cosines closer than this are equal: their last bits depend on the matrix size
SEPARATORS = ("，", ",")


class Head(nn.Module):
    """features (N, F) -> unit vectors (N, E): standardise, linear, GELU, linear, normalise."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, HIDDEN), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers((features - self.mean) / self.scale), dim=-1)


@dataclass(frozen=True)
class ClipZh:
    """The trained judge: its heads, the names it was trained on and what it reaches itself.

    `info` is judge.json: vendors, package versions, hashes, seed, accuracies on unseen vendors.
    """

    image_head: Head
    text_head: Head
    labels: tuple[str, ...]
    label_embeddings: Tensor
    info: Mapping[str, Any]

    @staticmethod
    def load(folder: Path) -> ClipZh:
        """Reads both files of the judge. Raises InvalidArtifact when missing or damaged."""
        return _load(folder)

    @property
    def accuracy(self) -> dict[str, float]:
        """Its own figures on real art of vendors that it has not seen, in [0, 1]."""
        return dict(self.info["accuracy"]["unseen"])

    def accuracy_line(self) -> str:
        """One sentence to print beside every score."""
        own = self.accuracy
        return (
            f"the judge itself, on real images of vendors it never saw: R@1 {own['r_at_1']:.1%}, "
            f"R@5 {own['r_at_5']:.1%} of {len(self.labels)} names; "
            f"R@5 {own['r_at_5_of_64']:.1%} of 64; cosine {own['cosine_true']:.3f} with the right "
            f"name, {own['cosine_shuffled']:.3f} with a wrong one"
        )

    def concept(self, caption: str) -> str:
        """The concept a caption names: without its style prefix and what follows a comma."""
        text = caption.strip()
        for prefix in self.info["style_prefixes"]:
            if text.startswith(prefix) and len(text) > len(prefix):
                text = text[len(prefix) :]
                break
        for separator in SEPARATORS:
            text = text.split(separator)[0]
        return text.strip() or caption

    @torch.inference_mode()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """T captions -> (T, E) unit vectors of their concepts."""
        names = [self.concept(caption) for caption in captions]
        known = {label: i for i, label in enumerate(self.labels)}
        new = [name for name in dict.fromkeys(names) if name not in known]
        table = self.label_embeddings
        if new:  # only then the sentence encoder is needed
            table = torch.cat([table, self.text_head(torch.from_numpy(text_features(new)))])
            known |= {name: len(self.labels) + i for i, name in enumerate(new)}
        return table[[known[name] for name in names]]

    @torch.inference_mode()
    def embed_features(self, features: Floats) -> Tensor:
        """EfficientNet-Lite0 features (N, 1280) -> (N, E) unit vectors."""
        return self.image_head(torch.from_numpy(features))

    def score(self, images: Images, captions: Sequence[str]) -> Floats:
        """images (N, H, W, 3) uint8, N captions -> cosine (N,) of each image with its caption."""
        return self.score_features(image_features(images), captions)

    def score_features(self, features: Floats, captions: Sequence[str]) -> Floats:
        """`score` for images whose features (N, 1280) are at hand."""
        _same_length(len(features), captions)
        cosine = (self.embed_features(features) * self.embed_texts(captions)).sum(-1)
        return np.asarray(cosine.numpy(), np.float32)

    def retrieval(
        self,
        images: Images,
        captions: Sequence[str],
        candidates: int = CANDIDATES,
        k: int = TOP,
        seed: int = 0,
    ) -> float:
        """Share of images whose caption is among the k best of `candidates`: see `hits`."""
        return float(self.hits(image_features(images), captions, candidates, k, seed).mean())

    def hits(
        self,
        features: Floats,
        captions: Sequence[str],
        candidates: int = CANDIDATES,
        k: int = TOP,
        seed: int = 0,
    ) -> npt.NDArray[np.bool_]:
        """features (N, 1280), N captions -> (N,) whether the caption's concept ranks in the top k.

        Image i is compared with its own concept and `candidates` - 1 other names the judge knows,
        drawn from (seed, i): the same names for every model compared. A tie counts as a loss.
        """
        _same_length(len(features), captions)
        if not 1 <= k < candidates <= len(self.labels):
            raise HcfError(
                f"R@{k} of {candidates} names cannot be taken: the judge knows {len(self.labels)}",
                fix=f"choose 1 <= k < candidates <= {len(self.labels)}",
            )
        truth = self.embed_texts(captions)
        number = {label: i for i, label in enumerate(self.labels)}
        found = np.zeros(len(features), np.bool_)
        for i, image in enumerate(self.embed_features(features)):
            own = number.get(self.concept(captions[i]), -1)  # -1: a concept without a name here
            order = np.random.default_rng([seed, i]).permutation(len(self.labels))
            others = order[order != own][: candidates - 1]
            rivals = self.label_embeddings[torch.from_numpy(others)] @ image
            found[i] = int((rivals >= truth[i] @ image - TIE).sum()) < k
        return found


def _same_length(images: int, captions: Sequence[str]) -> None:
    if images != len(captions):
        raise HcfError(f"{images} images but {len(captions)} captions", fix="give one caption each")


def _load(folder: Path) -> ClipZh:
    from safetensors import SafetensorError
    from safetensors.torch import load

    remedy = "copy both files from the model's hcf_data, or train them: hcf.quality.judge_training"
    for name in (WEIGHTS_FILE, INFO_FILE):
        if not (folder / name).exists():
            raise InvalidArtifact(f"no judge in {folder}: {name} is missing", fix=remedy)
    payload = (folder / WEIGHTS_FILE).read_bytes()
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        if hashlib.sha256(payload).hexdigest() != info["weights_sha256"]:
            raise InvalidArtifact(f"{WEIGHTS_FILE} is not what {INFO_FILE} describes", fix=remedy)
        tensors = {name: tensor.float() for name, tensor in load(payload).items()}
        heads = [Head(IMAGE_WIDTH), Head(TEXT_WIDTH)]
        for head, name in zip(heads, ("image", "text"), strict=True):
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
            head.load_state_dict(own)
            head.eval().requires_grad_(False)
        labels, embeddings = tuple(info["labels"]), tensors["label_embeddings"]
        if embeddings.shape != (len(labels), WIDTH):
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {tuple(embeddings.shape)} label embeddings")
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise InvalidArtifact(f"the judge in {folder} is damaged: {error}", fix=remedy) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise InvalidArtifact(f"{WEIGHTS_FILE} holds values that are not finite", fix=remedy)
    return ClipZh(heads[0], heads[1], labels, F.normalize(embeddings, dim=-1), info)
