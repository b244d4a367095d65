"""What the commands share on a terminal: options, progress lines, and the last line as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hcf.errors import RecipeError

Log = Callable[[str], None]


class Format(StrEnum):
    """human: text on stdout. json: one object as the last line of stdout, progress on stderr."""

    human = "human"
    json = "json"


ModelOption = Annotated[Path, typer.Option("--model", "-m", help="Pipeline or artefact folder.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="YAML whose section is used.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override, e.g. distill.steps=8. Repeatable.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of everything random.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, eager, compile, onnxruntime, openvino, tensorrt.")
]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or int8.")]
FormatOption = Annotated[Format, typer.Option("--format", help="Of the result.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")]


def make_log(format: Format = Format.human) -> Log:
    """Progress lines with the seconds since the start; a spinner beside them on a terminal.

    They go to stderr when stdout carries the JSON.
    """
    stream = sys.stderr if format is Format.json else sys.stdout
    started = time.monotonic()
    if not stream.isatty():
        return lambda line: print(
            f"{time.monotonic() - started:7.1f} s  {line}", file=stream, flush=True
        )
    from rich.console import Console

    console = Console(file=stream, highlight=False)

    def log(line: str) -> None:
        style = "bold" if line.startswith("[") else None
        console.print(f"[dim]{time.monotonic() - started:7.1f} s[/dim]  ", end="")
        console.print(line, style=style, markup=False)

    return log


def finish(format: Format, text: str, data: dict[str, Any]) -> None:
    """The result: `text` for people, or `data` as one line of JSON."""
    print(json.dumps(data, ensure_ascii=False) if format is Format.json else text, flush=True)


def planned(
    format: Format, verb: str, config: Any, paths: dict[str, Path], found: Any = None
) -> None:
    """What `--dry-run` of a single command says: its settings, what was found out beside them, and
    that nothing was written."""
    tree = config.model_dump(mode="json", exclude_none=True)
    where = ", ".join(f"{name} {path}" for name, path in paths.items())
    shown = {**tree, **(found or {})}
    lines = [f"would {verb}: {where}", *(f"  {key}: {value}" for key, value in shown.items())]
    data = {"dry_run": True, "command": verb, "config": tree, **(found or {})}
    finish(format, "\n".join(lines), data)


def parse_shapes(option: str, texts: Sequence[str] | None) -> dict[str, list[int]]:
    """["sample:1x4x64x64"] -> {"sample": [1, 4, 64, 64]}; RecipeError for another form."""
    shapes: dict[str, list[int]] = {}
    for text in texts or ():
        for part in text.split(","):
            name, _, sizes = part.partition(":")
            try:
                shapes[name.strip()] = [int(size) for size in sizes.split("x")]
            except ValueError as error:
                raise RecipeError(
                    f"{option} {text!r} is not of the form name:1x4x64x64", "use x between sizes"
                ) from error
    return shapes


def parse_overrides(overrides: Sequence[str] | None) -> dict[str, Any]:
    """["a.b=1"] -> {"a.b": 1}, values read as YAML."""
    from hcf.recipe import apply_overrides

    flat: dict[str, Any] = {}
    for text in overrides or ():
        tree: dict[str, Any] = {}
        apply_overrides(tree, [text])
        node: Any = tree
        keys = text.partition("=")[0].strip().split(".")
        for key in keys:
            node = node[key]
        flat[".".join(keys)] = node
    return flat
