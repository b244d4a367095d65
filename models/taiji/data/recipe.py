"""A data recipe and its stages: filter -> select -> shard -> report, each in one call.

name: mini
output: out/data/mini
source: {kind: table, path: pairs.parquet, images: images}
filters: {caption: {}, image: {}, duplicates: {distance: 4}}
select: {rules: {small: {column: short_side, min: 256}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import yaml
from pydantic import BaseModel, ConfigDict, Field

from taiji.data.domains import train_probe
from taiji.data.filter_config import Filters
from taiji.data.filters import column_folders, filter_keys, run_filters
from taiji.data.funnel import funnel, write_report
from taiji.data.image_filters import Scorer
from taiji.data.manifest import MANIFEST, Manifest, make_manifest, write_manifest
from taiji.data.metadata import json_hash, read_columns, write_json, write_table
from taiji.data.select import Query, Selection, select
from taiji.data.shards import SAMPLES, write_shards
from taiji.data.sources import Source, images_root, ingest, source_key
from taiji.data.workers import Engine

Log = Callable[[str], object]


class ShardConfig(BaseModel):
    """Samples of a shard: 10,000 are about a gigabyte of 512-pixel JPEGs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(SAMPLES, gt=0)


class DataRecipe(BaseModel):
    """One data set, from its source to its shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    output: Path
    source: Source
    rows_per_part: int = Field(16384, gt=0)
    filters: Filters = Filters()
    select: Query
    shards: ShardConfig = ShardConfig()

    @property
    def root(self) -> Path:
        return images_root(self.source, self.output)


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> DataRecipe:
    """Raises pydantic.ValidationError for unknown keys and wrong values, ValueError for no YAML."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    for dotted, value in (overrides or {}).items():
        node, keys = tree, dotted.split(".")
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[keys[-1]] = value
    return DataRecipe.model_validate(tree)


def filter_pairs(
    recipe: DataRecipe,
    *,
    scorers: Mapping[str, Scorer] | None = None,
    workers: int = 1,
    engine: Engine = "local",
    log: Log = print,
) -> dict[str, Any]:
    """Ingests the source and writes every filter's columns; rows, parts and keys."""
    found = ingest(
        recipe.source,
        recipe.output,
        rows_per_part=recipe.rows_per_part,
        workers=workers,
        engine=engine,
        log=log,
    )
    (recipe.output / "filters.json").unlink(missing_ok=True)  # until every part is there
    keys = run_filters(
        recipe.filters,
        recipe.output,
        recipe.root,
        scorers=scorers,
        workers=workers,
        engine=engine,
        log=log,
    )
    write_json(keys, recipe.output / "filters.json")
    return {**found, "filters": keys}


def query_table(recipe: DataRecipe) -> pa.Table:
    """The columns that the query reads, of all rows.

    Raises:
        FileNotFoundError: the filters have not run on this source.
        ValueError: a column that no filter and no source wrote.
    """
    _filters_ran(recipe)
    return read_columns(column_folders(recipe.output), recipe.select.columns())


def _filters_ran(recipe: DataRecipe) -> dict[str, Any]:
    report, keys = recipe.output / "metadata.json", recipe.output / "filters.json"
    if not report.is_file() or not keys.is_file():
        raise FileNotFoundError(f"no filtered pairs in {recipe.output}")
    found = json.loads(report.read_text(encoding="utf-8"))
    if found["source"] != source_key(recipe.source, recipe.rows_per_part):
        raise FileNotFoundError(f"the source changed since {recipe.output} was filtered")
    done = json.loads(keys.read_text(encoding="utf-8"))
    wanted = filter_keys(recipe.filters, found["key"])
    changed = [name for name, key in wanted.items() if done.get(name) != key]
    changed += [name for name in done if name in Filters.model_fields and name not in wanted]
    if changed:
        names = ", ".join(changed)
        raise FileNotFoundError(f"filters.{names} changed since {recipe.output} was filtered")
    return {**found, "filters": done}


def select_pairs(recipe: DataRecipe, log: Log = print) -> Selection:
    """Asks the query and writes selection.parquet (id, domain, reason; in row order) and .json."""
    table = query_table(recipe)
    selection = select(table, recipe.select)
    reasons = [step.name for step in selection.steps]
    labels = pa.DictionaryArray.from_arrays(
        pa.array(selection.reason, mask=selection.kept), pa.array(reasons, pa.string())
    )
    domain = pa.DictionaryArray.from_arrays(selection.domain, pa.array(selection.domains))
    rows = pa.table({"id": table["id"], "domain": domain, "reason": labels})
    write_table(rows, recipe.output / "selection.parquet")
    found = funnel(selection, reasons)
    write_json({"query": _query(recipe), **found}, recipe.output / "selection.json")
    for step in selection.steps:
        before, after = sum(step.rows_in.values()), sum(step.rows_out.values())
        log(f"{step.name}: {before:,} -> {after:,}")
    return selection


def _query(recipe: DataRecipe) -> dict[str, Any]:
    return recipe.select.model_dump(mode="json", exclude_none=True)


def shard_pairs(
    recipe: DataRecipe, *, workers: int = 1, engine: Engine = "local", log: Log = print
) -> Manifest:
    """Selects, writes the shards of what is kept and their manifest."""
    facts = _filters_ran(recipe)
    selection = select_pairs(recipe, log)
    if not selection.kept.any():
        raise ValueError("the query keeps no pair: see selection.json for the rule that takes most")
    shards = write_shards(
        recipe.output,
        recipe.root,
        selection.kept,
        selection.domain,
        selection.domains,
        samples=recipe.shards.samples,
        workers=workers,
        engine=engine,
        log=log,
    )
    found = funnel(selection, [step.name for step in selection.steps])
    manifest = make_manifest(
        shards,
        _query(recipe),
        name=recipe.name,
        metadata=facts["key"],
        rows=facts["rows"],
        filters=facts["filters"],
        bounds={step.name: step.bounds for step in selection.steps if step.bounds},
        rejected=found["rejected"],
    )
    write_manifest(manifest, recipe.output / MANIFEST)
    return manifest


def report_pairs(recipe: DataRecipe, log: Log = print) -> Path:
    """The funnel of the query over the filtered pairs, as report.json and report.html."""
    selection = select_pairs(recipe, log)
    folders = column_folders(recipe.output)
    return write_report(recipe.name, selection, folders, recipe.root, recipe.output)


def train_domain_probe(
    recipe: DataRecipe, path: Path, labels: Path | None = None, log: Log = print
) -> float:
    """Fits the linear probe of `filters.domain.probe`; its accuracy on the fifth held out.

    The labels are a CSV of `id` and `domain`, or the domains that the source states.

    Raises:
        ValueError: fewer than 20 labelled images.
    """
    from taiji.data.clip_filters import apply_head, features_of

    _filters_ran(recipe)
    stated = read_columns([recipe.output / "metadata"], ["id", "domain"])
    names = dict(zip(stated["id"].to_pylist(), stated["domain"].to_pylist(), strict=True))
    if labels is not None:
        rows = pa_csv.read_csv(labels).to_pylist()
        names = {bytes.fromhex(row["id"]): row["domain"] for row in rows}
    table = read_columns(column_folders(recipe.output), ["id", "clip_image"])
    features, known = features_of(table["clip_image"])
    label = [names.get(key) for key in table["id"].to_pylist()]
    rows = [i for i, name in enumerate(label) if name is not None and known[i]]
    if len(rows) < 20:
        raise ValueError(f"{len(rows)} labelled images are too few for a probe: label 20 or more")
    held = np.array([table["id"][i].as_py()[0] < 256 // 5 for i in rows])
    found = np.array([label[i] for i in rows])
    x = features[rows]
    domains = train_probe(x[~held], found[~held].tolist(), path)
    if not held.any():
        raise ValueError("no labelled image fell into the fifth held out: label more")
    guess = np.array(domains)[apply_head(x[held], path).argmax(1)]
    accuracy = float((guess == found[held]).mean())
    log(f"probe: {len(domains)} domains, {accuracy:.3f} right of {int(held.sum()):,} held out")
    return accuracy


def plan(recipe: DataRecipe) -> dict[str, Any]:
    """What a run would do, without reading an image."""
    return {
        "name": recipe.name,
        "output": str(recipe.output),
        "source": recipe.source.model_dump(mode="json"),
        "filters": [n for n in Filters.model_fields if getattr(recipe.filters, n) is not None],
        "rules": list(recipe.select.rules),
        "recipe": json_hash(recipe.model_dump(mode="json", exclude={"output": True})),
    }
