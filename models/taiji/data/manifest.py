"""The data manifest: what a data set was made from and how, and a hash that models can name.

Hashes and counts only: no path, time or machine, so the same data have the same manifest wherever
and by however many workers they were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from taiji.data.caption_filters import normal_form
from taiji.data.domains import sampling_shares
from taiji.data.metadata import file_hash, json_hash, part_paths, write_json, write_table
from taiji.data.shards import Shard

MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardRecord(_Record):
    """A tar: its hash is of the whole file."""

    name: str
    domain: str
    sha256: str
    bytes: int
    samples: int


class DomainRecord(_Record):
    """`samples` in the shards; `mass` counts them by their factors; `share` of what is drawn."""

    samples: int
    mass: float
    share: float


class Factors(_Record):
    """A Parquet file beside the manifest: id and factor of the samples whose factor is not 1."""

    file: str
    sha256: str
    rows: int


class Manifest(_Record):
    """See the module. `hash` is of everything else; `parent` of the manifest it re-weights."""

    version: Literal[1] = 1
    name: str
    metadata: str
    rows: int
    filters: dict[str, str]
    query: dict[str, Any]
    bounds: dict[str, dict[str, list[float | None]]]
    rejected: dict[str, int]
    domains: dict[str, DomainRecord]
    shards: tuple[ShardRecord, ...]
    skipped: tuple[dict[str, str], ...] = ()
    factors: Factors | None = None
    badcases: str | None = None
    parent: str | None = None
    hash: str = ""

    def sealed(self) -> Manifest:
        """The same manifest with its hash."""
        return self.model_copy(update={"hash": self.content_hash()})

    def content_hash(self) -> str:
        return json_hash(self.model_dump(mode="json", exclude={"hash"}))


class BadCase(_Record):
    """Samples to draw `factor` times as often (0 is never): by `ids`, or all whose domain, tags or
    caption hold `tag`."""

    ids: tuple[Annotated[str, Field(pattern="^[0-9a-f]{32}$")], ...] = ()
    tag: str | None = Field(None, pattern=r"\w")
    factor: float = Field(ge=0)


def make_manifest(shards: Sequence[Shard], query: dict[str, Any], **facts: Any) -> Manifest:
    """The manifest of freshly written shards; `facts` are its other fields."""
    counts: dict[str, int] = {}
    for shard in shards:
        counts[shard.domain] = counts.get(shard.domain, 0) + shard.samples
    records = tuple(
        ShardRecord(name=s.name, domain=s.domain, sha256=s.sha256, bytes=s.bytes, samples=s.samples)
        for s in shards
    )
    skipped = tuple({"shard": s.name, **row} for s in shards for row in s.skipped)
    domains = _domain_records(counts, {name: float(n) for name, n in counts.items()}, query)
    return Manifest(query=query, domains=domains, shards=records, skipped=skipped, **facts).sealed()


def _domain_records(
    counts: dict[str, int], mass: dict[str, float], query: dict[str, Any]
) -> dict[str, DomainRecord]:
    shares = sampling_shares(mass, query["domains"]["alpha"], query["domains"]["caps"])
    return {
        name: DomainRecord(samples=counts[name], mass=mass[name], share=shares[name])
        for name in sorted(counts)
    }


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path` (or in the folder `path`), its own hash checked.

    Raises:
        FileNotFoundError: none is there.
        ValueError: it was edited, or is no manifest.
    """
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no data manifest at {path}: make it with `hcf data shard`")
    manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    if manifest.hash != manifest.content_hash():
        raise ValueError(
            f"{path.name} does not have the hash it states: it was edited; make it anew"
        )
    return manifest


def write_manifest(manifest: Manifest, path: Path) -> None:
    write_json(manifest.model_dump(mode="json"), path)


def verify(manifest: Manifest, folder: Path) -> list[str]:
    """What differs between a manifest and the shards beside it; empty when nothing does."""
    problems = []
    for shard in manifest.shards:
        path = folder / "shards" / f"{shard.name}.tar"
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif path.stat().st_size != shard.bytes or file_hash(path) != shard.sha256:
            problems.append(f"{path.name} is not as it was written")
    if manifest.factors:
        path = folder / manifest.factors.file
        if not path.is_file() or file_hash(path) != manifest.factors.sha256:
            problems.append(f"{path.name} is missing or not as it was written")
    return problems


def read_badcases(path: Path) -> tuple[BadCase, ...]:
    """A YAML list of {ids: [...]} or {tag: ...} with a factor each.

    Raises:
        pydantic.ValidationError: an unknown key, an id that is none, a negative factor.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    cases = TypeAdapter(tuple[BadCase, ...]).validate_python(tree or [])
    empty = [case for case in cases if not case.ids and case.tag is None]
    if empty or not cases:
        raise ValueError(f"{path.name}: every bad case needs ids or a tag; the list needs one")
    return cases


def reweight(
    manifest: Manifest, folder: Path, badcases: Path, log: Callable[[str], object] = print
) -> Manifest:
    """A manifest of the same shards whose bad cases are drawn more or less often; written beside.

    Factors multiply, with those that the manifest has already too. They move samples within their
    domain and, by the domain's mass, its share; the caps hold again afterwards.

    Raises:
        ValueError: an id that no shard holds, or factors that leave nothing.
    """
    cases = read_badcases(badcases)
    ids, domain = sample_ids(manifest, folder)
    factor = sample_factors(manifest, folder, ids)
    for case, rows in zip(cases, _hit(cases, folder, ids, domain), strict=True):
        factor[rows] *= case.factor
        log(f"factor {case.factor:g} for {len(rows):,} samples of {case.tag or 'the ids'}")
    mass = {name: float(factor[domain == name].sum()) for name in manifest.domains}
    if not sum(mass.values()):
        raise ValueError(f"{badcases.name}: the factors leave no sample to draw")
    key = json_hash([manifest.hash, [case.model_dump(mode="json") for case in cases]])
    counts = {name: record.samples for name, record in manifest.domains.items()}
    changes = {
        "domains": _domain_records(counts, mass, manifest.query),
        "factors": _write_factors(folder, f"factors-{key[:12]}.parquet", ids, factor),
        "badcases": key,
        "parent": manifest.hash,
    }
    return manifest.model_copy(update=changes).sealed()


def _write_factors(
    folder: Path, name: str, ids: Sequence[bytes], factor: npt.NDArray[np.float64]
) -> Factors:
    changed = np.flatnonzero(factor != 1)
    listed = pa.array([ids[int(row)] for row in changed], pa.binary(16))
    write_table(pa.table({"id": listed, "factor": factor[changed]}), folder / name)
    return Factors(file=name, sha256=file_hash(folder / name), rows=len(changed))


def sample_ids(manifest: Manifest, folder: Path) -> tuple[list[bytes], npt.NDArray[np.str_]]:
    """Ids of all N samples in the shards' order, and their domains (N,)"""
    ids: list[bytes] = []
    domains: list[str] = []
    for shard in manifest.shards:
        found = pq.read_table(folder / "shards" / f"{shard.name}.parquet", columns=["id"])
        ids += found["id"].to_pylist()
        domains += [shard.domain] * len(found)
    return ids, np.array(domains)


def sample_factors(
    manifest: Manifest, folder: Path, ids: Sequence[bytes]
) -> npt.NDArray[np.float64]:
    """The factor of each of N samples: 1 where the manifest names none"""
    factor = np.ones(len(ids))
    if manifest.factors:
        changed = pq.read_table(folder / manifest.factors.file)
        place = {key: row for row, key in enumerate(ids)}
        rows = [place[key] for key in changed["id"].to_pylist()]
        factor[rows] = changed["factor"].to_numpy()
    return factor


def _hit(
    cases: Sequence[BadCase], folder: Path, ids: Sequence[bytes], domain: npt.NDArray[np.str_]
) -> list[npt.NDArray[np.int64]]:
    """The samples of each case."""
    place = {key: row for row, key in enumerate(ids)}
    tags = [case.tag for case in cases if case.tag]
    tagged = _tagged(tags, folder, place, domain) if tags else {}
    found = []
    for case in cases:
        unknown = [key for key in case.ids if bytes.fromhex(key) not in place]
        if unknown:
            raise ValueError(f"no sample has the id {unknown[0]}: take ids from the shards")
        rows = [place[bytes.fromhex(key)] for key in case.ids]
        found.append(np.unique([*rows, *tagged.get(case.tag or "", ())]).astype(np.int64))
    return found


def _tagged(
    tags: Sequence[str],
    folder: Path,
    place: dict[bytes, int],
    domain: npt.NDArray[np.str_],
) -> dict[str, list[int]]:
    """For each tag the samples whose domain or tags are it, or whose caption contains it."""
    rows: dict[str, list[int]] = {tag: np.flatnonzero(domain == tag).tolist() for tag in tags}
    normal = dict(zip(tags, normal_form(pa.array(tags)).to_pylist(), strict=True))
    for path in part_paths(folder / "metadata"):
        table = pq.read_table(path, columns=["id", "caption", "tags"])
        caption = normal_form(pc.fill_null(table["caption"], ""))
        for tag in tags:
            inside = pc.match_substring(caption, pattern=normal[tag]).to_numpy(zero_copy_only=False)
            listed = [tag in (found or ()) for found in table["tags"].to_pylist()]
            for row in np.flatnonzero(inside | np.array(listed, np.bool_)):
                key = table["id"][int(row)].as_py()
                if key in place:
                    rows[tag].append(place[key])
    return rows
