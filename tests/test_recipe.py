from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hcf.errors import RecipeError
from hcf.recipe import Recipe, load_recipe, read_tree, stage_config, write_resolved
from hcf.settings import BenchConfig, DistillConfig

BASE = "name: x\nmodel: m\noutput: out\n"


def recipe_file(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "where", "fix"),
    [
        ("distil: {steps: 4}", "unknown key distil", "distill"),
        ("distill: {step: 4}", "unknown key distill.step", "steps"),
        ("quantize: {exclude: [{patern: a, reason: b}]}", "quantize.exclude.0.patern", "pattern"),
        (
            "check: {thresholds: {psnr: {minn: 3}}}",
            "check.0.thresholds.psnr.minn",
            "did you mean min",
        ),
        ("bench: {wibble: 4}", "unknown key bench.wibble", "known: pairs"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest(
    tmp_path: Path, text: str, where: str, fix: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(tmp_path, BASE + text))
    assert where in caught.value.message and fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\noutput: y", "model is missing"),
        (BASE + "distill: {steps: 0}", "distill.steps"),
        (BASE + "distill: {steps: lots}", "got 'lots'"),
        (BASE + "check: {thresholds: {fed: {}}}", "needs one of min, max"),
        (BASE + "build: {engines: [openvino]}", "add an `export:` section"),
        (BASE + "check: [{name: a}, {name: a}]", "distinct names"),
        ("- a list", "not a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=".*") as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert said in caught.value.message


def test_missing_recipe_offers_the_nearest_file(tmp_path: Path) -> None:
    recipe_file(tmp_path, BASE, "quickstart.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "quikstart.yaml")
    assert "quickstart.yaml" in caught.value.fix and caught.value.exit_code == 2


def test_overrides_are_yaml_and_reach_into_lists(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, BASE + "check: [{name: a}, {name: b}]\n")
    recipe = load_recipe(
        path,
        ["distill.steps=8", "distill.learning_rate=1e-4", "check.1.images=16", "bench={pairs: 3}"],
    )
    assert recipe.distill == DistillConfig(steps=8, learning_rate=1e-4)
    assert recipe.check[1].images == 16 and recipe.bench == BenchConfig(pairs=3)
    for wrong in ("distill.steps", "=3", "check.7.images=1", "name.inner=1"):
        with pytest.raises(RecipeError, match="--set"):
            load_recipe(path, [wrong])


def test_imports_are_merged_under_the_importer(tmp_path: Path) -> None:
    recipe_file(tmp_path, "bench: {pairs: 3, batch: 2}\nseed: 5\n", "shared/deep.yaml")
    recipe_file(tmp_path, "import: deep.yaml\nbench: {pairs: 4}\n", "shared/bench.yaml")
    path = recipe_file(tmp_path, BASE + "import: [shared/bench.yaml]\nbench: {budget_s: 9}\n")
    bench = load_recipe(path).bench
    assert bench == BenchConfig(pairs=4, batch=2, budget_s=9, seed=5)
    recipe_file(tmp_path, "import: ../recipe.yaml\n", "shared/deep.yaml")
    with pytest.raises(RecipeError, match="imports itself"):
        read_tree(path)


def test_top_level_seed_threads_and_prompts_hold_for_stages_without_their_own(
    tmp_path: Path,
) -> None:
    text = "seed: 7\nthreads: 2\nprompts: [猫]\ndistill: {}\nbench: {seed: 1}\ncheck: {}\n"
    recipe = load_recipe(recipe_file(tmp_path, BASE + text))
    assert recipe.distill is not None and recipe.distill.seed == 7
    assert recipe.bench == BenchConfig(seed=1, threads=2, prompts=["猫"])
    assert recipe.check[0].seed == 7 and recipe.check[0].prompts == ["猫"]


def test_resolved_copy_reads_back_equal(tmp_path: Path) -> None:
    text = "prompts: [一只红色的猫]\ndistill: {}\nexport: {}\nbuild: {}\ncheck: {}\nreport: {}\n"
    recipe = load_recipe(recipe_file(tmp_path, BASE + text))
    write_resolved(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert "一只红色的猫" in (tmp_path / "resolved.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["distill"]["steps"] == 4


def test_one_section_for_a_single_command(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "seed: 3\ndistill: {steps: 8}\n")
    config = stage_config(DistillConfig, "distill", path, ["distill.batch_size=2"], steps=None)
    assert (config.steps, config.batch_size, config.seed) == (8, 2, 3)
    assert stage_config(DistillConfig, "distill", steps=2) == DistillConfig(steps=2)
    for override in ("distil.steps=8", "distill.stepz=8"):
        with pytest.raises(RecipeError) as caught:
            stage_config(DistillConfig, "distill", None, [override])
        assert "did you mean" in caught.value.fix


def test_every_shipped_recipe_of_a_run_is_valid() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    paths = [p for p in folder.glob("*.yaml")]
    assert paths
    for path in paths:
        assert isinstance(load_recipe(path), Recipe)
        assert path.read_text(encoding="utf-8").startswith("#")
