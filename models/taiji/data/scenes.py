"""The shapes world as a data set on disk: drawn, captioned and labelled, the same for one seed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from taiji.data.shapes import Split, caption, sample

LICENCE = "CC0-1.0"  # drawn by this code
SHARD = 2048
SPLITS: tuple[Split, ...] = ("train", "heldout")


def build(
    output: Path,
    *,
    count: int = 10_000,
    size: int = 64,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> Path:
    """Writes `count` scenes of each split into the folder `output` and returns it.

    `metadata.parquet`: split, shard, index, caption_zh, caption_en, truth (JSON), licence.
    `images-{size}-{shard:05d}.parquet`: rgb, the raw bytes of (size, size, 3) uint8. An existing
    `output` is replaced only when the new one is complete.

    Raises:
        ValueError: a size below 32; an `output` that is not such a data set.
    """
    if output.exists() and not (output / "metadata.parquet").is_file():
        raise ValueError(f"{output} exists and is not a data set: choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        staging.chmod(0o755)
        rows: list[dict[str, Any]] = []
        shard = 0
        for split in SPLITS:
            drawn = sample(count, seed, size=size, split=split)
            for start in range(0, count, SHARD):
                part = drawn[start : start + SHARD]
                for index, (scene, text, _) in enumerate(part):
                    rows.append(
                        {
                            "split": split,
                            "shard": shard,
                            "index": index,
                            "caption_zh": text,
                            "caption_en": caption(
                                scene, "en", Random(f"{seed}:{text}:{start + index}")
                            ),
                            "truth": json.dumps(scene.truth(), ensure_ascii=False),
                            "licence": LICENCE,
                        }
                    )
                table = pa.table({"rgb": [pixels.tobytes() for _, _, pixels in part]})
                pq.write_table(table, staging / f"images-{size}-{shard:05d}.parquet")
                shard += 1
            log(f"{split}: {count} scenes")
        pq.write_table(pa.Table.from_pylist(rows), staging / "metadata.parquet")
        if output.exists():
            old = staging.with_name(staging.name + ".old")
            os.rename(output, old)
            os.rename(staging, output)
            shutil.rmtree(old)
        else:
            os.rename(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output
