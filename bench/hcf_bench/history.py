"""A workload over commits: p50 with its spread above, the ratio to the baseline below.

The ratio is the panel to trust. Absolute times drift with the state of a machine from one day to
the next; baseline and candidate of one run share that state.
"""

from __future__ import annotations

import difflib
import html
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hcf.errors import MissingDependency, RecipeError, StorageError
from hcf_bench.environment import same_environment
from hcf_bench.records import Record, Row, read_records
from hcf_bench.report import bounds_text, number_text, row_p50, write_text
from hcf_bench.results import Bounds
from hcf_bench.statistics import percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale on white; markers tell series apart
# where colours cannot.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
MOST_TICKS: Final = 14
TIMES: Final = (
    "Times: median of a run, bars from its 10th to its 90th percentile. They drift with the state "
    "of the machine. Dotted line: the environment changed."
)
RATIOS: Final = (
    " Speed-up: time of the baseline over time of the subject, from interleaved pairs, with its "
    "95 % interval; above 1 is faster. This is the panel to trust."
)


@dataclass(frozen=True)
class Point:
    """One run of one series. `low_ms`, `high_ms`: p10 and p90, None where no samples are kept."""

    run: int
    date: str
    commit: str
    p50_ms: float
    low_ms: float | None
    high_ms: float | None
    baseline: str
    speedup: Bounds | None
    verdict: str


@dataclass(frozen=True)
class Run:
    """One record on the time axis; `changed` is what differs from the environment before it."""

    date: str
    commit: str
    name: str
    changed: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """One workload on one machine; series by subject, dtype and batch."""

    machine: str
    workload: str
    runs: tuple[Run, ...]
    series: dict[str, tuple[Point, ...]]


def read_history(
    results: Path, workload: str, *, machine: str = "", subjects: Sequence[str] = ()
) -> History:
    """The timed rows of a workload, oldest first.

    Args:
        results: folder of records.
        workload: its name.
        machine: folder of one machine below `results`; needed where there are several.
        subjects: only these; all by default.

    Raises:
        RecipeError: no such machine, workload or subject in the records, or several machines.
        InvalidArtifact: a record that cannot be read.
    """
    stored = read_records(results)
    machines = sorted({path.parent.name for path, _ in stored})
    if not machine and len(machines) > 1:
        raise RecipeError(
            f"{results} holds {len(machines)} machines, whose times cannot share an axis",
            "choose one: " + ", ".join(machines),
        )
    machine = machine or (machines[0] if machines else "")
    if machine not in machines:
        raise RecipeError(
            f"no records of {machine or 'any machine'} in {results}", _near(machine, machines)
        )
    records = [record for path, record in stored if path.parent.name == machine]
    held = [
        (record, row) for record in records for row in record.rows
        if row.status == "ok" and row_p50(row) is not None
    ]  # fmt: skip
    found = [(record, row) for record, row in held if row.workload == workload]
    if not found:
        names = sorted({row.workload for _, row in held})
        raise RecipeError(f"no timed rows of {workload} on {machine}", _near(workload, names))
    known = {row.subject for _, row in found}
    for subject in subjects:
        if subject not in known:
            raise RecipeError(
                f"no timed rows of {subject} for {workload}", _near(subject, sorted(known))
            )
    chosen = [(record, row) for record, row in found if not subjects or row.subject in subjects]
    return _history(machine, workload, chosen)


def plot_history(history: History) -> Figure:
    """Draws both panels; the lower one only where a ratio was measured.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(
            "the history plot needs matplotlib", "pip install 'hcf-toolkit[report]'"
        ) from error

    points = [point for series in history.series.values() for point in series]
    ratios = _has_ratios(history)
    figure = Figure(figsize=(10.0, 7.2 if ratios else 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if ratios else 1, 1, sharex=True, squeeze=False)[:, 0]
    handles = []
    for i, series in enumerate(history.series.values()):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5, "linewidth": 1.3, "elinewidth": 1.0, "capsize": 3.0,
        }  # fmt: skip
        at = _places(i, len(history.series), series)
        handles.append(_draw_times(axes[0], at, series, style))
        if ratios:
            _draw_ratios(axes[1], at, series, style)
    _dress(axes, history, points, ratios)
    figure.supxlabel(
        textwrap.fill(caption(history), 160), x=0.01, ha="left", fontsize=7.5, color="#444444"
    )
    axes[0].set_title(f"{history.workload} on {history.machine}", loc="left", fontsize=11)
    figure.legend(
        handles, list(history.series), loc="outside upper left", fontsize=8, frameon=False,
        ncols=min(len(handles), 3),
    )  # fmt: skip
    return figure


def caption(history: History) -> str:
    """How to read the plot, and which panel to trust."""
    return TIMES + (RATIOS if _has_ratios(history) else "")


def history_html(history: History) -> str:
    """A page that needs nothing else: the plot as inline SVG and a table of every run."""
    figure = plot_history(history)
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the same records make the same page.
    with matplotlib.rc_context({"svg.hashsalt": "hcf", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    title = html.escape(f"{history.workload} on {history.machine}")
    tables = "\n".join(_table(history, name) for name in history.series)
    return PAGE.format(title=title, svg=svg, caption=html.escape(caption(history)), tables=tables)


def write_history(history: History, folder: Path) -> tuple[Path, Path]:
    """Writes `<workload>-<machine>.png` and `.html` into a folder and returns both.

    Raises:
        StorageError: the folder cannot be written.
    """
    stem = f"{history.workload.replace('/', '-')}-{history.machine}"
    page = write_text(folder / f"{stem}.html", history_html(history))
    picture = folder / f"{stem}.png"
    try:
        plot_history(history).savefig(picture, metadata={"Software": None})
    except OSError as error:
        picture.unlink(missing_ok=True)
        raise StorageError(f"{picture} cannot be written: {error}", "free some space") from error
    return picture, page


def _has_ratios(history: History) -> bool:
    return any(point.speedup for series in history.series.values() for point in series)


def _history(machine: str, workload: str, rows: Sequence[tuple[Record, Row]]) -> History:
    records = list({id(record): record for record, _ in rows}.values())
    runs = []
    for i, record in enumerate(records):
        before = records[i - 1].environment if i else record.environment
        changed = same_environment(before, record.environment)
        runs.append(Run(record.date.isoformat(), record.commit[:7], record.name, tuple(changed)))
    series: dict[str, list[Point]] = {}
    for record, row in rows:
        name = f"{row.subject} {row.dtype}, batch {row.batch}"
        if row.device != "cpu":
            name += f", {row.device}"
        run = next(i for i, other in enumerate(records) if other is record)
        series.setdefault(name, []).append(_point(run, record, row))
    return History(machine, workload, tuple(runs), {k: tuple(v) for k, v in series.items()})


def _point(run: int, record: Record, row: Row) -> Point:
    samples = row.latency.samples_ms if row.latency else ()
    p50 = row_p50(row)
    assert p50 is not None
    return Point(
        run=run,
        date=record.date.isoformat(),
        commit=record.commit[:7],
        p50_ms=p50,
        low_ms=percentile(samples, 10) if samples else None,
        high_ms=percentile(samples, 90) if samples else None,
        baseline=row.baseline,
        speedup=row.speedup,
        verdict=row.verdict.value if row.verdict else "",
    )


def _places(i: int, count: int, series: Sequence[Point]) -> list[float]:
    """Places on the axis, shifted a little per series so that the bars do not cover each other."""
    shift = 0.0 if count == 1 else (i / (count - 1) - 0.5) * min(0.05 * count, 0.4)
    return [point.run + shift for point in series]


def _draw_times(axis: Any, at: list[float], series: Sequence[Point], style: dict[str, Any]) -> Any:
    p50 = [point.p50_ms for point in series]
    # p50 lies between p10 and p90 of the same samples; max() only guards against rounding
    low = [math.nan if p.low_ms is None else max(p.p50_ms - p.low_ms, 0.0) for p in series]
    high = [math.nan if p.high_ms is None else max(p.high_ms - p.p50_ms, 0.0) for p in series]
    return axis.errorbar(at, p50, yerr=[low, high], **style)


def _draw_ratios(
    axis: Any, at: list[float], series: Sequence[Point], style: dict[str, Any]
) -> None:
    held = [(x, p.speedup) for x, p in zip(at, series, strict=True) if p.speedup]
    if held:
        value = [s.value for _, s in held]
        low = [max(s.value - s.low, 0.0) for _, s in held]
        high = [max(s.high - s.value, 0.0) for _, s in held]
        axis.errorbar([x for x, _ in held], value, yerr=[low, high], **style)


def _dress(axes: Any, history: History, points: Sequence[Point], ratios: bool) -> None:
    """Axes, ticks, grid, and a dotted line where the environment changed."""
    top, bottom = axes[0], axes[-1]
    times = [point.p50_ms for point in points]
    if max(times) > 8 * min(times):
        top.set_yscale("log")
    else:
        top.set_ylim(bottom=0)
    top.set_ylabel("time of one call, ms")
    if ratios:
        names = sorted({point.baseline for point in points if point.speedup and point.baseline})
        bottom.axhline(1.0, color="#777777", linewidth=1.0)
        bottom.set_ylabel(f"speed-up over\n{', '.join(names) or 'the baseline'}, times")
    count = len(history.runs)
    step = -(-count // MOST_TICKS)
    # counted from the newest, which must have its label
    shown = list(range(count - 1, -1, -step))[::-1]
    bottom.set_xticks(shown, [f"{history.runs[i].date}\n{history.runs[i].commit}" for i in shown])
    bottom.tick_params(axis="x", labelsize=7.5)
    if len(shown) > 8:
        for label in bottom.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    bottom.set_xlim(-0.6, count - 0.4)
    bottom.set_xlabel("date and commit of the run")
    for axis in axes:
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for i, run in enumerate(history.runs):
            if run.changed:
                axis.axvline(i - 0.5, color="#777777", linestyle=":", linewidth=1.2)


def _table(history: History, name: str) -> str:
    heads = ("date", "commit", "run", "p50 ms", "p10 to p90", "speed-up [95 %]", "verdict",
             "environment")  # fmt: skip
    rows = []
    for point in history.series[name]:
        run = history.runs[point.run]
        spread = (
            "-" if point.low_ms is None or point.high_ms is None
            else f"{number_text(point.low_ms)} to {number_text(point.high_ms)}"
        )  # fmt: skip
        cells = (
            point.date, point.commit, run.name, number_text(point.p50_ms), spread,
            bounds_text(point.speedup), point.verdict or "-",
            "changed: " + "; ".join(run.changed) if run.changed else "as before",
        )  # fmt: skip
        mark = ' class="changed"' if run.changed else ""
        texts = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
        rows.append(f"<tr{mark}>{texts}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(rows)
    return f"<h2>{html.escape(name)}</h2>\n<table><tr>{head}</tr>\n{body}\n</table>"


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return (
        "did you mean " + " or ".join(close)
        if close
        else "there is " + (", ".join(names) or "nothing")
    )


PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }}
tr.changed td {{ background: #fff4d6; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin-top: 1.6rem; }}
</style></head><body>
<h1>{title}</h1>
{svg}
<p>{caption}</p>
{tables}
</body></html>
"""
