"""`hcf sweep` on a tiny model: students trained once, drawn once, one record, one plot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from hcf.cli import main
from hcf.errors import InvalidArtifact, RecipeError
from hcf.quality.evaluate import Evaluation
from hcf.quality.features import image_features
from hcf.quality.frechet import REFERENCE_FILE, fit_reference, save_reference
from hcf.quality.intervals import Interval, Paired, mean_draws, resample
from hcf.settings import Threshold
from hcf.sweep.compare import run_sweep
from hcf.sweep.recipe import Student, SweepConfig, load_sweep, students_of
from hcf.sweep.record import Cell, Cost, Goal, SweepRecord, read_record, write_record
from hcf.sweep.students import turn
from hcf.sweep.table import markdown
from hcf.sweep.verdict import judge_goals, pareto, winners

RECIPES = Path(__file__).parents[1] / "recipes" / "distill"
PROMPTS = ["cat", "dog", "bird", "tree"]


def tiny_tree(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny", "model": str(model), "seed": 1, "threads": 1,
        "distill": {
            "solver_steps": 4, "train_steps": 2, "batch_size": 2, "warmup_steps": 1,
            "trajectory": {"count": 3}, "consistency": {"skip": 1},
        },
        "students": [
            {"settings": {"method": "consistency"}, "grid": {"steps": [2]}},
            {"settings": {"method": "trajectory", "steps": 1},
             "grid": {"student.kind": ["lora"], "student.rank": [2]}},
        ],
        "draw": {"images": 8, "batch_size": 4, "chunk": 5, "engine": "eager", "resamples": 100,
                 "prompts": PROMPTS, "shown": 2},
        "bench": {"pairs": 6, "budget_s": 0.2},
        "goals": {1: {"fed": {"ratio_max": 1e9}, "diversity": {"min": 5.0}},
                  2: {"clip_zh": {"ratio_min": 1}}},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    make_tiny_pipeline().save_pretrained(folder)
    data = folder / "hcf_data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 8, 8, generator=generator).half()
    save_file({"latents": latents, "row": torch.arange(6)}, data / "latents_distill.safetensors")
    (data / "captions_distill.json").write_text(json.dumps(["cat", "dog", "bird"] * 2))
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    save_reference(fit_reference(image_features(images), dims=3), data / REFERENCE_FILE)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"default_steps": 3, "default_guidance_scale": 2.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def made(teacher: Path) -> tuple[Path, SweepRecord, list[str]]:
    """A sweep that was killed while it drew, and finished by the next: (output, record, its log)"""

    class Killed(BaseException): ...

    def log(line: str) -> None:
        if line == "teacher: 5 of 8 images":
            raise Killed

    config, students = spread(tiny_tree(teacher))
    out, lines = teacher.with_name("out"), list[str]()
    with pytest.raises(Killed):
        run_sweep(config, students, out, log=log)
    assert not out.exists()
    record = run_sweep(config, students, out, command="hcf sweep x", log=lines.append)
    return out, record, lines


def spread(tree: dict[str, Any]) -> tuple[SweepConfig, list[Student]]:
    config = SweepConfig.model_validate(tree)
    return config, students_of(config)


NAMES = ["consistency-2", "trajectory-1-lora-rank=2"]


def test_a_record_holds_quality_speed_and_cost(made: Any, teacher: Path) -> None:
    out, record, _ = made
    assert [cell.name for cell in record.cells] == ["teacher", *NAMES] and not record.failed
    base, two, one = record.cells
    assert set(two.metrics) == {"fed", "diversity"} and "clip_zh" in two.missing
    for cell in record.cells:
        for found in cell.metrics.values():
            assert found.candidate.low <= found.candidate.high
    assert base.metrics["fed"].ratio == Interval(1, 1, 1) and base.speedup is None
    assert two.metrics["fed"].ratio.value != 1
    # guidance has two rows a call; the students need none
    assert [(c.cost.denoiser_calls, c.cost.denoiser_rows) for c in record.cells] == [
        (3, 6), (2, 2), (1, 1)
    ]  # fmt: skip
    assert base.cost.gflop == pytest.approx(6 * one.cost.gflop) and base.cost.train_s is None
    assert (two.cost.train_images, one.cost.train_steps) == (4, 2)
    assert two.cost.trained_share == 1 and 0 < one.cost.trained_share < 0.2
    assert one.speedup and one.latency_ms and base.latency_ms
    assert [(g.metric, g.state) for g in one.goals] == [("fed", "met"), ("diversity", "missed")]
    assert two.goals[0].state == "missed" and "no judge" in two.goals[0].found
    assert [w.name for w in record.winners] == NAMES[::-1]
    assert "misses diversity >= 5" in record.winners[0].text
    assert read_record(out / "comparison.json") == record
    text = (out / "comparison.md").read_text()
    assert "**missed**" in text and "hcf sweep x" in text and str(teacher.parent) not in text
    assert Image.open(out / "comparison.png").size[0] > 500
    assert Image.open(out / "grid.png").size == (2 * 20 + 4, 3 * 20 + 4)


def test_nothing_is_made_twice(made: Any, teacher: Path) -> None:
    out, record, lines = made
    assert "teacher: 8 of 8 images" in lines and "teacher: 5 of 8 images" not in lines
    assert sum("used again" in line for line in lines) == 2  # trained before the first was killed
    lines = []
    again = run_sweep(*spread(tiny_tree(teacher)), out, command="hcf sweep x", log=lines.append)
    assert again.cells == record.cells
    assert not [line for line in lines if "images" in line or "timed against" in line]


def test_more_images_are_drawn_alone_and_a_student_that_diverges_is_left_out(
    made: Any, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, out = tiny_tree(teacher), made[0]
    tree["draw"]["images"] = 15
    bad = {"method": "consistency", "steps": 1, "learning_rate": 1e30, "train_steps": 12}
    tree["students"] = [tree["students"][0], {"name": "wild", "settings": bad}]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    def hcf(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return int(stop.value.code or 0), "".join(capsys.readouterr())

    code, text = hcf("sweep", recipe, "-o", out, "--dry-run")
    assert code == 0 and "wild-1: 12 steps to train" in text and "consistency-2: there" in text
    code, text = hcf("sweep", recipe, "-o", out, "--store")
    assert code == 12 and "wild-1: the training diverged" in text
    drawn = re.findall(r"(\S+): (\d+) of 15 images", text)
    assert drawn == [(name, n) for name in ("teacher", NAMES[0]) for n in ("10", "15")]
    found = read_record(tmp_path / "results" / "mine.json")
    assert list(found.failed) == ["wild-1"] and len(found.cells) == 2
    assert str(teacher.parent) not in json.dumps(found.failed)
    assert "(mine.png)" in (tmp_path / "results" / "mine.md").read_text()
    assert (tmp_path / "results" / "mine.png").read_bytes() == (out / "comparison.png").read_bytes()
    code, text = hcf("sweep", recipe, "-o", out, "--only", "nobody*")
    assert code == 2 and "there are consistency-2, wild-1" in text


def test_grids_spread_and_sections_of_other_methods_are_left_out(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["students"] = [
        {
            "grid": {
                "method": ["consistency", "guidance"],
                "steps": [1, 2],
                "student.kind": ["full", "lora"],
            },
            "settings": {"student": {"rank": 3}},
        }
    ]
    found = spread(tree)[1]
    assert [s.name for s in found] == [
        f"{m}-{n}{k}" for m in ("consistency", "guidance") for n in (1, 2) for k in ("", "-lora")
    ]
    assert found[1].config.student.kind == "lora" and found[1].config.student.rank == 3
    assert found[0].config.consistency is not None and found[0].config.trajectory is None
    assert found[4].config.consistency is None and found[0].config.seed == 1
    tree["students"] = [{"settings": {"method": "LCM"}}]
    (other,) = spread(tree)[1]
    assert other.name == "consistency-4" and other.config.consistency is not None


@pytest.mark.parametrize(
    ("students", "said"),
    [
        ([{"settings": {"stepz": 2}}], "did you mean steps"),
        ([{"grid": {"steps": [2, 2]}}], "two students are called consistency-2"),
        ([{"settings": {"method": "trajectory", "consistency": {}}}], "is for method=consistency"),
        ([{"settings": {"probe": {"every": 1, "thresholds": {"fed": {"max": 1}}}}}], "end a train"),
        ([{"name": "../x"}], "cannot be the name"),
        ([{"grid": {"steps.more": [1]}, "settings": {"steps": 2}}], "is below a value"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, students: Any, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path, students=students)))
    with pytest.raises(RecipeError) as caught:
        load_sweep(path)
    assert said in str(caught.value)


def test_shipped_recipes_spread() -> None:
    paths = [p for p in RECIPES.glob("*.yaml") if "students" in yaml.safe_load(p.read_text())]
    assert paths
    for path in paths:
        config, students = load_sweep(path)
        assert config.draw.images >= 5000 and {s.config.steps for s in students} >= {1, 2, 4}
        assert {s.config.student.kind for s in students} == {"full", "lora"}
        assert set(config.goals) == {1, 2, 4}


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


def cell(name: str, ms: float, fed: float, *, steps: int = 4, missed: bool = False) -> Cell:
    cost = Cost(train_s=ms, denoiser_calls=1, denoiser_rows=1, gflop=1)
    state: Any = "missed" if missed else "met"
    return Cell(
        name=name, method="m", kind="full", steps=steps, guidance_scale=1, content_hash="",
        metrics={"fed": between(fed, fed, fed)}, latency_ms=ms, timing="", cost=cost,
        speedup=Interval(9 / ms, 8.9 / ms, 9.1 / ms),
        goals=(Goal(metric="diversity", bound="ratio >= 0.95", state=state, found=""),),
    )  # fmt: skip


def test_the_front_holds_what_nothing_beats() -> None:
    cells = [cell("a", 1, 3), cell("b", 2, 2), cell("c", 2, 4), cell("d", 3, 2), cell("e", 3, 1)]
    cells.append(cell("f", 1.99, 2.5))  # faster than b by noise alone
    assert pareto(cells, "fed") == {"a", "b", "e"}
    assert pareto([*cells, cell("teacher", 9, 0.5)], "fed") == {"a", "b", "e", "teacher"}


def test_who_wins_and_who_is_not_told_apart() -> None:
    rng, group = np.random.default_rng(0), np.arange(40)
    weights, shared = resample(40, seed=0), rng.normal(10, 3, 40)

    def judged(shift: float) -> Evaluation:
        each = shared + shift + rng.normal(0, 0.1, 40)
        own = mean_draws(each, group, weights)
        return Evaluation({"fed": float(each.mean())}, {}, draws={"fed": own})

    found = {"best": judged(0), "close": judged(0.01), "far": judged(1), "thin": judged(-2)}
    cells = [
        cell(name, ms, e.values["fed"], missed=name == "thin")
        for ms, (name, e) in enumerate(found.items(), 1)
    ]
    (winner,) = winners(cells, found, "fed")
    assert {winner.name, *winner.tied} == {"best", "close"} and winner.cheapest == "best"
    (worst,) = winners(cells[3:], found, "fed")
    assert worst.name == "thin" and "it misses diversity ratio >= 0.95" in worst.text


def test_a_record_is_strict_and_two_sweeps_take_turns(
    tmp_path: Path, saved: Callable[[], Path]
) -> None:
    path = saved()
    tree = json.loads(path.read_text())
    for change in ({"extra": 1}, {"cells": [{**tree["cells"][0], "speed": 1}]}, {"seed": "x"}):
        path.write_text(json.dumps({**tree, **change}))
        with pytest.raises(InvalidArtifact, match="run hcf sweep again"):
            read_record(path)
    waited: list[str] = []

    class Waiting(BaseException): ...

    def log(line: str) -> None:
        waited.append(line)
        raise Waiting

    with (
        turn(tmp_path / "student", "a", log),
        pytest.raises(Waiting),
        turn(tmp_path / "student", "a", log),
    ):
        pass
    assert waited == ["a: waiting for another sweep that is at it"]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        record = SweepRecord(
            name="x", date="", command="", model="", images=2, prompts=2, seed=0, resamples=100,
            quality="fed", engine="eager", precision="fp32", cells=(cell("a", 1, 2),), winners=(),
            environment={}, machine="", recipe={},
        )  # fmt: skip
        write_record(tmp_path / "record.json", record)
        assert "| a | 4 |" in markdown(record, "x.png")
        return tmp_path / "record.json"

    return write
