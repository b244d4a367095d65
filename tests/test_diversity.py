"""Diversity and the intervals of every metric: against brute force, and through the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcf.errors import HcfError
from hcf.quality.diversity import diversity, pair_distances
from hcf.quality.evaluate import evaluate, judge_seen, paired
from hcf.quality.features import image_features
from hcf.quality.frechet import (
    REFERENCE_FILE,
    distance_draws,
    feature_distance,
    fit_reference,
    save_reference,
)
from hcf.quality.gate import check, check_prompts
from hcf.quality.intervals import interval, mean_draws, pair, resample
from hcf.quality.sampling import Prompt
from hcf.report.page import gate_rows
from hcf.settings import CheckConfig

RNG = np.random.default_rng(0)


def features(count: int, width: int = 12) -> Any:
    return RNG.normal(size=(count, width)).astype(np.float32)


def test_it_is_the_mean_over_pairs_of_a_prompt() -> None:
    x, group = features(9), np.array([0, 1, 0, 2, 0, 1, 3, 3, 3])
    each = pair_distances(x, group)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for prompt in range(4):
        rows = np.flatnonzero(group == prompt)
        pairs = [1 - unit[i] @ unit[j] for i in rows for j in rows if i < j]
        assert each[prompt] == pytest.approx(np.mean(pairs)) if pairs else np.isnan(each[prompt])
    assert diversity(each) == pytest.approx(np.nanmean(each))
    same = np.repeat(x[:1], 4, axis=0)
    assert diversity(pair_distances(same, np.zeros(4, int))) == pytest.approx(0, abs=1e-7)


def test_what_has_no_diversity_is_an_error() -> None:
    with pytest.raises(HcfError, match="images_per_prompt=4"):
        diversity(pair_distances(features(3), np.arange(3)))
    for value in (0, np.nan):
        with pytest.raises(HcfError, match="finite and not zero"):
            pair_distances(np.full((2, 4), value, np.float32), np.zeros(2, int))


def test_a_resample_is_what_repeating_its_images_gives() -> None:
    x, group = features(40), np.arange(40) % 8
    weights, values = resample(8, seed=3, resamples=20), RNG.normal(size=40)
    values[::7] = np.nan
    reference = fit_reference(features(60), dims=5)
    means, distances = (
        mean_draws(values, group, weights),
        distance_draws(x, group, reference, weights, chunk=3),
    )
    rows = [np.repeat(np.arange(40), row[group].astype(int)) for row in weights]
    assert weights.sum(1).tolist() == [8] * 20
    np.testing.assert_allclose(means, [np.nanmean(values[r]) for r in rows])
    brute = np.array([feature_distance(x[r], reference) for r in rows])
    np.testing.assert_allclose(
        distances - distances.mean(), brute - brute.mean(), atol=1e-6 * brute.mean()
    )
    # a resample is biased up by the images it repeats; the interval is not
    assert brute.mean() > feature_distance(x, reference) == pytest.approx(distances.mean())


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = {"mean": 0, "fed": 0}
    draws, dims = 60, 3
    reference = fit_reference(RNG.normal(size=(4000, dims)), dims=dims)
    scale = np.array([1.5, 1.0, 1.0])
    many = RNG.normal(size=(20000, dims)) * scale + 0.5
    truth = {"mean": 0.5, "fed": feature_distance(many, reference)}
    weights = resample(200, seed=0, resamples=200)
    for _ in range(draws):
        x, group = RNG.normal(size=(200, dims)) * scale + 0.5, np.arange(200)
        found = {
            "mean": interval(x[:, 1].mean(), mean_draws(x[:, 1], group, weights)),
            "fed": interval(
                feature_distance(x, reference), distance_draws(x, group, reference, weights)
            ),
        }
        for name, bounds in found.items():
            assert bounds is not None and bounds.low < bounds.value < bounds.high
            held[name] += bounds.low <= truth[name] <= bounds.high
    assert 0.85 * draws <= held["mean"] and 0.8 * draws <= held["fed"]


def test_paired_ratios_are_narrower_than_either_side() -> None:
    hard, group = RNG.uniform(0.2, 1.0, 60), np.arange(60)
    weights = resample(60, seed=0)
    sides = [hard, hard * 0.97 + RNG.normal(0, 0.005, 60)]
    draws = [mean_draws(each, group, weights) for each in sides]
    values = [float(each.mean()) for each in sides]
    found = pair({"x": values[0]}, {"x": values[1]}, {"x": draws[0]}, {"x": draws[1]})["x"]
    assert found.ratio is not None
    alone = (found.candidate.high - found.candidate.low) / found.candidate.value
    assert found.ratio.high - found.ratio.low < alone / 10 and found.ratio.high < 1
    assert found.ratio.value == pytest.approx(values[1] / values[0])
    assert found.difference.high < 0
    negative = pair({"x": -1.0}, {"x": 1.0}, {"x": -draws[0]}, {"x": draws[1]})["x"]
    assert negative.ratio is None and negative.difference.value == 2


def drawn(spread: float) -> tuple[Any, list[Prompt]]:
    """12 images (16, 16) of 4 prompts: a colour each, moved by `spread` from seed to seed."""
    rng = np.random.default_rng(1)
    base = rng.uniform(60, 190, (4, 1, 1, 3)).repeat(3, axis=0)
    noise = rng.normal(0, 1, (12, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    images = np.clip(base + spread * noise, 0, 255).astype(np.uint8)
    return images, [Prompt(str(i), f"prompt {i // 3}") for i in range(12)]


def test_a_distillation_that_loses_diversity_fails_where_it_is_bounded(tmp_path: Path) -> None:
    (before, prompts), (after, _) = drawn(40), drawn(0.1)
    bounds = CheckConfig.model_validate({"thresholds": {"diversity": {"ratio_min": 0.95}}})
    verdict = check(before, after, prompts, bounds, None, lambda line: None)
    (reason,) = verdict.reasons
    assert reason.startswith("quality: diversity: ratio to the baseline")
    found = next(m for m in verdict.metrics if m.name == "diversity")
    assert found.paired is not None and found.paired.ratio is not None
    assert found.paired.ratio.high < 0.95
    row = next(row for row in gate_rows(verdict) if row.metric.startswith("diversity"))
    assert row.interval.startswith("[0.") and "ratio 0." in row.interval
    assert check(before, before, prompts, bounds, None, lambda line: None).passed
    once = [Prompt(str(i), f"prompt {i}") for i in range(12)]
    said = check(before, after, once, bounds, None, lambda line: None).reasons[0]
    assert "no prompt has two images" in said


def test_every_metric_has_an_interval_and_images_may_be_gone(tmp_path: Path) -> None:
    images, prompts = drawn(40)
    seen = image_features(images)
    save_reference(fit_reference(image_features(255 - images), dims=3), tmp_path / REFERENCE_FILE)
    whole = evaluate(images, prompts, tmp_path, seed=2)
    assert set(whole.intervals) == set(whole.values) == {"fed", "diversity"}
    kept = judge_seen(prompts, lambda rows: seen[list(rows)], lambda rows: {}, tmp_path, seed=2)
    assert kept.values == pytest.approx(whole.values)
    ratio = paired(whole, kept)["fed"].ratio
    assert ratio is not None and ratio.low == pytest.approx(1) == pytest.approx(ratio.high)
    alone = evaluate(images[:3], prompts[:3], None)
    assert "diversity" in alone.values and not alone.intervals  # one prompt: nothing to resample


def test_a_check_draws_each_prompt_as_often_as_asked() -> None:
    texts = [f"prompt {i}" for i in range(10)]
    config = CheckConfig(images=9, images_per_prompt=4, prompts=texts)
    found = [prompt.text for prompt in check_prompts(config, None)]
    assert found == ["prompt 0", "prompt 5"] * 4
    assert len(check_prompts(CheckConfig(images=9, prompts=texts), None)) == 9
