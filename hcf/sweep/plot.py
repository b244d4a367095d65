"""One picture: quality against latency with the Pareto front, diversity below it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, Literal

from hcf.errors import MissingDependency
from hcf.quality.intervals import Interval
from hcf.report.grid import replace_file
from hcf.sweep.recipe import LOWER_IS_BETTER, TEACHER
from hcf.sweep.record import SweepRecord
from hcf.sweep.table import METRICS
from hcf.sweep.verdict import group_speedups

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DIVERSITY = "diversity"
APART = 1.04  # marks of one latency
CAPTION = (
    "latency of one image, ms: the teacher's median / the speed-up. Students of the same work\n"
    "have one, their median; their marks are spread around it, and the front's line joins the marks"
)


def draw_plot(record: SweepRecord, path: Path) -> None:
    """PNG; filled marks are trained whole, hollow ones as LoRA.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingDependency(
            f"the plot needs matplotlib: {missing}", fix="pip install 'hcf-toolkit[report]'"
        ) from missing
    metrics = [record.quality, *([DIVERSITY] if record.quality != DIVERSITY else [])]
    figure = Figure(figsize=(9.0, 3.6 + 2.8 * (len(metrics) - 1)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.6, 1.0][: len(metrics)]
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False, height_ratios=heights)
    methods = list(dict.fromkeys(c.method for c in record.cells if c.name != TEACHER))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    for axes, metric in zip(panels[:, 0], metrics, strict=True):
        _draw_metric(axes, record, metric, colours)
    _draw_front(panels[0, 0], record)
    _name_steps(panels[0, 0], record)
    _make_log(panels[-1, 0], "x")
    panels[-1, 0].set_xlabel(CAPTION, fontsize=9)
    _write_around(figure, record, colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(path, buffer.getvalue())


def _write_around(figure: Any, record: SweepRecord, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    figure.suptitle(
        f"{record.name}: {record.images} images a model, {record.engine} {record.precision}",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    marks = [Line2D([], [], color=c, marker="o", ls="", label=m) for m, c in colours.items()]
    marks += [
        Line2D([], [], color="#444444", marker="o", ls="", mfc="none", label="LoRA"),
        Line2D([], [], color="#000000", marker="*", ls="--", label="teacher"),
        Line2D([], [], color="#888888", lw=1.5, label="Pareto front"),
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)


def _make_log(axes: Any, axis: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers, but for 70 and 90, which have no room."""
    from matplotlib.ticker import FuncFormatter

    axes.set(**{f"{axis}scale": "log"})
    lines = axes.xaxis if axis == "x" else axes.yaxis
    lines.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lines.set_minor_formatter(
        FuncFormatter(lambda value, _: "" if f"{value:e}"[0] in "79" else f"{value:g}")
    )
    axes.tick_params(axis=axis, which="both", labelsize=8)


def _draw_metric(axes: Any, record: SweepRecord, metric: str, colours: dict[str, str]) -> None:
    at = _places(record)
    for cell in record.cells:
        found = cell.metrics.get(metric)
        if found is None:
            continue
        teacher = cell.name == TEACHER
        if teacher:
            axes.axhline(found.candidate.value, color="#000000", ls="--", lw=0.9, alpha=0.6)
        if cell.name not in at:
            continue
        colour = "#000000" if teacher else colours[cell.method]
        axes.errorbar(
            [at[cell.name]], [found.candidate.value], yerr=_bars(found.candidate), color=colour,
            marker="*" if teacher else "o", markersize=11 if teacher else 5.5, capsize=2.5,
            mfc="none" if cell.kind == "lora" else colour, elinewidth=0.9, ls="",
        )  # fmt: skip
    axes.tick_params(axis="y", labelsize=8)
    if metric == "fed":  # of one step it is many times that of four
        _make_log(axes, "y")
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    axes.set_ylabel(f"{METRICS[metric][0]} ({better} is better)", fontsize=9)
    axes.grid(alpha=0.3)


def _places(record: SweepRecord) -> dict[str, float]:
    """Where a model stands on the axis of latency: those of one latency side by side."""
    base = next((c.latency_ms for c in record.cells if c.name == TEACHER), None)
    if base is None:
        return {}
    at: dict[float, list[str]] = {}
    for name, speedup in group_speedups(record.cells).items():
        at.setdefault(base / speedup.value, []).append(name)
    return {
        name: ms * APART ** (i - (len(names) - 1) / 2)
        for ms, names in at.items()
        for i, name in enumerate(names)
    }


def _name_steps(axes: Any, record: SweepRecord) -> None:
    at = _places(record)
    for steps in sorted({cell.steps for cell in record.cells if cell.name in at}):
        own = [at[c.name] for c in record.cells if c.steps == steps and c.name in at]
        middle = math.sqrt(min(own) * max(own))
        axes.text(
            middle, 1.0, f"{steps} steps" if steps > 1 else "1 step", fontsize=8, ha="center",
            va="bottom", transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _bars(interval: Interval) -> list[list[float]]:
    value = interval.value
    return [[max(value - interval.low, 0.0)], [max(interval.high - value, 0.0)]]


def _draw_front(axes: Any, record: SweepRecord) -> None:
    at = _places(record)
    front = sorted((c for c in record.cells if c.on_front), key=lambda cell: at[cell.name])
    heights = [cell.metrics[record.quality].candidate.value for cell in front]
    axes.plot([at[c.name] for c in front], heights, color="#888888", lw=1.5, zorder=0)
