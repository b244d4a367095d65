"""`hcf sweep`: trains the students that are not there, draws, times and judges all models alike.

    <output>/                   comparison.json, .md, .png, grid.png, recipe.yaml
    <output>.work/students/     <name>-<key>/artifact, as a stage of `hcf run` leaves it
    <output>.work/drawn/        <name>-<key>/, see `hcf.sweep.draw`
    <output>.work/timed/        <name>-<key>.json, a comparison of hcf_bench

Everything in the work folder is found again by content: repeating the command, after whatever
killed it, does what is left. Two commands may share it (`only` names whose students to make); one
waits where the other is at the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcf.artifact import (
    check_model_folder,
    clean_leftovers,
    content_hash,
    read_manifest,
    refuse_foreign,
    save_text,
    staged_folder,
)
from hcf.code_hash import code_hash
from hcf.errors import HcfError, MissingDependency, RecipeError, StorageError
from hcf.run import ARTIFACT, DONE
from hcf.run_stages import DATA, manifest_of
from hcf.settings import CheckConfig, DistillConfig, ProgressiveConfig
from hcf.sweep.recipe import TEACHER, Student, SweepConfig
from hcf.sweep.record import Cell, Cost, SweepRecord, write_record
from hcf.sweep.students import chosen_students, train_students, turn

if TYPE_CHECKING:
    from hcf.quality.evaluate import Evaluation
    from hcf.quality.sampling import Prompt
    from hcf.sweep.draw import ImageCost, Model, On, Opened, Seen
    from hcf_bench.results import Comparison

Log = Callable[[str], None]
RECORD, TABLE, PLOT, GRID = "comparison.json", "comparison.md", "comparison.png", "grid.png"
DEFAULT_STEPS = 50  # of a pipeline whose folder and class name none


@dataclass(frozen=True)
class Judged:
    """A model with all that was found of it; `student` is None for the teacher."""

    model: Model
    student: Student | None
    seen: Seen
    cost: ImageCost
    timing: Comparison | None


def run_sweep(
    config: SweepConfig,
    students: Sequence[Student],
    output: Path,
    *,
    only: Sequence[str] = (),
    command: str = "",
    log: Log = print,
) -> SweepRecord:
    """Makes and compares the `students` whose names match one of `only` (all without it).

    A student that cannot be trained, drawn or timed is left out with its reason and the others are
    delivered. Raises what a broken teacher, a full disk or a missing package raises.
    """
    check_model_folder(config.model)
    refuse_foreign(output)
    chosen = chosen_students(students, only)
    work = output.with_name(output.name + ".work")
    for part in ("students", "drawn", "timed"):
        (work / part).mkdir(parents=True, exist_ok=True)
        clean_leftovers(work / part)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    failed: dict[str, str] = {}
    folders = train_students(config, chosen, work, failed, log)
    judged, on, prompts = _judge_models(config, chosen, folders, work, failed, log)
    record = make_record(config, judged, on, prompts, failed, command)
    write_output(config, record, judged, output)
    return record


def _judge_models(
    config: SweepConfig,
    students: Sequence[Student],
    folders: Mapping[str, Path],
    work: Path,
    failed: dict[str, str],
    log: Log,
) -> tuple[list[Judged], On, list[Prompt]]:
    """The teacher and every student that is there: drawn, counted and timed."""
    from hcf.quality.gate import check_prompts
    from hcf.sweep.draw import Opened, choose_engine

    data = config.model / DATA
    wanted = CheckConfig(images=config.draw.images, prompts=config.draw.prompts)
    prompts = check_prompts(wanted, data if data.is_dir() else None)
    if len({prompt.text for prompt in prompts}) < 2:
        raise RecipeError("one prompt alone has no interval", "give two and more: draw.prompts")
    teacher = _model(TEACHER, config.model)
    on = choose_engine(teacher, config.draw, config.threads, log)
    log(f"all are drawn and timed on {on.engine} {on.precision or 'fp32'}")
    base = Opened(teacher, on, log)
    judged = [_judge_model(config, base, None, None, prompts, work, log)]
    for student in students:
        if student.name not in folders:
            continue
        opened = Opened(_model(student.name, folders[student.name] / ARTIFACT), on, log)
        try:
            judged.append(_judge_model(config, opened, student, base, prompts, work, log))
        except (StorageError, MissingDependency):
            raise  # the next student would meet it too
        except HcfError as error:
            failed[student.name] = " ".join(str(error).split())
            log(f"{student.name}: left out, {failed[student.name]}")
    return judged, on, prompts


def _model(name: str, folder: Path) -> Model:
    from hcf.artifact import Sampling
    from hcf.run_report import default_steps
    from hcf.sweep.draw import Model

    found = manifest_of(folder).sampling
    steps = found.steps or default_steps(folder) or DEFAULT_STEPS
    sampling = Sampling(steps=steps, guidance_scale=found.guidance_scale)
    return Model(name, folder, content_hash(folder), sampling)


def _judge_model(
    config: SweepConfig,
    opened: Opened,
    student: Student | None,
    teacher: Opened | None,
    prompts: Sequence[Prompt],
    work: Path,
    log: Log,
) -> Judged:
    from hcf.sweep.draw import drawing_key, see

    model = opened.model
    folder = work / "drawn" / f"{model.name}-{drawing_key(model, opened.on)[:12]}"
    with turn(folder, model.name, log):
        folder.mkdir(exist_ok=True)
        cost = _kept_cost(opened, prompts[0].text, config.draw.seed, folder)
        seen = see(opened, prompts, config.draw, folder)
    timing = None
    if teacher is not None:
        timing = _kept_timing(config, teacher, opened, work / "timed", log)
    return Judged(model, student, seen, cost, timing)


def _kept_cost(opened: Opened, prompt: str, seed: int, folder: Path) -> ImageCost:
    from hcf.sweep.draw import ImageCost, image_cost

    path = folder / "cost.json"
    if path.is_file():
        return ImageCost(**json.loads(path.read_text(encoding="utf-8")))
    pipe, sampling = opened.eager(), opened.model.sampling
    scale = sampling.guidance_scale
    scale = _default_guidance(pipe) if scale is None else scale
    found = image_cost(pipe, prompt, sampling.steps or DEFAULT_STEPS, scale, seed)
    save_text(path, json.dumps(vars(found)))
    return found


def _default_guidance(pipe: Any) -> float:
    import inspect

    default = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    return 1.0 if default in (None, inspect.Parameter.empty) else float(default)


def _kept_timing(
    config: SweepConfig, teacher: Opened, student: Opened, folder: Path, log: Log
) -> Comparison:
    """Interleaved pairs of teacher and student, both on the engine of the comparison."""
    from hcf.sweep.draw import drawing_key
    from hcf_bench.compare import PROMPTS, compare_pipelines
    from hcf_bench.environment import describe, read_environment
    from hcf_bench.results import Comparison, read_result, write_result

    models, on = (teacher.model, student.model), teacher.on
    environment = read_environment(config.bench.threads)
    said = [
        *(drawing_key(model, on) for model in models),
        config.bench.model_dump(mode="json"),
        describe(environment),
        code_hash(("hcf_bench/compare.py", "hcf_bench/pairs.py", "hcf_bench/statistics.py")),
    ]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    name = student.model.name
    path = folder / f"{name}-{key[:12]}.json"
    with turn(path, name, log):
        if path.is_file():
            found = read_result(path)
            assert isinstance(found, Comparison)
            return found
        log(f"{name}: timed against the teacher in pairs")
        names = [f"{m.name}, {m.sampling.steps} steps, {on.engine}" for m in models]
        timed = compare_pipelines(
            teacher.accelerated(),
            student.accelerated(),
            config.bench.prompts or PROMPTS,
            config.bench,
            sampling=(models[0].sampling, models[1].sampling),
            names=(names[0], names[1]),
            content_hashes=(models[0].content_hash, models[1].content_hash),
            threads=environment.threads,
        )
        write_result(path, timed)
    log(f"{name}: {timed.headline()}")
    return timed


def make_record(
    config: SweepConfig,
    judged: Sequence[Judged],
    on: On,
    prompts: Sequence[Prompt],
    failed: Mapping[str, str],
    command: str,
) -> SweepRecord:
    """Judges what was seen: every model by the same evaluator, over the same resamples."""
    from hcf.quality.evaluate import judge_seen
    from hcf.sweep.verdict import pareto, winners
    from hcf_bench.environment import describe, read_environment

    data = config.model / DATA
    evaluations: dict[str, Evaluation] = {
        found.model.name: judge_seen(
            prompts, found.seen.features_of, found.seen.hits_of, data if data.is_dir() else None,
            seed=config.draw.seed, resamples=config.draw.resamples,
        )
        for found in judged
    }  # fmt: skip
    teacher = evaluations[TEACHER]
    cells = [_cell(config, found, teacher, evaluations[found.model.name]) for found in judged]
    cells[0] = cells[0].model_copy(update={"latency_ms": _teacher_ms(judged)})
    front = pareto(cells, config.quality)
    cells = [cell.model_copy(update={"on_front": cell.name in front}) for cell in cells]
    environment = read_environment(config.bench.threads)
    return SweepRecord(
        name=config.name,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        model=f"{config.model.resolve().name} {judged[0].model.content_hash[:16]}",
        images=len(prompts),
        prompts=len({prompt.text for prompt in prompts}),
        seed=config.draw.seed,
        resamples=config.draw.resamples,
        quality=config.quality,
        engine=on.engine,
        precision=on.precision or "fp32",
        cells=tuple(cells),
        winners=winners(cells, evaluations, config.quality),
        failed={name: plain(config, why) for name, why in failed.items()},
        notes=teacher.notes,
        judge=dict(teacher.judge),
        environment=environment.model_dump(mode="json"),
        machine=describe(environment),
        recipe=config.model_dump(mode="json", exclude_none=True),
    )


def plain(config: SweepConfig, text: str) -> str:
    """`text` without the folders that lead to the model: a record is read on other machines."""
    return text.replace(f"{config.model.parent}/", "")


def _cell(config: SweepConfig, found: Judged, teacher: Evaluation, evaluation: Evaluation) -> Cell:
    from hcf.quality.evaluate import paired
    from hcf.quality.intervals import Interval
    from hcf.sweep.verdict import judge_goals

    model, student, timing = found.model, found.student, found.timing
    metrics = paired(teacher, evaluation)
    missing = {n: plain(config, why) for n, why in evaluation.missing.items() if n not in metrics}
    steps = model.sampling.steps or DEFAULT_STEPS
    cost = Cost(
        denoiser_calls=found.cost.calls,
        denoiser_rows=found.cost.rows,
        gflop=found.cost.flop / 1e9,
        **(_training(student.config, model.folder) if student else {}),
    )
    latency = timing.candidate.latency if timing else None
    over = timing.speedup if timing else None
    said = "the baseline" if timing is None else f"{timing.verdict}: {timing.reason}"
    goals = config.goals.get(steps, {}) if student else {}
    return Cell(
        name=model.name,
        method=student.config.method if student else TEACHER,
        kind=student.config.student.kind if student else "",
        steps=steps,
        guidance_scale=model.sampling.guidance_scale,
        content_hash=model.content_hash,
        metrics=metrics,
        missing=missing,
        latency_ms=latency.p50_ms if latency else None,
        speedup=Interval(over.value, over.low, over.high) if over else None,
        timing=said,
        cost=cost,
        goals=judge_goals({str(name): bound for name, bound in goals.items()}, metrics, missing),
    )


def _training(config: DistillConfig, folder: Path) -> dict[str, Any]:
    """What `Cost` says of training, from the student's manifest."""
    told = read_manifest(folder).distillation
    halvings = (config.progressive or ProgressiveConfig()).halvings
    stages = halvings if config.method == "progressive" else 1
    steps = stages * max(1, config.train_steps // stages)
    return {
        "train_s": told["seconds"],
        "train_steps": steps,
        "train_images": steps * config.batch_size,
        "trained_share": told["trained_share"],
    }


def _teacher_ms(judged: Sequence[Judged]) -> float | None:
    """The median over the pairs with every student."""
    from hcf_bench.statistics import percentile

    sides = [found.timing.baseline.latency for found in judged if found.timing]
    samples = [ms for side in sides if side for ms in side.samples_ms]
    return percentile(samples, 50) if samples else None


def write_output(
    config: SweepConfig, record: SweepRecord, judged: Sequence[Judged], output: Path
) -> None:
    """The record, the table, the plot and a grid of images: the folder whole or not at all."""
    import yaml

    from hcf.report.grid import save_grid
    from hcf.sweep.plot import draw_plot
    from hcf.sweep.table import markdown

    with staged_folder(output) as folder:
        write_record(folder / RECORD, record)
        save_text(folder / TABLE, markdown(record, PLOT))
        draw_plot(record, folder / PLOT)
        images = [image for found in judged for image in found.seen.shown]
        if images:
            columns = len(images) // len(judged)
            names = [f"{f.model.name} {i}" for f in judged for i in range(columns)]
            save_grid(folder / GRID, images, columns, captions=names)
        tree = config.model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
        save_text(folder / "recipe.yaml", text)
        save_text(folder / DONE, json.dumps({"step": "sweep", "name": record.name}))


def store(output: Path, recipe: Path) -> Path:
    """Copies record, table and plot to results/ beside the recipe, under its name."""
    from hcf.report.grid import replace_file

    folder = recipe.parent / "results"
    plot = f"{recipe.stem}.png"
    replace_file(folder / plot, (output / PLOT).read_bytes())
    table = (output / TABLE).read_text(encoding="utf-8").replace(f"({PLOT})", f"({plot})")
    replace_file(folder / f"{recipe.stem}.md", table.encode())
    return replace_file(folder / f"{recipe.stem}.json", (output / RECORD).read_bytes())
