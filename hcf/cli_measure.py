"""`hcf check` and `hcf bench`: quality and time of a model against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hcf.errors import GateFailed, HcfError, Regression
from hcf.terminal import (
    EngineOption,
    Format,
    FormatOption,
    ModelOption,
    PrecisionOption,
    RecipeOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    finish,
    make_log,
)

bench = typer.Typer(no_args_is_help=True, help="Time a model, or two against each other.")

BaselineOption = Annotated[Path, typer.Option("--baseline", "-b", help="What it is held against.")]
CandidateOption = Annotated[Path, typer.Option("--candidate", "-c", help="What is judged.")]
PairsOption = Annotated[int | None, typer.Option(min=1, help="Timed calls, or pairs of them.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Images at a time.")]
BudgetOption = Annotated[float | None, typer.Option(help="Seconds to spend at most.")]
ResultOption = Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")]


def check(
    baseline: BaselineOption,
    candidate: CandidateOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    images: Annotated[int | None, typer.Option(min=1, help="Prompts, one seed each.")] = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    output: ResultOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Compare quality on fixed seeds; exit code 3 when a threshold of the recipe is missed."""
    from hcf.artifact import save_text
    from hcf.recipe import CheckConfig, stage_config
    from hcf.run_stages import check_artifacts

    options = {"images": images, "threads": threads, "seed": seed}
    config = stage_config(CheckConfig, "check", recipe, set or (), **options)
    verdict = check_artifacts(baseline, candidate, config, engine=engine, log=make_log(format))
    if output:
        save_text(output, verdict.model_dump_json(indent=1))
    state = "passed" if verdict.passed else "failed"
    finish(format, f"check {verdict.name}: {state}", verdict.model_dump(mode="json"))
    if not verdict.passed:
        raise GateFailed("\n".join(verdict.reasons), "improve the candidate, or the thresholds")


@bench.command("run")
def bench_run(
    model: ModelOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    pairs: PairsOption = None,
    batch: BatchOption = None,
    budget_s: BudgetOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    output: ResultOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Time one model from prompt to pixels, with its stages and its environment."""
    from hcf_bench.compare import run_benchmark
    from hcf_bench.results import write_result

    config = _config(recipe, set, pairs=pairs, batch=batch, budget_s=budget_s, threads=threads)
    found = run_benchmark(model, config, engine=engine, precision=precision, log=make_log(format))
    if output:
        write_result(output, found)
    latency = found.subject.latency
    text = f"{found.workload}: p50 {latency.p50_ms:.1f} ms" if latency else "nothing was timed"
    finish(format, text, found.model_dump(mode="json"))


@bench.command("compare")
def bench_compare(
    baseline: BaselineOption,
    candidate: CandidateOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    pairs: PairsOption = None,
    batch: BatchOption = None,
    budget_s: BudgetOption = None,
    baseline_engine: Annotated[str, typer.Option(help="As for hcf generate.")] = "auto",
    candidate_engine: Annotated[str, typer.Option(help="As for hcf generate.")] = "auto",
    threads: ThreadsOption = None,
    output: ResultOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Time two models as interleaved pairs; exit code 9 when the candidate is slower."""
    from hcf_bench.compare import compare_artifacts
    from hcf_bench.results import write_result
    from hcf_bench.statistics import Verdict

    config = _config(recipe, set, pairs=pairs, batch=batch, budget_s=budget_s, threads=threads)
    found = compare_artifacts(
        baseline,
        candidate,
        config,
        engines=(baseline_engine, candidate_engine),
        log=make_log(format),
    )
    if output:
        write_result(output, found)
    finish(format, found.headline(), found.model_dump(mode="json"))
    if found.verdict is Verdict.SLOWER:
        raise Regression(f"{candidate} is slower than {baseline}: {found.reason}")
    if found.verdict is Verdict.INVALID:
        raise HcfError(f"the comparison is invalid: {found.reason}")


def _config(recipe: Path | None, set: list[str] | None, **options: Any) -> Any:
    from hcf.recipe import BenchConfig, stage_config

    return stage_config(BenchConfig, "bench", recipe, set or (), **options)
