"""Domains of the data: what an image shows, how often each is drawn, how many cartoons at most.

N rows, D feature width, K domains.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from taiji.data.filter_config import ClipFilter, DomainFilter

Features = npt.NDArray[np.float32]

SLACK = 1e-9  # of float arithmetic: 0.3 of 100 rows are 30

DOMAINS: dict[str, tuple[str, ...]] = {
    "landscape": ("一张自然风景照片", "山川湖海的风光"),
    "chinese_scenery": ("一张中国名胜古迹的照片", "中国古典园林和建筑"),
    "city": ("一张城市街道的照片", "现代建筑和夜景"),
    "food": ("一张美食的照片", "一道中国菜"),
    "festival": ("中国传统节日的场景", "春节的灯笼和烟花"),
    "object": ("一件物品的照片", "一张商品图"),
    "animal": ("一张动物的照片",),
    "people": ("一张人物照片", "一张名人的照片"),
    "game": ("一张游戏画面截图", "游戏角色原画"),
    "cartoon": ("一张卡通图片", "一张动漫插画", "一张动画片截图"),
    "art": ("一幅油画", "一幅水墨画", "一幅水彩画", "一幅素描"),
    "concept": ("一幅抽象的概念图", "一张示意图"),
}


def zero_shot(features: Features, texts: Sequence[Features], temperature: float) -> Features:
    """features (N, D), K arrays of prompt features (P, D) -> probabilities (N, K)

    A domain is the mean direction of its prompts (Radford et al. 2021, section 3.1.4).
    """
    means = np.stack([text.mean(0) for text in texts])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return _softmax(features @ means.T / temperature)


def _softmax(logits: Features) -> Features:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def train_probe(
    features: Features, labels: Sequence[str], path: Path, *, decay: float = 1e-6
) -> tuple[str, ...]:
    """features (N, D) with N labels -> a safetensors head of K outputs at `path`; their names.

    Multinomial logistic regression by L-BFGS. The names are in the file's metadata.
    """
    import torch
    from safetensors.numpy import save_file

    names = tuple(sorted(set(labels)))
    x = torch.from_numpy(features)
    y = torch.tensor([names.index(label) for label in labels])
    layer = torch.nn.Linear(x.shape[1], len(names))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(x), y)
        loss = loss + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tensors = {
        "probe.weight": layer.weight.detach().numpy(),
        "probe.bias": layer.bias.detach().numpy(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"domains": json.dumps(names, ensure_ascii=False)})
    temporary.replace(path)
    return names


def probe_names(path: Path) -> tuple[str, ...]:
    """Raises ValueError for a head that names no domains, FileNotFoundError for none."""
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no probe at {path}: make it with `hcf data probe`")
    with safe_open(path, "np") as tensors:
        names = (tensors.metadata() or {}).get("domains")
    if names is None:
        raise ValueError(f"{path.name} is a head, but no probe: its metadata names no domains")
    return tuple(json.loads(names))


def domain_columns(
    rows: pa.Table, config: DomainFilter, clip_config: ClipFilter
) -> dict[str, pa.Array]:
    """rows (N; clip_image) -> domain (N) and its probability (N), null where there is no image"""
    from taiji.data.clip_filters import apply_head, features_of, load_clip

    features, known = features_of(rows["clip_image"])
    if config.probe is not None:
        names = probe_names(config.probe)
        probabilities = _softmax(apply_head(features, config.probe))
    else:
        prompts = config.prompts or DOMAINS
        names = tuple(prompts)
        clip = load_clip(clip_config.model, clip_config.tokenizer_folder)
        texts = [clip.texts(prompts[name]).numpy() for name in names]
        probabilities = zero_shot(features, texts, config.temperature)
    best = probabilities.argmax(1)
    return {
        "domain": pa.array(np.array(names)[best], pa.string(), mask=~known),
        "domain_score": pa.array(probabilities.max(1), pa.float32(), mask=~known),
    }


def capped_counts(counts: Mapping[str, int], caps: Mapping[str, float]) -> dict[str, int]:
    """Rows to keep of each domain so that none exceeds its share of what is kept.

    Raises:
        ValueError: every domain is capped and the caps add up to less than 1.
    """
    if not sum(counts.values()):
        return dict(counts)
    bound: set[str] = set()
    while True:
        free = sum(n for name, n in counts.items() if name not in bound)
        room = 1 - sum(caps[name] for name in bound)
        if not free or room <= 0:
            raise ValueError(_infeasible(counts, caps))
        total = free / room
        over = {d for d, n in counts.items() if d not in bound and n > caps.get(d, 1) * total}
        if not over:
            break
        bound |= over
    kept = {d: int(caps[d] * total + SLACK) if d in bound else n for d, n in counts.items()}
    while surplus := [d for d in bound if kept[d] > caps[d] * sum(kept.values()) + SLACK]:
        kept[surplus[0]] -= 1  # whole rows: rounding down one domain shrinks the sum of all
    return kept


def sampling_shares(
    counts: Mapping[str, float], alpha: float, caps: Mapping[str, float]
) -> dict[str, float]:
    """Share of each domain in what training draws: n^alpha, none above its cap.

    What a cap cuts off goes to the others in proportion. Raises ValueError as `capped_counts`.
    """
    weight = {name: count**alpha for name, count in counts.items() if count > 0}
    bound: set[str] = set()
    while True:
        free = sum(w for name, w in weight.items() if name not in bound)
        room = 1 - sum(caps[name] for name in bound)
        if weight and (not free or room <= 0):
            raise ValueError(_infeasible(counts, caps))
        share = {d: caps[d] if d in bound else w / free * room for d, w in weight.items()}
        over = {d for d, s in share.items() if s > caps.get(d, 1) and d not in bound}
        if not over:
            return {name: share.get(name, 0.0) for name in counts}
        bound |= over


def _infeasible(counts: Mapping[str, float], caps: Mapping[str, float]) -> str:
    held = ", ".join(f"{name} {caps[name]:g}" for name in counts if name in caps)
    return (
        f"the caps ({held}) leave part of the data without a domain that may fill it: raise a cap, "
        "or keep rows of a domain without one"
    )


@dataclass(frozen=True)
class GeneratedShare:
    """What a model draws of one domain, beside its share of the training draws."""

    domain: str
    training: float
    generated: float
    images: int
    passed: bool


def generated_share(
    labels: Sequence[str],
    training: Mapping[str, float],
    domain: str = "cartoon",
    *,
    tolerance: float = 0.05,
    ceiling: float = 0.20,
) -> GeneratedShare:
    """The cartoon test: domain labels of images drawn from style-free prompts must hold `domain`
    within `tolerance` of its training share, and not above `ceiling`.

    Raises:
        ValueError: no labels, or a domain that the training shares do not name.
    """
    if not labels or domain not in training:
        raise ValueError(
            f"labels of generated images and the training share of {domain} are needed"
        )
    found = Counter(labels)[domain] / len(labels)
    within = abs(found - training[domain]) <= tolerance and found <= ceiling
    return GeneratedShare(domain, training[domain], found, len(labels), within)
