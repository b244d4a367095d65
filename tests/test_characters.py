"""The world of characters: what is drawn is what the rules read, and captions say it."""

from random import Random

import numpy as np
import pytest

from taiji.data.characters import (
    NOUN,
    POSES,
    POSES_ZH,
    Character,
    Reading,
    agreement,
    caption,
    characters,
    pack,
    read,
    render,
    split,
    texts,
)
from taiji.train.phases.character_base import score


def test_every_character_and_every_action_are_read_back_exactly() -> None:
    rng = Random(1)
    for i, who in enumerate(characters()):
        for pose, image in pack(who, rng)[i % 2 :: 2]:  # half the time, and all is seen
            reading = read(image)
            assert all(agreement(reading, who).values()) and reading.pose == pose, (who, pose)


@pytest.mark.parametrize("size", [48, 96])
def test_other_sizes_are_read_too(size: int) -> None:
    rng = Random(0)
    for who in characters()[::17]:
        reading = read(render(who, "left", size, rng))
        assert all(agreement(reading, who).values()) and reading.pose == "left"


def test_a_pack_is_one_character_and_never_one_image_twice() -> None:
    images = [image for _, image in pack(Character("red", "heart"), Random(0), variations=2)]
    assert len(images) == 2 * len(POSES)
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])
    again = [image for _, image in pack(Character("red", "heart"), Random(0), variations=2)]
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))


def test_nothing_is_read_from_white_and_no_action_without_hands() -> None:
    image = np.full((64, 64, 3), 255, np.uint8)
    assert read(image) == Reading()
    whole = render(Character("blue", "square", "yellow", 1), "both", 64, Random(0))
    whole[:, :14] = 255  # its left hand
    reading = read(whole)
    assert reading.pose is None and (reading.colour, reading.crown) == ("blue", "yellow")
    with pytest.raises(ValueError, match="uint8"):
        read(image.astype(np.float32))


def test_captions_differ_wherever_characters_do() -> None:
    assert len(set(texts())) == (len(characters()) + 1) * len(POSES)
    who = Character("pink", "circle", "black", 1)
    assert caption(who, "both") == f"粉色的圆形{NOUN}，独眼，黑色皇冠，{POSES_ZH['both']}"
    assert caption(None, "left") == f"{NOUN}，升起左手" and caption(None, None) == NOUN
    shuffled = {caption(who, None, Random(i)) for i in range(9)}
    assert len(shuffled) == 2 and all("皇冠" in text for text in shuffled)


def test_held_out_characters_are_not_trained_on() -> None:
    train, heldout = split(24, 0)
    assert len(heldout) == 24 and not set(train) & set(heldout)
    assert set(train) | set(heldout) == set(characters()) and split(24, 0) == (train, heldout)
    assert split(24, 1) != (train, heldout)


def test_scores_are_shares_of_what_was_asked_for() -> None:
    who = Character("red", "circle", "none", 2)
    other = Character("blue", "circle", "none", 1)
    images = np.stack([render(one, "down", 64, Random(0)) for one in (who, other)])
    found = score(images, [(who, "down"), (who, "left")], "x_")
    assert found == {
        "x_colour": 0.5, "x_shape": 1.0, "x_crown": 1.0, "x_eyes": 0.5, "x_identity": 0.75,
        "x_all": 0.5, "x_pose": 0.5,
    }  # fmt: skip
    assert score(images[:1], [(None, "down")]) == {"pose": 1.0}


def test_wrong_names_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="'gray' is not one of red"):
        Character("gray", "circle")
    with pytest.raises(ValueError, match="'dance' is not one of down"):
        caption(None, "dance")
    with pytest.raises(ValueError, match="size 32 is below 48"):
        render(Character("red", "circle"), "down", 32, Random(0))
    with pytest.raises(ValueError, match="'dance'"):
        render(Character("red", "circle"), "dance", 64, Random(0))
    with pytest.raises(ValueError, match="heldout=144 of 144"):
        split(144, 0)
