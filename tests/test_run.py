"""The resume logic of `hcf run`, with real stages that do next to nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hcf.artifact import MANIFEST, clone_artifact, read_manifest, verify, write_manifest
from hcf.errors import GateFailed, HcfError, RecipeError
from hcf.recipe import Recipe
from hcf.run import ARTIFACT, VERDICT, Log, plan, run_recipe


def append(name: str) -> Any:
    def stage(folder: Path, inputs: Mapping[str, Path], config: Any, log: Log) -> None:
        (source,) = inputs.values()
        manifest = clone_artifact(source, folder / ARTIFACT)
        (folder / ARTIFACT / f"{name}.txt").write_text(config.model_dump_json())
        write_manifest(folder / ARTIFACT, manifest)

    return stage


def judge(folder: Path, inputs: Mapping[str, Path], config: Any, log: Log) -> None:
    passed = "psnr_db" not in config.thresholds
    verdict = {"passed": passed, "reasons": [] if passed else ["psnr_db 20 < 28"]}
    (folder / VERDICT).write_text(json.dumps(verdict))


def time_them(folder: Path, inputs: Mapping[str, Path], config: Any, log: Log) -> None:
    (folder / "end_to_end.json").write_text('{"speedup": 40}')


def page(folder: Path, inputs: Mapping[str, Path], config: Any, log: Log) -> None:
    (folder / "report.html").write_text(" ".join(inputs))
    (folder / "grid.png").write_bytes(b"png")


STAGES = {
    **{name: append(name) for name in ("distill", "quantize", "export", "build")},
    "check": judge,
    "bench": time_them,
    "report": page,
}


def recipe(folder: Path, **sections: Any) -> Recipe:
    model = folder / "teacher"
    model.mkdir(exist_ok=True)
    (model / "model_index.json").write_text("{}")
    tree = {
        "distill": {},
        "quantize": {},
        "export": {},
        "build": {},
        "check": [{"name": "student", "candidate": "student"}, {"name": "int8"}],
        "bench": {},
        "report": {},
        **sections,
    }
    return Recipe(name="demo", model=model, output=folder / "out", **tree)


def reused(recipe: Recipe, **options: Any) -> dict[str, bool]:
    result = run_recipe(recipe, stages=STAGES, log=lambda line: None, **options)
    return {step.step.name: step.reused for step in result.steps}


ALL = ["distill", "quantize", "export", "build", "check-student", "check-int8", "bench", "report"]


def test_plan_orders_stages_and_wires_their_inputs(tmp_path: Path) -> None:
    steps = {step.name: step.inputs for step in plan(recipe(tmp_path))}
    assert list(steps) == ALL
    assert steps["quantize"] == ("distill",) and steps["build"] == ("export",)
    assert steps["check-student"] == ("model", "distill")
    assert steps["check-int8"] == ("model", "build") and steps["bench"] == (
        "model",
        "distill",
        "build",
    )
    steps = {s.name: s.inputs for s in plan(recipe(tmp_path, distill=None, quantize=None))}
    assert steps["export"] == ("model",) and steps["check-student"] == ("model", "model")


def test_first_run_does_everything_and_the_next_nothing(tmp_path: Path) -> None:
    assert reused(recipe(tmp_path)) == dict.fromkeys(ALL, False)
    output = tmp_path / "out"
    assert verify(output) == []
    manifest = read_manifest(output)
    assert manifest.name == "demo" and manifest.recipe is not None
    assert manifest.quality == dict.fromkeys(["student", "int8"], {"passed": True, "reasons": []})
    assert manifest.latency == {"end_to_end": {"speedup": 40}}
    lineage = [parent.name for parent in manifest.parents]
    assert lineage == ["demo-export", "demo-quantize", "demo-distill", "teacher"]
    assert (output / "report.html").is_file() and (output / "grid.png").is_file()
    assert {f"{n}.txt" for n in ("distill", "quantize", "export", "build")} < {
        p.name for p in output.iterdir()
    }
    assert reused(recipe(tmp_path)) == dict.fromkeys(ALL, True)
    assert reused(recipe(tmp_path), resume=False) == dict.fromkeys(ALL, False)


def test_a_changed_setting_repeats_its_stage_and_what_follows(tmp_path: Path) -> None:
    reused(recipe(tmp_path))
    seen = reused(recipe(tmp_path, quantize={"percentile": 99.0}))
    assert [name for name, again in seen.items() if again] == ["distill", "check-student"]
    folders = [p.name for p in (tmp_path / "out.work").glob("[0-9]*")]
    assert len(folders) == len(ALL), "results of other settings are dropped"


def test_changed_content_of_the_model_or_of_a_result_repeats(tmp_path: Path) -> None:
    reused(recipe(tmp_path))
    (result,) = (tmp_path / "out.work").glob("03-export-*")
    (result / ARTIFACT / "export.txt").write_text("edited")
    assert [n for n, again in reused(recipe(tmp_path)).items() if not again] == ["export"]
    (tmp_path / "teacher/more.json").write_text("{}")
    assert not any(reused(recipe(tmp_path)).values())


def test_touching_a_file_repeats_nothing(tmp_path: Path) -> None:
    reused(recipe(tmp_path))
    os.utime(tmp_path / "teacher/model_index.json", (1, 1))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert all(reused(recipe(tmp_path).model_copy(update={"model": tmp_path / "moved"})).values())


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    assert reused(recipe(tmp_path), dry_run=True) == dict.fromkeys(ALL, False)
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]
    reused(recipe(tmp_path))
    lines: list[str] = []
    changed = recipe(tmp_path, export={"opset": 22})
    run_recipe(changed, stages=STAGES, dry_run=True, log=lines.append)
    assert "2. quantize: reused (reads distill)" in lines
    assert "3. export: would run (reads quantize)" in lines
    assert "4. build: would run (reads export)" in lines


def test_a_failed_gate_stops_reports_and_leaves_the_output_alone(tmp_path: Path) -> None:
    reused(recipe(tmp_path))
    before = read_manifest(tmp_path / "out")
    failing = recipe(
        tmp_path, check=[{"name": "int8", "thresholds": {"psnr_db": {"min": 28}}}, {"name": "more"}]
    )
    for _ in range(2):  # the second time from the stored verdict
        with pytest.raises(GateFailed, match=r"psnr_db 20 < 28") as caught:
            run_recipe(failing, stages=STAGES, log=lambda line: None)
        (report,) = (tmp_path / "out.work").glob("08-report-*/report.html")
        assert str(report) in caught.value.message
        assert "bench" not in report.read_text().split()
    assert read_manifest(tmp_path / "out") == before


def test_a_stage_that_raises_keeps_what_came_before(tmp_path: Path) -> None:
    def full(folder: Path, inputs: Mapping[str, Path], config: Any, log: Log) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(HcfError, match="filled up"):
        run_recipe(recipe(tmp_path), stages={**STAGES, "export": full}, log=lambda line: None)
    names = sorted(p.name[:2] for p in (tmp_path / "out.work").iterdir() if p.is_dir())
    assert names == ["01", "02"] and not (tmp_path / "out").exists()
    seen = reused(recipe(tmp_path))
    assert [n for n, again in seen.items() if again] == ["distill", "quantize"]


def test_output_that_would_destroy_something_is_refused(tmp_path: Path) -> None:
    ours = recipe(tmp_path)
    with pytest.raises(RecipeError, match="both"):
        run_recipe(ours.model_copy(update={"output": ours.model}), stages=STAGES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="not replaced"):
        run_recipe(ours, stages=STAGES)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run import STAGES, recipe
from hcf.run import run_recipe

stop_at = sys.argv[1]
def wait(stage):
    def run(folder, inputs, config, log):
        (folder / "half-written").write_text("x")
        print("ready", flush=True)
        time.sleep(120)
    return run
stages = {{**STAGES, stop_at: wait(STAGES[stop_at])}}
run_recipe(recipe(Path({folder!r})), stages=stages, log=lambda line: None)
"""


@pytest.mark.parametrize("stop_at", ["distill", "build", "check", "report"])
def test_killed_at_any_stage_the_next_run_continues(tmp_path: Path, stop_at: str) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code, stop_at], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    with pytest.raises(HcfError, match="another run"):
        reused(recipe(tmp_path))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    work = tmp_path / "out.work"
    assert not (tmp_path / "out").exists()
    seen = reused(recipe(tmp_path))
    first = next(name for name in ALL if name.startswith(stop_at))
    assert list(seen.values()) == [name in ALL[: ALL.index(first)] for name in ALL]
    assert (tmp_path / "out" / MANIFEST).is_file()
    assert not list(work.rglob("half-written")) and not list(work.glob(".hcf-*-*"))


def test_a_cache_makes_graphs_and_engines_of_its_two_steps(tmp_path: Path) -> None:
    with_cache = recipe(tmp_path, cache={"interval": 2, "branch": 1})
    configs = {step.name: step.config for step in plan(with_cache)}
    steps = ["unet_full_1", "unet_shallow_1"]
    assert configs["export"].model_dump()["components"][:2] == steps
    assert configs["build"].model_dump()["components"][:2] == steps
    assert configs["build"].model_dump()["cache"]["interval"] == 2


def test_a_sensitivity_search_comes_before_what_it_decides(tmp_path: Path) -> None:
    searched = recipe(tmp_path, sensitivity={"max_error": 0.05})
    steps = {step.name: step for step in plan(searched)}
    assert steps["quantize"].inputs[-1] == "sensitivity"
    assert not steps["sensitivity"].makes_artifact
