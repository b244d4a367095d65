"""The comparison as Markdown: what each model is worth, what it costs, who wins."""

from __future__ import annotations

from collections.abc import Sequence

from hcf.quality.intervals import Interval
from hcf.report.table import number, ratio, speedup_text
from hcf.sweep.recipe import LOWER_IS_BETTER
from hcf.sweep.record import Cell, SweepRecord

METRICS = {
    "fed": ("FED", 2), "clip_zh": ("CLIP-zh", 4), "retrieval_r5": ("R@5 of 64", 3),
    "diversity": ("diversity", 4), "colour": ("colour", 3), "shape": ("shape", 3),
    "count": ("count", 3), "pair": ("pair", 3), "position": ("position", 3),
}  # fmt: skip
QUALITY, RULES = tuple(METRICS)[:4], tuple(METRICS)[4:]
ABOUT = {
    "fed": "Fréchet distance of EfficientNet-Lite0 features, those of our judge, to {references} "
    "reference images; not FID, and not to be compared with it",
    "clip_zh": "cosine of image and caption by our own judge of emoji names; no general CLIP",
    "retrieval_r5": "share of images that have their own caption among the 5 nearest of 64",
    "diversity": "mean pairwise distance of the features of one prompt's images",
}
SIGNS = {"met": "met", "within": "within the interval", "missed": "**missed**"}
FRONT = (
    "Bold in the tables: on the Pareto front, that is no other model has a better {metric} without "
    "being slower. Students with as many calls, network rows and FLOPs do the same work and count "
    "as equally fast, by the median of their speed-ups; between others, slower is what the "
    "intervals of both show."
)
INTERVALS = (
    "Value, then x its ratio to the teacher, each with its 95 % interval over prompts; the ratio's "
    "is paired. Every student was trained once: what another seed of the training would change is "
    "in no interval. ↑: higher is better, ↓: lower is."
)
VERDICTS = (
    "A ratio is student over teacher, a drop is teacher minus student. *Met*: the estimate meets "
    "the bound; its interval may reach past it, and then the verdict says so. *Within the "
    "interval*: the estimate misses the bound, the interval reaches it. *Missed*: all of the "
    "interval misses it."
)
COST = (
    "Latency of one image: the teacher's median, divided by the speed-up in interleaved pairs. "
    "NFE: calls of the denoiser for one image; guidance has two network rows a call. Training: "
    "seconds of the training loop; the teacher's trajectories, which some methods solve before "
    "it, are not counted."
)


def markdown(record: SweepRecord, plot: str) -> str:
    """The page beside comparison.json; `plot` is the picture's relative path."""
    sections = [
        f"# {record.name}",
        _what(record),
        _teacher(record),
        f"![{record.quality} against latency]({plot})",
        FRONT.format(metric=METRICS[record.quality][0]),
        "## Who wins\n\n" + "\n".join(f"- {winner.text}" for winner in record.winners),
        *_judged(record, "Quality", QUALITY),
        *_judged(record, "Rules", RULES),
        f"## Cost\n\n{COST}",
        _cost(record),
        *_goals([cell for cell in record.cells if cell.goals]),
        *_remarks(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(record: SweepRecord) -> str:
    return (
        f"`{record.command}`, {record.date}: {record.model}, {record.images} images of "
        f"{record.prompts} distinct prompts a model from seed {record.seed}, drawn and timed on "
        f"{record.engine} {record.precision}; {record.machine}."
    )


def _teacher(record: SweepRecord) -> str:
    """How the teacher is sampled: what every ratio is over."""
    for cell in record.cells:
        if cell.method == "teacher":
            scale = cell.guidance_scale
            guided = "its own guidance" if scale is None else f"guidance {scale:g}"
            text = f"The teacher: {cell.scheduler}, {cell.steps} steps, {guided}."
            costs = [c.cost for c in record.cells if c is not cell]
            if costs and all(cost.denoiser_rows == cost.denoiser_calls for cost in costs):
                text += " The students' guidance is folded in: one network row a step."
            return text
    return ""


def _judged(record: SweepRecord, title: str, wanted: Sequence[str]) -> list[str]:
    """Heading, legend and table of those of the `wanted` metrics that were computed."""
    names = [n for n in wanted if any(n in cell.metrics for cell in record.cells)]
    if not names:
        return []
    legend = [f"- {title_of(n)}: {_about(record, n)}" for n in names if n in ABOUT]
    if title == "Rules":
        legend = ["Shares of synthetic scenes found right by rule, all ↑: higher is better."]
    rows = [["model", "steps", *(title_of(name) for name in names)]]
    for cell in record.cells:
        shown = f"**{cell.name}**" if cell.on_front else cell.name
        rows.append([shown, str(cell.steps), *(_metric(cell, name) for name in names)])
    said = INTERVALS if title == "Quality" else ""
    parts = [f"## {title}", said, "\n".join(legend), _samples(record, names), _table(rows)]
    return [part for part in parts if part]


def title_of(metric: str) -> str:
    """A metric's heading, with an arrow to where better is."""
    return METRICS[metric][0] + (" ↓" if metric in LOWER_IS_BETTER else " ↑")


def _about(record: SweepRecord, metric: str) -> str:
    count = record.reference_images
    return ABOUT[metric].format(references="the" if count is None else f"{count:,}")


def _samples(record: SweepRecord, names: Sequence[str]) -> str:
    """Images and prompts behind the values, metrics of the same ones together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if found := record.samples.get(name):
            groups.setdefault((found.images, found.prompts), []).append(METRICS[name][0])
    said = [
        f"{', '.join(own)}: {images:,} images of {prompts:,} distinct prompts a model"
        for (images, prompts), own in groups.items()
    ]
    return "; ".join(said) + ("." if said else "")


def _remarks(record: SweepRecord) -> list[str]:
    missing = {f"{m}: {why}" for cell in record.cells for m, why in cell.missing.items()}
    remarks = [*record.notes, *sorted(missing)]
    remarks += [f"left out, {name}: {why}" for name, why in record.failed.items()]
    return ["## Notes", "\n".join(f"- {line}" for line in remarks)] if remarks else []


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
        ["model", "latency ms", "speed-up [95 %]", "NFE (network rows)", "denoiser GFLOP an image",
         "training loop s", "steps", "images seen", "trained share"]
    ]  # fmt: skip
    for cell in record.cells:
        cost = cell.cost
        rows.append([
            cell.name, number(cell.latency_ms, 1), _speedup(cell),
            f"{cost.denoiser_calls} ({cost.denoiser_rows})", number(cost.gflop, 1),
            number(cost.train_s, 0), number(cost.train_steps, 0), number(cost.train_images, 0),
            "-" if cost.trained_share is None else f"{100 * cost.trained_share:.1f} %",
        ])  # fmt: skip
    return _table(rows)


def _speedup(cell: Cell) -> str:
    found = cell.speedup
    if found is None:
        return "-" if cell.method == "teacher" else cell.timing
    clock = " (processor time)" if cell.clock == "processor" else ""
    return speedup_text(found.value, found.low, found.high) + clock


def _goals(cells: Sequence[Cell]) -> list[str]:
    rows = [["model", "goal", "found", "verdict"]]
    for cell in cells:
        for goal in cell.goals:
            met_past = goal.state == "met" and goal.reaches_past
            sign = SIGNS[goal.state] + (" (interval reaches past it)" if met_past else "")
            rows.append([cell.name, f"{goal.metric} {goal.bound}", goal.found, sign])
    return ["## Goals", VERDICTS, _table(rows)] if cells else []


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
