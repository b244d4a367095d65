"""`hcf run`: the stages of a recipe in order, each done once for its inputs, then the artefact.

A stage's result lies in `<output>.work/<nn>-<name>-<key>/`; the key is a SHA-256 over its settings,
the content of its inputs and the source of the code that makes it. The folder gets its name, with
`done.json` inside, only when the stage has finished, so whatever kills a run leaves temporary
names that the next run removes. Repeating the command continues after the last finished stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcf.artifact import (
    MANIFEST,
    PACKAGES,
    check_model_folder,
    clean_leftovers,
    clone_artifact,
    content_hash,
    environment,
    hash_file,
    hash_files,
    read_manifest,
    refuse_foreign,
    save_text,
    staged_folder,
    write_manifest,
)
from hcf.code_hash import code_hash
from hcf.errors import GateFailed, HcfError, RecipeError, StorageError
from hcf.recipe import Recipe, write_resolved
from hcf.settings import BuildConfig, Config, ExportConfig

Log = Callable[[str], None]
# A stage writes its result into a folder: stage(folder, inputs {name: path}, settings, log).
# An artefact goes to folder/"artifact", anything else into files of the folder itself.
Inputs = Mapping[str, Path]
Stage = Callable[[Path, Inputs, Any, Log], None]

ARTIFACT = "artifact"
DONE = "done.json"
VERDICT = "verdict.json"
LADDER = "ladder.json"
LOADING = ("hcf/load.py", "hcf/routing.py", "hcf/decode", "hcf/feature_cache")
# Whose change makes a stage's earlier result stale.
SOURCES: Mapping[str, tuple[str, ...]] = {
    "distill": (
        "hcf/distill",
        "hcf/decode",
        "hcf/trace.py",
        "taiji/train",
        "taiji/diffusion",
        "taiji/autoencoder",
    ),
    "sensitivity": ("hcf/quantize", "hcf/export", "hcf/engines", "hcf/trace.py"),
    "quantize": ("hcf/quantize", "hcf/trace.py"),
    "export": ("hcf/export", "hcf/quantize", "hcf/trace.py"),
    "build": ("hcf/engines", "hcf/export"),
    "check": ("hcf/quality", "hcf/run_stages.py", *LOADING),
    "bench": ("hcf_bench", "hcf/engines", "hcf/run_stages.py", *LOADING),
    "report": ("hcf/report", "hcf/run_report.py", *LOADING),
}


@dataclass(frozen=True)
class Step:
    """One stage of a run. `inputs` are names of earlier steps, or "model"."""

    number: int
    stage: str
    name: str
    config: Config
    inputs: tuple[str, ...]
    makes_artifact: bool

    @property
    def label(self) -> str:
        return f"{self.number:02d}-{self.name}"


@dataclass(frozen=True)
class StepResult:
    """What became of a step: its folder, whether an earlier result was used, and its seconds."""

    step: Step
    folder: Path
    reused: bool
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """A finished run (or the plan of one): where the artefact is, and its steps."""

    output: Path
    steps: tuple[StepResult, ...]
    report: Path | None = None

    def summary(self) -> dict[str, Any]:
        """Plain data for `--format json`."""
        return {
            "output": str(self.output),
            "report": str(self.report) if self.report else None,
            "steps": [
                {
                    "name": r.step.name,
                    "folder": str(r.folder),
                    "reused": r.reused,
                    "seconds": round(r.seconds, 2),
                }
                for r in self.steps
            ],
        }


def plan(recipe: Recipe) -> list[Step]:
    """The recipe's stages in their order, each with the earlier results it reads."""
    steps: list[Step] = []
    result = student = "model"

    def add(stage: str, name: str, config: Config, inputs: tuple[str, ...], artifact: bool) -> None:
        steps.append(Step(len(steps) + 1, stage, name, config, inputs, artifact))

    export, build = _with_cache(recipe)
    artifact_stages: tuple[tuple[str, Config | None], ...] = (
        ("distill", recipe.distill),
        ("quantize", recipe.quantize),
        ("export", export),
        ("build", build),
    )
    for stage, config in artifact_stages:
        if config is None:
            continue
        inputs: tuple[str, ...] = (result,)
        if stage == "quantize" and recipe.sensitivity is not None:
            add("sensitivity", "sensitivity", recipe.sensitivity, inputs, False)
            inputs = (result, "sensitivity")
        add(stage, stage, config, inputs, True)
        result = stage
        student = stage if stage == "distill" else student
    for check in recipe.check:
        names = {"teacher": "model", "student": student, "result": result}
        pair = (names[check.baseline], names[check.candidate])
        add("check", f"check-{check.name}", check, pair, False)
    if recipe.bench is not None:
        seen = tuple(dict.fromkeys(("model", student, result)))
        add("bench", "bench", recipe.bench, seen, False)
    if recipe.report is not None:
        seen = tuple(dict.fromkeys(("model", student, result, *(s.name for s in steps))))
        add("report", "report", recipe.report, seen, False)
    return steps


def _with_cache(recipe: Recipe) -> tuple[ExportConfig | None, BuildConfig | None]:
    """The export and build sections; under a cache the U-Net is its two steps."""
    export, build, cache = recipe.export, recipe.build, recipe.cache
    if cache is None or export is None or build is None:
        return export, build
    pair = [f"unet_full_{cache.branch}", f"unet_shallow_{cache.branch}"]

    def steps(components: Iterable[str]) -> list[str]:
        return [name for c in components for name in (pair if c == "unet" else [c])]

    exported = steps(export.components or ["unet", "vae_decoder"])
    return (
        export.model_copy(update={"components": exported}),
        build.model_copy(update={"components": steps(build.components), "cache": cache}),
    )


def run_recipe(
    recipe: Recipe,
    *,
    stages: Mapping[str, Stage] | None = None,
    dry_run: bool = False,
    resume: bool = True,
    log: Log = print,
) -> RunResult:
    """Runs `recipe` and puts the finished artefact at its `output`.

    Finished steps whose settings, inputs and code are unchanged are used again, unless `resume`
    is False. GateFailed (or Regression) after the report is written where a bound is missed; the
    output is then as it was. `stages` replaces the functions that do the work, by stage name.
    """
    check_model_folder(recipe.model)
    if recipe.output.resolve() == recipe.model.resolve():
        raise RecipeError(f"output and model are both {recipe.model}", "choose another output")
    refuse_foreign(recipe.output)
    if stages is None:
        from hcf.run_stages import STAGES

        stages = STAGES
    work = recipe.output.with_name(recipe.output.name + ".work")
    steps = plan(recipe)
    if dry_run:
        return _show_plan(recipe, steps, work, log)
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    with _only_run(work):
        clean_leftovers(work)
        write_resolved(recipe, work / "recipe.yaml")
        if not resume:
            for folder in work.glob("[0-9][0-9]-*"):
                shutil.rmtree(folder)
        return _run_steps(recipe, steps, work, stages, log)


def _run_steps(
    recipe: Recipe, steps: list[Step], work: Path, stages: Mapping[str, Stage], log: Log
) -> RunResult:
    places: dict[str, Path] = {"model": recipe.model}
    hashes: dict[str, str] = {"model": input_hash(recipe.model)}
    results: list[StepResult] = []
    failed: list[str] = []
    for step in steps:
        if failed and step.stage != "report":
            log(f"[{step.number}/{len(steps)}] {step.name}: not run, a gate failed")
            continue
        inputs = {name: places[name] for name in step.inputs if name in places}
        key = step_key(step, {name: hashes[name] for name in inputs})
        folder = work / f"{step.label}-{key[:12]}"
        reused = is_finished(folder)
        started = time.monotonic()
        if reused:
            log(f"[{step.number}/{len(steps)}] {step.name}: finished before, used again")
        else:
            log(f"[{step.number}/{len(steps)}] {step.name}: started")
            run_step(recipe.name, step, folder, inputs, stages[step.stage], log)
        seconds = time.monotonic() - started
        if not reused:
            log(f"[{step.number}/{len(steps)}] {step.name}: done in {seconds:.1f} s")
        places[step.name] = folder / ARTIFACT if step.makes_artifact else folder
        hashes[step.name] = input_hash(places[step.name])
        results.append(StepResult(step, folder, reused, seconds))
        failed += _failures(folder)
    _remove_stale(work, results)
    report = next((r.folder / "report.html" for r in results if r.step.stage == "report"), None)
    if failed:
        seen = f"; the report is {report}" if report else ""
        raise GateFailed(
            "\n".join(failed) + f"\n{recipe.output} was not written{seen}",
            fix="change the stage that loses quality, or the thresholds of the recipe",
        )
    artifacts = [r for r in results if r.step.makes_artifact]
    _publish(recipe, places[artifacts[-1].step.name] if artifacts else recipe.model, results)
    if report:
        report = recipe.output / "report.html"
    return RunResult(recipe.output, tuple(results), report)


def run_step(run: str, step: Step, folder: Path, inputs: Inputs, stage: Stage, log: Log) -> None:
    """Lets `stage` fill `folder`, which gets its name when it is whole."""
    started = time.monotonic()
    with staged_folder(folder) as temporary:
        stage(temporary, inputs, step.config, log)
        if step.makes_artifact:
            made = temporary / ARTIFACT
            if not (made / MANIFEST).is_file():
                raise HcfError(
                    f"the stage {step.name} wrote no artefact", "this is a bug: report it"
                )
            # lineage reads as teacher <- quickstart-distill <- quickstart-quantize ...
            named = read_manifest(made).model_copy(update={"name": f"{run}-{step.name}"})
            save_text(made / MANIFEST, named.model_dump_json(indent=1, exclude_none=True))
        record = {
            "step": step.name,
            "config": step.config.model_dump(mode="json"),
            "files": _listing(temporary),
            "seconds": round(time.monotonic() - started, 2),
        }
        save_text(temporary / DONE, json.dumps(record, ensure_ascii=False, indent=1))


def step_key(step: Step, inputs: Mapping[str, str]) -> str:
    """SHA-256 of everything the step's result depends on."""
    versions = environment()
    parts = {
        "stage": step.stage,
        "config": step.config.model_dump(mode="json"),
        "inputs": dict(inputs),
        "files": _config_files(step.config),
        "source": code_hash(SOURCES[step.stage]),
        "packages": {name: versions.get(name) for name in PACKAGES if name != "hcf-toolkit"},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _config_files(config: Config) -> dict[str, str]:
    """Hashes of the files that the settings point to."""
    found: dict[str, str] = {}
    for name, value in config:
        if isinstance(value, Path):
            if not value.exists():
                raise RecipeError(
                    f"{name}: nothing at {value}", "paths are relative to this folder"
                )
            found[name] = content_hash(value) if value.is_dir() else hash_file(value)
    return found


def input_hash(path: Path) -> str:
    """Content, and the manifest without what differs between two equal runs."""
    files = content_hash(path)
    if not (path / MANIFEST).is_file():
        return files
    manifest = read_manifest(path).model_dump_json(
        exclude={"name", "created", "environment", "recipe", "parents"}
    )
    return hashlib.sha256((files + manifest).encode()).hexdigest()


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a result that is complete and as its stage left it."""
    try:
        record = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record["files"] == _listing(folder))


def _listing(folder: Path) -> dict[str, str]:
    """{relative path: SHA-256} of a step's folder; "" for files that do not count as content."""
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    digests = hash_files(folder)
    return {name: digests.get(name, "") for name in names if name != DONE}


def _failures(folder: Path) -> list[str]:
    """What the step's verdict, if it has one, says was missed."""
    try:
        verdict = json.loads((folder / VERDICT).read_text(encoding="utf-8"))
    except OSError:
        return []
    return [] if verdict["passed"] else [str(reason) for reason in verdict["reasons"]]


def _publish(recipe: Recipe, artifact: Path, results: list[StepResult]) -> None:
    """The last artefact with verdicts, times, page and pictures, as `recipe.output`."""
    source = read_manifest(artifact) if (artifact / MANIFEST).is_file() else None
    with staged_folder(recipe.output) as folder:
        manifest = clone_artifact(artifact, folder)
        if source is not None:  # same content: its parents are the output's
            manifest.parents = source.parents
        manifest.name = recipe.name
        manifest.recipe = recipe.model_dump(mode="json", exclude_none=True)
        for result in results:
            if result.step.stage == "check":
                name = result.step.name.removeprefix("check-")
                manifest.quality[name] = _read_json(result.folder / VERDICT)
            elif result.step.stage == "bench":
                for file in sorted(result.folder.glob("*.json")):
                    if file.name not in (DONE, VERDICT):
                        manifest.latency[file.stem] = _read_json(file)
            elif result.step.stage == "report":
                for file in sorted(result.folder.iterdir()):
                    if file.suffix in (".html", ".png", ".md"):
                        (folder / file.name).unlink(missing_ok=True)
                        shutil.copyfile(file, folder / file.name)
        write_manifest(folder, manifest)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _remove_stale(work: Path, results: list[StepResult]) -> None:
    """Drops results of the same steps with other settings or inputs."""
    for result in results:
        for folder in work.glob(f"{result.step.label}-{'[0-9a-f]' * 12}"):
            if folder != result.folder:
                shutil.rmtree(folder)


def _show_plan(recipe: Recipe, steps: list[Step], work: Path, log: Log) -> RunResult:
    """Logs what would be done. A step after one that must run has inputs not known yet."""
    places: dict[str, Path] = {"model": recipe.model}
    hashes = {"model": input_hash(recipe.model)}
    results: list[StepResult] = []
    for step in steps:
        folder, reused = work / f"{step.label}-?", False
        if all(name in hashes for name in step.inputs):
            folder = (
                work / f"{step.label}-{step_key(step, {n: hashes[n] for n in step.inputs})[:12]}"
            )
            reused = is_finished(folder)
        if reused:
            places[step.name] = folder / ARTIFACT if step.makes_artifact else folder
            hashes[step.name] = input_hash(places[step.name])
        reads = ", ".join(step.inputs)
        log(f"{step.number}. {step.name}: {'reused' if reused else 'would run'} (reads {reads})")
        results.append(StepResult(step, folder, reused, 0.0))
    log(f"then the artefact would be written to {recipe.output}")
    return RunResult(recipe.output, tuple(results))


@contextlib.contextmanager
def _only_run(work: Path) -> Iterator[None]:
    """Holds the lock of `work`: two runs of one output would take each other's folders away."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / ".hcf-lock", "w")
    except OSError as error:
        raise StorageError(f"{work} cannot be written: {error}", "choose another output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HcfError(
                f"another run is writing {work}", "wait for it, or choose another output"
            ) from error
        yield
