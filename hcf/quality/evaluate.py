"""What one set of images is worth: FED, CLIP-zh, retrieval, rule accuracy. N images, H W pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcf.errors import HcfError
from hcf.quality.clip_score import CANDIDATES, TOP, ClipZh
from hcf.quality.features import Floats, Images, check_images, image_features
from hcf.quality.frechet import REFERENCE_FILE, feature_distance, floor, load_reference
from hcf.quality.rules import ASPECTS, rule_accuracy
from hcf.quality.sampling import Prompt

JUDGED = ("fed", "clip_zh", "retrieval_r5")


@dataclass(frozen=True)
class Evaluation:
    """`values` by metric, and for every other metric in `missing` why it could not be computed.

    `clip_each` maps positions of prompts to their cosine; `judge` holds the judge's own accuracies
    and `notes` what must be printed beside the values.
    """

    values: Mapping[str, float]
    missing: Mapping[str, str]
    clip_each: Mapping[int, float] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def evaluate(
    images: Images, prompts: Sequence[Prompt], judge_folder: Path | None, *, seed: int = 0
) -> Evaluation:
    """images (N, H, W, 3) uint8 of N prompts -> every metric of one image set.

    FED, CLIP-zh and retrieval take the prompts that are not of kind "shapes", the rule judge those
    that are. `judge_folder` holds judge.safetensors, judge.json and reference_stats.safetensors.
    """
    check_images(images)
    if len(images) != len(prompts):
        raise HcfError(f"{len(images)} images but {len(prompts)} prompts", "give one prompt each")
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    clip_each: dict[int, float] = {}
    judge_info: dict[str, Any] = {}
    notes: list[str] = []

    def attempt(names: Sequence[str], compute: Callable[[], Mapping[str, float]]) -> None:
        try:
            found = compute()
        except (HcfError, ImportError) as error:
            missing.update(dict.fromkeys(names, " ".join(str(error).split())))
            return
        for name in names:
            value = found.get(name, math.nan)
            if math.isfinite(value):
                values[name] = value
            else:
                missing[name] = "no prompt asks for it" if name not in found else "not finite"

    chosen = [i for i, prompt in enumerate(prompts) if prompt.kind != "shapes"]
    texts = [prompts[i].concept for i in chosen]
    cache: list[Floats] = []

    def features() -> Floats:
        if not cache:
            cache.append(image_features(images[chosen]))
        return cache[0]

    def folder() -> Path:
        if not chosen:
            raise HcfError("there are only prompts of kind shapes")
        if judge_folder is None:
            raise HcfError("there is no folder with the judge: the model has no hcf_data")
        return judge_folder

    def frechet() -> dict[str, float]:
        reference = load_reference(folder() / REFERENCE_FILE)
        distance = feature_distance(features(), reference)
        about = ", ".join(f"{key} {value}" for key, value in reference.source.items())
        least = floor(reference, len(chosen))
        known = "" if least is None else f"; as many of these real images reach {least:.1f}"
        notes.append(
            f"FED (EfficientNet-Lite0) of {len(chosen)} images to {reference.count} real ones "
            f"({about}){known}"
        )
        return {"fed": distance}

    def clip() -> dict[str, float]:
        judge = ClipZh.load(folder())
        cosine = judge.score_features(features(), texts)
        clip_each.update({i: float(value) for i, value in zip(chosen, cosine, strict=True)})
        judge_info.update(judge.info["accuracy"])
        notes.append(judge.accuracy_line())
        hits = judge.hits(features(), texts, CANDIDATES, TOP, seed)
        return {"clip_zh": float(cosine.mean()), "retrieval_r5": float(hits.mean())}

    scenes = [i for i, prompt in enumerate(prompts) if prompt.kind == "shapes" and prompt.truth]

    def rules() -> dict[str, float]:
        if not scenes:
            raise HcfError("there is no prompt of kind shapes with a truth")
        return rule_accuracy(images[scenes], [prompts[i].truth or {} for i in scenes])

    attempt(("fed",), frechet)
    attempt(("clip_zh", "retrieval_r5"), clip)
    attempt(ASPECTS, rules)
    return Evaluation(values, missing, clip_each, judge_info, tuple(notes))
