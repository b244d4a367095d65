"""Which goals a student misses, which students nothing beats, and who wins with how many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from hcf.quality.evaluate import Evaluation, paired
from hcf.quality.gate import describe
from hcf.quality.intervals import Interval, Paired
from hcf.settings import Threshold
from hcf.sweep.recipe import LOWER_IS_BETTER, TEACHER
from hcf.sweep.record import Cell, Goal, State, Winner


def judge_goals(
    thresholds: Mapping[str, Threshold], metrics: Mapping[str, Paired], missing: Mapping[str, str]
) -> tuple[Goal, ...]:
    """Every bound against the estimate and its interval."""
    goals = []
    for metric, threshold in thresholds.items():
        found = metrics.get(metric)
        if found is None:
            said = f"cannot be computed: {missing.get(metric, 'no interval')}"
            goals.append(Goal(metric=metric, bound=describe(threshold), state="missed", found=said))
            continue
        for bound, interval, least, most in _bounds(threshold, found):
            goals.append(_judge_goal(metric, bound, interval, least, most))
    return tuple(goals)


def _judge_goal(
    metric: str, bound: str, interval: Interval | None, least: float | None, most: float | None
) -> Goal:
    if interval is None:
        said = "the ratio cannot be computed: the teacher's value may be 0 or less"
        return Goal(metric=metric, bound=bound, state="missed", found=said)
    return Goal(
        metric=metric,
        bound=bound,
        state=_state(interval, least, most),
        found=f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]",
        reaches_past=_reaches_past(interval, least, most),
    )


def _bounds(
    threshold: Threshold, found: Paired
) -> list[tuple[str, Interval | None, float | None, float | None]]:
    """(words, interval, least, most) of each bound that is set."""
    d = found.difference
    drop = Interval(-d.value, -d.high, -d.low)
    rows: list[tuple[Threshold, Interval | None, float | None, float | None]] = [
        (Threshold(min=threshold.min), found.candidate, threshold.min, None),
        (Threshold(max=threshold.max), found.candidate, None, threshold.max),
        (Threshold(ratio_min=threshold.ratio_min), found.ratio, threshold.ratio_min, None),
        (Threshold(ratio_max=threshold.ratio_max), found.ratio, None, threshold.ratio_max),
        (Threshold(drop_max=threshold.drop_max), drop, None, threshold.drop_max),
    ]
    return [
        (describe(words), interval, least, most)
        for words, interval, least, most in rows
        if least is not None or most is not None
    ]


def _state(interval: Interval, least: float | None, most: float | None) -> State:
    # differences of shares like 0.95 - 0.93 must not miss by the last bit
    value = round(interval.value, 9)
    if (least is None or value >= least) and (most is None or value <= most):
        return "met"
    reached = interval.high >= least if least is not None else interval.low <= (most or 0.0)
    return "within" if reached else "missed"


def _reaches_past(interval: Interval, least: float | None, most: float | None) -> bool:
    low, high = round(interval.low, 9), round(interval.high, 9)
    return (least is not None and low < least) or (most is not None and high > most)


def group_speedups(cells: Sequence[Cell]) -> dict[str, Interval]:
    """Speed-up over the teacher by name: the median of the students that do the same work.

    As many calls, rows and FLOPs are the same computation; what their timings differ by is noise.
    """
    found: dict[str, Interval] = {}
    groups: dict[tuple[int, int, float], dict[str, Interval]] = {}
    for cell in cells:
        cost = cell.cost
        if cell.name == TEACHER and cell.latency_ms is not None:
            found[cell.name] = Interval(1, 1, 1)
        elif cell.speedup is not None:
            work = cost.denoiser_calls, cost.denoiser_rows, cost.gflop
            groups.setdefault(work, {})[cell.name] = cell.speedup
    for own in groups.values():
        found |= dict.fromkeys(own, _median(list(own.values())))
    return found


def _median(intervals: Sequence[Interval]) -> Interval:
    sides = ("value", "low", "high")
    value, low, high = (median(getattr(i, side) for i in intervals) for side in sides)
    return Interval(value, low, high)


def pareto(cells: Sequence[Cell], quality: str) -> set[str]:
    """Names of the models that no other is better than without being slower.

    Students of the same work are equally fast; between others, slower is what the intervals of both
    speed-ups show: the last per cent of their medians is noise too.
    """
    speed = group_speedups(cells)
    points: dict[str, tuple[float, float, float]] = {}  # shortest and longest time, loss
    for cell in cells:
        if cell.name in speed and quality in cell.metrics:
            over = speed[cell.name]
            points[cell.name] = 1 / over.high, 1 / over.low, _loss(cell, quality)
    return {
        name
        for name, (shortest, longest, loss) in points.items()
        if not any(
            (other_loss < loss and low <= longest) or (other_loss == loss and high < shortest)
            for low, high, other_loss in points.values()
        )
    }


def winners(
    cells: Sequence[Cell], evaluations: Mapping[str, Evaluation], quality: str
) -> tuple[Winner, ...]:
    """For every number of steps: of the students that miss the fewest goals, the best quality.

    Those whose difference from it has 0 in its interval tie with it; of them the one that meets
    the most goals wins. Rows in which the metric is missing cannot win.
    """
    students = [cell for cell in cells if cell.name != TEACHER and quality in cell.metrics]
    found = []
    for steps in sorted({cell.steps for cell in students}):
        own = [cell for cell in students if cell.steps == steps]
        rivals = [cell for cell in own if _count(cell, "missed") == _fewest_missed(own)]
        best = min(rivals, key=lambda cell: _loss(cell, quality))
        ties = [c for c in rivals if _tied(evaluations[best.name], evaluations[c.name], quality)]
        chosen = min(ties, key=lambda cell: (-_count(cell, "met"), _loss(cell, quality)))
        text = _steps(steps) + ": " + "; ".join(_sentence(chosen, best, ties, rivals, own, quality))
        tied = tuple(cell.name for cell in ties if cell is not chosen)
        found.append(Winner(steps=steps, name=chosen.name, tied=tied, text=text))
    return tuple(found)


def _steps(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _loss(cell: Cell, quality: str) -> float:
    value = cell.metrics[quality].candidate.value
    return value if quality in LOWER_IS_BETTER else -value


def _count(cell: Cell, state: State) -> int:
    return sum(goal.state == state for goal in cell.goals)


def _fewest_missed(cells: Sequence[Cell]) -> int:
    return min(_count(cell, "missed") for cell in cells)


def _tied(best: Evaluation, other: Evaluation, quality: str) -> bool:
    difference = paired(best, other)[quality].difference
    return difference.low <= 0 <= difference.high


def _sentence(
    chosen: Cell,
    best: Cell,
    ties: Sequence[Cell],
    rivals: Sequence[Cell],
    own: Sequence[Cell],
    quality: str,
) -> list[str]:
    """Who wins and why, in clauses; every "ahead" and "tie" is among those that miss as few."""
    value = chosen.metrics[quality].candidate
    who = f"{chosen.name} ({quality} {value.value:.4g} [{value.low:.4g}, {value.high:.4g}])"
    as_few = "" if len(rivals) == len(own) else " that misses as few goals"
    if len(rivals) == 1:
        said = [f"{who}, the only one" + (" that misses so few goals" if as_few else "")]
    elif len(ties) == 1:
        said = [f"{who}, ahead of every other{as_few} by more than the interval"]
    else:
        said = [who, *_said_of_ties(chosen, best, ties)]
    passed = [c for c in own if c not in rivals and _loss(c, quality) < _loss(chosen, quality)]
    if passed:
        names = ", ".join(cell.name for cell in passed)
        said.append(f"chosen over {names}, better in {quality}, for missing fewer goals")
    wrong = [f"{goal.metric} {goal.bound}" for goal in chosen.goals if goal.state == "missed"]
    return said + ([f"it misses {', '.join(wrong)}"] if wrong else [])


def _said_of_ties(chosen: Cell, best: Cell, ties: Sequence[Cell]) -> list[str]:
    others = ", ".join(cell.name for cell in ties if cell not in (chosen, best))
    if chosen is best:
        return [f"not told apart from it: {others}"]
    said = [f"not told apart from {best.name}, the best estimate, and meets more goals"]
    return said + ([f"nor told apart from {best.name}: {others}"] if others else [])
