"""`hcf sweep` on a tiny model: students trained once, drawn once, one record, one plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make_tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from hcf.artifact import Sampling
from hcf.cli import main
from hcf.code_hash import code_hash
from hcf.distill.data import keep, kept
from hcf.errors import HcfError, RecipeError
from hcf.quality.features import image_features
from hcf.quality.frechet import REFERENCE_FILE, fit_reference, save_reference
from hcf.quality.intervals import Interval
from hcf.quality.rules import ASPECTS
from hcf.quality.sampling import Prompt
from hcf.run_stages import run_distill
from hcf.settings import DistillConfig
from hcf.sweep.compare import count_samples, plain, run_sweep, train_steps
from hcf.sweep.draw import Model, On, see
from hcf.sweep.recipe import DrawConfig, Student, SweepConfig, load_sweep, students_of
from hcf.sweep.record import Sample, SweepRecord, read_record
from hcf.sweep.students import leave_out, train_students, turn
from hcf.sweep.timing import kept_timing, set_threads, teacher_ms
from hcf_bench.environment import read_environment, usable_cores
from hcf_bench.results import Bounds, Comparison, Latency
from hcf_bench.results import Side as BenchSide
from hcf_bench.statistics import Verdict

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
    assert one.speedup and one.clock and base.latency_ms
    assert one.latency_ms == base.latency_ms / one.speedup.value
    assert base.scheduler == "DDIMScheduler" and record.reference_images == 6
    assert record.samples["fed"] == Sample(images=8, prompts=4)
    assert [(g.metric, g.state) for g in one.goals] == [("fed", "met"), ("diversity", "missed")]
    assert two.goals[0].state == "missed" and "no judge" in two.goals[0].found
    assert [w.name for w in record.winners] == NAMES[::-1]
    assert "misses diversity >= 5" in record.winners[0].text
    assert read_record(out / "comparison.json") == record
    text = (out / "comparison.md").read_text()
    assert "FED: 8 images of 4 distinct prompts a model" in re.sub(", diversity", "", text)
    assert "The teacher: DDIMScheduler, 3 steps, guidance 2. The students'" in text
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
    code, text = hcf("sweep", recipe, "-o", out, "--store", "--only", "*-?")
    assert code == 12 and "wild-1: the training diverged" in text
    drawn = re.findall(r"(\S+): (\d+) of 15 images", text)
    assert drawn == [(name, n) for name in ("teacher", NAMES[0]) for n in ("10", "15")]
    found = read_record(tmp_path / "results" / "mine.json")
    assert list(found.failed) == ["wild-1"] and len(found.cells) == 2
    assert str(teacher.parent) not in json.dumps(found.failed)
    assert "checkpoints are" not in found.failed["wild-1"]  # the fix is for who runs it
    assert found.command == f"hcf sweep {recipe} --only '*-?'"
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
    sweeps = {path.stem: load_sweep(path) for path in paths}
    assert "compare" in sweeps
    for config, students in sweeps.values():
        assert config.draw.images >= 5000
        assert {s.config.student.kind for s in students} == {"full", "lora"}
        assert {s.config.steps for s in students} == set(config.goals)  # each budget has a goal
    assert set(sweeps["compare"][0].goals) == {1, 2, 4}


def test_two_sweeps_take_turns(tmp_path: Path) -> None:
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


def test_a_defect_stops_the_sweep_and_what_was_trained_is_found_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, students = spread(tiny_tree(teacher))
    (tmp_path / "students").mkdir()

    def broken(temporary: Any, inputs: Any, settings: Any, log: Any) -> None:
        if settings.method == "trajectory":
            raise RuntimeError("a defect")
        run_distill(temporary, inputs, settings, log)

    monkeypatch.setattr("hcf.sweep.students.run_distill", broken)
    failed: dict[str, str] = {}
    with pytest.raises(RuntimeError, match="a defect"):
        train_students(config, students, tmp_path, failed, print)
    monkeypatch.undo()
    lines: list[str] = []
    found = train_students(config, students, tmp_path, failed, lines.append)
    assert list(found) == NAMES and not failed
    assert "[1/2] consistency-2: trained before, used again" in lines
    assert "[2/2] trajectory-1-lora-rank=2: started" in lines


@pytest.mark.parametrize("relative", [True, False])
def test_a_reason_in_the_record_names_no_folder_of_this_machine(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = Path("out.work") if relative else tmp_path / "out.work"
    failed: dict[str, str] = {}
    for folder in (work, work.resolve(), Path.cwd()):
        error = HcfError(f"{folder / 'students'}/a is\n broken", f"delete {folder}/students/a")
        leave_out("a", error, failed, lambda line: None)
        assert plain(failed["a"], Path("models"), work) == "students/a is broken"
    elsewhere = Path("/data/out.work")
    assert plain("/data/out.work is full", elsewhere, elsewhere.parent) == "out.work is full"
    assert plain("../x/y: models/z", Path("models"), work) == "../x/y: z"
    assert plain("../x/y", Path("."), work) == "../x/y"


def test_one_number_of_threads_whatever_the_environment_says(teacher: Path) -> None:
    before = torch.get_num_threads()
    tree = tiny_tree(teacher)
    del tree["threads"]
    try:
        torch.set_num_threads(usable_cores() + 1)  # what OMP_NUM_THREADS does
        assert set_threads(spread(tree)[0]) == torch.get_num_threads() == usable_cores()
        tree["bench"]["threads"] = 3
        assert set_threads(spread(tree)[0]) == torch.get_num_threads() == 3
        assert set_threads(spread({**tree, "threads": 1})[0]) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def opened(name: str) -> Any:
    model = Model(name, Path(name), name, Sampling(steps=1))
    return SimpleNamespace(
        model=model,
        on=On("eager", None, "cpu", 1),
        log=lambda line: None,
        accelerated=lambda: "pipe",
    )


def timed(speedup: float | None) -> Comparison:
    given = None if speedup is None else Bounds(value=speedup, low=speedup, high=speedup)
    side = BenchSide(name="x", latency=Latency.of([8.0, 9.0, 10.0]))
    return Comparison(
        workload="w", verdict=Verdict.INVALID if given is None else Verdict.FASTER, reason="r",
        paired=True, baseline=side, candidate=side, speedup=given, threshold=0.01, floor_ms=0,
        seed=0, environment=read_environment(1),
    )  # fmt: skip


def test_an_invalid_timing_is_made_again_and_two_never_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [timed(None), timed(2.0)]
    monkeypatch.setattr("hcf.sweep.timing._time", lambda *sides: answers.pop(0))
    both = opened("teacher"), opened("student")
    bench = spread(tiny_tree(tmp_path))[0].bench

    def time() -> Comparison:
        return kept_timing(bench, *both, tmp_path, lambda line: None)

    assert [time().speedup is None, time().speedup is None] == [True, False]
    assert time().speedup and not answers  # kept
    assert [path.name for path in tmp_path.glob(".lock-*")] == [".lock-machine"]
    assert teacher_ms([None, time()]) == 9 and teacher_ms([None]) is None


def test_how_many_are_shown_is_of_the_first_chunk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []

    def draw(pipe: Any, sampling: Any, prompts: Any, seeds: Any, batch: int, shown: int) -> Any:
        drawn.append((seeds[0], shown))
        n = len(prompts)
        return {
            "features": torch.zeros(n, 2),
            "hits": torch.zeros(n, len(ASPECTS)),
            "shown": torch.zeros(shown, 2, 2, 3, dtype=torch.uint8),
        }

    monkeypatch.setattr("hcf.sweep.draw._draw", draw)
    prompts = [Prompt(str(i), text) for i, text in enumerate(PROMPTS)]
    for shown in (1, 2):
        config = DrawConfig(images=4, chunk=2, shown=shown)
        assert len(see(opened("a"), prompts, config, tmp_path).shown) == shown
    assert drawn == [(0, 1), (2, 0), (0, 2)]


def test_a_kept_file_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    keep(path, {"x": torch.arange(100)}, key="a")
    assert kept(path, key="b") is None
    whole = path.read_bytes()
    for size in (0, 5, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert kept(path, key="a") is None
    path.write_bytes(whole)
    found = kept(path, key="a")
    assert found and found["x"].tolist() == list(range(100))


def test_images_and_prompts_behind_each_metric() -> None:
    truth = {"objects": []}
    kinds = [("cat", "emoji"), ("cat", "emoji"), ("dog", "emoji"), ("red", "shapes")]
    prompts = [
        Prompt(str(i), text, kind, truth=truth if kind == "shapes" else None)
        for i, (text, kind) in enumerate(kinds)
    ]
    nothing = float("nan")
    hits = {"colour": [nothing, nothing, nothing, 1.0], "pair": [nothing] * 4}
    assert count_samples(prompts, hits) == {
        "fed": Sample(images=3, prompts=2),
        "clip_zh": Sample(images=3, prompts=2),
        "retrieval_r5": Sample(images=3, prompts=2),
        "diversity": Sample(images=2, prompts=1),
        "colour": Sample(images=1, prompts=1),
    }


def test_steps_are_those_of_all_stages_and_of_the_regression_before_them() -> None:
    def steps(**settings: Any) -> int:
        return train_steps(DistillConfig.model_validate({"train_steps": 10, **settings}))

    assert steps(method="consistency") == 10
    assert steps(method="progressive", progressive={"halvings": 3}) == 9
    regression = {"regression_steps": 5}
    assert steps(method="distribution_matching", distribution_matching=regression) == 15


def test_code_is_hashed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "committed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_hash(["committed"])
    (package / "__init__.py").write_text("x = 1")
    assert code_hash(("committed",)) == before
