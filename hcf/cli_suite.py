"""`hcf bench peers`, `profile`, `suite` and `gpu`: many rows at once, kept as a record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcf.cli_bench import (
    RESULTS,
    BatchOption,
    DeviceOption,
    FolderOption,
    JunitOption,
    MarkdownOption,
    ResultsOption,
    StoreOption,
    WorkloadArgument,
    command_line,
    write_reports,
)
from hcf.errors import MissingDependency, RecipeError, RowsFailed
from hcf.terminal import Format, FormatOption, Log, SetOption, ThreadsOption, finish, make_log

if TYPE_CHECKING:
    from hcf_bench.records import Record
    from hcf_bench.suite_recipe import SuiteConfig

BUDGET_S = 540.0
GPU_RECIPE, REHEARSAL_RECIPE = "gpu.yaml", "rehearsal.yaml"
PartsOption = Annotated[
    Path | None, typer.Option("--parts", help="Where parts are kept; default OUTPUT/parts.")
]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Use finished parts.")]


def peers(
    workload: WorkloadArgument,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", "-p", help="Repeatable; by default all.")
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", "-b", help="What all are held against.")
    ] = "eager",
    batch: BatchOption = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a pipeline.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Before the first look.")] = 8,
    pairs_s: Annotated[float, typer.Option(help="Seconds of pairs for each peer.")] = 60.0,
    subject_s: Annotated[float, typer.Option(help="Seconds until a peer is killed.")] = 600.0,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds in all.")] = 3600.0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    output: FolderOption = Path("out/bench"),
    results: ResultsOption = RESULTS,
    store: StoreOption = False,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Run one workload by every peer that is here, each against the baseline, in pairs."""
    from hcf_bench.peers import PEERS
    from hcf_bench.suite_recipe import Part, SuiteConfig

    part = Part(
        name="peers",
        kind="peers",
        workload=workload,
        baseline=baseline,
        peers=peer or [name for name in PEERS if name != baseline],
        batch=batch,
        steps=steps,
        pairs=pairs,
        pairs_s=pairs_s,
        subject_s=subject_s,
        box_s=budget_s,
    )
    dtypes = ["fp32", "bf16", "fp16", "int8", "fp8"]
    ceilings = Part(name="ceilings", kind="ceilings", dtypes=dtypes, box_s=60.0)
    name = workload.replace("/", "-")
    suite = SuiteConfig(name=name, device=device, threads=threads, parts=[ceilings, part])
    _run_suite(
        suite, output / name, budget_s, None, True, (), results if store else None,
        junit, markdown, format,
    )  # fmt: skip


def profile(
    workload: WorkloadArgument,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16.")] = "fp32",
    batch: BatchOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    output: FolderOption = Path("out/bench"),
    format: FormatOption = Format.human,
) -> None:
    """Show the ten layers of a module that lie furthest above their roofline floor."""
    from hcf_bench.layer_profile import profile_table
    from hcf_bench.suite import run_suite
    from hcf_bench.suite_recipe import Part, SuiteConfig

    parts = [
        Part(name="ceilings", kind="ceilings", dtypes=[dtype], box_s=60.0),
        Part(
            name="profile", kind="profile", workload=workload, dtypes=[dtype], batch=batch,
            box_s=600.0, subject_s=600.0,
        ),
    ]  # fmt: skip
    suite = SuiteConfig(
        name=f"profile-{workload.replace('/', '-')}", device=device, threads=threads, parts=parts
    )
    log = make_log(format)
    record = run_suite(
        suite, output / suite.name, budget_s=660.0, resume=False, command=command_line(), log=log
    )
    text = "\n\n".join(profile_table(found) for found in record.profiles)
    finish(format, text or "\n".join(record.notes), record.model_dump(mode="json"))
    _exit_on_failures(record)


def suite(
    recipe: Annotated[Path, typer.Argument(help="YAML under recipes/bench.")],
    output: FolderOption,
    set: SetOption = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds in all.")] = 3600.0,
    only: Annotated[list[str] | None, typer.Option(help="Name of a part. Repeatable.")] = None,
    parts_folder: Annotated[
        Path | None, typer.Option("--parts", help="Where parts are kept; default OUTPUT/parts.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use finished parts.")
    ] = True,
    results: ResultsOption = RESULTS,
    store: StoreOption = False,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Run the parts of a recipe in order of value, each in its time box.

    Exit code 12: some rows failed; the others are delivered.
    """
    from hcf_bench.suite import load_suite

    _run_suite(
        load_suite(recipe, set or ()), output, budget_s, parts_folder, resume, only or (),
        results if store else None, junit, markdown, format,
    )  # fmt: skip


def gpu(
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder to write.")],
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds in all.")] = BUDGET_S,
    only: Annotated[list[str] | None, typer.Option(help="Name of a part. Repeatable.")] = None,
    parts_folder: Annotated[
        Path | None, typer.Option("--parts", help="Where parts are kept; default OUTPUT/parts.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use finished parts.")
    ] = True,
    rehearsal: Annotated[bool, typer.Option(help="The tiny twin, on the CPU.")] = False,
    set: SetOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Everything worth knowing of a GPU, most valuable first; goes on where it stopped."""
    from hcf_bench.suite import load_suite, recipe_path

    found = load_suite(recipe_path(REHEARSAL_RECIPE if rehearsal else GPU_RECIPE), set or ())
    _run_suite(found, output, budget_s, parts_folder, resume, only or (), None, None, None, format)


def kernels(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Calls whose text holds this; repeatable.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest configurations instead.")
    ] = False,
    tables: Annotated[
        Path | None, typer.Option("--tables", help="Where --tune keeps them; default: the package.")
    ] = None,
    compiler: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Beside torch.compile max-autotune.")
    ] = True,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="PRESET/unet, ...; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16.")] = "bf16",
    most: Annotated[int | None, typer.Option(min=1, help="Calls, the costliest first.")] = None,
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds in all.")] = BUDGET_S,
    device: DeviceOption = "cpu",
    output: FolderOption = Path("out/kernels"),
    format: FormatOption = Format.human,
) -> None:
    """Time every fused kernel over the shapes models ask for, or tune them for this GPU."""
    from itertools import islice

    from hcf_bench import kernels as work
    from hcf_bench.kernel_calls import calls_of

    log: Log = make_log(format)
    calls = dict(islice(work.select(calls_of(model, dtype), only or ()).items(), most))
    if tune:
        if not device.startswith("cuda"):
            raise MissingDependency("kernels are tuned on a GPU", "give --device cuda")
        path = work.write_table(work.tune_calls(calls, device, budget_s, log), tables, device)
        return finish(format, f"wrote {path}", {"table": str(path)})
    record = work.run_kernels(
        calls, device=device, compiles=compiler, budget_s=budget_s, command=command_line(), log=log
    )
    output.mkdir(parents=True, exist_ok=True)
    text = record.model_dump_json(indent=1)
    (temporary := output / "kernels.json.tmp").write_text(text, encoding="utf-8")
    temporary.replace(output / "kernels.json")
    finish(format, work.kernel_table(record), record.model_dump(mode="json"))
    failed = [f"  {row.call}: {row.failed['ours']}" for row in record.rows if "ours" in row.failed]
    if failed:
        raise RowsFailed(f"{len(failed)} of {len(record.rows)} calls failed:\n" + "\n".join(failed))


def training(
    preset: Annotated[list[str] | None, typer.Argument(help="As hcf train plan; MINI.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="img/s and MFU, no peer.")] = False,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    pieces: Annotated[int, typer.Option(min=1, help="Of a batch, with --measure.")] = 1,
    recompute: Annotated[bool, typer.Option(help="Activations, with --measure.")] = False,
    distill: Annotated[
        list[str] | None, typer.Option(help="Method, with --measure: img/s of its steps.")
    ] = None,
    student: Annotated[str, typer.Option(help="full or lora, with --distill.")] = "full",
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit, with --distill.")] = "adamw",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")] = "fp32",
    budget_s: Annotated[float, typer.Option("--budget", help="Seconds of pairs.")] = 120.0,
    threads: ThreadsOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")] = None,
    results: ResultsOption = RESULTS,
    store: StoreOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Training speed: our loop beside diffusers' example in pairs, or its img/s and MFU alone."""
    from hcf_bench.suite import store_record, write_record
    from hcf_bench.training import TrainingConfig, run_training

    log: Log = make_log(format)
    try:
        config = TrainingConfig(
            presets=preset or ["MINI"], measure=measure, batch=batch, pieces=pieces, dtype=dtype,
            recompute=recompute, budget_s=budget_s, threads=threads, distill=distill or [],
            student=student, optimizer=optimizer,
        )  # fmt: skip
        record, lines = run_training(config, command_line(), log)
    except ValueError as error:
        raise RecipeError(str(error), "see hcf bench training --help") from error
    if output is not None:
        write_record(output, record)
    if store:
        log(f"stored {store_record(record, results)}")
    finish(format, "\n".join(lines), record.model_dump(mode="json"))


def _run_suite(
    config: SuiteConfig,
    output: Path,
    budget_s: float,
    parts_folder: Path | None,
    resume: bool,
    only: list[str] | tuple[str, ...],
    results: Path | None,
    junit: Path | None,
    markdown: Path | None,
    format: Format,
) -> None:
    from hcf_bench.report import terminal_table
    from hcf_bench.suite import run_suite, store_record

    log: Log = make_log(format)
    record = run_suite(
        config,
        output,
        budget_s=budget_s,
        parts_folder=parts_folder,
        resume=resume,
        only=only,
        command=command_line(),
        log=log,
    )
    if results is not None:
        log(f"stored {store_record(record, results)}")
    write_reports(junit, markdown, record)
    text = terminal_table(record, str(output / f"{config.name}.json"))
    finish(format, text, record.model_dump(mode="json"))
    _exit_on_failures(record)


def _exit_on_failures(record: Record) -> None:
    from hcf_bench.suite import failures

    failed = failures(record)
    if failed:
        listed = "\n".join(f"  {line}" for line in failed)
        raise RowsFailed(f"{len(failed)} of {len(record.rows)} rows failed:\n{listed}")
    if not (record.rows or record.ceilings or record.profiles or record.selftests):
        raise MissingDependency("nothing was measured", "give it a larger --budget")
