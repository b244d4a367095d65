"""The last stage of a run: what the earlier ones left becomes a page, a card, a grid and a ladder.

Three roles appear side by side: the teacher (the model given), the student (after distillation, in
eager fp32) and the result (on the engines that were chosen).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcf.artifact import Manifest
from hcf.report.card import model_card, write_card
from hcf.report.grid import save_grid
from hcf.report.page import (
    Figure,
    GateRow,
    ImageColumn,
    SpeedRow,
    chosen_entry,
    engine_rows,
    gate_rows,
    layer_row,
    speed_row,
    write_report,
)
from hcf.report.table import Rung, ratio
from hcf.run import DONE, LADDER, VERDICT
from hcf.run_stages import DATA, DENOISER, END_TO_END, STUDENT, manifest_of
from hcf.settings import ReportConfig

if TYPE_CHECKING:
    from hcf.quality.gate import Verdict

Log = Callable[[str], None]
MAKERS = ("build", "export", "quantize", "distill", "model")  # whose artefact is the result


def write_run_report(
    folder: Path, inputs: Mapping[str, Path], config: ReportConfig, log: Log
) -> None:
    """Writes report.html, README.md, grid.png and the ladder into `folder`."""
    roles = {"teacher": inputs["model"]}
    if "distill" in inputs:
        roles["student"] = inputs["distill"]
    maker = next(name for name in MAKERS if name in inputs)
    if maker not in ("model", "distill"):
        roles["result"] = inputs[maker]
    result = inputs[maker]
    manifest = manifest_of(result)
    checks = {name: path for name, path in inputs.items() if name.startswith("check-")}
    verdicts = {name: _verdict(path) for name, path in checks.items()}
    values = _values({name: (_config(path), verdicts[name]) for name, path in checks.items()})
    bench = inputs.get("bench")
    times = {
        name: json.loads((bench / name).read_text(encoding="utf-8"))
        for name in (END_TO_END, STUDENT, DENOISER)
        if bench is not None and (bench / name).is_file()
    }
    rungs = _rungs(roles, values, times)
    speeds = _speeds(times, _config(bench) if bench else {})
    gates = [row for verdict in verdicts.values() for row in _labelled(verdict)]
    failed = [reason for verdict in verdicts.values() for reason in verdict.reasons]
    if bench is not None:
        failed += json.loads((bench / VERDICT).read_text(encoding="utf-8"))["reasons"]
    prompts, columns = _images(roles, config, log)
    environment = _environment(times)
    facts = manifest.model_dump(mode="json", exclude_none=True)
    judged = next((v.judge for v in verdicts.values() if v.judge), None)
    notes = [note for verdict in verdicts.values() for note in verdict.notes]
    write_report(
        folder / "report.html",
        title=config.title or config.name,
        passed=None if not verdicts and bench is None else not failed,
        summary=_summary(rungs),
        figures=_figures(speeds, gates),
        rungs=rungs,
        prompts=prompts,
        images=columns,
        gate=gates,
        judge=judged,
        speeds=speeds,
        layers=[layer_row(row) for row in _layer_errors(result)],
        quantization_note=_quantization_note(manifest),
        engines=engine_rows(manifest),
        manifest=facts,
        environment=environment,
        notes=[*failed, *dict.fromkeys(notes)],
    )
    images = [image for column in columns for image in column.images]
    captions = [f"{column.label}: {prompt}" for column in columns for prompt in prompts]
    if images:
        save_grid(folder / "grid.png", images, len(prompts), captions=captions)
    card = model_card(
        name=config.name or manifest.name,
        manifest={**facts, "parents": facts.get("parents", [])[-1:]},  # the teacher
        rungs=rungs,
        gate=gates,
        speeds=speeds,
        licence=config.licence,
        environment=environment,
        example_prompt=prompts[0] if prompts else "",
        image="grid.png" if images else "",
    )
    write_card(folder / "README.md", card)
    ladder = json.dumps([asdict(rung) for rung in rungs], ensure_ascii=False)
    (folder / LADDER).write_text(ladder, encoding="utf-8")


def _verdict(folder: Path) -> Verdict:
    from hcf.quality.gate import Verdict

    return Verdict.model_validate_json((folder / VERDICT).read_text(encoding="utf-8"))


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))["config"]
    return found


def _values(
    checks: Mapping[str, tuple[Mapping[str, Any], Verdict]],
) -> dict[str, dict[str, float]]:
    """{role: {metric: value}} over all checks; PSNR only where it is against the student."""
    values: dict[str, dict[str, float]] = {}
    for config, verdict in checks.values():
        for metric in verdict.metrics:
            if metric.name.startswith(("psnr", "ssim")) and config["baseline"] != "student":
                continue
            for role, value in (
                (config["baseline"], metric.baseline),
                (config["candidate"], metric.value),
            ):
                if value is not None:
                    values.setdefault(role, {})[metric.name] = value
    return values


def _rungs(
    roles: Mapping[str, Path],
    values: Mapping[str, Mapping[str, float]],
    times: Mapping[str, Mapping[str, Any]],
) -> list[Rung]:
    rungs = []
    for role, path in roles.items():
        manifest = manifest_of(path)
        entry = chosen_entry(manifest, "unet") if role == "result" else None
        found = times.get(STUDENT if role == "student" else END_TO_END, {})
        side = found.get("baseline" if role == "teacher" else "candidate") or {}
        speedup = found.get("speedup") or {} if role != "teacher" else {"value": 1.0}
        metrics = values.get(role, {})
        rungs.append(
            Rung(
                name=role,
                steps=manifest.sampling.steps or default_steps(path),
                engine=entry.engine if entry else "eager",
                precision=entry.precision if entry else "fp32",
                latency_ms=(side.get("latency") or {}).get("p50_ms"),
                speedup=speedup.get("value") if side else None,
                speedup_low=speedup.get("low", speedup.get("value")) if side else None,
                speedup_high=speedup.get("high", speedup.get("value")) if side else None,
                clip_zh=metrics.get("clip_zh"),
                fed=metrics.get("fed"),
                psnr_db=metrics.get("psnr_db"),
                chosen=role == list(roles)[-1],
            )
        )
    return rungs


def default_steps(path: Path) -> int:
    """Steps of a pipeline folder that states none: its class's default."""
    import inspect

    from hcf.source import pipeline_class

    parameters = inspect.signature(pipeline_class(path).__call__).parameters
    return int(parameters["num_inference_steps"].default or 0)


def _speeds(times: Mapping[str, Mapping[str, Any]], bench: Mapping[str, Any]) -> list[SpeedRow]:
    labels = {
        END_TO_END: ("end to end", bench.get("min_speedup")),
        STUDENT: ("student, end to end", None),
        DENOISER: ("denoiser alone", bench.get("min_denoiser_speedup")),
    }
    return [speed_row(labels[name][0], found, labels[name][1]) for name, found in times.items()]


def _labelled(verdict: Verdict) -> list[GateRow]:
    from dataclasses import replace

    return [replace(row, metric=f"{verdict.name}: {row.metric}") for row in gate_rows(verdict)]


def _figures(speeds: Sequence[SpeedRow], gates: Sequence[GateRow]) -> list[Figure]:
    """The comparisons and every gated metric, as headline figures."""
    figures = [
        Figure(
            row.label,
            f"{ratio(row.speedup)}x",
            f"[{ratio(row.low)}, {ratio(row.high)}]" if row.low and row.high else "",
            None if row.goal is None or row.low is None else row.low >= row.goal,
        )
        for row in speeds
        if row.speedup is not None
    ]
    gated = [row for row in gates if row.passed is not None and row.value is not None]
    figures += [
        Figure(row.metric, f"{row.value:.{row.digits}f}", row.threshold, row.passed)
        for row in gated
    ]
    return figures


def _summary(rungs: Sequence[Rung]) -> str:
    first, last = rungs[0], rungs[-1]
    text = f"{first.name}: {first.steps} steps. {last.name}: {last.steps} steps"
    text += f" on {last.engine} in {last.precision}."
    if last.speedup and last is not first:
        text += f" It is {ratio(last.speedup)} times as fast, end to end, at equal threads."
    return text


def _images(
    roles: Mapping[str, Path], config: ReportConfig, log: Log
) -> tuple[list[str], list[ImageColumn]]:
    """Prompts, and for each role its images of them from the same seeds."""
    from hcf.load import load
    from hcf.quality.sampling import PROMPTS_FILE, choose_prompts, generate_images, load_prompts

    shipped = roles["teacher"] / DATA / PROMPTS_FILE
    if config.prompts:
        prompts = list(config.prompts)
    elif shipped.is_file():
        prompts = [p.text for p in choose_prompts(load_prompts(shipped), config.images)]
    else:
        return [], []
    columns = []
    for role, path in roles.items():
        log(f"{len(prompts)} images of the {role}")
        pipe = load(path, engine="auto" if role == "result" else "eager", threads=config.threads)
        seeds = [config.seed + i for i in range(len(prompts))]
        images = generate_images(pipe, prompts, seeds, sampling=manifest_of(path).sampling)
        columns.append(ImageColumn(role, list(images)))
    return prompts, columns


def _environment(times: Mapping[str, Mapping[str, Any]]) -> str:
    """The machine in one line: as the bench saw it, else as it is."""
    from hcf_bench.environment import Environment, describe, read_environment

    for found in times.values():
        return describe(Environment.model_validate(found["environment"]))
    return describe(read_environment())


def _layer_errors(result: Path) -> list[dict[str, Any]]:
    file = result / "unet" / "quantization.json"
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["layer_errors"]
    return rows


def _quantization_note(manifest: Manifest) -> str:
    notes = []
    for name, facts in manifest.quantization.items():
        notes.append(
            f"{name}: {facts['layers']} layers in {str(facts['format']).upper()}, "
            f"{facts['excluded']} in floating point; ranges by {facts['algorithm']} over "
            f"{facts['calibration_calls']} calls of {facts['calibration_samples']} prompts; "
            f"the whole is {facts['relative_error']:.4f} from fp32"
        )
    return ". ".join(notes)
