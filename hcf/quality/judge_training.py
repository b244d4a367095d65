"""Trains the judge's two heads on emoji art that the generators never see, in about a minute.

    loss = 1/2 (CE(s I T^t) + CE(s T I^t)),   I image and T text embeddings of one batch

a batch holding each concept once (CLIP, Radford et al. 2021). Every image is seen clean and
degraded, so that the judge looks at what is drawn and not at how sharp it is. Accuracies are
measured on the generators' vendors, which the judge has not seen. N images, B batch, L labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.errors import HcfError
from hcf.quality.clip_score import INFO_FILE, WEIGHTS_FILE, ClipZh, Head
from hcf.quality.features import (
    IMAGE_WIDTH,
    NETWORK_SHA256,
    TEXT_WIDTH,
    Images,
    image_features,
    package_versions,
    text_features,
)

IMAGE_SIZE = 64
BATCH = 256
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
IMAGE_DROPOUT, TEXT_DROPOUT = 0.3, 0.1
FEATURE_NOISE = 0.3  # in standard deviations of each feature
TAG_SHARE = 0.2  # of the texts are a tag and not the name
Rows = list[dict[str, Any]]


def train_judge(
    emoji_folder: Path,
    output_folder: Path,
    *,
    epochs: int = 200,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains on the judge's vendors in `emoji_folder`, writes judge.safetensors and judge.json into
    `output_folder` and returns the accuracies: {"unseen": {...}, "by_vendor": {vendor: {...}}}.

    One epoch shows every name once. Raises HcfError when the data set lacks the vendors of either
    side, FileNotFoundError without a data set, MissingDependency without the feature packages.
    """
    from taiji.data import emoji

    images, rows = emoji.load(emoji_folder, IMAGE_SIZE)
    present = {row["vendor"] for row in rows}
    judge_vendors = [name for name in emoji.JUDGE_VENDORS if name in present]
    unseen_vendors = [name for name in emoji.GENERATOR_VENDORS if name in present]
    if not judge_vendors or not unseen_vendors:
        raise HcfError(
            f"{emoji_folder} holds {', '.join(sorted(present))}: the judge needs its own vendors "
            f"to train on and a generator's vendor to be measured on",
            fix="build the emoji data with all vendors: `hcf data build emoji`",
        )
    seen = np.array([row["vendor"] in judge_vendors for row in rows])
    log(f"features of {seen.sum()} images of {', '.join(judge_vendors)}, clean and degraded")
    clean = image_features(images[seen])
    rough = image_features(degrade(images[seen], np.random.default_rng(seed)))
    features = torch.from_numpy(np.stack([clean, rough], 1))
    own = [row for row, chosen in zip(rows, seen, strict=True) if chosen]
    heads = fit_heads(features, own, epochs=epochs, seed=seed, log=log)

    labels = tuple(dict.fromkeys(row["label"] for row in own))
    info: dict[str, Any] = {
        "schema_version": 1,
        "judge_vendors": judge_vendors,
        "unseen_vendors": unseen_vendors,
        "training_images": int(seen.sum()),
        "image_size": IMAGE_SIZE,
        "epochs": epochs,
        "seed": seed,
        "packages": package_versions(),
        "network_sha256": NETWORK_SHA256,
        "data_sha256": hashlib.sha256("".join(sorted(r["md5"] for r in rows)).encode()).hexdigest(),
        "style_prefixes": list(emoji.STYLES.values()),
        "labels": list(labels),
    }
    output_folder.mkdir(parents=True, exist_ok=True)
    _write(output_folder, heads, labels, {**info, "accuracy": {}})
    log(f"accuracy on {(~seen).sum()} images of {', '.join(unseen_vendors)}")
    other = [row for row, chosen in zip(rows, seen, strict=True) if not chosen]
    accuracy = measure(ClipZh.load(output_folder), images[~seen], other, seed=seed)
    _write(output_folder, heads, labels, {**info, "accuracy": accuracy})
    log(ClipZh.load(output_folder).accuracy_line())
    return accuracy


def degrade(images: Images, rng: np.random.Generator) -> Images:
    """images (N, H, W, 3) -> the same, each shifted, blurred and with noise, as generated ones."""
    found = np.empty_like(images)
    for i, image in enumerate(images):
        offset = (*rng.uniform(-3, 3, 2), 0)
        pixels = ndimage.shift(image.astype(np.float32), offset, order=1, cval=255)
        sigma = rng.uniform(0.2, 1.2)
        pixels = ndimage.gaussian_filter(pixels, (sigma, sigma, 0))
        pixels += rng.normal(0, rng.uniform(0, 8), image.shape)
        found[i] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return found


def fit_heads(
    features: Tensor, rows: Rows, *, epochs: int, seed: int, log: Callable[[str], object] = print
) -> tuple[Head, Head]:
    """features (N, variants, 1280) with their N rows -> the image head and the text head."""
    members: dict[str, list[int]] = {}
    tags: dict[str, list[str]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row["label"], []).append(i)
        tags[row["label"]] = row["tags"]
    labels = list(members)
    texts = list(dict.fromkeys([*labels, *(tag for some in tags.values() for tag in some)]))
    number = {text: i for i, text in enumerate(texts)}
    vectors = torch.from_numpy(text_features(texts))

    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        image_head, text_head = Head(IMAGE_WIDTH, IMAGE_DROPOUT), Head(TEXT_WIDTH, TEXT_DROPOUT)
        flat = features.flatten(0, 1)
        image_head.mean.copy_(flat.mean(0))
        image_head.scale.copy_(flat.std(0) + 1e-3)
        log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        parameters = [*image_head.parameters(), *text_head.parameters(), log_scale]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        batch = min(BATCH, len(labels))
        rounds = len(labels) // batch
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=max(epochs * rounds, 2), pct_start=0.1
        )
        for epoch in range(epochs):
            order = rng.permutation(len(labels))
            for start in range(0, rounds * batch, batch):
                chosen = [labels[i] for i in order[start : start + batch]]
                x = _mixed(features, [members[label] for label in chosen], rng)
                x = x + FEATURE_NOISE * image_head.scale * torch.randn_like(x)
                named = [_text(label, tags[label], rng) for label in chosen]
                images = image_head(x)
                logits = (
                    log_scale.exp().clamp(max=100)
                    * images
                    @ text_head(vectors[[number[text] for text in named]]).T
                )
                target = torch.arange(batch)
                loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if (epoch + 1) % max(1, epochs // 5) == 0:
                log(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return image_head.eval(), text_head.eval()


def _mixed(features: Tensor, members: Sequence[list[int]], rng: np.random.Generator) -> Tensor:
    """A random blend (B, 1280) of two pictures of each concept: styles between the vendors'."""

    def draw() -> Tensor:
        pictures = [some[int(rng.integers(len(some)))] for some in members]
        return features[pictures, rng.integers(features.shape[1], size=len(members))]

    share = torch.from_numpy(rng.random((len(members), 1), dtype=np.float32))
    return torch.lerp(draw(), draw(), share)


def _text(label: str, tags: Sequence[str], rng: np.random.Generator) -> str:
    return tags[int(rng.integers(len(tags)))] if tags and rng.random() < TAG_SHARE else label


def measure(judge: ClipZh, images: Images, rows: Rows, *, seed: int = 0) -> dict[str, Any]:
    """Retrieval of the right name for real images (N, H, W, 3): over all and for each vendor."""
    labels = [row["label"] for row in rows]
    features = image_features(images)
    known = np.array([label in judge.labels for label in labels])
    cosine = (judge.embed_features(features) @ judge.label_embeddings.T).numpy()
    number = {label: i for i, label in enumerate(judge.labels)}
    own = np.array([number.get(label, 0) for label in labels])
    true = cosine[np.arange(len(own)), own]
    rank = (cosine >= true[:, None]).sum(1) - 1
    shuffled = cosine[np.arange(len(own)), np.random.default_rng(seed).permutation(own)]
    hits = judge.hits(features, labels, min(64, len(judge.labels)), seed=seed)

    def figures(chosen: npt.NDArray[np.bool_]) -> dict[str, float]:
        return {
            "images": int(chosen.sum()),
            **{f"r_at_{k}": round(float((rank[chosen] < k).mean()), 4) for k in (1, 5, 10)},
            "r_at_5_of_64": round(float(hits[chosen].mean()), 4),
            "cosine_true": round(float(true[chosen].mean()), 4),
            "cosine_shuffled": round(float(shuffled[chosen].mean()), 4),
        }

    vendors = np.array([row["vendor"] for row in rows])
    return {
        "unseen": figures(known),
        "by_vendor": {name: figures(known & (vendors == name)) for name in dict.fromkeys(vendors)},
    }


def _write(
    folder: Path, heads: tuple[Head, Head], labels: tuple[str, ...], info: dict[str, Any]
) -> None:
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.half().contiguous()
        for name, head in zip(("image", "text"), heads, strict=True)
        for key, value in head.state_dict().items()
    }
    with torch.inference_mode():
        tensors["label_embeddings"] = heads[1](torch.from_numpy(text_features(labels))).half()
    payload = save(tensors)
    described = {**info, "weights_sha256": hashlib.sha256(payload).hexdigest()}
    _replace(folder / WEIGHTS_FILE, payload)
    text = json.dumps(described, ensure_ascii=False, indent=1) + "\n"
    _replace(folder / INFO_FILE, text.encode())


def _replace(path: Path, payload: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(payload)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
