"""Synthetic metadata in any number, to see that filtering stays within time and memory.

Rows have everything that the real filters would have written from images: sizes, hashes, scores.
Near duplicates and evaluation images are planted, so the counts that come out can be checked.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from taiji.data.decontaminate import EvaluationFilter
from taiji.data.filter_config import Filters
from taiji.data.recipe import DataRecipe, filter_pairs, select_pairs
from taiji.data.select import Query
from taiji.data.sources import TableSource

GROUP = 65_536
PLANTED = 100
NAMES = ("红色的花", "雪山下的湖", "一只猫", "老街的夜景", "青花瓷瓶", "热气腾腾的火锅", "卡通女孩")
FOREIGN = ("a red flower in the snow", "赤い花のある庭です", "붉은 꽃과 나무", "")
DOMAINS = ("cartoon", "landscape", "object", "food", "people")
SHARES = (0.3, 0.3, 0.2, 0.1, 0.1)

QUERY = {
    "rules": {
        "repeated": {"column": "repeated", "equals": False},
        "caption": {"column": "caption_ok", "equals": True},
        "language": {"column": "caption_language", "one_of": ["zh"]},
        "size": {"column": "short_side", "min": 256},
        "aspect": {"column": "aspect", "max": 3},
        "entropy": {"column": "entropy", "percentiles": [5, 99], "by": "domain"},
        "laplacian": {"column": "laplacian", "percentiles": [5, 99], "by": "domain"},
        "edges": {"column": "edges", "percentiles": [5, 99], "by": "domain"},
        "jpeg_bytes": {"column": "jpeg_bytes", "percentiles": [5, 99], "by": "domain"},
        "evaluation": {"column": "evaluation_distance", "min": 9, "missing": "keep"},
        "relevance": {"column": "relevance", "top": 0.3, "min": 0.2},
        "aesthetic": {"column": "aesthetic", "min": 4.5},
        "watermark": {"column": "watermark", "max": 0.5},
        "duplicate": {"column": "cluster", "best_of": ["pixels", "aesthetic"]},
    },
    "domains": {"alpha": 0.5, "caps": {"cartoon": 0.15}},
}


def write_rows(path: Path, rows: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    """A table of `rows` pairs at `path`; returns the evaluation hashes that lie near its first."""
    evaluation = np.random.default_rng([seed, 0]).integers(2**64, size=PLANTED, dtype=np.uint64)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: pq.ParquetWriter | None = None
    for number, start in enumerate(range(0, rows, GROUP)):
        rng = np.random.default_rng([seed, 1, number])
        table = _table(rng, start, min(GROUP, rows - start), evaluation if not start else None)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
    return evaluation


def _table(
    rng: np.random.Generator, start: int, rows: int, planted: npt.NDArray[np.uint64] | None
) -> pa.Table:
    hashes = rng.integers(2**64, size=rows, dtype=np.uint64)
    copies = rng.integers(rows // 2, rows, rows // 20)  # a twentieth copy a row of the first half
    hashes[copies] = hashes[copies - rows // 2] ^ _flips(rng, len(copies), 2)
    if planted is not None:
        hashes[: len(planted)] = planted[:rows] ^ _flips(rng, min(len(planted), rows), 4)
    foreign = rng.random(rows) < 0.1
    names = np.array(NAMES)[rng.integers(len(NAMES), size=rows)]
    others = np.array(FOREIGN)[rng.integers(len(FOREIGN), size=rows)]
    numbers = [str(start + i) for i in range(rows)]
    return pa.table(
        {
            "url": [f"synthetic/{n}" for n in numbers],
            "caption": np.where(foreign, others, np.char.add(names, numbers)),
            "width": np.exp(rng.normal(6.5, 0.5, rows)).astype(np.int32) + 1,
            "height": np.exp(rng.normal(6.4, 0.5, rows)).astype(np.int32) + 1,
            "domain": np.array(DOMAINS)[rng.choice(len(DOMAINS), rows, p=SHARES)],
            "phash": hashes,
            **{
                name: rng.normal(mean, deviation, rows).astype(np.float32)
                for name, mean, deviation in (
                    ("entropy", 6.0, 1.0), ("laplacian", 500.0, 150.0), ("edges", 0.2, 0.05),
                    ("jpeg_bytes", 0.3, 0.1), ("relevance", 0.22, 0.08), ("aesthetic", 5.0, 1.0),
                )
            },
            "watermark": rng.beta(1, 4, rows).astype(np.float32),
        }
    )  # fmt: skip


def _flips(rng: np.random.Generator, count: int, bits: int) -> npt.NDArray[np.uint64]:
    """(count,) masks of at most `bits` set bits"""
    one = np.left_shift(np.uint64(1), rng.integers(64, size=(count, bits)).astype(np.uint64))
    return np.bitwise_or.reduce(one, axis=1)


def rehearse(
    output: Path,
    *,
    rows: int = 1_000_000,
    seed: int = 0,
    workers: int = 1,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Makes the rows, filters and selects them in `output`; what it took, without the making.

    `peak_mb` is an upper bound: this process's peak plus, for each worker, that of the largest.
    """
    evaluation = write_rows(output / "rows" / "pairs.parquet", rows, seed)
    pq.write_table(pa.table({"phash": evaluation}), output / "evaluation.parquet")
    log(f"{rows:,} synthetic rows")
    recipe = DataRecipe(
        name="rehearsal",
        output=output / "work",
        source=TableSource(path=output / "rows"),
        filters=Filters(evaluation=EvaluationFilter(images=output / "evaluation.parquet")),
        select=Query.model_validate(QUERY),
    )
    started = time.perf_counter()
    filter_pairs(recipe, workers=workers, log=log)
    filtered = time.perf_counter()
    selection = select_pairs(recipe, log)
    selected = time.perf_counter()
    near = pq.read_table(recipe.output / "columns" / "evaluation", columns=["evaluation_distance"])
    return {
        "rows": rows,
        "kept": int(selection.kept.sum()),
        "planted_found": len(near) - near["evaluation_distance"].null_count,
        "filter_s": round(filtered - started, 1),
        "select_s": round(selected - filtered, 1),
        "peak_mb": round(_peak_mb(workers)),
    }


def _peak_mb(workers: int) -> float:
    own, child = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return (own + (workers * child if workers > 1 else 0)) / unit
