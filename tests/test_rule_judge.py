"""The rule judge: exact on ground truth, tolerant to what a generator does to an image."""

from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from taiji.data import shapes
from taiji.data.rule_judge import find, judge, to_lab
from taiji.data.shapes import Group, Scene

Pixels = npt.NDArray[np.uint8]
Sample = tuple[Scene, str, Pixels]


def _drawn(n: int, size: int) -> list[Sample]:
    options: dict[str, Any] = {
        "size": size, "counts": range(1, 7), "texture_share": 0.4, "relation_share": 0.35,
    }  # fmt: skip
    held_out = shapes.sample(n // 2, 11, split="heldout", **options)
    return shapes.sample(n - n // 2, 11, split="train", **options) + held_out


def _share_right(drawn: list[Sample]) -> float:
    scores = [judge(image, scene.truth()).values() for scene, _, image in drawn]
    return sum(False not in score for score in scores) / len(scores)


@pytest.mark.parametrize(("size", "n"), [(64, 400), (96, 100), (128, 200)])
def test_ground_truth_is_always_right(size: int, n: int) -> None:
    for scene, caption, image in _drawn(n, size):
        verdict = judge(image, scene.truth())
        position = None if scene.relation is None else True
        expected = {"colour": True, "shape": True, "count": True, "position": position}
        assert verdict == expected, (caption, find(image))


@pytest.mark.parametrize("size", [64, 128])
def test_blur_and_noise_are_tolerated(size: int) -> None:
    noise = np.random.default_rng(0)

    def degrade(image: Pixels) -> Pixels:
        soft = ndimage.gaussian_filter(image.astype(np.float64), (1, 1, 0))
        return np.clip(np.rint(soft + noise.normal(0, 10, soft.shape)), 0, 255).astype(np.uint8)

    assert _share_right([(s, c, degrade(image)) for s, c, image in _drawn(200, size)]) >= 0.97


def test_each_wrong_attribute_is_noticed() -> None:
    rng = Random(0)
    for seed in range(60):
        colour, other = rng.sample(list(shapes.COLOURS), 2)
        shape, other_shape = rng.sample(shapes.SHAPES, 2)
        count, other_count = rng.sample(range(1, 7), 2)
        texture = rng.choice(shapes.TEXTURES)
        image = shapes.render(Scene((Group(colour, shape, count, texture),)), 64, Random(seed))

        def wrong(group: Group, image: Pixels = image) -> list[str]:
            verdict = judge(image, Scene((group,)).truth())
            return [name for name, right in verdict.items() if right is False]

        assert wrong(Group(other, shape, count)) == ["colour"]
        assert wrong(Group(colour, other_shape, count)) == ["shape"]
        assert wrong(Group(colour, shape, other_count)) == ["count"]


@pytest.mark.parametrize("relation", list(shapes.RELATIONS_ZH))
def test_position_is_judged_against_every_relation(relation: str) -> None:
    pair = (Group("red", "circle"), Group("navy", "star"))
    for seed in range(10):
        image = shapes.render(Scene(pair, relation), 64, Random(seed))
        for asked in shapes.RELATIONS_ZH:
            assert judge(image, Scene(pair, asked).truth())["position"] is (asked == relation)
        swapped = judge(image, Scene(pair[::-1], relation).truth())
        assert swapped["colour"] and swapped["position"] is False
    stranger = Scene((Group("green", "cross"), Group("yellow", "heart")), relation)
    assert judge(image, stranger.truth())["position"] is False


def test_specks_are_ignored_and_large_extras_count() -> None:
    scene = Scene((Group("blue", "square", 2),))
    image = shapes.render(scene, 64, Random(1))
    for y, x in ((1, 1), (1, 60), (60, 1)):
        image[y : y + 2, x : x + 2] = (200, 0, 0)
    assert judge(image, scene.truth())["count"] is True
    image = shapes.render(Scene((Group("blue", "square"),)), 64, Random(4))
    one = Scene((Group("blue", "square"),)).truth()
    image = np.concatenate([image, image], axis=1)[:, ::2]
    assert judge(image, one)["count"] is False and judge(image, one)["colour"] is True


def test_blank_and_foreign_images() -> None:
    truth = Scene((Group("red", "circle"),)).truth()
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert judge(blank, truth) == {
        "colour": False, "shape": False, "count": False, "position": None,
    }  # fmt: skip
    related = Scene((Group("red", "circle"), Group("blue", "star")), "left").truth()
    assert set(judge(blank, related).values()) == {False}
    with pytest.raises(ValueError, match="uint8"):
        judge(blank.astype(np.float32), truth)
    with pytest.raises(ValueError, match="not a scene"):
        judge(blank, {"objects": []})


def test_lab_matches_published_values() -> None:
    # sRGB primaries and white in CIELAB D65 (Bruce Lindbloom's calculator)
    known = {(255, 0, 0): (53.2, 80.1, 67.2), (0, 0, 255): (32.3, 79.2, -107.9),
             (255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0)}  # fmt: skip
    for rgb, lab in known.items():
        assert np.abs(to_lab(rgb) - lab).max() < 0.25
