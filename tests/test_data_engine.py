"""The data engine from recipe to manifest: queries, byte identity, kill -9, reports, commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from taiji.data.image_filters import Scorer
from taiji.data.manifest import read_manifest
from taiji.data.recipe import (
    DataRecipe,
    filter_pairs,
    query_table,
    read_recipe,
    report_pairs,
    select_pairs,
    shard_pairs,
)
from taiji.data.rehearsal import rehearse
from taiji.data.select import CAP, Query, select, sweep
from taiji.data.workers import Engine, run_tasks

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "data"


def silent(line: str) -> None: ...


def table(**columns: Any) -> pa.Table:
    rows = len(next(iter(columns.values())))
    ids = [i.to_bytes(16, "big") for i in range(rows)]
    domain = columns.pop("domain", ["x"] * rows)
    return pa.table({"id": pa.array(ids, pa.binary(16)), "domain": domain, **columns})


def ask(columns: pa.Table, **rules: dict[str, Any]) -> list[str | None]:
    """Each row's reason."""
    selection = select(columns, Query.model_validate({"rules": rules}))
    names = [*(step.name for step in selection.steps), None]
    return [names[i] for i in selection.reason]


def test_every_rejected_row_has_the_first_reason_in_order() -> None:
    columns = table(a=[1.0, 5.0, 1.0, None], b=[9.0, 1.0, 1.0, 1.0], lang=["zh", "en", "zh", None])
    low, high = {"column": "a", "min": 2}, {"column": "b", "max": 3}
    assert ask(columns, low=low, high=high) == ["low", None, "low", "low"]
    assert ask(columns, high=high, low=low) == ["high", None, "low", "low"]
    kept = {**low, "missing": "keep"}
    assert ask(columns, low=kept) == ["low", None, "low", None]
    chinese = {"column": "lang", "one_of": ["zh"]}
    assert ask(columns, language=chinese) == [None, "language", None, "language"]
    assert ask(columns, language={**chinese, "missing": "keep"})[3] is None


def test_percentiles_and_top_are_of_the_rows_that_arrive_by_domain() -> None:
    values = np.concatenate([np.arange(100.0), 1000 + np.arange(100.0)])
    columns = table(v=values, domain=["a"] * 100 + ["b"] * 100, ok=[True] * 150 + [False] * 50)
    both = ask(columns, cut={"column": "v", "percentiles": [5, 99], "by": "domain"})
    assert [r is not None for r in both] == ([True] * 5 + [False] * 94 + [True]) * 2
    after = ask(
        columns,
        ok={"column": "ok", "equals": True},
        top={"column": "v", "top": 0.3, "by": "domain"},
    )
    assert after[:100] == ["top"] * 70 + [None] * 30  # of 100
    assert after[100:150] == ["top"] * 35 + [None] * 15  # of the 50 that were left
    assert after[150:] == ["ok"] * 50


def test_sides_and_ratios_come_from_width_and_height() -> None:
    columns = table(width=[256, 900, 256, None], height=[256, 256, 255, 300])
    rules = {"size": {"column": "short_side", "min": 256}, "aspect": {"column": "aspect", "max": 3}}
    assert ask(columns, **rules) == [None, "aspect", "size", "size"]


def test_the_best_of_the_rows_still_there_is_kept() -> None:
    columns = table(
        cluster=[0, 0, 0, 3, 3], width=[9, 9, 9, 1, 1], height=[9, 9, 8, 1, 1],
        beauty=[1.0, 2.0, 9.0, 5.0, 5.0], mark=[0.0, 0.9, 0.0, 0.0, 0.0],
    )  # fmt: skip
    best = {"column": "cluster", "best_of": ["pixels", "beauty"]}
    # row 1 is the best; without it row 0, and never none. Of equals the smaller id stays.
    assert ask(columns, twin=best) == ["twin", None, "twin", None, "twin"]
    mark = {"column": "mark", "max": 0.5}
    assert ask(columns, mark=mark, twin=best) == [None, "mark", "twin", None, "twin"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"column": "a"}, "has no bound"),
        ({"column": "a", "percentiles": [5, 101]}, "between 0 and 100"),
        ({"column": "a", "min": 1, "by": "domain"}, "groups percentiles and top"),
        ({"column": "a", "mini": 1}, "Extra inputs"),
        ({"column": "a", "top": 0}, "greater than 0"),
        ({"column": "a", "min": 1, "one_of": ["x"]}, "one_of stands alone"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Query.model_validate({"rules": {"r": rule}})
    with pytest.raises(ValidationError, match="call the rule something else"):
        Query.model_validate({"rules": {CAP: {"column": "a", "min": 1}}})
    with pytest.raises(ValueError, match="holds text"):
        ask(table(a=["x"]), r={"column": "a", "min": 1})


def test_a_sweep_moves_one_threshold() -> None:
    columns = table(v=np.arange(10.0), w=np.arange(10.0))
    rules = {"v": {"column": "v", "min": 2}, "w": {"column": "w", "max": 8}}
    query = Query.model_validate({"rules": rules})
    assert sweep(columns, query, "v", "min", [0, 5, 100]) == [(0, 9), (5, 4), (100, 0)]
    with pytest.raises(ValueError, match="one of v, w"):
        sweep(columns, query, "z", "min", [0])


def darkness(images: list[Image.Image]) -> Any:
    """A scorer of the caller's own, importable where the workers are."""
    return np.array([1 - np.asarray(image, np.float32).mean() / 255 for image in images])


SCORERS: dict[str, Scorer] = {"darkness": darkness}


def recipe(output: Path, **changes: Any) -> DataRecipe:
    """The shipped tiny recipe without its CLIP, and a rule on a scorer."""
    tree = read_recipe(RECIPES / "shapes.yaml").model_dump(mode="json")
    rules = {name: rule for name, rule in tree["select"]["rules"].items() if name != "relevance"}
    rules["duplicate"] = {"column": "cluster", "best_of": ["pixels"]}
    rules["dark"] = {"column": "darkness", "max": 0.3}
    tree["select"]["rules"] = rules
    tree["select"]["domains"]["caps"] = {"circle": 0.1}
    tree["filters"]["clip"] = None
    tree["source"]["count"], tree["rows_per_part"] = 200, 64
    tree["shards"]["samples"] = 16
    return DataRecipe.model_validate({**tree, "output": str(output), **changes})


def reciprocal(number: int) -> float:
    if not number:
        raise ValueError("division by zero")
    return 1 / number


def run(output: Path, workers: int, engine: Engine) -> dict[str, str]:
    """{file: hash} of a whole run."""
    found = recipe(output)
    filter_pairs(found, scorers=SCORERS, workers=workers, engine=engine, log=silent)
    shard_pairs(found, workers=workers, engine=engine, log=silent)
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    output = tmp_path_factory.mktemp("alone")
    return output, run(output, 1, "local")


def test_the_funnel_adds_up_and_the_cap_holds(alone: tuple[Path, dict[str, str]]) -> None:
    found = json.loads((alone[0] / "selection.json").read_text())
    assert found["kept"] + sum(found["rejected"].values()) == found["rows"] == 200
    for before, after in zip(found["steps"], found["steps"][1:], strict=False):
        assert before["rows_out"] == after["rows_in"]
    assert found["domains"]["circle"] <= 0.1 * found["kept"]
    manifest = json.loads((alone[0] / "manifest.json").read_text())
    assert manifest["rejected"] == found["rejected"]
    assert sum(d["samples"] for d in manifest["domains"].values()) == found["kept"]
    assert manifest["domains"]["circle"]["share"] <= 0.1
    assert sum(d["share"] for d in manifest["domains"].values()) == pytest.approx(1)


def test_two_workers_leave_the_same_bytes(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    assert run(tmp_path / "out", 2, "local") == alone[1]


def test_ray_leaves_the_same_bytes(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's workers find this module, and with it the scorer, where pytest found it
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    try:
        assert run(tmp_path / "out", 1, "ray") == alone[1]
        with pytest.raises(ValueError, match="division by"):
            list(run_tasks(reciprocal, [1, 0], engine="ray"))
    finally:
        ray.shutdown()


HCF = "import sys; from hcf.cli import main; main(sys.argv[1:])"


def hcf(*arguments: object, code: int = 0) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, "-c", HCF, *(str(a) for a in arguments), "--format", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == code, found.stderr
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def test_a_killed_run_goes_on_mid_shard_to_the_same_manifest(tmp_path: Path) -> None:
    tree = recipe(tmp_path / "out").model_dump(mode="json")
    tree["source"]["count"], tree["rows_per_part"] = 900, 400
    tree["select"]["rules"] = {"unreadable": {"column": "readable", "equals": True}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    filter_pairs(read_recipe(path), log=silent)
    shards = tmp_path / "out" / "shards"
    options = ("--set", "shards.samples=1000")
    process = subprocess.Popen(
        [sys.executable, "-c", HCF, "data", "shard", str(path), *options],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if any(part.stat().st_size > 65_536 for part in shards.glob(".*.part")):
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    left = {path.name for path in shards.glob("*.tar")}
    assert not (tmp_path / "out" / "manifest.json").exists()
    resumed = hcf("data", "shard", path, *options)
    assert not list(shards.glob(".*.part"))

    fresh = read_recipe(path, {"output": str(tmp_path / "fresh"), "shards.samples": 1000})
    filter_pairs(fresh, log=silent)
    assert shard_pairs(fresh, log=silent).hash == resumed["hash"]
    names = sorted(path.name for path in shards.iterdir())
    assert left < set(names)
    for name in names:
        assert (shards / name).read_bytes() == (fresh.output / "shards" / name).read_bytes()
    assert names == sorted(path.name for path in (fresh.output / "shards").iterdir())
    assert hcf("data", "verify", tmp_path / "out")["shards"] == len(names) / 3


def test_a_threshold_moves_when_the_images_are_gone(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(alone[0], copy, ignore=shutil.ignore_patterns("source", "shards"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(copy).model_dump(mode="json"), sort_keys=False))
    rows = hcf("data", "select", path, "--sweep", "dark.max=0,0.05,1")["kept"]
    assert 0 == rows[0][1] < rows[1][1] < rows[2][1]
    error = hcf("data", "select", path, "--sweep", "dark=low", code=2)["error"]
    assert "write it as" in error["fix"]


def test_the_report_is_one_page_with_pictures(alone: tuple[Path, dict[str, str]]) -> None:
    page = report_pairs(recipe(alone[0]), silent).read_text()
    assert page.count("data:image/jpeg;base64,") >= 6 and "http" not in page
    for name in ("duplicate", "dark", CAP, "circle"):
        assert f">{name}<" in page
    found = json.loads((alone[0] / "report.json").read_text())
    assert [step["name"] for step in found["steps"]][-1] == CAP


def test_bad_cases_become_a_new_manifest(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    cases = tmp_path / "badcases.yaml"
    cases.write_text("- {tag: 红色, factor: 2}\n", encoding="utf-8")
    found = hcf("data", "reweight", alone[0], "-b", cases, "-o", "second.json")
    assert read_manifest(alone[0] / "second.json").hash == found["hash"]
    error = hcf("data", "reweight", alone[0], "-b", cases, "-o", "second.json", code=2)["error"]
    assert "name a new file" in error["fix"]


def test_a_changed_source_must_be_filtered_again(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    changed = recipe(alone[0], source={"kind": "shapes", "count": 201})
    with pytest.raises(FileNotFoundError, match="source changed"):
        query_table(changed)
    caption_only = recipe(alone[0], filters={"caption": {}})
    with pytest.raises(FileNotFoundError, match="duplicates, image changed|image, duplicates"):
        query_table(caption_only)
    with pytest.raises(FileNotFoundError, match="no filtered pairs"):
        select_pairs(recipe(tmp_path), silent)


def test_the_command_explains_itself(tmp_path: Path) -> None:
    shapes = RECIPES / "shapes.yaml"
    plan = hcf("data", "filter", shapes, "--dry-run", "--set", f"output={tmp_path / 'o'}")
    assert plan["filters"] == ["caption", "image", "clip", "duplicates"] and plan["dry_run"]
    assert not (tmp_path / "o").exists()
    error = hcf("data", "select", shapes, "--set", f"output={tmp_path / 'o'}", code=5)["error"]
    assert "no filtered pairs" in error["message"] and "hcf data filter" in error["fix"]
    error = hcf("data", "shard", shapes, "--set", "select.ruler=1", code=2)["error"]
    assert "ruler" in error["message"]
    assert "no recipe" in hcf("data", "report", tmp_path / "x", code=2)["error"]["message"]


def test_the_rehearsal_finds_all_that_is_planted(tmp_path: Path) -> None:
    found = rehearse(tmp_path, rows=30_000, workers=1, log=silent)
    assert found["planted_found"] == 100 and 0 < found["kept"] < 0.2 * found["rows"]
    steps = json.loads((tmp_path / "work" / "selection.json").read_text())["rejected"]
    assert min(steps[name] for name in ("language", "duplicate", "relevance", CAP)) > 0


def test_shipped_recipes_are_valid() -> None:
    names = {path.stem: read_recipe(path).name for path in RECIPES.glob("*.yaml")}
    assert set(names) == set(names.values()) >= {"shapes", "emoji", "web"}
    with pytest.raises(ValidationError, match="ruls"):
        read_recipe(RECIPES / "shapes.yaml", {"select.ruls": 3})


def test_the_tiny_recipe_runs_as_shipped(tmp_path: Path) -> None:
    found = read_recipe(RECIPES / "shapes.yaml", {"output": str(tmp_path), "source.count": 120})
    found = found.model_copy(
        update={"filters": found.filters.model_copy(
            update={"clip": found.filters.clip.model_copy(
                update={"model": ROOT / found.filters.clip.model,
                        "tokenizer": ROOT / found.filters.clip.tokenizer_folder}
            )}
        )}
    )  # fmt: skip
    filter_pairs(found, log=silent)
    manifest = shard_pairs(found, log=silent)
    assert manifest.rejected["relevance"] == 12
    assert sum(record.samples for record in manifest.domains.values()) > 95
