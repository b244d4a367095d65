"""Which format for which layers: an integer program over measured errors and costs.

A group of layers takes one of its options; option o has squared error e_o and cost c_o, and both
add up over the groups (see `hcf.quantize.sensitivity`). Then for binary x

    min sum e_o x_o   with  sum c_o x_o <= budget,  or  min sum c_o x_o  with  sum e_o x_o <= bound

is solved to the optimum by HiGHS through `scipy.optimize.milp`. Where the sum of errors is not the
error of the sum, `exchange` improves the choice by moves that are judged by the true error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from hcf.artifact import save_text
from hcf.errors import MissingDependency, RecipeError

Log = Callable[[str], None]
FLOATING = "none"
TRIED_MOVES = 16  # a round of exchange tries at most so many


@dataclass(frozen=True)
class Option:
    """Layers that are chosen together, in one format ("none": floating point)."""

    layers: tuple[str, ...]
    format: str
    error: float
    """Relative error of the output when only they are quantised."""
    cost: float
    """In the unit of the cost model: milliseconds, or one of its own."""


Choice = Mapping[tuple[str, ...], Option]


@dataclass(frozen=True)
class Point:
    """One choice of the Pareto front: predicted cost and error, layers by format."""

    cost: float
    error: float
    formats: dict[str, int]


def choose(
    options: Sequence[Option], *, budget: float | None = None, max_error: float | None = None
) -> dict[tuple[str, ...], Option]:
    """The option of every group: least error within `budget`, or least cost within `max_error`.

    Raises RecipeError where no choice keeps the bound, saying what could be reached.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups = {layers: i for i, layers in enumerate(dict.fromkeys(o.layers for o in options))}
    error = np.array([o.error**2 for o in options])
    cost = np.array([o.cost for o in options])
    one = np.zeros((len(groups), len(options)))
    for i, option in enumerate(options):
        one[groups[option.layers], i] = 1
    if budget is not None:
        objective, bounded, bound = error, cost, budget
    elif max_error is not None:
        objective, bounded, bound = cost, error, max_error**2
    else:
        raise ValueError("give a budget or a max_error")
    # both sides near 1, so that the solver's absolute tolerances mean the same everywhere
    scale = max(float(np.abs(objective).max()), 1e-300)
    unit = abs(bound) if bound else max(float(np.abs(bounded).max()), 1e-300)
    found = milp(
        objective / scale,
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(bounded[None] / unit, -np.inf, bound / unit),
        ],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60.0},
    )
    if found.x is None:
        least = sum(min(bounded[one[i] == 1]) for i in range(len(groups)))
        if budget is not None:
            raise RecipeError(
                f"no choice of formats costs at most {budget:.4g}: the cheapest costs {least:.4g}",
                fix="raise the latency ratio, or offer faster formats",
            )
        raise RecipeError(
            f"no choice of formats has a relative error of at most {max_error:.4g}: the least is "
            f"{math.sqrt(least):.4g}",
            fix="raise the bound, or offer more exact formats",
        )
    return {o.layers: o for o, x in zip(options, found.x, strict=True) if x > 0.5}


def cost_of(choice: Choice) -> float:
    """Predicted cost of a choice."""
    return sum(option.cost for option in choice.values())


def predicted_error(choice: Choice) -> float:
    """Predicted relative error of a choice."""
    return math.sqrt(sum(option.error**2 for option in choice.values()))


def layer_formats(choice: Choice) -> dict[str, str]:
    """Layer -> format, "none" for floating point."""
    return {layer: o.format for o in choice.values() for layer in o.layers}


def pareto(options: Sequence[Option], count: int = 24) -> list[Point]:
    """The front from the cheapest choice to the most exact one, at `count` budgets, cost rising."""
    by_group: dict[tuple[str, ...], list[Option]] = {}
    for option in options:
        by_group.setdefault(option.layers, []).append(option)
    low = sum(min(o.cost for o in each) for each in by_group.values())
    exact = [min(each, key=lambda o: (o.error, o.cost)) for each in by_group.values()]
    high = max(sum(o.cost for o in exact), low)
    points: list[Point] = []
    for share in np.linspace(0, 1, count):
        # a hair above the least cost: the sum of minima rounds
        budget = (low + (high - low) * float(share)) * (1 + 1e-9) + 1e-12
        choice = choose(options, budget=budget)
        formats: dict[str, int] = {}
        for format in layer_formats(choice).values():
            formats[format] = formats.get(format, 0) + 1
        point = Point(cost_of(choice), predicted_error(choice), dict(sorted(formats.items())))
        if not points or point.error < points[-1].error:
            points.append(point)
    return points


def exchange(
    options: Sequence[Option],
    choice: Choice,
    true_error: Callable[[dict[str, str]], float],
    *,
    budget: float,
    rounds: int,
    log: Log = lambda line: None,
) -> tuple[dict[tuple[str, ...], Option], float]:
    """Exchanges within `budget` that lower the true error; returns choice and true error.

    A move forces one group to another option and solves the program again for the others, so that
    what it costs is given back where it harms least. Moves that are better by `true_error` stay.
    """
    best, error = dict(choice), true_error(layer_formats(choice))
    forced: dict[tuple[str, ...], Option] = {}
    tried: set[Option] = set()
    for turn in range(rounds):
        kept = 0
        for option in [o for o in _moves(options, best) if o not in tried][:TRIED_MOVES]:
            tried.add(option)
            held = {**forced, option.layers: option}
            try:
                candidate = choose(
                    [o for o in options if held.get(o.layers, o) == o], budget=budget
                )
            except RecipeError:
                continue  # it does not fit with what is forced already
            found = true_error(layer_formats(candidate))
            if found < error:
                best, error, forced, kept = candidate, found, held, kept + 1
        log(f"sensitivity: exchange round {turn + 1}: {kept} moves kept, true error {error:.5f}")
        if not kept:
            break
    return best, error


def _moves(options: Sequence[Option], choice: Choice) -> list[Option]:
    """Options that are not chosen, most promising first.

    In turn the groups of the largest error made more exact, and those that cost most for the error
    they avoid made cheaper.
    """
    others = [o for o in options if choice[o.layers] != o]
    exact = [o for o in others if o.error < choice[o.layers].error]
    cheap = [o for o in others if o.error >= choice[o.layers].error]
    exact.sort(key=lambda o: o.error**2 - choice[o.layers].error ** 2)
    cheap.sort(
        key=lambda o: (
            (o.error**2 - choice[o.layers].error ** 2) / max(choice[o.layers].cost - o.cost, 1e-12)
        )
    )
    turns = zip_longest(exact, cheap)
    return [option for pair in turns for option in pair if option is not None]


def draw_front(
    points: Sequence[Point], marks: Mapping[str, tuple[float, float]], unit: str, path: Path
) -> None:
    """PNG of the front with named (cost, error) marks; MissingDependency without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingDependency(
            f"the Pareto chart needs matplotlib: {missing}", fix="pip install 'hcf-toolkit[report]'"
        ) from missing
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([p.cost for p in points], [p.error for p in points], "o-", ms=3, label="Pareto front")
    for name, (cost, error) in marks.items():
        axes.plot([cost], [error], "s", label=name)
    axes.set_xlabel(f"predicted cost of the layers ({unit})")
    axes.set_ylabel("relative error of the prediction")
    axes.set_yscale("log") if all(p.error > 0 for p in points) else axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def write_front(points: Sequence[Point], tree: Mapping[str, object], path: Path) -> None:
    """JSON: `tree` (what was searched, how) and the front."""
    front = [vars(point) for point in points]
    save_text(path, json.dumps({**tree, "front": front}, indent=1, ensure_ascii=False))
