"""The quality gate: candidate against baseline on the same prompts and seeds, then the thresholds.

A metric that a threshold names and that cannot be computed fails the gate, with its reason. N
images, H W pixels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hcf.artifact import Sampling
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.quality.evaluate import JUDGED, Evaluation, evaluate, paired
from hcf.quality.features import Images
from hcf.quality.fidelity import Fidelity, fidelity
from hcf.quality.intervals import Interval, Paired
from hcf.quality.rules import ASPECTS
from hcf.quality.sampling import (
    PROMPTS_FILE,
    Prompt,
    choose_prompts,
    generate_images,
    load_prompts,
)
from hcf.settings import CheckConfig, Threshold

FIDELITY = ("psnr_db", "psnr_mean_db", "ssim")
METRICS = (*FIDELITY, *JUDGED, *ASPECTS)
WORST = 5
Log = Callable[[str], object]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MetricResult(_Data):
    """One metric. `value` is the candidate's; fidelity has no baseline of its own.

    `passed` is None where no threshold names it; `reason` says why it failed or is missing.
    `paired` holds the 95 % intervals of both sides, of their ratio and of their difference.
    """

    name: str
    value: float | None
    baseline: float | None = None
    threshold: str = ""
    passed: bool | None = None
    reason: str = ""
    paired: Paired | None = None


class WorstPrompt(_Data):
    """A prompt that lost most: its PSNR in dB, or its CLIP-zh candidate minus baseline."""

    prompt: str
    metric: str
    value: float


class Verdict(_Data):
    """The outcome of one check, plain data for JSON. `reasons` names every threshold missed.

    `judge` holds the judge's own accuracies, which belong beside every score; `notes` too.
    """

    name: str
    passed: bool
    reasons: tuple[str, ...]
    metrics: tuple[MetricResult, ...]
    worst: tuple[WorstPrompt, ...] = ()
    images: int = 0
    seed: int = 0
    judge: dict[str, Any] = {}
    notes: tuple[str, ...] = ()

    def value(self, metric: str) -> float | None:
        """The candidate's value of one metric."""
        return next(m.value for m in self.metrics if m.name == metric)


def check_pipelines(
    baseline: Any,
    candidate: Any,
    config: CheckConfig,
    data_folder: Path | None,
    log: Log = print,
    *,
    baseline_sampling: Sampling | None = None,
    candidate_sampling: Sampling | None = None,
) -> Verdict:
    """Both pipelines draw the same prompts from the same seeds; their images go to `check`.

    `data_folder` (a model's hcf_data) holds the judge, the reference and check_prompts.json, which
    `config.prompts` replaces. A candidate whose images are not finite fails every threshold.
    """
    check_names(config.thresholds)
    prompts = check_prompts(config, data_folder)
    texts = [prompt.text for prompt in prompts]
    seeds = [config.seed + i for i in range(len(prompts))]

    def draw(name: str, pipe: Any, sampling: Sampling | None) -> Images:
        def tell(line: str) -> None:
            log(f"{name}: {line}")

        return generate_images(
            pipe, texts, seeds, batch_size=config.batch_size, sampling=sampling, log=tell
        )

    expected = draw("baseline", baseline, baseline_sampling)
    try:
        found = draw("candidate", candidate, candidate_sampling)
    except InvalidArtifact as error:
        missing = dict.fromkeys(METRICS, error.message)
        return judge_metrics({}, {}, missing, config, images=len(prompts))
    return check(expected, found, prompts, config, data_folder, log)


def check_prompts(config: CheckConfig, data_folder: Path | None) -> list[Prompt]:
    """The prompts of a check, one an image: `images_per_prompt` rounds of the same, `images` or
    just under. Raises RecipeError when there are none."""
    source = config.prompts
    if not source:
        if data_folder is None:
            raise RecipeError(
                "the model ships no check prompts", fix="name some: `check: {prompts: [...]}`"
            )
        source = data_folder / PROMPTS_FILE
    each = min(config.images_per_prompt, config.images)
    return choose_prompts(load_prompts(source), config.images // each) * each


def check(
    baseline: Images,
    candidate: Images,
    prompts: Sequence[Prompt],
    config: CheckConfig,
    judge_folder: Path | None,
    log: Log = print,
) -> Verdict:
    """baseline, candidate (N, H, W, 3) uint8 of the same N prompts and seeds -> the verdict.

    Raises RecipeError for a threshold on an unknown metric or prompts that do not match.
    """
    check_names(config.thresholds)
    if not len(baseline) == len(candidate) == len(prompts):
        raise RecipeError(
            f"{len(prompts)} prompts, {len(baseline)} images before, {len(candidate)} after",
            fix="give one image of each prompt",
        )
    log(f"judging 2 x {len(prompts)} images")
    before = evaluate(baseline, prompts, judge_folder, seed=config.seed)
    after = evaluate(candidate, prompts, judge_folder, seed=config.seed)
    values, missing = dict(after.values), {**before.missing, **after.missing}
    closeness: Fidelity | None = None
    try:
        closeness = fidelity(baseline, candidate)
        values |= {name: float(getattr(closeness, name)) for name in FIDELITY}
    except HcfError as error:
        missing |= dict.fromkeys(FIDELITY, error.message)
    verdict = judge_metrics(
        before.values,
        values,
        missing,
        config,
        images=len(prompts),
        worst=_worst(prompts, before, after, closeness),
        judge=dict(after.judge),
        notes=after.notes,
        intervals=paired(before, after),
    )
    for note in verdict.notes:
        log(note)
    for metric in verdict.metrics:
        log(_line(metric))
    return verdict


def judge_metrics(
    baseline: Mapping[str, float],
    candidate: Mapping[str, float],
    missing: Mapping[str, str],
    config: CheckConfig,
    *,
    images: int,
    worst: Sequence[WorstPrompt] = (),
    judge: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    intervals: Mapping[str, Paired] | None = None,
) -> Verdict:
    """Values of both sides by metric, and why others are missing -> the verdict."""
    metrics = tuple(
        apply_threshold(
            name,
            baseline.get(name),
            candidate.get(name),
            config.thresholds.get(name),
            missing.get(name, ""),
        ).model_copy(update={"paired": (intervals or {}).get(name)})
        for name in METRICS
    )
    reasons = tuple(f"{config.name}: {m.name}: {m.reason}" for m in metrics if m.passed is False)
    return Verdict(
        name=config.name,
        passed=not reasons,
        reasons=reasons,
        metrics=metrics,
        worst=tuple(worst),
        images=images,
        seed=config.seed,
        judge=dict(judge or {}),
        notes=tuple(notes),
    )


def apply_threshold(
    name: str,
    baseline: float | None,
    value: float | None,
    threshold: Threshold | None,
    missing: str = "",
) -> MetricResult:
    """One metric held against its bounds; without a threshold it is only reported."""
    value = value if value is not None and math.isfinite(value) else None
    baseline = baseline if baseline is not None and math.isfinite(baseline) else None
    if threshold is None:
        reason = "" if value is not None else missing
        return MetricResult(name=name, value=value, baseline=baseline, reason=reason)
    wrong: list[str] = []
    if value is None:
        wrong.append(f"cannot be computed: {missing or 'not finite'}")
    else:
        wrong += _broken(threshold, baseline, value, missing)
    return MetricResult(
        name=name,
        value=value,
        baseline=baseline,
        threshold=describe(threshold),
        passed=not wrong,
        reason="; ".join(wrong),
    )


def _broken(threshold: Threshold, baseline: float | None, value: float, missing: str) -> list[str]:
    wrong: list[str] = []

    def bound(what: str, actual: float, least: float | None, most: float | None) -> None:
        if least is not None and not actual >= least:
            wrong.append(f"{what} {actual:.4g} is below {least:g}")
        if most is not None and not actual <= most:
            wrong.append(f"{what} {actual:.4g} is above {most:g}")

    bound("value", value, threshold.min, threshold.max)
    if threshold.ratio_min is not None or threshold.ratio_max is not None:
        if baseline is None:
            wrong.append(f"the ratio cannot be computed: {missing or 'no baseline value'}")
        elif baseline <= 0:
            wrong.append(f"the ratio cannot be computed: the baseline is {baseline:.4g}")
        else:
            ratio = value / baseline
            bound("ratio to the baseline", ratio, threshold.ratio_min, threshold.ratio_max)
    if threshold.drop_max is not None:
        if baseline is None:
            wrong.append(f"the drop cannot be computed: {missing or 'no baseline value'}")
        else:
            # differences of shares like 0.95 - 0.92 must not fail by the last bit
            bound("drop from the baseline", round(baseline - value, 9), None, threshold.drop_max)
    return wrong


def describe(threshold: Threshold) -> str:
    """A threshold in words for tables: ">= 28", "ratio >= 0.98", "drop <= 0.03"."""
    words = (
        (">=", threshold.min), ("<=", threshold.max), ("ratio >=", threshold.ratio_min),
        ("ratio <=", threshold.ratio_max), ("drop <=", threshold.drop_max),
    )  # fmt: skip
    return ", ".join(f"{word} {bound:g}" for word, bound in words if bound is not None)


def check_names(thresholds: Mapping[str, Threshold]) -> None:
    """Raises RecipeError for a threshold on a metric that does not exist, with the nearest name."""
    for name in thresholds:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1, 0.4)
            raise RecipeError(
                f"check.thresholds: there is no metric {name!r}",
                fix=f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}",
            )


def _worst(
    prompts: Sequence[Prompt], before: Evaluation, after: Evaluation, closeness: Fidelity | None
) -> list[WorstPrompt]:
    found: list[WorstPrompt] = []
    if closeness is not None:
        for i in np.argsort(closeness.psnr_each_db, kind="stable")[:WORST]:
            value = round(float(closeness.psnr_each_db[i]), 3)
            found.append(WorstPrompt(prompt=prompts[i].text, metric="psnr_db", value=value))
    both = before.clip_each.keys() & after.clip_each.keys()
    change = {i: after.clip_each[i] - before.clip_each[i] for i in sorted(both)}
    for i in sorted(change, key=lambda i: change[i])[:WORST]:
        value = round(change[i], 4)
        found.append(WorstPrompt(prompt=prompts[i].text, metric="clip_zh change", value=value))
    return found


def _line(metric: MetricResult) -> str:
    """One metric for the terminal: "pass  fed 41.2 (baseline 40.0), ratio <= 1.1"."""
    state = {True: "pass", False: "FAIL", None: "    "}[metric.passed]
    value = "missing" if metric.value is None else f"{metric.value:.4f}"
    base = "" if metric.baseline is None else f" (baseline {metric.baseline:.4f})"
    found = metric.paired
    if found is not None and metric.value is not None:
        value += f" {bounds_text(found.candidate)}"
        if found.ratio is not None:
            base += f", ratio {found.ratio.value:.3f} {bounds_text(found.ratio, 3)}"
    tail = "".join(f", {text}" for text in (metric.threshold, metric.reason) if text)
    return f"{state} {metric.name} {value}{base}{tail}"


def bounds_text(interval: Interval, digits: int = 4) -> str:
    """ "[40.1, 42.3]" """
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
