"""Which goals a student misses, which students nothing beats, and who wins with how many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
            if interval is None:
                state: State = "missed"
                said = "the ratio cannot be computed: the teacher's value may be 0 or less"
            else:
                state = _state(interval, least, most)
                said = f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
            goals.append(Goal(metric=metric, bound=bound, state=state, found=said))
    return tuple(goals)


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


def pareto(cells: Sequence[Cell], quality: str) -> set[str]:
    """Names of the models that no other is better than without being slower.

    Slower is what the intervals of both speed-ups show: students of as many steps do the same work,
    and the last per cent of their medians is noise.
    """
    sign = 1.0 if quality in LOWER_IS_BETTER else -1.0
    points: dict[str, tuple[float, float, float]] = {}  # shortest and longest time, loss
    for cell in cells:
        over = Interval(1, 1, 1) if cell.name == TEACHER else cell.speedup
        if over is not None and cell.latency_ms is not None and quality in cell.metrics:
            loss = sign * cell.metrics[quality].candidate.value
            points[cell.name] = 1 / over.high, 1 / over.low, loss
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
    """For every number of steps: the student with the fewest goals missed, then the best quality.

    One whose ratio to the winner has 1 in its interval is not told apart from it. Rows in which
    the metric is missing cannot win.
    """
    students = [cell for cell in cells if cell.name != TEACHER and quality in cell.metrics]
    found = []
    for steps in sorted({cell.steps for cell in students}):
        own = [cell for cell in students if cell.steps == steps]
        best = min(own, key=lambda cell: _rank(cell, quality))
        tied = [c for c in own if c is not best and _missed(c) <= _missed(best)]
        tied = [c for c in tied if _tied(evaluations[best.name], evaluations[c.name], quality)]
        cheapest = min([best, *tied], key=lambda cell: cell.cost.train_s or 0.0)
        found.append(_winner(steps, best, tied, cheapest, quality, alone=len(own) == 1))
    return tuple(found)


def _rank(cell: Cell, quality: str) -> tuple[int, float]:
    value = cell.metrics[quality].candidate.value
    return _missed(cell), value if quality in LOWER_IS_BETTER else -value


def _missed(cell: Cell) -> int:
    return sum(goal.state == "missed" for goal in cell.goals)


def _tied(best: Evaluation, other: Evaluation, quality: str) -> bool:
    difference = paired(best, other)[quality].difference
    return difference.low <= 0 <= difference.high


def _winner(
    steps: int, best: Cell, tied: Sequence[Cell], cheapest: Cell, quality: str, *, alone: bool
) -> Winner:
    value = best.metrics[quality].candidate
    text = f"{steps} step{'s' if steps > 1 else ''}: {best.name}"
    text += f" ({quality} {value.value:.4g} [{value.low:.4g}, {value.high:.4g}])"
    if alone:
        text += ", the only one"
    elif tied:
        text += f"; not told apart from it: {', '.join(cell.name for cell in tied)}"
    else:
        text += ", ahead of every other by more than the interval"
    if cheapest is not best:
        text += f"; of these {cheapest.name} trained for the least time"
    wrong = [f"{goal.metric} {goal.bound}" for goal in best.goals if goal.state == "missed"]
    if wrong:
        text += f"; it misses {', '.join(wrong)}"
    return Winner(
        steps=steps, name=best.name, tied=tuple(c.name for c in tied), cheapest=cheapest.name,
        text=text,
    )  # fmt: skip
