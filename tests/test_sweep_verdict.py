"""`hcf sweep`: goals against intervals, who wins, what is on the front, what the page says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcf.errors import InvalidArtifact
from hcf.quality.evaluate import Evaluation
from hcf.quality.intervals import Interval, Paired, mean_draws, resample
from hcf.settings import Threshold
from hcf.sweep.plot import APART, _draw_metric, _places
from hcf.sweep.record import Cell, Cost, Goal, Sample, SweepRecord, read_record, write_record
from hcf.sweep.table import markdown
from hcf.sweep.verdict import group_speedups, judge_goals, pareto, winners


def between(value: float, low: float, high: float, base: float = 1.0) -> Paired:
    whole = Interval(value, low, high)
    over = Interval(value / base, low / base, high / base)
    less = Interval(value - base, low - base, high - base)
    return Paired(Interval(base, base, base), whole, over, less)


@pytest.mark.parametrize(
    ("bound", "value", "low", "high", "state"),
    [
        ({"ratio_max": 1.05}, 1.04, 1.0, 1.08, "met"),
        ({"ratio_max": 1.0}, 1.02, 0.99, 1.05, "within"),
        ({"ratio_max": 1.0}, 1.02, 1.01, 1.03, "missed"),
        ({"ratio_min": 0.95}, 0.94, 0.93, 0.96, "within"),
        ({"min": 2}, 1.0, 0.9, 1.1, "missed"),
        ({"drop_max": 0.02}, 0.98, 0.95, 1.0, "met"),
        ({"drop_max": 0.02}, 0.97, 0.95, 0.99, "within"),
        ({"drop_max": 0.02}, 0.9, 0.88, 0.92, "missed"),
    ],
)
def test_goals_are_held_against_the_interval(
    bound: dict[str, float], value: float, low: float, high: float, state: str
) -> None:
    (goal,) = judge_goals({"fed": Threshold(**bound)}, {"fed": between(value, low, high)}, {})
    assert goal.state == state
    assert goal.reaches_past == (low < 1 or state != "met" or bound == {"ratio_max": 1.05})


def test_a_goal_that_its_whole_interval_meets_is_met_outright() -> None:
    (goal,) = judge_goals({"fed": Threshold(ratio_max=1.1)}, {"fed": between(1.0, 0.9, 1.1)}, {})
    assert (goal.state, goal.reaches_past) == ("met", False)


def cell(
    name: str, ms: float, fed: float, *, steps: int = 4, state: Any = "met", work: float = 0
) -> Cell:
    cost = Cost(train_s=ms, denoiser_calls=1, denoiser_rows=1, gflop=work or ms)
    return Cell(
        name=name, method="teacher" if name == "teacher" else "m", kind="full", steps=steps,
        guidance_scale=1, content_hash="",
        metrics={"fed": between(fed, fed, fed)}, latency_ms=ms, timing="", cost=cost,
        speedup=Interval(9 / ms, 8.9 / ms, 9.1 / ms),
        goals=(Goal(metric="diversity", bound="ratio >= 0.95", state=state, found=""),),
    )  # fmt: skip


def test_the_front_holds_what_nothing_beats() -> None:
    cells = [cell("a", 1, 3), cell("b", 2, 2), cell("c", 2, 4), cell("d", 3, 2), cell("e", 3, 1)]
    cells.append(cell("f", 1.99, 2.5))  # faster than b by noise alone
    assert pareto(cells, "fed") == {"a", "b", "e"}
    assert pareto([*cells, cell("teacher", 9, 0.5)], "fed") == {"a", "b", "e", "teacher"}


def test_students_of_the_same_work_are_equally_fast() -> None:
    cells = [cell("a", 1, 3, work=5), cell("b", 2, 2, work=5), cell("c", 1.5, 4, work=5)]
    assert {s.value for s in group_speedups(cells).values()} == {6}
    assert pareto(cells, "fed") == {"b"}


def test_marks_are_spread_around_the_latency_of_their_work() -> None:
    cells = [cell(n, ms, 1, work=5) for n, ms in (("a", 2.9), ("b", 3), ("c", 3.2))]
    at = _places(record_of([cell("teacher", 9, 1), *cells, cell("d", 1, 1)]))
    expected = {"teacher": 9, "a": 3 / APART, "b": 3, "c": 3 * APART, "d": 1}
    assert at == pytest.approx(expected)
    assert _places(record_of(cells)) == {}


def test_fed_is_on_a_logarithmic_axis_and_diversity_is_not() -> None:
    figure = pytest.importorskip("matplotlib.figure")
    record = record_of([cell("teacher", 9, 20), cell("a", 1, 200)])
    axes = figure.Figure().subplots()
    _draw_metric(axes, record, "diversity", {"m": "#000000"})
    assert axes.get_yscale() == "linear"
    _draw_metric(axes, record, "fed", {"m": "#000000"})
    assert axes.get_yscale() == "log"
    assert axes.yaxis.get_major_formatter()(100) == "100"


def judged_by_name(shifts: dict[str, float]) -> dict[str, Evaluation]:
    """FED of 40 prompts a model, moved from what they share."""
    rng, group = np.random.default_rng(0), np.arange(40)
    weights, shared = resample(40, seed=0), rng.normal(10, 3, 40)

    def judged(shift: float) -> Evaluation:
        noise = rng.normal(0, 0.1, 40)
        each = shared + shift + noise - noise.mean()
        own = mean_draws(each, group, weights)
        return Evaluation({"fed": float(each.mean())}, {}, draws={"fed": own})

    return {name: judged(shift) for name, shift in shifts.items()}


@pytest.mark.parametrize(
    ("shifts", "states", "name", "tied", "said"),
    [
        ({"a": 0, "b": 1}, {}, "a", (),
         "4 steps: a (fed %s), ahead of every other by more than the interval"),
        ({"a": 0, "b": 0.01}, {}, "a", ("b",), "4 steps: a (fed %s); not told apart from it: b"),
        ({"a": 0}, {}, "a", (), "4 steps: a (fed %s), the only one"),
        ({"a": 0, "b": -1}, {"b": "missed"}, "a", (),
         "4 steps: a (fed %s), the only one that misses so few goals; chosen over b, better in fed,"
         " for missing fewer goals"),
        ({"a": 0, "b": 1, "c": -1, "d": 2}, {"c": "missed", "d": "missed"}, "a", (),
         "4 steps: a (fed %s), ahead of every other that misses as few goals by more than the "
         "interval; chosen over c, better in fed, for missing fewer goals"),
        ({"a": 0, "b": 0.01, "c": 0.02}, {"a": "within", "c": "within"}, "b", ("a", "c"),
         "4 steps: b (fed %s); not told apart from a, the best estimate, and meets more goals; "
         "nor told apart from a: c"),
        ({"a": 0, "b": 1}, {"a": "missed", "b": "missed"}, "a", (),
         "4 steps: a (fed %s), ahead of every other by more than the interval; it misses diversity "
         "ratio >= 0.95"),
    ],
)  # fmt: skip
def test_who_wins_and_what_is_said_of_it(
    shifts: dict[str, float], states: dict[str, Any], name: str, tied: tuple[str, ...], said: str
) -> None:
    found = judged_by_name(shifts)
    cells = [cell(n, 1, e.values["fed"], state=states.get(n, "met")) for n, e in found.items()]
    (winner,) = winners(cells, found, "fed")
    assert (winner.name, winner.tied) == (name, tied)
    value = f"{found[name].values['fed']:.4g}"
    assert winner.text == said.replace("%s", f"{value} [{value}, {value}]")


def record_of(cells: list[Cell], **changes: Any) -> SweepRecord:
    settings: dict[str, Any] = {
        "name": "x", "date": "", "command": "", "model": "", "images": 2, "prompts": 2, "seed": 0,
        "resamples": 100, "quality": "fed", "engine": "eager", "precision": "fp32", "winners": (),
        "environment": {}, "machine": "", "recipe": {}, "cells": tuple(cells), **changes,
    }  # fmt: skip
    return SweepRecord(**settings)


def test_the_page_says_what_its_numbers_are() -> None:
    teacher = cell("teacher", 9, 2, steps=50).model_copy(
        update={"scheduler": "DDIMScheduler", "guidance_scale": 2.0, "speedup": None, "goals": ()}
    )
    slow = cell("a", 3, 2).model_copy(update={"clock": "processor"})
    goal = slow.goals[0].model_copy(update={"reaches_past": True})
    slow = slow.model_copy(
        update={"goals": (goal,), "metrics": {**slow.metrics, "colour": between(0.9, 0.8, 1.0)}}
    )
    counts = {"fed": Sample(images=2560, prompts=159), "colour": Sample(images=1536, prompts=70)}
    text = markdown(record_of([teacher, slow], samples=counts, reference_images=900), "x.png")
    assert "The teacher: DDIMScheduler, 50 steps, guidance 2. The students' guidance is" in text
    assert "FED: 2,560 images of 159 distinct prompts a model." in text
    assert "colour: 1,536 images of 70 distinct prompts a model." in text
    assert "to 900 reference images; not FID" in text
    assert "| model | steps | FED ↓ |" in text and "| model | steps | colour ↑ |" in text
    assert "| 3.00x [2.97, 3.03] (processor time) |" in text
    assert "met (interval reaches past it)" in text
    assert "NFE (network rows) | denoiser GFLOP an image" in text


def test_a_record_is_strict(saved: Callable[[], Path]) -> None:
    path = saved()
    tree = json.loads(path.read_text())
    for change in ({"extra": 1}, {"cells": [{**tree["cells"][0], "speed": 1}]}, {"seed": "x"}):
        path.write_text(json.dumps({**tree, **change}))
        with pytest.raises(InvalidArtifact, match="run hcf sweep again"):
            read_record(path)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        record = record_of([cell("a", 1, 2)])
        write_record(tmp_path / "record.json", record)
        assert "| a | 4 |" in markdown(record, "x.png")
        return tmp_path / "record.json"

    return write
