"""What one set of images is worth: FED, CLIP-zh, retrieval, diversity, rule accuracy, each with its
interval. N images, H W pixels, P distinct prompts, R resamples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hcf.errors import HcfError
from hcf.quality.clip_score import CANDIDATES, TOP, ClipZh
from hcf.quality.diversity import diversity, pair_distances
from hcf.quality.features import Floats, Images, check_images, image_features
from hcf.quality.frechet import (
    REFERENCE_FILE,
    distance_draws,
    feature_distance,
    floor,
    load_reference,
)
from hcf.quality.intervals import (
    RESAMPLES,
    Doubles,
    Interval,
    Paired,
    interval,
    mean_draws,
    pair,
    resample,
)
from hcf.quality.rules import ASPECTS, rule_hits
from hcf.quality.sampling import Prompt

JUDGED = ("fed", "clip_zh", "retrieval_r5", "diversity")
Rows = Sequence[int]
# value, and the values of resamples (R,)
Found = tuple[float, Doubles]


@dataclass(frozen=True)
class Evaluation:
    """`values` by metric, and for every other metric in `missing` why it could not be computed.

    `draws` (R,) by metric are the values of resampled prompts, empty for a single prompt.
    `clip_each` maps positions of prompts to their cosine; `judge` holds the judge's own accuracies
    and `notes` what must be printed beside the values.
    """

    values: Mapping[str, float]
    missing: Mapping[str, str]
    clip_each: Mapping[int, float] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    draws: Mapping[str, Doubles] = field(default_factory=dict)

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % over prompts, by metric."""
        found = {name: interval(self.values[name], draws) for name, draws in self.draws.items()}
        return {name: bounds for name, bounds in found.items() if bounds is not None}


def paired(baseline: Evaluation, candidate: Evaluation) -> dict[str, Paired]:
    """Ratio and difference of two sets of the same prompts and seed, by metric."""
    return pair(baseline.values, candidate.values, baseline.draws, candidate.draws)


def evaluate(
    images: Images, prompts: Sequence[Prompt], judge_folder: Path | None, *, seed: int = 0
) -> Evaluation:
    """images (N, H, W, 3) uint8 of N prompts -> every metric of one image set.

    FED, CLIP-zh and retrieval take the prompts that are not of kind "shapes", the rule judge those
    that are, diversity every prompt of two images and more. `judge_folder` holds judge.safetensors,
    judge.json and reference_stats.safetensors.
    """
    check_images(images)
    if len(images) != len(prompts):
        raise HcfError(f"{len(images)} images but {len(prompts)} prompts", "give one prompt each")
    known: dict[int, Floats] = {}

    def features(rows: Rows) -> Floats:
        new = [i for i in rows if i not in known]
        if new:
            known.update(zip(new, image_features(images[new]), strict=True))
        return np.stack([known[i] for i in rows])

    def hits(rows: Rows) -> Mapping[str, Doubles]:
        return rule_hits(images[list(rows)], [prompts[i].truth or {} for i in rows])

    return judge_seen(prompts, features, hits, judge_folder, seed=seed)


def judge_seen(
    prompts: Sequence[Prompt],
    features: Callable[[Rows], Floats],
    hits: Callable[[Rows], Mapping[str, Doubles]],
    judge_folder: Path | None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """`evaluate` for images that are seen through `features` (n, F) and rule `hits` {aspect: (n,)}
    of some of their rows: they may be kept without the images."""
    values: dict[str, float] = {}
    draws: dict[str, Doubles] = {}
    missing: dict[str, str] = {}
    clip_each: dict[int, float] = {}
    judge_info: dict[str, Any] = {}
    notes: list[str] = []
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    number = {text: i for i, text in enumerate(texts)}
    group = np.array([number[prompt.text] for prompt in prompts])
    weights = resample(len(texts), seed=seed, resamples=resamples)

    def attempt(names: Sequence[str], compute: Callable[[], Mapping[str, Found]]) -> None:
        try:
            found = compute()
        except (HcfError, ImportError) as error:
            missing.update(dict.fromkeys(names, " ".join(str(error).split())))
            return
        for name in names:
            value, own = found.get(name, (math.nan, np.empty(0)))
            if math.isfinite(value):
                values[name] = value
                if len(texts) > 1:
                    draws[name] = own
            else:
                missing[name] = "no prompt asks for it" if name not in found else "not finite"

    def of_images(rows: Rows, each: npt.NDArray[Any], value: float) -> Found:
        return value, mean_draws(np.asarray(each, np.float64), group[list(rows)], weights)

    chosen = [i for i, prompt in enumerate(prompts) if prompt.kind != "shapes"]
    concepts = [prompts[i].concept for i in chosen]

    def folder() -> Path:
        if not chosen:
            raise HcfError("there are only prompts of kind shapes")
        if judge_folder is None:
            raise HcfError("there is no folder with the judge: the model has no hcf_data")
        return judge_folder

    def frechet() -> dict[str, Found]:
        reference = load_reference(folder() / REFERENCE_FILE)
        distance = feature_distance(features(chosen), reference)
        about = ", ".join(f"{key} {value}" for key, value in reference.source.items())
        least = floor(reference, len(chosen))
        known = "" if least is None else f"; as many of these real images reach {least:.1f}"
        notes.append(
            f"FED (EfficientNet-Lite0) of {len(chosen)} images to {reference.count} real ones "
            f"({about}){known}"
        )
        own = distance_draws(features(chosen), group[chosen], reference, weights)
        return {"fed": (distance, own)}

    def clip() -> dict[str, Found]:
        judge = ClipZh.load(folder())
        cosine = judge.score_features(features(chosen), concepts)
        clip_each.update({i: float(value) for i, value in zip(chosen, cosine, strict=True)})
        judge_info.update(judge.info["accuracy"])
        notes.append(judge.accuracy_line())
        found = judge.hits(features(chosen), concepts, CANDIDATES, TOP, seed)
        return {
            "clip_zh": of_images(chosen, cosine, float(cosine.mean())),
            "retrieval_r5": of_images(chosen, found, float(found.mean())),
        }

    repeated = np.flatnonzero(np.bincount(group)[group] > 1).tolist()

    def spread() -> dict[str, Found]:
        each = np.full(len(texts), np.nan)
        if repeated:
            found = pair_distances(features(repeated), group[repeated])
            each[: len(found)] = found
        value = diversity(each)
        return {"diversity": (value, mean_draws(each, np.arange(len(texts)), weights))}

    scenes = [i for i, prompt in enumerate(prompts) if prompt.kind == "shapes" and prompt.truth]

    def rules() -> dict[str, Found]:
        if not scenes:
            raise HcfError("there is no prompt of kind shapes with a truth")
        return {
            aspect: of_images(scenes, each, float(np.nanmean(each)))
            for aspect, each in hits(scenes).items()
            if not np.isnan(each).all()
        }

    attempt(("fed",), frechet)
    attempt(("clip_zh", "retrieval_r5"), clip)
    attempt(("diversity",), spread)
    attempt(ASPECTS, rules)
    return Evaluation(values, missing, clip_each, judge_info, tuple(notes), draws)
