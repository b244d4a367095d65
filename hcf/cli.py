"""The `hcf` command: verbs that parse, call, and print. Nothing heavy is imported before its verb.

Exit codes: 0 done, 1 error, 2 usage or recipe, 3 quality gate, 4 package or hardware missing,
5 damaged model, 6 pickle refused, 7 disk, 8 engine of another machine, 9 slower, 10 undecided,
11 not comparable, 12 rows failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from hcf import cli_bench, cli_data, cli_dataset, cli_measure, cli_stages, cli_suite, cli_sweep
from hcf.artifact import is_disk_full
from hcf.errors import HcfError, InvalidArtifact, StorageError
from hcf.terminal import (
    DryRunOption,
    EngineOption,
    Format,
    FormatOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    finish,
    make_log,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes a text-to-image diffusion model fast, and shows that it is still good.",
)

QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code; errors go to stderr with the fix."""
    signal.signal(signal.SIGTERM, _terminate)
    # Progress is our own log lines; the libraries' bars and notices would run through them.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, prog_name="hcf", standalone_mode=False)
    except HcfError as error:
        print(f"error: {error}", file=sys.stderr)
        if "json" in given or "--format=json" in given:
            kind = type(error).__name__
            report = {"type": kind, "message": error.message, "fix": error.fix}
            print(json.dumps({"error": report, "exit_code": error.exit_code}, ensure_ascii=False))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; repeat the command to continue", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `hcf inspect x | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if is_disk_full(error):
            print(f"error: the disk is full: {error}\nfix: free some space", file=sys.stderr)
            sys.exit(StorageError.exit_code)
        # Usage errors of click, which some versions of typer bring along under another name.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an error, so that temporary folders are removed."""
    sys.exit(128 + number)


def _version(value: bool) -> None:
    if value:
        from hcf import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    set: SetOption = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use stages that are finished.")
    ] = True,
    format: FormatOption = Format.human,
) -> None:
    """Run a whole recipe, from the teacher to the checked, timed artefact."""
    from hcf.recipe import load_recipe
    from hcf.run import LADDER, run_recipe

    found = load_recipe(recipe, set or ())
    result = run_recipe(found, dry_run=dry_run, resume=resume, log=make_log(format))
    if dry_run:
        finish(format, "nothing was written", {"dry_run": True, **result.summary()})
        return
    ladders = [s.folder / LADDER for s in result.steps if (s.folder / LADDER).is_file()]
    rungs = json.loads(ladders[0].read_text(encoding="utf-8")) if ladders else []
    if rungs and format is Format.human:
        from hcf.report.table import Rung, final_table

        final_table([Rung(**rung) for rung in rungs], title=found.name)
    text = f"{result.output}" + (f", report {result.report}" if result.report else "")
    finish(format, text, {**result.summary(), "ladder": rungs})


for verb in (
    cli_stages.distill,
    cli_stages.quantize,
    cli_stages.sensitivity,
    cli_stages.export,
    cli_stages.build,
):
    app.command()(verb)
app.command()(cli_sweep.sweep)
app.command()(cli_measure.check)
app.command()(cli_measure.decoder)
for timed in (
    cli_suite.peers,
    cli_suite.profile,
    cli_suite.kernels,
    cli_suite.suite,
    cli_suite.gpu,
    cli_suite.training,
):
    cli_bench.bench.command()(timed)
app.add_typer(cli_bench.bench, name="bench")
for step in cli_dataset.VERBS:
    cli_data.data.command()(step)
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_data.training, name="train")


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG; numbered for several.")],
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="A prompt.")] = 1,
    grid: Annotated[int, typer.Option(min=0, help="One PNG with this many columns.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    seed: SeedOption = 0,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Draw images of prompts."""
    from hcf.generate import Request, generate_files

    request = Request(
        prompts=tuple(prompt),
        output=output,
        negative_prompt=negative_prompt,
        images=num_images,
        columns=grid,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed or 0,
    )
    files = generate_files(
        model, request, engine=engine, precision=precision, threads=threads, log=make_log(format)
    )
    names = [str(file) for file in files]
    finish(format, "\n".join(names), {"files": names})


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder, .safetensors or .onnx.")],
    format: FormatOption = Format.human,
) -> None:
    """Show what is in a model: components, types, lineage, engines, operators."""
    from hcf.inspect import describe, inspect_path

    found = inspect_path(path)
    finish(format, describe(found), {"path": found.path, "kind": found.kind, **found.data})


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Artefact folder.")],
    format: FormatOption = Format.human,
) -> None:
    """Recompute an artefact's hashes and check that its weights are whole and finite."""
    from dataclasses import asdict

    from hcf.artifact import check_model_folder, read_manifest
    from hcf.artifact import verify as recompute

    problems = recompute(path)
    manifest = read_manifest(path)
    if format is Format.json:
        found = [asdict(problem) for problem in problems]
        data = {"content_hash": manifest.content_hash, "problems": found}
        print(json.dumps(data, ensure_ascii=False))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise InvalidArtifact(f"{path} is not as it was written:\n{listed}", "make it again")
    check_model_folder(path)
    if format is Format.human:
        print(f"{path}: {len(manifest.files)} files as written, {manifest.content_hash}")


@app.command()
def doctor(format: FormatOption = Format.human) -> None:
    """Say what this machine can run, and the line that fixes what it cannot."""
    from hcf.doctor import describe, examine

    machine = examine()
    finish(format, describe(machine), machine.summary())
