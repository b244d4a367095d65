"""`hcf bench`: time models and what they are made of, compare, explain, and keep the results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcf.errors import InvalidComparison, Regression, Undecided
from hcf.terminal import (
    EngineOption,
    Format,
    FormatOption,
    ModelOption,
    PrecisionOption,
    RecipeOption,
    SetOption,
    ThreadsOption,
    finish,
    make_log,
)

if TYPE_CHECKING:
    from hcf_bench.records import Record
    from hcf_bench.results import Comparison

bench = typer.Typer(no_args_is_help=True, help="Time models, compare, explain, keep the results.")

COMPARE_S = 300.0

PairsOption = Annotated[int | None, typer.Option(min=1, help="Timed calls, or pairs of them.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Images at a time.")]
BudgetOption = Annotated[float | None, typer.Option(help="Seconds to spend at most.")]
ResultOption = Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")]
FolderOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
JunitOption = Annotated[Path | None, typer.Option("--junit", help="JUnit XML to write.")]
MarkdownOption = Annotated[Path | None, typer.Option("--markdown", help="Markdown to write.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda[:n].")]
ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of stored records.")]
StoreOption = Annotated[bool, typer.Option("--store", help="Also keep the record under --results.")]
WorkloadArgument = Annotated[str, typer.Argument(help="Such as sd15/unet; see hcf bench list.")]
RESULTS = Path("bench/results")


@bench.command("run")
def run(
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
def compare(
    baseline: Annotated[
        str, typer.Option("--baseline", "-b", help="Folder, commit, stored result, or . (as is).")
    ],
    candidate: Annotated[str, typer.Option("--candidate", "-c", help="What is judged; likewise.")],
    workload: Annotated[
        str, typer.Option(help="For commits: what both run; by default a shipped pipeline.")
    ] = "",
    peer: Annotated[str, typer.Option(help="For commits: how a workload is run.")] = "eager",
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="For commits: the pipeline both run.")
    ] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
    pairs: PairsOption = None,
    batch: BatchOption = None,
    budget_s: BudgetOption = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, help="Relative change that matters: 0.01 is 1 %.")
    ] = None,
    floor_ms: Annotated[
        float | None, typer.Option(min=0.0, help="Absolute change that matters, milliseconds.")
    ] = None,
    baseline_engine: Annotated[str, typer.Option(help="As for hcf generate.")] = "auto",
    candidate_engine: Annotated[str, typer.Option(help="As for hcf generate.")] = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, max=2, help="1: both sides in one; 2: one each, in turns.")
    ] = None,
    threads: ThreadsOption = None,
    output: ResultOption = None,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Interleaved pairs of two models, two commits, or a model and a stored result.

    Exit code 9: slower; 10: undecided; 11: not comparable.
    """
    from hcf_bench.references import compare_references
    from hcf_bench.results import write_result

    config = _config(
        recipe,
        set,
        pairs=pairs,
        batch=batch,
        budget_s=COMPARE_S if budget_s is None and recipe is None else budget_s,
        threads=threads,
        threshold=threshold,
        floor_ms=floor_ms,
    )
    found = compare_references(
        baseline,
        candidate,
        config,
        root=Path.cwd(),
        workload=workload,
        peer=peer,
        model=model,
        engines=(baseline_engine, candidate_engine),
        processes=processes,
        log=make_log(format),
    )
    if output:
        write_result(output, found)
    write_reports(junit, markdown, found)
    finish(format, found.headline(), found.model_dump(mode="json"))
    _exit_on(found, baseline, candidate)


@bench.command("selftest")
def selftest(
    comparisons: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 200,
    slowdown: Annotated[float, typer.Option(help="Injected, as a fraction.")] = 0.02,
    threshold: Annotated[float, typer.Option(help="Change that matters.")] = 0.01,
    load: Annotated[int, typer.Option(min=0, help="Processes that compete for the cores.")] = 4,
    processes: Annotated[int, typer.Option(min=1, max=2, help="1, or 2 in turns.")] = 1,
    blocks: Annotated[int, typer.Option(min=50, help="Length of the timed call.")] = 50,
    budget_s: Annotated[float, typer.Option(help="Seconds a comparison at most.")] = 290.0,
    allow: Annotated[int, typer.Option(min=0, help="Errors more than the bounds.")] = 0,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(help="Of orders and resamples.")] = 0,
    results: ResultsOption = RESULTS,
    store: StoreOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Measure the harness itself: false alarms, power and overhead, beside a synthetic load.

    Exit code 1 when a bound is missed.
    """
    from hcf.errors import HcfError
    from hcf_bench.selftest import SelfTestConfig, describe, failures, run_selftest
    from hcf_bench.suite import selftest_record, store_record

    config = SelfTestConfig(
        comparisons=comparisons,
        slowdown=slowdown,
        threshold=threshold,
        load=load,
        budget_s=budget_s,
        threads=threads or 1,
        processes=processes,
        blocks=blocks,
        seed=seed,
    )
    log = make_log(format)
    tests = run_selftest(config, log)
    if store:
        record = selftest_record(tests, config.threads, command_line())
        log(f"stored {store_record(record, results)}")
    data = {"tests": [test.model_dump(mode="json") for test in tests]}
    finish(format, "\n".join(describe(test) for test in tests), data)
    missed = failures(tests, allowance=allow)
    if missed:
        raise HcfError("; ".join(missed), "look for what else runs on this machine")


@bench.command("list")
def list_workloads(device: DeviceOption = "cpu", format: FormatOption = Format.human) -> None:
    """Name every workload, and every peer with what keeps it from running here."""
    from hcf_bench.peers import PEERS
    from hcf_bench.workloads import WORKLOADS

    lines = []
    for name, work in WORKLOADS.items():
        size = f"{work.params / 1e6:,.1f} M" if work.params else ""
        tflop = f"{work.tflop:.4g} TFLOP" if work.tflop else ""
        lines.append(f"{name:<44} {work.kind:<9} {size:>12} {tflop:>13}")
    missing = {name: peer.missing(device) for name, peer in PEERS.items()}
    lines += ["", *(f"{name:<26} {reason or 'ready'}" for name, reason in missing.items())]
    finish(format, "\n".join(lines), {"workloads": sorted(WORKLOADS), "peers": missing})


@bench.command("render")
def render(
    results: ResultsOption = RESULTS,
    target: Annotated[Path, typer.Option("--output", "-o")] = Path("bench/README.md"),
    check: Annotated[bool, typer.Option("--check", help="Only say whether it is current.")] = False,
    format: FormatOption = Format.human,
) -> None:
    """Write bench/README.md from the stored records. With --check, exit code 1 if it differs."""
    from hcf.errors import HcfError
    from hcf_bench.render import is_rendered, write_readme

    if check:
        if not is_rendered(results, target):
            raise HcfError(f"{target} is not what {results} renders to", "run hcf bench render")
    else:
        write_readme(results, target)
    finish(format, f"{target}", {"file": str(target)})


@bench.command("history")
def history(
    workload: WorkloadArgument,
    output: FolderOption = Path("out/history"),
    machine: Annotated[
        str, typer.Option(help="Folder under --results; default: the only one.")
    ] = "",
    subject: Annotated[list[str] | None, typer.Option(help="Repeatable; by default all.")] = None,
    results: ResultsOption = RESULTS,
    format: FormatOption = Format.human,
) -> None:
    """Draw a workload's stored times and ratios over commits: a PNG and a page."""
    from hcf_bench.history import read_history, write_history

    found = read_history(results, workload, machine=machine, subjects=tuple(subject or ()))
    files = [str(path) for path in write_history(found, output)]
    finish(format, "\n".join(files), {"files": files})


def write_reports(junit: Path | None, markdown: Path | None, found: Comparison | Record) -> None:
    from hcf_bench.report import write_junit, write_markdown

    if junit:
        write_junit(junit, [found])
    if markdown:
        write_markdown(markdown, [found])


def _exit_on(found: Comparison, baseline: str, candidate: str) -> None:
    if found.verdict == "SLOWER":
        raise Regression(f"{candidate} is slower than {baseline}: {found.reason}")
    if found.verdict == "UNDECIDED":
        raise Undecided(
            f"no verdict on {candidate} against {baseline}: {found.reason}",
            "give it a larger --budget-s, a quieter machine or a wider --threshold",
        )
    if found.verdict == "INVALID":
        raise InvalidComparison(f"the comparison is invalid: {found.reason}")


def command_line() -> str:
    """What was typed, as it can be typed again; absolute paths are cut to their last part."""
    words = [Path(w).name if w.startswith("/") else w for w in sys.argv[1:]]
    return shlex.join(["hcf", *words])


def _config(recipe: Path | None, set: list[str] | None, **options: Any) -> Any:
    from hcf.recipe import stage_config
    from hcf.settings import BenchConfig

    return stage_config(BenchConfig, "bench", recipe, set or (), **options)
