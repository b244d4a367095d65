"""How well a first stage gives images back: PSNR, use of the codebook, and a Frechet distance.

    python -m taiji.autoencoder.reconstruction FOLDER [--network NETWORK] [--images IMAGES]

The distance is FID's formula between the features of images and of their reconstructions, over the
places of a feature network's last map averaged. It is rFID only with FID's Inception weights, which
no package carries: so it stands beside the network's name, and compares only under the same one.
N images, B batch, H W pixels, F features, K codes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from taiji.autoencoder.codebook import code_counts, nearest_codes, perplexity, usage
from taiji.autoencoder.kl import latents, to_tensor
from taiji.autoencoder.losses import psnr
from taiji.autoencoder.perceptual import IMAGE_CLIP, FeatureNetwork, load_network
from taiji.data import shapes

BATCH = 64
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class PooledFeatures(nn.Module):
    """The last map of a network, averaged over its places: images (B, 3, H, W) -> (B, F)"""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[-1].float().mean(1)


def make_frechet(network: FeatureNetwork) -> Any:
    """torchmetrics' FID over `network`. Raises ImportError naming the extra when it is missing."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            "the Frechet distance needs torchmetrics: pip install 'hcf-toolkit[judge]'"
        ) from error
    side = network.size or 64
    return FrechetInceptionDistance(
        PooledFeatures(network),
        normalize=True,
        input_img_size=(3, side, side),
        sync_on_compute=False,  # every process of a group measures all images
    )


@torch.no_grad()
def measure(
    model: AutoencoderKL | VQModel, images: Tensor, network: FeatureNetwork | None = None
) -> dict[str, float]:
    """images (N, 3, H, W) in [-1, 1] -> means over the images, without anything random.

    psnr and l1; usage and perplexity of a codebook over all of them; frechet with a network.
    """
    frechet = None if network is None else make_frechet(network.to(model.device)).to(model.device)
    book = model.quantize.embedding.weight if isinstance(model, VQModel) else None
    counts: Any = 0
    db, errors = [], []
    for x in images.to(model.device).split(BATCH):
        z = latents(model, x)
        if book is not None:
            counts = counts + code_counts(nearest_codes(z, book), len(book))
        output = model.decode(z).sample.float().clamp(-1, 1)
        db.append(psnr(output, x))
        errors.append(l1_loss(output, x, reduction="none").mean((1, 2, 3)))
        if frechet is not None:
            frechet.update(x, real=True)
            frechet.update(output, real=False)
    found = {"psnr": float(torch.cat(db).mean()), "l1": float(torch.cat(errors).mean())}
    if book is not None:
        found |= {"usage": usage(counts), "perplexity": perplexity(counts)}
    if frechet is not None:
        found["frechet"] = float(frechet.compute())
    return found


def heldout_scenes(count: int, seed: int = 0, **world: Any) -> Tensor:
    """Compositions that no training corpus has -> (N, 3, H, W) in [-1, 1]"""
    drawn = shapes.sample(count, seed, split="heldout", **world)
    return to_tensor(np.stack([image for _, _, image in drawn]))


def read_images(folder: Path, size: int) -> Tensor:
    """Every image of a folder in the order of names, centre square of `size` -> (N, 3, H, W)"""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no image in {folder}: expected {', '.join(IMAGE_SUFFIXES)}")
    return to_tensor(np.stack([_square(path, size) for path in paths]))


def _square(path: Path, size: int) -> Any:
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def load_first_stage(folder: Path) -> AutoencoderKL | VQModel:
    """A saved component of either class. Raises FileNotFoundError, ValueError for another class."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no first stage at {folder}: train one, see recipes/train")
    name = json.loads(config.read_text()).get("_class_name")
    classes = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
    if name not in classes:
        raise ValueError(f"{folder} holds {name}, not one of {', '.join(classes)}")
    return classes[name].from_pretrained(folder, use_safetensors=True).eval()


def main(arguments: list[str] | None = None, log: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(prog="taiji.autoencoder.reconstruction", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a VQModel or an AutoencoderKL")
    parser.add_argument("--network", type=Path, default=IMAGE_CLIP, help="of the features")
    parser.add_argument("--images", type=Path, help="folder; without it held-out scenes are drawn")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    given = parser.parse_args(arguments)
    network = load_network(given.network)
    if given.images is None:
        images = heldout_scenes(given.scenes, given.seed, size=given.size)
    else:
        images = read_images(given.images, given.size)
    found = measure(load_first_stage(given.model), images, network)
    log(json.dumps({**found, "images": len(images), "features": network.card}))


if __name__ == "__main__":
    main()
