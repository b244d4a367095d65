"""`hcf data filter`, `select`, `shard`, `report` and their kin: raw pairs to training shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError
from hcf.terminal import (
    DryRunOption,
    Format,
    FormatOption,
    OutputOption,
    SetOption,
    finish,
    make_log,
    parse_overrides,
)

if TYPE_CHECKING:
    from taiji.data.recipe import DataRecipe


class Engine(StrEnum):
    """local: processes of this machine. ray: tasks of a Ray cluster, or of a Ray started here."""

    local = "local"
    ray = "ray"


RecipeArgument = Annotated[Path, typer.Argument(help="A file of recipes/data.")]
WorkersOption = Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes.")]
DataEngineOption = Annotated[Engine, typer.Option("--engine", help="Who runs the tasks.")]


@contextmanager
def _errors(what: Path) -> Iterator[None]:
    """The data engine's errors as those of the command."""
    from pydantic import ValidationError

    try:
        yield
    except ImportError as error:
        extra = "ray" if "engine ray" in str(error) else "data"
        raise MissingDependency(str(error), f"pip install 'hcf-toolkit[{extra}]'") from error
    except ValidationError as error:
        raise RecipeError(f"{what}: {error}", "compare with the files of recipes/data") from error
    except FileNotFoundError as error:
        fix = "check the recipe's paths, and run `hcf data filter` first"
        raise InvalidArtifact(str(error), fix) from error
    except ValueError as error:
        raise RecipeError(f"{what}: {error}", "see docs/data.md") from error


def _recipe(path: Path, overrides: list[str] | None) -> DataRecipe:
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}", "see recipes/data")
    from taiji.data.recipe import read_recipe

    return read_recipe(path, parse_overrides(overrides))


def _planned(found: DataRecipe, format: Format) -> None:
    from taiji.data.recipe import plan

    steps = plan(found)
    lines = [f"{key}: {value}" for key, value in steps.items()]
    finish(format, "\n".join(lines), {"dry_run": True, **steps})


def filter(
    recipe: RecipeArgument,
    set: SetOption = None,
    workers: WorkersOption = 1,
    engine: DataEngineOption = Engine.local,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Write each filter's columns beside the metadata; what is there already is not done again."""
    with _errors(recipe):
        found = _recipe(recipe, set)
        if dry_run:
            return _planned(found, format)
        from taiji.data.recipe import filter_pairs

        log = make_log(format)
        done = filter_pairs(found, workers=workers, engine=engine.value, log=log)
    text = f"{found.output}: {done['rows']:,} pairs, filters {', '.join(done['filters'])}"
    finish(format, text, {"output": str(found.output), **done})


def select(
    recipe: RecipeArgument,
    set: SetOption = None,
    sweep: Annotated[
        str | None, typer.Option(help="Rows kept at each value: relevance.min=0.2,0.25,0.3")
    ] = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Ask the recipe's query which rows are kept, without touching an image."""
    with _errors(recipe):
        found = _recipe(recipe, set)
        if dry_run:
            return _planned(found, format)
        if sweep is not None:
            return _sweep(found, sweep, format)
        from taiji.data.recipe import select_pairs

        chosen = select_pairs(found, make_log(format))
    kept = int(chosen.kept.sum())
    text = f"{kept:,} of {len(chosen.kept):,} pairs kept"
    finish(format, text, {"rows": len(chosen.kept), "kept": kept})


def _sweep(recipe: DataRecipe, text: str, format: Format) -> None:
    from taiji.data.recipe import query_table
    from taiji.data.select import sweep

    bound, _, values = text.partition("=")
    rule, _, name = bound.rpartition(".")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError as error:
        raise RecipeError(f"--sweep {text}", "write it as relevance.min=0.2,0.25,0.3") from error
    rows = sweep(query_table(recipe), recipe.select, rule, name, numbers)
    lines = [f"{bound}={value:g}: {kept:,} kept" for value, kept in rows]
    finish(format, "\n".join(lines), {"sweep": bound, "kept": rows})


def shard(
    recipe: RecipeArgument,
    set: SetOption = None,
    workers: WorkersOption = 1,
    engine: DataEngineOption = Engine.local,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Select, then write the kept pairs as webdataset tars with a manifest; resumes mid-shard."""
    with _errors(recipe):
        found = _recipe(recipe, set)
        if dry_run:
            return _planned(found, format)
        from taiji.data.recipe import shard_pairs

        manifest = shard_pairs(found, workers=workers, engine=engine.value, log=make_log(format))
    samples = sum(record.samples for record in manifest.domains.values())
    text = f"{found.output}: {samples:,} samples in {len(manifest.shards)} shards, {manifest.hash}"
    facts = {"samples": samples, "skipped": len(manifest.skipped), "hash": manifest.hash}
    finish(format, text, {"output": str(found.output), **facts})


def report(
    recipe: RecipeArgument,
    set: SetOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """What every rule let through by domain, with examples: report.html and report.json."""
    with _errors(recipe):
        found = _recipe(recipe, set)
        if dry_run:
            return _planned(found, format)
        from taiji.data.recipe import report_pairs

        page = report_pairs(found, make_log(format))
    finish(format, str(page), {"report": str(page)})


def probe(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV of id and domain; else the source's domains.")
    ] = None,
    set: SetOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Fit the linear domain classifier on the filtered pairs' CLIP features."""
    with _errors(recipe):
        from taiji.data.recipe import train_domain_probe

        accuracy = train_domain_probe(_recipe(recipe, set), output, labels, make_log(format))
    finish(format, f"{output}: {accuracy:.3f} right", {"probe": str(output), "accuracy": accuracy})


def reweight(
    manifest: Annotated[Path, typer.Argument(help="A data manifest, or its folder.")],
    badcases: Annotated[Path, typer.Option("--badcases", "-b", help="YAML list.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Name of the new manifest.")],
    format: FormatOption = Format.human,
) -> None:
    """A manifest of the same shards that draws bad cases more often, or leaves bad data out."""
    with _errors(badcases):
        from taiji.data.manifest import read_manifest, reweight, write_manifest

        folder = manifest if manifest.is_dir() else manifest.parent
        if output.parent not in (Path(), folder) or (folder / output.name).exists():
            raise RecipeError(f"-o {output}", f"name a new file for the folder {folder}")
        found = reweight(read_manifest(manifest), folder, badcases, make_log(format))
        write_manifest(found, folder / output.name)
    target = str(folder / output.name)
    finish(format, f"{target}: {found.hash}", {"manifest": target, "hash": found.hash})


def verify(
    manifest: Annotated[Path, typer.Argument(help="A data manifest, or its folder.")],
    format: FormatOption = Format.human,
) -> None:
    """Recompute the hashes of a manifest and of its shards."""
    with _errors(manifest):
        from taiji.data.manifest import read_manifest, verify

        found = read_manifest(manifest)
        problems = verify(found, manifest if manifest.is_dir() else manifest.parent)
    if problems:
        raise InvalidArtifact("\n".join(problems), "run `hcf data shard` again")
    text = f"{manifest}: {len(found.shards)} shards as written, {found.hash}"
    finish(format, text, {"hash": found.hash, "shards": len(found.shards)})


def rehearse(
    output: OutputOption,
    rows: Annotated[int, typer.Option(min=1, help="Synthetic pairs.")] = 1_000_000,
    seed: Annotated[int, typer.Option()] = 0,
    workers: WorkersOption = 1,
    format: FormatOption = Format.human,
) -> None:
    """Filter and select synthetic metadata, and say the seconds and the peak memory."""
    with _errors(output):
        from taiji.data.rehearsal import rehearse

        log = make_log(format)
        found: dict[str, Any] = rehearse(output, rows=rows, seed=seed, workers=workers, log=log)
    if found["planted_found"] < min(100, rows):
        raise HcfError(f"only {found['planted_found']} planted evaluation images were found")
    finish(format, ", ".join(f"{key} {value}" for key, value in found.items()), found)


VERBS = (filter, select, shard, report, probe, reweight, verify, rehearse)
