"""Near duplicates: pairs of 64-bit hashes within a Hamming distance, pairs of close embeddings, and
the clusters that they form.

N rows, M queries, D embedding width, k the largest distance.
"""

from __future__ import annotations

from itertools import combinations
from math import comb, log2

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Pairs = tuple[Rows, Rows]

CHUNK = 1_000_000  # pairs compared at once


class DuplicateFilter(BaseModel):
    """Writes `repeated` (an earlier row has the same id) and `cluster` (number of the first row of
    the near duplicates that the row belongs to). Rows are joined whose perceptual hashes are within
    `distance` bits and whose colour grids differ by at most `colour` of 255 levels in the mean
    (hashes are of gray: a red apple has that of a green one); with `cosine` also those whose CLIP
    images are at least that close."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distance: int = Field(4, ge=0, le=16)
    colour: float = Field(10.0, ge=0)
    cosine: float | None = Field(None, gt=0, le=1)
    seed: int = 0


def _tables(rows: int, queries: int, distance: int) -> tuple[int, int]:
    """Blocks to cut the hash into, and how many of them a table compares: the cheapest choice."""

    def cost(kept: int) -> float:
        tables = comb(distance + kept, kept)
        found = rows * queries / 2 ** (64 * kept / (distance + kept))
        return tables * ((rows + queries) * log2(rows + 2) + found)

    kept = min(range(1, 5), key=cost)
    return distance + kept, kept


def hamming_pairs(queries: Hashes, hashes: Hashes | None, distance: int) -> Pairs:
    """queries (M,), hashes (N,) -> all (query, hash) numbers within `distance` bits, sorted

    Without `hashes` the pairs of two queries, the lower number first. Cut into d + r blocks, two
    hashes that differ in at most d bits agree in at least r whole blocks (Manku, Jain, Das Sarma
    2007, section 3): one sorted table for every choice of r blocks finds every pair. Candidates are
    compared exactly, so there is neither a miss nor a false pair.
    """
    others = queries if hashes is None else hashes
    if not len(queries) or not len(others):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    blocks, kept = _tables(len(others), len(queries), distance)
    edges = [round(i * 64 / blocks) for i in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in zip(edges, edges[1:], strict=False)]
    found = [np.empty(0, np.int64)]
    for chosen in combinations(masks, kept):
        found.append(_bucket_pairs(queries, hashes, np.uint64(sum(chosen)), distance))
    both = np.unique(np.concatenate(found))
    return both // len(others), both % len(others)


def _bucket_pairs(queries: Hashes, hashes: Hashes | None, mask: np.uint64, distance: int) -> Rows:
    """Pairs (query * N + hash) that agree under the mask and lie within the distance."""
    order = np.argsort(queries & mask, kind="stable")
    wanted = (queries & mask)[order]
    if hashes is None:  # of two equal keys the one that follows in the sorted order
        others, other_order = queries, order
        first = np.arange(1, len(queries) + 1)
        count = np.searchsorted(wanted, wanted, "right") - first
    else:
        others, other_order = hashes, np.argsort(hashes & mask, kind="stable")
        keys = (hashes & mask)[other_order]
        first = np.searchsorted(keys, wanted, "left")
        count = np.searchsorted(keys, wanted, "right") - first
    found = [np.empty(0, np.int64)]
    ends = np.cumsum(count)
    start = 0
    while start < len(queries):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + CHUNK, "right")))
        lengths = count[start:stop]
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        query = np.repeat(order[start:stop], lengths)
        row = other_order[np.repeat(first[start:stop], lengths) + inside]
        close = np.bitwise_count(queries[query] ^ others[row]) <= distance
        query, row = query[close], row[close]
        if hashes is None:
            query, row = np.minimum(query, row), np.maximum(query, row)
        found.append(query * len(others) + row)
        start = stop
    return np.concatenate(found)


def embedding_pairs(
    embeddings: npt.NDArray[np.float32], cosine: float, *, seed: int = 0, nearest: int = 3
) -> Pairs:
    """embeddings (N, D) of unit length -> pairs of rows with at least this cosine.

    Within k-means cells, as SemDeDup (Abbas et al. 2023, arXiv 2303.09540) does; every row is
    compared in its `nearest` cells, so that few pairs are lost at the borders.
    """
    rows = len(embeddings)
    cells = max(1, round((rows / 50) ** 0.5))
    centres = _kmeans(embeddings, cells, seed)
    nearest = min(nearest, cells)
    members: list[list[Rows]] = [[] for _ in range(cells)]
    for start in range(0, rows, 8192):
        score = embeddings[start : start + 8192] @ centres.T
        top = np.argpartition(-score, nearest - 1, axis=1)[:, :nearest]
        for cell in range(cells):
            members[cell].append(start + np.flatnonzero((top == cell).any(1)))
    found = [np.empty(0, np.int64)]
    for parts in members:
        index = np.concatenate(parts)
        for start in range(0, len(index), 2048):
            part = index[start : start + 2048]
            a, b = np.nonzero(embeddings[part] @ embeddings[index].T >= cosine)
            left, right = part[a], index[b]
            found.append((left * rows + right)[left < right])
    both = np.unique(np.concatenate(found))
    return both // rows, both % rows


def _kmeans(
    embeddings: npt.NDArray[np.float32], cells: int, seed: int, rounds: int = 8
) -> npt.NDArray[np.float32]:
    """embeddings (N, D) -> centres (cells, D) of unit length, from a sample of the rows"""
    rng = np.random.default_rng(seed)
    size = min(len(embeddings), 256 * cells)
    sample = embeddings[np.sort(rng.choice(len(embeddings), size, replace=False))]
    centres = sample[np.sort(rng.choice(size, min(cells, size), replace=False))].copy()
    for _ in range(rounds):
        nearest = (sample @ centres.T).argmax(1)
        for cell in np.unique(nearest):
            mean = sample[nearest == cell].mean(0)
            centres[cell] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return centres


def clusters(rows: int, pairs: list[Pairs]) -> Rows:
    """For each of `rows` rows the smallest row number that pairs connect it with: (rows,)"""
    left = np.concatenate([np.empty(0, np.int64), *(a for a, _ in pairs)])
    right = np.concatenate([np.empty(0, np.int64), *(b for _, b in pairs)])
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(rows, rows))
    count, label = connected_components(graph, directed=False)
    first = np.full(count, rows, np.int64)
    np.minimum.at(first, label, np.arange(rows))
    return first[label]


def hash_links(
    hashes: Hashes, distance: int, grids: npt.NDArray[np.uint8] | None = None, colour: float = 0
) -> Pairs:
    """hashes (N,), colour grids (N, 48) -> pairs that connect what is close in both

    Equal rows are compared once: an image that occurs a million times costs nothing. The hash 0 of
    images without structure says nothing and connects nothing.
    """
    rows = np.flatnonzero(hashes)
    marks = hashes[rows].astype(">u8").view(np.uint8).reshape(len(rows), 8)
    if grids is not None:
        marks = np.concatenate([marks, grids[rows]], axis=1)
    keys = np.ascontiguousarray(marks).view(f"V{marks.shape[1]}").ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    unique = rows[first]
    a, b = hamming_pairs(hashes[unique], None, distance)
    if grids is not None:
        close = np.concatenate(
            [_colour_close(grids, unique[a[i : i + CHUNK]], unique[b[i : i + CHUNK]], colour)
             for i in range(0, max(len(a), 1), CHUNK)]
        )  # fmt: skip
        a, b = a[close], b[close]
    return (
        np.concatenate([unique[a], unique[inverse]]),
        np.concatenate([unique[b], rows]),
    )


def _colour_close(
    grids: npt.NDArray[np.uint8], a: Rows, b: Rows, colour: float
) -> npt.NDArray[np.bool_]:
    difference = np.abs(grids[a].astype(np.int16) - grids[b])
    return difference.mean(1) <= colour


def repeated_ids(ids: npt.NDArray[np.uint64], order: Rows) -> npt.NDArray[np.bool_]:
    """ids (N, 2) and their stable ascending order (N,) -> True for every later row of an id"""
    result = np.zeros(len(ids), np.bool_)
    ordered = ids[order]
    same = (ordered[1:] == ordered[:-1]).all(1)
    result[order[1:][same]] = True
    return result
