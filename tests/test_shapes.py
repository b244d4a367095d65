"""The coloured-shapes world: determinism, splits, captions, rendering."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from scipy import ndimage

from taiji.data import shapes
from taiji.data.shapes import COLOURS, SHAPES, Group, Scene


def test_the_same_seed_gives_the_same_samples() -> None:
    for split in ("train", "heldout"):
        one, two = (shapes.sample(20, 3, texture_share=0.5, split=split) for _ in range(2))
        assert [(s, c) for s, c, _ in one] == [(s, c) for s, c, _ in two]
        assert all((a[2] == b[2]).all() for a, b in zip(one, two, strict=True))
    assert [c for _, c, _ in shapes.sample(20, 4)] != [c for _, c, _ in shapes.sample(20, 3)]


def test_images_are_uint8_on_white() -> None:
    for size in (64, 128):
        for _, _, image in shapes.sample(10, 0, size=size):
            assert image.shape == (size, size, 3) and image.dtype == np.uint8
            rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert (rim == 255).all()


def test_held_out_compositions_never_occur_in_training() -> None:
    train = shapes.sample(1500, 0, size=32, relation_share=0.5, counts=range(1, 7))
    heldout = shapes.sample(
        1500, 0, size=32, relation_share=0.5, counts=range(1, 7), split="heldout"
    )

    def parts(scene: Scene) -> set[object]:
        names = {(o.colour, o.shape, o.count) for o in scene.objects}
        pair = frozenset((o.colour, o.shape) for o in scene.objects)
        return names | {pair} if scene.relation else set(names)

    seen = set().union(*(parts(scene) for scene, _, _ in train))
    assert all(parts(scene) - seen for scene, _, _ in heldout)
    # but each colour, shape and count is trained
    groups = [o for scene, _, _ in train for o in scene.objects]
    assert {o.colour for o in groups} == set(COLOURS) and {o.shape for o in groups} == set(SHAPES)
    assert {o.count for o in groups} == set(range(1, 7))
    triples = [shapes.split_of(Scene((Group(c, s, n),)))
               for c in COLOURS for s in SHAPES for n in range(1, 7)]  # fmt: skip
    assert 0.06 < triples.count("heldout") / len(triples) < 0.14


def test_a_pair_is_held_out_in_both_orders() -> None:
    for colour in COLOURS:
        pair = (Group("red", "circle"), Group(colour, "star"))
        assert len({
            shapes.split_of(Scene(order, relation))
            for order in (pair, pair[::-1]) for relation in shapes.RELATIONS_ZH
        }) == 1  # fmt: skip


def test_shares_and_subsets_are_respected() -> None:
    drawn = shapes.sample(
        600, 1, size=32, colours=["red", "blue"], shapes=["circle", "star"], counts=[1, 2],
        relation_share=0.5, texture_share=0.25,
    )  # fmt: skip
    groups = [o for scene, _, _ in drawn for o in scene.objects]
    assert {o.colour for o in groups} == {"red", "blue"}
    assert {o.shape for o in groups} == {"circle", "star"} and {o.count for o in groups} == {1, 2}
    assert 0.4 < sum(scene.relation is not None for scene, _, _ in drawn) / 600 < 0.6
    assert 0.18 < sum(o.texture != "solid" for o in groups) / len(groups) < 0.32
    assert len({scene.relation for scene, _, _ in drawn}) == 5


def test_captions_read_naturally() -> None:
    assert shapes.caption(Scene((Group("red", "circle"),))) == "一个红色的圆形"
    three = Scene((Group("blue", "star", 3),))
    assert shapes.caption(three) == "三个蓝色的五角星"
    assert shapes.caption(three, "en") == "three blue stars"
    assert "三颗蓝色的五角星" in {shapes.caption(three, rng=Random(i)) for i in range(60)}
    assert shapes.caption(Scene((Group("navy", "cross", 2),))).startswith("两个深蓝色")
    assert "带条纹的" in shapes.caption(Scene((Group("green", "square", 1, "striped"),)))
    left = Scene((Group("red", "circle"), Group("green", "square")), "left")
    wordings = {shapes.caption(left, rng=Random(i)) for i in range(100)}
    assert "红色的圆形在绿色的方形左边" in wordings and "绿色的方形在红色的圆形的右边" in wordings
    assert "左边是红色的圆形，右边是绿色的方形" in wordings
    orange = Scene((Group("orange", "heart"), Group("gray", "cross")), "below")
    assert shapes.caption(orange, "en") == "an orange heart below a gray cross"
    with pytest.raises(ValueError, match="zh or en"):
        shapes.caption(left, "fr")


@pytest.mark.parametrize("count", range(1, 7))
def test_objects_never_touch(count: int) -> None:
    scene = Scene((Group("black", "square", count),))
    for seed in range(25):
        image = shapes.render(scene, 64, Random(seed))
        assert ndimage.label(image[..., 0] < 250, np.ones((3, 3)))[1] == count


def test_places_and_sizes_vary() -> None:
    areas, centres = [], []
    for seed in range(30):
        dark = shapes.render(Scene((Group("black", "circle"),)), 64, Random(seed))[..., 0] < 128
        areas.append(int(dark.sum()))
        centres.append(ndimage.center_of_mass(dark))
    assert max(areas) > 1.6 * min(areas) and np.ptp(centres, axis=0).min() > 10


def test_silhouettes_differ_at_eighteen_pixels() -> None:
    covers = {s: shapes.silhouette(s, 64, (0.5, 0.5, 9 / 64)) for s in SHAPES}
    for i, a in enumerate(SHAPES):
        for b in SHAPES[:i]:
            iou = np.minimum(covers[a], covers[b]).sum() / np.maximum(covers[a], covers[b]).sum()
            assert iou < 0.85, (a, b, iou)


def test_truth_round_trips_and_bad_scenes_are_refused() -> None:
    for scene, _, _ in shapes.sample(50, 2, size=32, texture_share=0.5, relation_share=0.5):
        assert Scene.from_truth(scene.truth()) == scene
    for bad in ({}, {"objects": [{"colour": "red"}], "relation": None}):
        with pytest.raises(ValueError, match="not a scene"):
            Scene.from_truth(bad)
    with pytest.raises(ValueError, match="'mauve'.*red"):
        Group("mauve", "circle")
    with pytest.raises(ValueError, match="count 7"):
        Group("red", "circle", 7)
    with pytest.raises(ValueError, match="look different"):
        Scene((Group("red", "circle"), Group("red", "circle")), "left")
    with pytest.raises(ValueError, match="32 pixels"):
        shapes.render(Scene((Group("red", "circle"),)), 16, Random(0))


def test_an_empty_split_is_an_error() -> None:
    held = Counter(
        (c, s)
        for c in COLOURS
        for s in SHAPES
        if shapes.split_of(Scene((Group(c, s),))) == "heldout"
    )
    colour, shape = next(iter(held))
    with pytest.raises(ValueError, match="no train scene.*allow more"):
        shapes.sample(1, 0, colours=[colour], shapes=[shape], counts=[1], relation_share=0)
    with pytest.raises(ValueError, match="texture_share"):
        shapes.sample(1, 0, texture_share=1.5)
