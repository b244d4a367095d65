import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from hcf.artifact import Sampling
from hcf.errors import InvalidArtifact, RecipeError
from hcf.quality.features import image_features
from hcf.quality.frechet import REFERENCE_FILE, fit_reference, save_reference
from hcf.quality.gate import (
    METRICS,
    Verdict,
    apply_threshold,
    check,
    check_pipelines,
    check_prompts,
)
from hcf.quality.rules import rule_accuracy
from hcf.quality.sampling import Prompt, choose_prompts, generate_images, load_prompts
from hcf.settings import CheckConfig, Threshold
from taiji.data import shapes
from taiji.data.shapes import Group, Scene, render


def config(thresholds: dict[str, dict[str, float]] | None = None, **given: Any) -> CheckConfig:
    return CheckConfig.model_validate({"thresholds": thresholds or {}, **given})


def scenes(count: int) -> tuple[np.ndarray, list[Prompt]]:
    drawn = shapes.sample(count, 0, texture_share=0.0)
    prompts = [
        Prompt(str(i), text, "shapes", truth=scene.truth())
        for i, (scene, text, _) in enumerate(drawn)
    ]
    return np.stack([image for _, _, image in drawn]), prompts


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("threshold", "baseline", "value", "passed", "reason"),
    [
        ({"min": 28}, None, 28.0, True, ""),
        ({"min": 28}, None, 27.9, False, "value 27.9 is below 28"),
        ({"max": 2}, None, 3.0, False, "value 3 is above 2"),
        ({"ratio_min": 0.98}, 0.5, 0.49, True, ""),
        ({"ratio_min": 0.98}, 0.5, 0.48, False, "ratio to the baseline 0.96 is below 0.98"),
        ({"ratio_max": 1.1}, 40.0, 50.0, False, "ratio to the baseline 1.25 is above 1.1"),
        ({"drop_max": 0.03}, 0.95, 0.92, True, ""),
        ({"drop_max": 0.03}, 0.95, 0.91, False, "drop from the baseline 0.04 is above 0.03"),
        ({"drop_max": 0.03}, 0.5, 0.9, True, ""),
        ({"min": 1, "ratio_min": 2}, 1.0, 0.5, False, "value 0.5 is below 1; ratio"),
        ({"min": 28}, None, None, False, "cannot be computed: no judge"),
        ({"min": 28}, None, float("nan"), False, "cannot be computed"),
        ({"ratio_min": 0.9}, None, 1.0, False, "the ratio cannot be computed"),
        ({"ratio_min": 0.9}, 0.0, 1.0, False, "the baseline is 0"),
        ({"ratio_min": 0.9}, -0.1, 1.0, False, "the baseline is -0.1"),
        ({"drop_max": 0.1}, float("nan"), 1.0, False, "the drop cannot be computed"),
    ],
)
def test_thresholds(
    threshold: dict[str, float],
    baseline: float | None,
    value: float | None,
    passed: bool,
    reason: str,
) -> None:
    missing = "no judge" if value is None else ""
    result = apply_threshold("x", baseline, value, Threshold(**threshold), missing)
    assert result.passed is passed
    assert reason in result.reason and bool(result.reason) is not passed
    assert result.threshold


def test_without_a_threshold_a_metric_is_reported_and_its_absence_explained() -> None:
    assert apply_threshold("x", 1.0, 2.0, None).passed is None
    assert apply_threshold("x", None, None, None, "no judge").reason == "no judge"


def test_the_right_images_pass_and_swapped_ones_fail_by_name() -> None:
    images, prompts = scenes(10)
    bounds = {
        "psnr_db": {"min": 28}, "colour": {"drop_max": 0.03}, "shape": {"min": 0.9},
        "count": {"min": 0.9},
    }  # fmt: skip
    good = check(images, images, prompts, config(bounds), None, quiet)
    assert good.passed and not good.reasons
    assert good.value("colour") == 1.0 and good.value("psnr_db") == 100.0
    bad = check(images, images[::-1].copy(), prompts, config(bounds, name="int8"), None, quiet)
    assert not bad.passed
    assert [r.split(": ")[:2] for r in bad.reasons] == [["int8", n] for n in bounds]
    assert bad.worst[0].metric == "psnr_db" and bad.worst[0].value <= bad.worst[1].value


def test_a_metric_that_cannot_be_computed_fails_only_where_it_is_named(tmp_path: Path) -> None:
    images, prompts = scenes(4)
    for data, reason in ((None, "only prompts of kind"), (tmp_path, "only prompts of kind")):
        verdict = check(
            images, images, prompts, config({"clip_zh": {"ratio_min": 0.98}}), data, quiet
        )
        assert not verdict.passed and len(verdict.reasons) == 1
        assert "cannot be computed" in verdict.reasons[0] and reason in verdict.reasons[0]
    free = check(images, images, prompts, config(), None, quiet)
    assert free.passed and free.value("fed") is None
    named = [Prompt("0", "猫"), Prompt("1", "狗")]
    bounds = config({"clip_zh": {"min": 0}, "retrieval_r5": {"min": 0}})
    for data, reason in ((None, "no folder with the judge"), (tmp_path, "no judge in")):
        verdict = check(images[:2], images[:2], named, bounds, data, quiet)
        assert len(verdict.reasons) == 2 and all(reason in r for r in verdict.reasons)
    verdict = check(images[:2], images[:2], named, config({"fed": {"max": 9}}), tmp_path, quiet)
    assert "no reference statistics" in verdict.reasons[0]
    verdict = check(images[:2], images[:2], named, config({"shape": {"min": 0.5}}), None, quiet)
    assert "no prompt of kind shapes" in verdict.reasons[0]


def test_fed_is_computed_for_enough_images_and_refused_for_too_few(tmp_path: Path) -> None:
    images, prompts = scenes(20)
    named = [Prompt(p.id, p.text) for p in prompts]
    save_reference(fit_reference(image_features(images), dims=8), tmp_path / REFERENCE_FILE)
    bounds = config({"fed": {"ratio_max": 1.1}})
    other = 255 - images
    verdict = check(images, other, named, bounds, tmp_path, quiet)
    fed = next(m for m in verdict.metrics if m.name == "fed")
    assert fed.baseline == pytest.approx(0, abs=1e-2) and fed.value is not None and fed.value > 1
    few = check(images[:6], images[:6], named[:6], bounds, tmp_path, quiet)
    assert not few.passed and "more than 8" in few.reasons[0]


def test_a_verdict_is_plain_json_and_reads_back() -> None:
    images, prompts = scenes(3)
    verdict = check(images, images, prompts, config({"ssim": {"min": 0.9}}), None, quiet)
    text = verdict.model_dump_json()
    plain = json.loads(text)
    assert plain["passed"] is True and plain["reasons"] == [] and plain["images"] == 3
    assert [m["name"] for m in plain["metrics"]] == list(METRICS)
    assert Verdict.model_validate_json(text) == verdict


def test_an_unknown_metric_offers_the_nearest_name() -> None:
    images, prompts = scenes(2)
    with pytest.raises(RecipeError, match="did you mean colour"):
        check(images, images, prompts, config({"color": {"min": 1}}), None, quiet)


def test_images_must_match_the_prompts() -> None:
    images, prompts = scenes(2)
    with pytest.raises(RecipeError, match="one image of each prompt"):
        check(images, images[:1], prompts, config(), None, quiet)


def test_rule_accuracy_of_true_scenes_and_of_a_blank_page() -> None:
    images, prompts = scenes(30)
    truths = [prompt.truth or {} for prompt in prompts]
    assert min(rule_accuracy(images, truths).values()) >= 0.9
    blank = np.full_like(images, 255)
    assert rule_accuracy(blank, truths)["colour"] == 0


def test_two_objects_count_as_a_pair_and_not_as_colour_or_shape() -> None:
    pair = Scene((Group("red", "circle"), Group("blue", "star")), "left")
    image = render(pair, 64, Random(0))[None]
    assert rule_accuracy(image, [pair.truth()]) == {"pair": 1.0, "position": 1.0}
    swapped = Scene((Group("blue", "circle"), Group("red", "star")), "left")
    assert rule_accuracy(image, [swapped.truth()])["pair"] == 0


def test_prompts_of_all_forms_and_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "check_prompts.json"
    entries = [
        {
            "id": "a",
            "prompt": "推特风格猫",
            "kind": "emoji",
            "split": "train",
            "label": "猫",
        },
        "一只狗",
    ]
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    first, second = load_prompts(file)
    assert first.concept == "猫" and second.concept == "一只狗" and second.kind is None
    assert check_prompts(config(images=5), tmp_path)[4] == first
    for wrong in ([], [" "], [{"id": 1}], tmp_path / "absent.json"):
        with pytest.raises(RecipeError):
            load_prompts(wrong)
    with pytest.raises(RecipeError, match="ships no check prompts"):
        check_prompts(config(), None)


def test_prompts_are_spread_evenly_or_repeated() -> None:
    prompts = [Prompt(str(i), "x") for i in range(10)]
    assert [p.id for p in choose_prompts(prompts, 5)] == ["0", "2", "4", "6", "8"]
    assert [p.id for p in choose_prompts(prompts, 12)][-2:] == ["0", "1"]


def test_the_same_seeds_give_the_same_images_in_any_batch(tiny_pipeline: Any) -> None:
    texts, seeds = ["猫", "狗", "鱼"], [5, 6, 7]
    fast = Sampling(steps=2, guidance_scale=1.0)
    whole = generate_images(tiny_pipeline, texts, seeds, sampling=fast)
    assert whole.shape == (3, 16, 16, 3) and whole.dtype == np.uint8
    single = generate_images(tiny_pipeline, texts, seeds, batch_size=1, sampling=fast)
    assert np.abs(whole.astype(int) - single.astype(int)).max() <= 1
    other = generate_images(tiny_pipeline, texts, [8, 9, 10], sampling=fast)
    assert not np.array_equal(whole, other)


def test_two_pipelines_are_checked_end_to_end(tiny_pipeline: Any) -> None:
    lines: list[str] = []
    settings = config({"psnr_db": {"min": 99}}, prompts=["猫", "狗"], images=4, batch_size=3)
    two, three = (Sampling(steps=n, guidance_scale=1.0) for n in (2, 3))
    same = check_pipelines(
        tiny_pipeline, tiny_pipeline, settings, None, lines.append,
        baseline_sampling=two, candidate_sampling=two,
    )  # fmt: skip
    assert same.passed and same.images == 4
    assert any("baseline: 4 of 4 images" in line for line in lines)
    assert any(line.startswith("pass psnr_db 100") for line in lines)
    differs = check_pipelines(
        tiny_pipeline, tiny_pipeline, settings, None, quiet,
        baseline_sampling=two, candidate_sampling=three,
    )  # fmt: skip
    assert not differs.passed


def test_a_candidate_with_nan_weights_fails_with_the_reason(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    tiny_pipeline.save_pretrained(tmp_path / "good")
    broken = StableDiffusionPipeline.from_pretrained(tmp_path / "good")
    broken.set_progress_bar_config(disable=True)
    torch.nn.init.constant_(broken.unet.conv_out.weight, float("nan"))
    settings = config({"psnr_db": {"min": 1}, "ssim": {"min": 0}}, prompts=["猫"], images=2)
    two = Sampling(steps=2, guidance_scale=1.0)
    verdict = check_pipelines(
        tiny_pipeline, broken, settings, None, quiet, baseline_sampling=two, candidate_sampling=two
    )
    assert not verdict.passed and len(verdict.reasons) == 2
    assert "not finite" in verdict.reasons[0]
    with pytest.raises(InvalidArtifact, match="not finite"):
        generate_images(broken, ["猫"], [0], sampling=two)
