"""The comparison as Markdown: what each model is worth, what it costs, who wins."""

from __future__ import annotations

from hcf.quality.intervals import Interval
from hcf.report.table import number, ratio, speedup_text
from hcf.sweep.record import Cell, SweepRecord

METRICS = {
    "fed": ("FED", 2), "clip_zh": ("CLIP-zh", 4), "retrieval_r5": ("R@5 of 64", 3),
    "diversity": ("diversity", 4), "colour": ("colour", 3), "shape": ("shape", 3),
    "count": ("count", 3), "pair": ("pair", 3), "position": ("position", 3),
}  # fmt: skip
SIGNS = {"met": "met", "within": "within the interval", "missed": "**missed**"}


def markdown(record: SweepRecord, plot: str) -> str:
    """The page beside comparison.json; `plot` is the picture's relative path."""
    goals = [cell for cell in record.cells if cell.goals]
    sections = [
        f"# {record.name}",
        _what(record),
        f"![{record.quality} against latency]({plot})",
        "## Who wins\n\n" + "\n".join(f"- {winner.text}" for winner in record.winners),
        "## Quality\n\nValue, then its ratio to the teacher, each with its 95 % interval over "
        "prompts; the ratio's is paired. Bold: on the Pareto front of latency and "
        f"{record.quality}.\n\n" + _quality(record),
        "## Cost\n\n" + _cost(record),
    ]
    if goals:
        sections.append("## Goals\n\n" + _goals(goals))
    missing = {f"{m}: {why}" for cell in record.cells for m, why in cell.missing.items()}
    remarks = [*record.notes, *sorted(missing)]
    remarks += [f"left out, {name}: {why}" for name, why in record.failed.items()]
    if remarks:
        sections.append("## Notes\n\n" + "\n".join(f"- {line}" for line in remarks))
    return "\n\n".join(sections) + "\n"


def _what(record: SweepRecord) -> str:
    return (
        f"`{record.command}`, {record.date}: {record.model}, {record.images} images of "
        f"{record.prompts} prompts a model from seed {record.seed}, drawn and timed on "
        f"{record.engine} {record.precision}; {record.machine}."
    )


def _quality(record: SweepRecord) -> str:
    names = [n for n in METRICS if any(n in cell.metrics for cell in record.cells)]
    rows = [["model", "steps", *(METRICS[name][0] for name in names)]]
    for cell in record.cells:
        title = f"**{cell.name}**" if cell.on_front else cell.name
        rows.append([title, str(cell.steps), *(_metric(cell, name) for name in names)])
    return _table(rows)


def _metric(cell: Cell, name: str) -> str:
    found = cell.metrics.get(name)
    if found is None:
        return "-"
    text = _bounded(found.candidate, METRICS[name][1])
    if cell.method != "teacher" and found.ratio is not None:
        text += f"<br>x {_bounded(found.ratio, 3)}"
    return text


def _bounded(interval: Interval, digits: int) -> str:
    low, high = number(interval.low, digits), number(interval.high, digits)
    return f"{number(interval.value, digits)} [{low}, {high}]"


def _cost(record: SweepRecord) -> str:
    rows = [
        ["model", "latency ms (p50)", "speed-up [95 %]", "denoiser calls (rows)", "GFLOP an image",
         "training s", "steps", "images seen", "trained share"]
    ]  # fmt: skip
    for cell in record.cells:
        cost, s = cell.cost, cell.speedup
        over = speedup_text(s.value, s.low, s.high) if s else "-"
        if s is None and cell.method != "teacher":
            over = cell.timing
        rows.append([
            cell.name, number(cell.latency_ms, 1), over,
            f"{cost.denoiser_calls} ({cost.denoiser_rows})", number(cost.gflop, 1),
            number(cost.train_s, 0), number(cost.train_steps, 0), number(cost.train_images, 0),
            "-" if cost.trained_share is None else f"{100 * cost.trained_share:.1f} %",
        ])  # fmt: skip
    return _table(rows)


def _goals(cells: list[Cell]) -> str:
    rows = [["model", "goal", "found", "verdict"]]
    for cell in cells:
        for goal in cell.goals:
            bound = f"{goal.metric} {goal.bound}"
            rows.append([cell.name, bound, goal.found, SIGNS[goal.state]])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def summary(record: SweepRecord) -> str:
    """A few lines for the terminal: the winners, and what is missed."""
    lines = [winner.text for winner in record.winners]
    for cell in record.cells:
        wrong = [f"{g.metric} {g.bound}" for g in cell.goals if g.state == "missed"]
        fast = f"{ratio(cell.speedup.value)}x" if cell.speedup else "-"
        if wrong:
            lines.append(f"{cell.name} ({fast}) misses {', '.join(wrong)}")
    return "\n".join(lines)
