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

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcf.artifact import (
    INDEX,
    check_model_folder,
    clean_leftovers,
    content_hash,
    read_manifest,
    refuse_foreign,
    save_text,
    staged_folder,
)
from hcf.errors import HcfError, MissingDependency, RecipeError, StorageError
from hcf.run import ARTIFACT, DONE
from hcf.run_stages import DATA, manifest_of
from hcf.settings import CheckConfig, DistillConfig, ProgressiveConfig
from hcf.sweep.recipe import TEACHER, Student, SweepConfig
from hcf.sweep.record import Cell, Clock, Cost, Sample, SweepRecord, write_record
from hcf.sweep.students import chosen_students, leave_out, train_students, turn
from hcf.sweep.timing import kept_timing, set_threads, teacher_ms

if TYPE_CHECKING:
    from hcf.quality.evaluate import Evaluation
    from hcf.quality.intervals import Doubles
    from hcf.quality.sampling import Prompt
    from hcf.sweep.draw import ImageCost, Model, On, Opened, Seen
    from hcf_bench.results import Comparison

Log = Callable[[str], None]
RECORD, TABLE, PLOT, GRID = "comparison.json", "comparison.md", "comparison.png", "grid.png"
CLOCKS: Mapping[str, Clock] = {"wall": "wall", "cpu": "processor", "device": "wall"}
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
    threads = set_threads(config)
    failed: dict[str, str] = {}
    folders = train_students(config, chosen, work, failed, log)
    judged, on, prompts = _judge_models(config, threads, chosen, folders, work, failed, log)
    folders_of = config.model.parent, work, work.parent
    failed = {name: plain(why, *folders_of) for name, why in failed.items()}
    record = make_record(config, judged, on, prompts, failed, command)
    write_output(config, record, judged, output)
    return record


def _judge_models(
    config: SweepConfig,
    threads: int,
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
    on = choose_engine(teacher, config.draw, threads, log)
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
            leave_out(student.name, error, failed, log)
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
        timing = kept_timing(config.bench, teacher, opened, work / "timed", log)
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
    base_ms = teacher_ms([found.timing for found in judged])
    cells = [
        _cell(config, found, teacher, evaluations[found.model.name], base_ms) for found in judged
    ]
    front = pareto(cells, config.quality)
    cells = [cell.model_copy(update={"on_front": cell.name in front}) for cell in cells]
    environment = read_environment(on.threads)
    return SweepRecord(
        name=config.name,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        model=f"{config.model.resolve().name} {judged[0].model.content_hash[:16]}",
        images=len(prompts),
        prompts=len({prompt.text for prompt in prompts}),
        samples=count_samples(prompts, judged[0].seen.hits),
        reference_images=_reference_images(data) if "fed" in teacher.values else None,
        seed=config.draw.seed,
        resamples=config.draw.resamples,
        quality=config.quality,
        engine=on.engine,
        precision=on.precision or "fp32",
        cells=tuple(cells),
        winners=winners(cells, evaluations, config.quality),
        failed=dict(failed),
        notes=teacher.notes,
        judge=dict(teacher.judge),
        environment=environment.model_dump(mode="json"),
        machine=describe(environment),
        recipe=config.model_dump(mode="json", exclude_none=True),
    )


def count_samples(
    prompts: Sequence[Prompt], hits: Mapping[str, Sequence[float] | Doubles]
) -> dict[str, Sample]:
    """Images and distinct prompts behind each metric; NaN of `hits` was not asked for."""
    times = Counter(prompt.text for prompt in prompts)
    concepts = [p.text for p in prompts if p.kind != "shapes"]
    texts = dict.fromkeys(("fed", "clip_zh", "retrieval_r5"), concepts)
    texts["diversity"] = [p.text for p in prompts if times[p.text] > 1]
    for aspect, each in hits.items():
        pairs = zip(prompts, each, strict=True)
        texts[aspect] = [prompt.text for prompt, hit in pairs if not math.isnan(hit)]
    return {n: Sample(images=len(own), prompts=len(set(own))) for n, own in texts.items() if own}


def _reference_images(data: Path) -> int:
    from hcf.quality.frechet import REFERENCE_FILE, load_reference

    return load_reference(data / REFERENCE_FILE).count


def plain(text: str, *folders: Path) -> str:
    """`text` without `folders`, nor the current one: a record is read on other machines."""
    known = {str(path) for own in folders for path in (own, own.resolve())}
    # the longest first: one may lie in another
    for folder in sorted({*known, str(Path.cwd())} - {"."}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def _cell(
    config: SweepConfig,
    found: Judged,
    teacher: Evaluation,
    evaluation: Evaluation,
    base_ms: float | None,
) -> Cell:
    from hcf.quality.evaluate import paired
    from hcf.quality.intervals import Interval
    from hcf.sweep.verdict import judge_goals

    model, student, timing = found.model, found.student, found.timing
    metrics = paired(teacher, evaluation)
    missing = {
        name: plain(why, config.model.parent)
        for name, why in evaluation.missing.items()
        if name not in metrics
    }
    steps = model.sampling.steps or DEFAULT_STEPS
    cost = Cost(
        denoiser_calls=found.cost.calls,
        denoiser_rows=found.cost.rows,
        gflop=found.cost.flop / 1e9,
        **(_training(student.config, model.folder) if student else {}),
    )
    over = timing.speedup if timing else None
    clock = None if timing is None or over is None else CLOCKS[timing.clock]
    said = "the baseline" if timing is None else f"{timing.verdict}: {timing.reason}"
    goals = config.goals.get(steps, {}) if student else {}
    return Cell(
        name=model.name,
        method=student.config.method if student else TEACHER,
        kind=student.config.student.kind if student else "",
        steps=steps,
        guidance_scale=model.sampling.guidance_scale,
        scheduler=_scheduler(model.folder),
        content_hash=model.content_hash,
        metrics=metrics,
        missing=missing,
        latency_ms=_latency_ms(base_ms, over.value if over else None, student),
        speedup=Interval(over.value, over.low, over.high) if over else None,
        clock=clock,
        timing=said,
        cost=cost,
        goals=judge_goals({str(name): bound for name, bound in goals.items()}, metrics, missing),
    )


def _latency_ms(
    base_ms: float | None, speedup: float | None, student: Student | None
) -> float | None:
    """The teacher's over the speed-up: a student's own times have the load of their minute."""
    if student is None or base_ms is None:
        return base_ms
    return None if speedup is None else base_ms / speedup


def _scheduler(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return str((index.get("scheduler") or ["", ""])[1])


def _training(config: DistillConfig, folder: Path) -> dict[str, Any]:
    """What `Cost` says of training, from the student's manifest."""
    told = read_manifest(folder).distillation
    steps = train_steps(config)
    return {
        "train_s": told["seconds"],
        "train_steps": steps,
        "train_images": steps * config.batch_size,
        "trained_share": told["trained_share"],
    }


def train_steps(config: DistillConfig) -> int:
    """Optimiser steps of the student: of all stages, and of the regression before them."""
    halvings = (config.progressive or ProgressiveConfig()).halvings
    stages = halvings if config.method == "progressive" else 1
    matching = config.distribution_matching
    regression = matching.regression_steps if matching else 0
    return regression + stages * max(1, config.train_steps // stages)


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
