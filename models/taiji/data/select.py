"""Which rows are kept: a query over the filters' columns, re-run in seconds when a threshold moves.

Rules are asked in order, and the first that a row fails is its one reason. Shares and percentiles
are of the rows that all earlier rules kept, so each rule says what it does to what reaches it.
N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from taiji.data.domains import capped_counts
from taiji.data.metadata import id_order, ids_as_integers

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int32]

CAP = "domain_cap"
UNKNOWN = "unknown"


class Rule(BaseModel):
    """One question to one column; every bound that is named must hold.

    `percentiles` [5, 99] keeps the rows between these percentiles, `top` 0.3 the highest three in
    ten, both within each value of the column `by`. `best_of` keeps, of the rows with one value of
    `column`, the one that is highest in the named columns, in order. A row without a value is
    rejected, or kept with `missing: keep`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str
    min: float | None = None
    max: float | None = None
    percentiles: tuple[float, float] | None = None
    top: float | None = Field(None, gt=0, le=1)
    by: str | None = None
    equals: bool | None = None
    one_of: tuple[str, ...] | None = None
    best_of: tuple[str, ...] | None = None
    missing: Literal["reject", "keep"] = "reject"

    @model_validator(mode="after")
    def _asks_something(self) -> Rule:
        asked = (self.min, self.max, self.percentiles, self.top, self.equals, self.one_of)
        if all(value is None for value in asked) and self.best_of is None:
            raise ValueError(
                f"the rule on {self.column} has no bound: give min, max, top or another"
            )
        alone = [name for name in ("one_of", "best_of") if getattr(self, name) is not None]
        if alone and len([value for value in (*asked, self.best_of) if value is not None]) > 1:
            raise ValueError(f"{alone[0]} stands alone: write the other bounds as another rule")
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles {list(self.percentiles)} are not between 0 and 100")
        if self.by and self.percentiles is None and self.top is None:
            raise ValueError("`by` groups percentiles and top: name one of them")
        return self

    def columns(self) -> tuple[str, ...]:
        return (self.column, *((self.by,) if self.by else ()), *(self.best_of or ()))


class Domains(BaseModel):
    """`alpha` of the sampling weights n^alpha; `caps` on the share of a domain, both in the rows
    kept and in what is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(0.5, ge=0, le=1)
    caps: dict[str, float] = {}

    @model_validator(mode="after")
    def _caps_are_shares(self) -> Domains:
        wrong = [f"{name} {cap:g}" for name, cap in self.caps.items() if not 0 < cap <= 1]
        if wrong:
            raise ValueError(f"caps {', '.join(wrong)} are no shares above 0 and up to 1")
        return self


class Query(BaseModel):
    """Rules by name, in the order they are asked; a name is the reason of the rows it rejects."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: dict[str, Rule] = Field(min_length=1)
    domains: Domains = Domains()

    @model_validator(mode="after")
    def _cap_is_ours(self) -> Query:
        if CAP in self.rules:
            raise ValueError(f"{CAP} is the reason of domains.caps: call the rule something else")
        return self

    def columns(self) -> list[str]:
        """What the query reads, ids and domain included."""
        asked = [name for rule in self.rules.values() for name in rule.columns()]
        plain = [source for name in asked for source in DERIVED.get(name, ((name,), None))[0]]
        return list(dict.fromkeys(["id", "domain", *plain]))


@dataclass(frozen=True)
class Step:
    """What one rule did: the bounds it came to (by group), rows in and out of each domain."""

    name: str
    bounds: dict[str, list[float | None]] = field(default_factory=dict)
    rows_in: dict[str, int] = field(default_factory=dict)
    rows_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """reason (N): the step that rejected the row, -1 where it is kept; domain (N): a number into
    `domains`; the funnel."""

    reason: npt.NDArray[np.int16]
    domain: npt.NDArray[np.int32]
    domains: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def kept(self) -> Mask:
        return self.reason < 0


def _short_side(width: Values, height: Values) -> Values:
    return np.minimum(width, height)


def _aspect(width: Values, height: Values) -> Values:
    return np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)


def _pixels(width: Values, height: Values) -> Values:
    return width * height


SIDES = ("width", "height")
DERIVED: dict[str, tuple[tuple[str, ...], Callable[[Values, Values], Values] | None]] = {
    "short_side": (SIDES, _short_side),
    "aspect": (SIDES, _aspect),
    "pixels": (SIDES, _pixels),
}


class _Columns:
    """Columns of a table as arrays; null numbers are NaN, null strings code -1."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def numbers(self, name: str) -> Values:
        sources, derive = DERIVED.get(name, ((name,), None))
        found = [self._number(source) for source in sources]
        return derive(*found) if derive else found[0]

    def _number(self, name: str) -> Values:
        column = self.table[name]
        if pa.types.is_string(column.type):
            raise ValueError(f"column {name} holds text: ask it with one_of")
        return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)

    def codes(self, name: str) -> tuple[npt.NDArray[np.int32], list[str]]:
        column = self.table[name].combine_chunks()
        if not pa.types.is_dictionary(column.type):
            column = pc.cast(column, pa.string()).dictionary_encode()
        codes = pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False)
        return codes, column.dictionary.to_pylist()


def select(table: pa.Table, query: Query) -> Selection:
    """table (N; `query.columns()`) -> the selection. The same columns give the same rows."""
    columns = _Columns(table)
    groups, names = _domains(columns)
    reason = np.full(len(table), -1, np.int16)
    order = id_order(ids_as_integers(table["id"]))
    rank = np.empty(len(table), np.int64)
    rank[order] = np.arange(len(table))
    steps: list[Step] = []

    def step(name: str, rejected: Mask, bounds: dict[str, list[float | None]]) -> None:
        alive = reason < 0
        reason[rejected & alive] = len(steps)
        before, after = (_count(groups, mask, names) for mask in (alive, reason < 0))
        steps.append(Step(name, bounds, before, after))

    for name, rule in query.rules.items():
        step(name, *_ask(rule, columns, reason < 0, rank))
    if query.domains.caps:
        step(CAP, _over_cap(groups, names, reason < 0, order, query.domains), {})
    return Selection(reason, groups, names, tuple(steps))


def _domains(columns: _Columns) -> tuple[Groups, tuple[str, ...]]:
    """Each row's number into the sorted names of the domains; without one it is in `unknown`."""
    codes, found = columns.codes("domain")
    given = [*found, UNKNOWN]
    names = tuple(sorted(set(given) if (codes < 0).any() else set(found)))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(name, 0) for name in given], np.int32)[codes], names


def _count(groups: Groups, mask: Mask, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(groups[mask], minlength=len(names))
    return {name: int(n) for name, n in zip(names, counts, strict=True)}


def _ask(
    rule: Rule, columns: _Columns, alive: Mask, rank: npt.NDArray[np.int64]
) -> tuple[Mask, dict[str, list[float | None]]]:
    """Rows that fail the rule (of all, the caller looks at the living), and the bounds used."""
    if rule.one_of is not None:
        codes, names = columns.codes(rule.column)
        allowed = np.array([*(name in rule.one_of for name in names), rule.missing == "keep"])
        return ~allowed[codes], {}
    if rule.best_of is not None:
        return _not_best(rule, columns, alive, rank), {}
    values = columns.numbers(rule.column)
    absent = np.isnan(values)
    failed = np.zeros(len(values), np.bool_)
    bounds: dict[str, list[float | None]] = {}
    for group, low, high in _bounds(rule, columns, values, alive & ~absent):
        outside = (values < low) | (values > high)
        failed |= outside if group is None else outside & group[1]
        shown: list[float | None] = [float(b) if np.isfinite(b) else None for b in (low, high)]
        bounds["" if group is None else group[0]] = shown
    if rule.equals is not None:
        failed |= values != float(rule.equals)
    failed[absent] = rule.missing == "reject"
    return failed, bounds


def _bounds(
    rule: Rule, columns: _Columns, values: Values, alive: Mask
) -> Iterator[tuple[tuple[str, Mask] | None, float, float]]:
    """(group, lowest, highest value kept) of the whole, or of each value of `by`."""
    groups: list[tuple[str, Mask] | None] = [None]
    if rule.by:
        codes, names = columns.codes(rule.by)
        named = [*enumerate(names), (-1, UNKNOWN)]
        groups = [(name, codes == code) for code, name in named if (codes == code).any()]
    for group in groups:
        low = -np.inf if rule.min is None else rule.min
        high = np.inf if rule.max is None else rule.max
        there = values[alive if group is None else alive & group[1]]
        if rule.percentiles and len(there):
            below, above = np.percentile(there, rule.percentiles)
            low, high = max(low, float(below)), min(high, float(above))
        if rule.top is not None and len(there):
            low = max(low, float(np.quantile(there, 1 - rule.top)))
        yield group, low, high


def _not_best(rule: Rule, columns: _Columns, alive: Mask, rank: npt.NDArray[np.int64]) -> Mask:
    """Of the living rows with one value of the column all but the best; the id settles ties."""
    values = columns.numbers(rule.column)
    rows = np.flatnonzero(alive & ~np.isnan(values))
    keys = [np.nan_to_num(-columns.numbers(name)[rows], nan=np.inf) for name in rule.best_of or ()]
    order = np.lexsort((rank[rows], *reversed(keys), values[rows]))
    ordered = values[rows][order]
    first = np.ones(len(rows), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    failed = np.zeros(len(values), np.bool_)
    failed[rows[order[~first]]] = True
    failed[np.isnan(values)] = rule.missing == "reject"
    return failed


def _over_cap(
    groups: Groups,
    names: Sequence[str],
    alive: Mask,
    order: npt.NDArray[np.int64],
    domains: Domains,
) -> Mask:
    """Living rows beyond their domain's cap; which ones is as good as random, by their ids."""
    counts = _count(groups, alive, names)
    keep = capped_counts({name: n for name, n in counts.items() if n}, domains.caps)
    over = np.zeros(len(groups), np.bool_)
    for code, name in enumerate(names):
        if keep.get(name, 0) < counts[name]:
            rows = order[(groups[order] == code) & alive[order]]
            over[rows[keep[name] :]] = True
    return over


def sweep(
    table: pa.Table, query: Query, rule: str, bound: str, values: Sequence[float]
) -> list[tuple[float, int]]:
    """(value, rows kept) for each value of one bound of one rule. Images are not touched.

    Raises:
        ValueError: no rule of this name, or a bound that is no number.
    """
    if rule not in query.rules or bound not in ("min", "max", "top"):
        known = ", ".join(query.rules)
        raise ValueError(f"{rule}.{bound} cannot be swept: give min, max or top of one of {known}")
    found = []
    for value in values:
        moved = Rule.model_validate({**query.rules[rule].model_dump(), bound: value})
        rules = {**query.rules, rule: moved}
        kept = select(table, query.model_copy(update={"rules": rules})).kept
        found.append((value, int(kept.sum())))
    return found
