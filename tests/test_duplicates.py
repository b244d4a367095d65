"""Near duplicates and planted evaluation images, found exactly; against a naive comparison."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from taiji.data.caption_filters import caption_columns
from taiji.data.decontaminate import (
    EvaluationFilter,
    caption_keys,
    evaluation_columns,
    evaluation_hashes,
    nearest_distance,
)
from taiji.data.duplicates import (
    clusters,
    embedding_pairs,
    hamming_pairs,
    hash_links,
    repeated_ids,
)
from taiji.data.image_filters import perceptual_hash, reduced

PLANTED = 100


def silent(line: str) -> None: ...


def picture(seed: int, side: int = 192) -> Image.Image:
    """Random colours with the 1/f spectrum of photographs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] - side // 2
    spectrum = rng.normal(size=(side, side, 3)) + 1j * rng.normal(size=(side, side, 3))
    spectrum /= np.maximum(np.hypot(x, y), 1)[..., None] ** 1.2
    field = np.fft.ifft2(np.fft.ifftshift(spectrum, (0, 1)), axes=(0, 1)).real
    field = (field - field.mean((0, 1))) / field.std((0, 1))
    return Image.fromarray(np.clip(128 + 50 * field, 0, 255).astype(np.uint8))


def near(hashes: npt.NDArray[np.uint64], bits: int, rng: Any) -> npt.NDArray[np.uint64]:
    result = hashes.copy()
    for i in range(len(result)):
        for bit in rng.choice(64, bits, replace=False):
            result[i] ^= np.uint64(1) << np.uint64(bit)
    return result


@pytest.mark.parametrize("distance", [0, 1, 4, 8, 12])
def test_hamming_pairs_are_those_of_a_naive_comparison(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(2**64, size=400, dtype=np.uint64)
    hashes[200:300] = near(hashes[:100], max(distance, 1), rng)  # at the very distance
    hashes[300:] = near(hashes[100:200], distance + 1, rng)  # just beyond
    queries = hashes[::2]
    naive = np.bitwise_count(queries[:, None] ^ hashes[None]) <= distance
    query, row = hamming_pairs(queries, hashes, distance)
    assert set(zip(query.tolist(), row.tolist(), strict=True)) == set(
        zip(*(part.tolist() for part in np.nonzero(naive)), strict=True)
    )
    first, second = hamming_pairs(queries, None, distance)
    own = np.triu(np.bitwise_count(queries[:, None] ^ queries[None]) <= distance, 1)
    assert np.array_equal(np.stack([first, second]), np.stack(np.nonzero(own)))
    empty = hamming_pairs(queries[:0], hashes, distance)
    assert len(empty[0]) == len(empty[1]) == 0


def test_clusters_join_chains_and_are_named_by_their_first_row() -> None:
    pairs = (np.array([5, 2, 7]), np.array([2, 8, 7]))
    assert clusters(9, [pairs]).tolist() == [0, 1, 2, 3, 4, 2, 6, 7, 2]
    assert clusters(3, []).tolist() == [0, 1, 2]


def test_a_million_equal_images_are_one_cluster_and_those_without_structure_none() -> None:
    hashes = np.full(1_000_000, 77, np.uint64)
    hashes[[3, 5]] = 0
    found = clusters(len(hashes), [hash_links(hashes, 4)])
    assert found[3] == 3 and found[5] == 5 and (np.delete(found, [3, 5]) == 0).all()


def test_equal_shapes_of_another_colour_are_no_duplicates() -> None:
    hashes = np.array([9, 9, 8, 9], np.uint64)
    grids = np.full((4, 48), 100, np.uint8)
    grids[1] += 30
    grids[2] += 5
    assert clusters(4, [hash_links(hashes, 1, grids, 10)]).tolist() == [0, 1, 0, 0]
    assert clusters(4, [hash_links(hashes, 0, grids, 10)]).tolist() == [0, 1, 2, 0]
    assert clusters(4, [hash_links(hashes, 1, grids, 40)]).tolist() == [0, 0, 0, 0]


def test_repeated_ids_are_the_later_ones() -> None:
    ids = np.array([[1, 1], [2, 0], [1, 1], [1, 2], [1, 1]], np.uint64)
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    assert repeated_ids(ids, order).tolist() == [False, False, True, False, True]


def test_embedding_pairs_find_planted_copies() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 32)).astype(np.float32)
    x[2500:] = x[:500] + 0.05 * rng.normal(size=(500, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    a, b = embedding_pairs(x, 0.98)
    naive = np.triu(x @ x.T >= 0.98, 1)
    found = np.zeros_like(naive)
    found[a, b] = True
    assert not (found & ~naive).any()  # no false pair
    assert found.sum() >= 0.99 * naive.sum() and naive.sum() >= 500
    again = embedding_pairs(x, 0.98)
    assert np.array_equal(a, again[0]) and np.array_equal(b, again[1])


def jpeg(image: Image.Image) -> Image.Image:
    target = io.BytesIO()
    image.save(target, "jpeg", quality=40)
    return Image.open(io.BytesIO(target.getvalue()))


def crop(image: Image.Image, rng: Any) -> Image.Image:
    """Up to a tenth of each axis is cut off, anywhere."""
    width, height = image.size
    left, top = rng.uniform(0, 0.05, 2)
    right, bottom = 1 - rng.uniform(0, 0.05, 2)
    box = (left * width, top * height, right * width, bottom * height)
    return image.crop(tuple(round(value) for value in box))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    for seed in range(PLANTED):
        picture(seed).save(folder / f"{seed:03d}.png")
    return folder


def test_every_planted_evaluation_image_is_found_and_nothing_else(evaluation: Path) -> None:
    hashes = evaluation_hashes(evaluation, silent)
    rng = np.random.default_rng(0)
    originals = [Image.open(path) for path in sorted(evaluation.iterdir())]
    changes = {
        "same": lambda image: image,
        "half size": lambda image: image.resize((96, 96), Image.Resampling.BICUBIC),
        "other aspect": lambda image: image.resize((240, 180), Image.Resampling.LANCZOS),
        "jpeg": jpeg,
        "crop": lambda image: crop(image, rng),
        "crop, half size, jpeg": lambda image: jpeg(crop(image, rng).resize((96, 96))),
    }
    for name, change in changes.items():
        planted = [perceptual_hash(reduced(change(image))) for image in originals]
        found = nearest_distance(pa.chunked_array([pa.array(planted, pa.uint64())]), hashes, 8)
        assert (found <= 8).sum() == PLANTED, f"{name}: {(found <= 8).sum()} of {PLANTED}"
    others = [perceptual_hash(picture(seed, 96)) for seed in range(1000, 1600)]
    found = nearest_distance(pa.chunked_array([pa.array(others, pa.uint64())]), hashes, 8)
    assert (found <= 8).sum() == 0


def test_evaluation_captions_are_found_however_they_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("一只红色的猫在雪地里\n猫\n", encoding="utf-8")
    keys = caption_keys(path, 6)
    texts = pa.chunked_array([["一只红色的猫，在雪地里！", "猫", "一只红色的狗在雪地里", None]])
    rows = pa.table({"caption_key": caption_columns(texts)["caption_key"]})
    columns = evaluation_columns(rows, None, keys, 8)
    assert columns["evaluation_caption"].to_pylist() == [True, False, False, False]


def test_evaluation_sets_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="images, captions or both"):
        EvaluationFilter()
    with pytest.raises(FileNotFoundError, match="no images in"):
        evaluation_hashes(tmp_path, silent)
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="evaluation image a.png.*mend or remove"):
        evaluation_hashes(tmp_path, silent)
    table = tmp_path / "hashes.parquet"
    pq.write_table(pa.table({"phash": np.array([3, 1, 3], np.uint64)}), table)
    assert evaluation_hashes(table).tolist() == [1, 3]
