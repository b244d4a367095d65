"""What each stage of a run does: reads earlier results, calls the function, leaves its files.

Stages that make a model write folder/"artifact"; a check and a bench leave JSON and, where bounds
were set, verdict.json with `passed` and `reasons`; the report leaves a page, a card and a grid.
Everything heavy is imported when a stage really runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hcf.artifact import MANIFEST, Manifest, Sampling, default_sampling, read_manifest, save_text
from hcf.errors import RecipeError
from hcf.recipe import stage_config
from hcf.run import ARTIFACT, VERDICT, Inputs, Log, Stage
from hcf.settings import (
    BenchConfig,
    BuildConfig,
    CheckConfig,
    DistillConfig,
    ExportConfig,
    QuantizeConfig,
    ReportConfig,
    SensitivityConfig,
)

if TYPE_CHECKING:
    from hcf.quality.gate import Verdict

DATA = "hcf_data"
RULES = "rules.yaml"  # what a sensitivity search found, as a recipe
END_TO_END, STUDENT, DENOISER = "end_to_end.json", "student.json", "denoiser.json"
# Words of hcf_bench's verdict. INVALID must not be read: wrong outputs, unequal threads.
INVALID, FASTER = "INVALID", "FASTER"


def run_distill(folder: Path, inputs: Inputs, config: DistillConfig, log: Log) -> None:
    from hcf.distill.trainer import distill

    # beside the stage's folder, which does not outlive a killed run
    distill(_only(inputs), folder / ARTIFACT, config, log, work=folder.parent / "distill")


def run_sensitivity(folder: Path, inputs: Inputs, config: SensitivityConfig, log: Log) -> None:
    """Leaves the rules it chose as a recipe, which the quantize stage of the run follows."""
    from hcf.engines.search import search

    search(_only(inputs), folder / RULES, config, log)


def run_quantize(folder: Path, inputs: Inputs, config: QuantizeConfig, log: Log) -> None:
    """With the rules of a sensitivity search after the recipe's own, where the run made one."""
    from hcf.quantize.quantize import quantize

    model, *searches = inputs.values()
    for search in searches:
        found = stage_config(QuantizeConfig, "quantize", search / RULES)
        config = config.model_copy(update={"rules": [*config.rules, *found.rules]})
    quantize(model, folder / ARTIFACT, config, log)


def run_export(folder: Path, inputs: Inputs, config: ExportConfig, log: Log) -> None:
    from hcf.export.onnx import export

    export(_only(inputs), folder / ARTIFACT, config, log)


def run_build(folder: Path, inputs: Inputs, config: BuildConfig, log: Log) -> None:
    from hcf.engines.build import build

    build(_only(inputs), folder / ARTIFACT, config, log)


def run_check(folder: Path, inputs: Inputs, config: CheckConfig, log: Log) -> None:
    """Baseline in eager fp32; a candidate that is the run's result on the engines it was given."""
    baseline, candidate = next(iter(inputs.values())), list(inputs.values())[-1]
    engine = "auto" if config.candidate == "result" else "eager"
    verdict = check_artifacts(baseline, candidate, config, engine=engine, log=log)
    save_text(folder / VERDICT, verdict.model_dump_json(indent=1))


def run_bench(folder: Path, inputs: Inputs, config: BenchConfig, log: Log) -> None:
    """Teacher eager against result, and against the student where there is one; the U-Net alone."""
    from hcf_bench.compare import compare_artifacts, compare_denoisers
    from hcf_bench.results import write_result

    model, *students, result = inputs.values()
    for student in students:
        found = compare_artifacts(
            model,
            student,
            config,
            engines=("eager", "eager"),
            precisions=("fp32", "fp32"),
            log=log,
        )
        write_result(folder / STUDENT, found)
    overall = compare_artifacts(
        model,
        result,
        _deciding(config, config.min_speedup),
        engines=("eager", "auto"),
        precisions=("fp32", None),
        log=log,
    )
    write_result(folder / END_TO_END, overall)
    alone = compare_denoisers(result, _deciding(config, config.min_denoiser_speedup), log=log)
    write_result(folder / DENOISER, alone)
    reasons = []
    for found, goal in ((overall, config.min_speedup), (alone, config.min_denoiser_speedup)):
        if found.verdict == INVALID or found.speedup is None:
            reasons.append(f"bench: {found.workload} is invalid: {found.reason}")
        elif goal is not None and (found.verdict != FASTER or found.speedup.low < goal):
            reasons.append(
                f"bench: {found.workload}: {found.verdict}, {found.speedup.low:.2f}x at least "
                f"over {found.pairs} pairs, {goal:g}x asked for"
            )
    save_text(folder / VERDICT, json.dumps({"passed": not reasons, "reasons": reasons}))


def _deciding(config: BenchConfig, goal: float | None) -> BenchConfig:
    """Pairs until it is decided whether `goal` is reached, not whether there is any speed-up."""
    return config.model_copy(update={"threshold": max(config.threshold, (goal or 1.0) - 1.0)})


def run_report(folder: Path, inputs: Inputs, config: ReportConfig, log: Log) -> None:
    from hcf.run_report import write_run_report

    write_run_report(folder, inputs, config, log)


STAGES: Mapping[str, Stage] = {
    "distill": run_distill,
    "sensitivity": run_sensitivity,
    "quantize": run_quantize,
    "export": run_export,
    "build": run_build,
    "check": run_check,
    "bench": run_bench,
    "report": run_report,
}


def check_artifacts(
    baseline: Path, candidate: Path, config: CheckConfig, *, engine: str = "auto", log: Log = print
) -> Verdict:
    """The quality gate on two model folders; the judge and prompts come from either one's data.

    Raises RecipeError for a guidance scale that a side cannot take: its own is folded in.
    """
    from hcf.load import load
    from hcf.quality.gate import check_pipelines

    samplings = [_sampling_asked(side, config) for side in (baseline, candidate)]
    data = next((f / DATA for f in (baseline, candidate) if (f / DATA).is_dir()), None)
    return check_pipelines(
        load(baseline, engine="eager", threads=config.threads),
        load(candidate, engine=engine, threads=config.threads),
        config,
        data,
        log,
        baseline_sampling=samplings[0],
        candidate_sampling=samplings[1],
    )


def _sampling_asked(path: Path, config: CheckConfig) -> Sampling:
    """The folder's own, with what the check sets."""
    found, scale = manifest_of(path), config.guidance_scale
    told = found.distillation.get("guidance_embedding") if found.distillation else None
    if scale not in (None, 1) and found.sampling.guidance_scale == 1 and not told:
        raise RecipeError(
            f"{path} has its guidance folded in: it is sampled with scale 1, not {scale:g}",
            fix="leave guidance_scale out, or distil with guidance_embedding",
        )
    given = {"steps": config.steps, "guidance_scale": scale}
    return found.sampling.model_copy(update={k: v for k, v in given.items() if v is not None})


def manifest_of(path: Path) -> Manifest:
    """The folder's manifest, or one made up for a plain pipeline folder."""
    if (path / MANIFEST).is_file():
        return read_manifest(path)
    return Manifest(name=path.resolve().name, sampling=default_sampling(path))


def sampling_of(path: Path) -> Sampling:
    """Steps and guidance scale that the folder asks for."""
    return manifest_of(path).sampling


def _only(inputs: Inputs) -> Path:
    (path,) = inputs.values()
    return path
