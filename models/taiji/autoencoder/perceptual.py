"""Distance of images in the features of a frozen network (LPIPS: Zhang et al., arXiv 1801.03924).

    d(x, y) = sum over layers l of  mean over places of  sum_d w_ld (x_ld - y_ld)^2

with features of unit length at each place and w learned, or 1 without learned weights. The network
is a folder that transformers reads (CLIP-like towers, ViT, ResNet, ...) or a safetensors file of
VGG16 under torchvision's names, which with the published linear weights is LPIPS itself. No such
network comes with a package, so by default it is this family's own ImageCLIP tower.

B batch, H W pixels, P places (tokens or pixels of a feature map), D width, L layers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import AutoModel

IMAGE_CLIP = Path("models/weights/taiji-sd-mini/image_clip")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
VGG16_WIDTHS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


class PerceptualConfig(BaseModel):
    """`network`: a transformers folder or a VGG16 safetensors file. `linear`: safetensors with
    w of each layer as lpips names them, lin0.model.1.weight (1, D, 1, 1) and so on. `layers`:
    which of the network's feature maps count, all by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: Path = IMAGE_CLIP
    linear: Path | None = None
    layers: tuple[int, ...] | None = None


class Vgg16(nn.Module):
    """Convolutions of VGG16 (arXiv 1409.1556), numbered as torchvision does."""

    def __init__(self) -> None:
        super().__init__()
        body: list[nn.Module] = []
        self.last: list[int] = []
        ins = 3
        for widths in VGG16_WIDTHS:
            if body:
                body.append(nn.MaxPool2d(2))
            for outs in widths:
                body += [nn.Conv2d(ins, outs, 3, padding=1), nn.ReLU()]
                ins = outs
            self.last.append(len(body) - 1)
        self.features = nn.Sequential(*body)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> five maps (B, P, D), each after the last ReLU of its group"""
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.last:
                maps.append(x.flatten(2).mT)
        return maps


class HiddenStates(nn.Module):
    """The hidden states of a transformers model, of its vision tower where it has two."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) -> L maps (B, P, D)"""
        states = self.model(pixel_values=x, output_hidden_states=True).hidden_states
        return [s.flatten(2).mT if s.ndim == 4 else s for s in states]


class FeatureNetwork(nn.Module):
    """A frozen network over images in [-1, 1], which are resized where it takes one size only.

    `card` says which one it is, for model cards and records.
    """

    def __init__(
        self,
        body: nn.Module,
        card: dict[str, Any],
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.body = body.requires_grad_(False)
        self.card, self.size = card, size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stays in evaluation mode inside a model that trains."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> L maps (B, P, D)"""
        x = ((images + 1) / 2 - self.mean) / self.std
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(x)


def load_network(path: Path) -> FeatureNetwork:
    """Raises FileNotFoundError without it, ValueError for a file that is no VGG16."""
    if path.is_dir():
        return _load_transformers(path)
    if path.is_file():
        return _load_vgg16(path)
    raise FileNotFoundError(
        f"no feature network at {path}: give perceptual.network a transformers folder or a VGG16 "
        "safetensors file, or set objective.perceptual_weight to 0"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _card(path: Path, body: nn.Module, kind: str, weights: Path) -> dict[str, Any]:
    count = sum(p.numel() for p in body.parameters())
    return {
        "network": path.name,
        "class": kind,
        "parameters": count,
        "sha256": _digest(weights),
    }


def _load_transformers(folder: Path) -> FeatureNetwork:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: save the model with it")
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    body = HiddenStates(model)
    preprocessor = folder / "preprocessor_config.json"
    stated = json.loads(preprocessor.read_text()) if preprocessor.exists() else {}
    config = getattr(model.config, "vision_config", model.config)
    return FeatureNetwork(
        body,
        _card(folder, body, type(body.model).__name__, weights),
        tuple(stated.get("image_mean", HALF)),
        tuple(stated.get("image_std", HALF)),
        getattr(config, "image_size", None),
    )


def _load_vgg16(path: Path) -> FeatureNetwork:
    body = Vgg16()
    try:
        tensors = {k: v for k, v in load_file(path).items() if k.startswith("features.")}
        body.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not a VGG16 under torchvision's names: {error}") from error
    card = _card(path, body, "Vgg16", path)
    return FeatureNetwork(body, card, IMAGENET_MEAN, IMAGENET_STD)


class PerceptualLoss(nn.Module):
    def __init__(
        self,
        network: FeatureNetwork,
        linear: list[Tensor] | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.layers = network, layers
        self.linear = None if linear is None else [w.flatten() for w in linear]
        self.card = {
            **network.card,
            "layers": "all" if layers is None else list(layers),
            "learned_weights": linear is not None,
        }

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, 3, H, W) in [-1, 1] -> distances (B,)"""
        pairs = list(zip(self.network(x), self.network(y), strict=True))
        chosen = pairs if self.layers is None else [pairs[i] for i in self.layers]
        weights: list[Tensor | None] = [*self.linear] if self.linear else [None] * len(chosen)
        if len(weights) != len(chosen):
            raise ValueError(f"{len(weights)} linear weights for {len(chosen)} layers of features")
        return sum(
            (layer_distance(a, b, w) for (a, b), w in zip(chosen, weights, strict=True)),
            start=x.new_zeros(len(x)),
        )


def layer_distance(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """a, b (B, P, D), weight (D,) -> (B,): 1801.03924, eq. 1"""
    gap = (normalize(a.float(), dim=-1) - normalize(b.float(), dim=-1)).square()
    if weight is not None:
        gap = gap * weight.to(gap.device)
    return gap.sum(-1).mean(1)


def load_perceptual(config: PerceptualConfig) -> PerceptualLoss:
    """Raises FileNotFoundError and ValueError for what is missing or does not fit."""
    network = load_network(config.network)
    linear = None
    if config.linear is not None:
        if not config.linear.is_file():
            raise FileNotFoundError(f"no linear weights at {config.linear}")
        tensors = load_file(config.linear)
        names = sorted(k for k in tensors if k.startswith("lin") and k.endswith(".model.1.weight"))
        if not names:
            raise ValueError(f"{config.linear} has no lin0.model.1.weight: take lpips' names")
        linear = [tensors[name] for name in names]
    return PerceptualLoss(network, linear, config.layers)
