"""`hcf sweep`: many students of one teacher, compared."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hcf.errors import RowsFailed
from hcf.terminal import (
    DryRunOption,
    Format,
    FormatOption,
    OutputOption,
    SetOption,
    finish,
    make_log,
)


def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML under recipes/distill.")],
    output: OutputOption,
    set: SetOption = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Students, e.g. '*-lora'. Repeatable.")
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep the result beside the recipe, in results/.")
    ] = False,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Train students of every method and size, judge and time them alike: one table, one plot.

    Repeating the command goes on where it was. Exit code 12: some students failed; the others are
    delivered.
    """
    from hcf.sweep import compare
    from hcf.sweep.recipe import load_sweep
    from hcf.sweep.students import show_plan
    from hcf.sweep.table import summary

    config, students = load_sweep(recipe, set or ())
    log = make_log(format)
    if dry_run:
        found = show_plan(config, students, output, only or (), log)
        return finish(format, "nothing was written", {"dry_run": True, "students": found})
    words = [word for text in set or () for word in ("--set", text)]
    words += [word for pattern in only or () for word in ("--only", pattern)]
    command = shlex.join(["hcf", "sweep", recipe.as_posix(), *words])
    record = compare.run_sweep(config, students, output, only=only or (), command=command, log=log)
    if store:
        log(f"stored {compare.store(output, recipe)}")
    finish(
        format,
        f"{summary(record)}\n{output / compare.TABLE}, {output / compare.PLOT}",
        record.model_dump(mode="json"),
    )
    if record.failed:
        listed = "\n".join(f"  {name}: {why}" for name, why in record.failed.items())
        raise RowsFailed(f"{len(record.failed)} students have no row:\n{listed}")
