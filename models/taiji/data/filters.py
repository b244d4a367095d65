"""Runs filters over metadata parts. A filter only writes columns beside the metadata; what they
mean for a row is decided later, by a query (`select`).

A filter's columns lie in `columns/<filter>/part-*.parquet` under a key of its code, its settings,
its inputs and its models: an unchanged filter is not run again, a killed one goes on after its last
part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from taiji.data.caption_filters import caption_columns
from taiji.data.decontaminate import (
    EvaluationFilter,
    caption_keys,
    evaluation_columns,
    evaluation_hashes,
)
from taiji.data.domains import domain_columns
from taiji.data.duplicates import (
    DuplicateFilter,
    Pairs,
    clusters,
    embedding_pairs,
    hash_links,
    repeated_ids,
)
from taiji.data.filter_config import Filters, content_of
from taiji.data.image_filters import Scorer, image_columns, scorer_column
from taiji.data.metadata import (
    fixed_bytes,
    id_order,
    ids_as_integers,
    json_hash,
    part_path,
    part_paths,
    read_columns,
    write_json,
    write_table,
)
from taiji.data.workers import Engine, run_tasks

# The modules beside this one that compute a filter's columns: a change in them makes these anew.
CODE = {
    "caption": ("caption_filters",),
    "image": ("image_filters", "metadata"),
    "clip": ("clip_filters", "metadata"),
    "heads": ("clip_filters", "metadata"),
    "domain": ("domains", "clip_filters", "metadata"),
    "evaluation": (
        "decontaminate", "caption_filters", "duplicates", "image_filters", "metadata", "filters",
    ),
    "duplicates": ("duplicates", "metadata", "filters"),
}  # fmt: skip
SCORER_CODE = ("image_filters", "metadata")
PIXELS = ("file", "offset", "bytes")
AFTER = {
    "heads": ("clip",),
    "domain": ("clip",),
    "evaluation": ("image", "caption"),
    "duplicates": ("image", "clip"),
}


@dataclass(frozen=True)
class FilterTask:
    """Filters over one part, in order."""

    names: tuple[str, ...]
    filters: Filters
    output: Path
    root: Path
    part: int
    scorers: Mapping[str, Scorer]

    def read(self, name: str, columns: tuple[str, ...]) -> pa.Table:
        """What filter `name` reads of this part; a filter's column stands before the metadata's."""
        found: dict[str, Any] = {}
        for folder in column_folders(self.output):
            path = part_path(folder, self.part)
            if path.is_file() and folder.name != name:
                there = [c for c in columns if c in pq.read_schema(path).names]
                found |= {c: pq.read_table(path, columns=[c])[c] for c in there}
        missing = [column for column in columns if column not in found]
        if missing:
            raise ValueError(
                f"filters.{name} reads {', '.join(missing)}: add the filter that writes it, "
                "or the column to the source"
            )
        return pa.table(found)


def column_folders(output: Path) -> list[Path]:
    """Metadata first, then every filter's columns in the order of their names."""
    folders = [p for p in (output / "columns").glob("*") if p.is_dir() and part_paths(p)]
    return [output / "metadata", *sorted(folders)]


def run_filters(
    filters: Filters,
    output: Path,
    root: Path,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    workers: int = 1,
    engine: Engine = "local",
    log: Callable[[str], object] = print,
) -> dict[str, str]:
    """Writes the columns of every filter that the metadata in `output` lack; {filter: key}.

    `scorers` are your own detectors (a watermark, a face): {column: images -> values}. They must
    pickle where there is more than one worker, and are keyed by their name alone.
    """
    metadata = json.loads((output / "metadata.json").read_text(encoding="utf-8"))
    own = dict(scorers or {})
    keys = filter_keys(filters, metadata["key"], list(own))
    _remove_stale(output, list(keys), metadata["key"])
    pending: dict[int, list[str]] = {}
    for name, key in keys.items():
        done = _begin(output / "columns" / name, key, metadata["key"])
        parts = [part for part in range(metadata["parts"]) if part not in done]
        if parts:
            log(f"filter {name}: {len(parts)} of {metadata['parts']} parts")
        if parts and name == "evaluation":
            _prepare_evaluation(filters.evaluation, output, log)
        for part in parts:
            pending.setdefault(part, []).append(name)
    whole = any("duplicates" in names for names in pending.values())
    tasks = []
    for part, names in sorted(pending.items()):
        by_part = tuple(name for name in names if name != "duplicates")
        if by_part:
            tasks.append(FilterTask(by_part, filters, output, root, part, own))
    for _ in run_tasks(filter_part, tasks, workers=workers, engine=engine):
        pass
    if whole:
        _write_duplicates(filters, output)
    return {path.stem: _report(path)["key"] for path in sorted((output / "columns").glob("*.json"))}


def filter_keys(filters: Filters, metadata: str, scorers: Sequence[str] = ()) -> dict[str, str]:
    """What a filter's columns depend on: code, settings, inputs, and the filters before it."""
    keys: dict[str, str] = {}
    for name in type(filters).model_fields:
        config = getattr(filters, name)
        if config is not None:
            before = {other: keys[other] for other in AFTER.get(name, ()) if other in keys}
            code = code_hash(CODE[name])
            keys[name] = json_hash([code, metadata, content_of(config), before])
    return keys | {n: json_hash([code_hash(SCORER_CODE), metadata, n]) for n in scorers}


@cache
def code_hash(modules: tuple[str, ...]) -> str:
    """SHA-256 over the files of modules beside this one."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def _report(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _remove_stale(output: Path, plan: list[str], metadata: str) -> None:
    """Removes the columns of other metadata, and of filters that the recipe no longer names: they
    would stand before the metadata's own. A scorer's stay: only its owner can make them again."""
    for report in (output / "columns").glob("*.json"):
        dropped = report.stem in Filters.model_fields and report.stem not in plan
        if dropped or _report(report)["metadata"] != metadata:
            shutil.rmtree(report.with_suffix(""), ignore_errors=True)
            report.unlink()


def _begin(folder: Path, key: str, metadata: str) -> set[int]:
    """Numbers of the parts that are done under `key`; columns of another key are removed."""
    report = folder.with_suffix(".json")
    if report.is_file() and _report(report)["key"] == key:
        return {int(path.stem.removeprefix("part-")) for path in part_paths(folder)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json({"key": key, "metadata": metadata}, report)
    return set()


def filter_part(task: FilterTask) -> None:
    """Computes and writes the filters' columns of one part."""
    for name in task.names:
        columns = _columns(task, name)
        write_table(pa.table(columns), part_path(task.output / "columns" / name, task.part))


def _columns(task: FilterTask, name: str) -> dict[str, pa.Array]:
    filters = task.filters
    if name in task.scorers:
        return {name: scorer_column(task.read(name, PIXELS), task.root, task.scorers[name])}
    if name == "caption":
        return caption_columns(task.read(name, ("caption",))["caption"])
    if name == "image":
        return image_columns(task.read(name, PIXELS), task.root)
    if name == "evaluation" and filters.evaluation:
        return _evaluation_part(task, filters.evaluation)
    if filters.clip is None:
        raise ValueError(f"filters.{name} needs filters.clip")
    from taiji.data.clip_filters import clip_columns, head_columns  # torch, only where needed

    if name == "clip":
        return clip_columns(task.read(name, (*PIXELS, "caption")), task.root, filters.clip)
    rows = task.read(name, ("clip_image",))
    if name == "heads" and filters.heads:
        return head_columns(rows, filters.heads)
    if name == "domain" and filters.domain:
        return domain_columns(rows, filters.domain, filters.clip)
    raise ValueError(f"no filter is called {name}")


def _prepare_evaluation(
    config: EvaluationFilter | None, output: Path, log: Callable[[str], object]
) -> None:
    """The evaluation set as sorted keys, made once for all parts."""
    assert config is not None
    folder = output / "columns"
    if config.images:
        hashes = evaluation_hashes(config.images, log)
        write_table(pa.table({"phash": hashes}), folder / "evaluation-images.parquet")
    if config.captions:
        keys = caption_keys(config.captions, config.least_characters)
        write_table(pa.table({"key": keys}), folder / "evaluation-captions.parquet")


def _evaluation_part(task: FilterTask, config: EvaluationFilter) -> dict[str, pa.Array]:
    folder = task.output / "columns"
    hashes = captions = None
    reads: tuple[str, ...] = ()
    if config.images:
        reads += ("phash",)
        hashes = pq.read_table(folder / "evaluation-images.parquet")["phash"].to_numpy()
    if config.captions:
        reads += ("caption_key",)
        captions = pq.read_table(folder / "evaluation-captions.parquet")["key"].to_numpy()
    return evaluation_columns(task.read("evaluation", reads), hashes, captions, config.distance)


def _write_duplicates(filters: Filters, output: Path) -> None:
    """The one filter that sees all rows at once: 72 bytes a row, and the embeddings if asked."""
    config = filters.duplicates
    assert config is not None
    folders = [f for f in column_folders(output) if f.name != "duplicates"]
    there = {name for folder in folders for name in pq.read_schema(part_paths(folder)[0]).names}
    ids = ids_as_integers(read_columns(folders, ["id"])["id"])
    pairs = _duplicate_pairs(config, folders, there)
    repeated, cluster = repeated_ids(ids, id_order(ids)), clusters(len(ids), pairs)
    start = 0
    for path in part_paths(output / "metadata"):
        stop = start + pq.read_metadata(path).num_rows
        table = pa.table({"repeated": repeated[start:stop], "cluster": cluster[start:stop]})
        write_table(table, output / "columns" / "duplicates" / path.name)
        start = stop


def _duplicate_pairs(config: DuplicateFilter, folders: list[Path], there: set[str]) -> list[Pairs]:
    pairs = []
    if "phash" in there:
        hashes = read_columns(folders, ["phash"])["phash"].fill_null(0).to_numpy()
        grids = None
        if "colour" in there:
            grids = fixed_bytes(read_columns(folders, ["colour"])["colour"])
        pairs.append(hash_links(hashes.astype(np.uint64), config.distance, grids, config.colour))
    if config.cosine is not None:
        from taiji.data.clip_filters import features_of

        features, known = features_of(read_columns(folders, ["clip_image"])["clip_image"])
        rows = np.flatnonzero(known)
        a, b = embedding_pairs(features[rows], config.cosine, seed=config.seed)
        pairs.append((rows[a], rows[b]))
    return pairs
