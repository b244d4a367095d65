"""`hcf data build` and `hcf train`: what the models are made from, and what making them costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError
from hcf.terminal import (
    Format,
    FormatOption,
    OutputOption,
    SetOption,
    finish,
    make_log,
    parse_overrides,
)

data = typer.Typer(no_args_is_help=True, help="Make data sets.")
build = typer.Typer(no_args_is_help=True, help="Build a data set, deterministically.")
data.add_typer(build, name="build")


@build.command()
def emoji(
    output: OutputOption,
    size: Annotated[list[int] | None, typer.Option(help="Pixels; repeatable.")] = None,
    vendor: Annotated[list[str] | None, typer.Option(help="Repeatable; all without it.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the packages.")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Real emoji of several vendors with their Chinese names (needs npm to fetch packages)."""
    try:
        from taiji.data.emoji import GENERATOR_VENDORS, JUDGE_VENDORS
        from taiji.data.emoji import build as work
    except ImportError as error:
        raise MissingDependency(str(error), "pip install 'hcf-toolkit[data]'") from error
    vendors = vendor or [*GENERATOR_VENDORS, *JUDGE_VENDORS]
    log = make_log(format)
    try:
        work(output, sizes=size or (64, 128), cache=cache, vendors=vendors, log=log)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    except RuntimeError as error:
        raise MissingDependency(str(error), "install npm, or give --cache") from error
    finish(format, str(output), {"output": str(output)})


@build.command()
def shapes(
    output: OutputOption,
    count: Annotated[int, typer.Option(min=1, help="Scenes of each split.")] = 10_000,
    size: Annotated[int, typer.Option(help="Pixels.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    format: FormatOption = Format.human,
) -> None:
    """The generated world of coloured shapes, whose captions are exactly true."""
    try:
        from taiji.data.scenes import build as work
    except ImportError as error:
        raise MissingDependency(str(error), "pip install 'hcf-toolkit[data]'") from error
    try:
        work(output, count=count, size=size, seed=seed, log=make_log(format))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    finish(format, str(output), {"output": str(output)})


@data.command()
def judge(
    emoji: Annotated[Path, typer.Argument(help="What `hcf data build emoji` made.")],
    output: OutputOption,
    names: Annotated[
        Path | None, typer.Option(help="Training recipe whose art is the Frechet reference.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    format: FormatOption = Format.human,
) -> None:
    """Train the quality judge on other vendors' art than the generator's, and its reference."""
    from hcf.quality.frechet import REFERENCE_FILE, build_reference
    from hcf.quality.judge_training import train_judge

    chosen: dict[str, Any] = {}
    if names is not None:
        from taiji.train.recipe import read_recipe

        corpus = read_recipe(names).data
        chosen = {"labels": corpus.labels, "vendors": corpus.vendors}
    log = make_log(format)
    try:
        accuracy = train_judge(emoji, output, epochs=epochs, seed=seed, log=log)
        build_reference(emoji, output / REFERENCE_FILE, **chosen)
    except FileNotFoundError as error:
        raise InvalidArtifact(str(error), "hcf data build emoji") from error
    finish(format, str(output), {"output": str(output), "accuracy": accuracy["unseen"]})


class _TrainGroup(TyperGroup):
    """`hcf train RECIPE` is `hcf train run RECIPE`: what is no command here is a recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, "--help"}
        return super().parse_args(ctx, ["run", *args] if args and args[0] not in known else args)


training = typer.Typer(
    cls=_TrainGroup, no_args_is_help=True, help="Train a recipe (hcf train RECIPE), or plan a run."
)


@training.command("run")
def train(
    recipe: Annotated[Path, typer.Argument(help="A file of recipes/train.")],
    set: SetOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Train one phase of a Taiji model; an interrupted run continues where it was."""
    from pydantic import ValidationError

    overrides = parse_overrides(set)
    if not recipe.is_file():
        raise RecipeError(f"no recipe at {recipe}", "see recipes/train")
    from taiji.train.parallel import rank
    from taiji.train.recipe import train as work

    try:
        model = work(recipe, overrides, make_log(format))
    except ValidationError as error:
        raise RecipeError(
            f"{recipe}: {error}", "compare with the files of recipes/train"
        ) from error
    except FileNotFoundError as error:
        raise InvalidArtifact(str(error), "build the data, or run the phases in order") from error
    except FloatingPointError as error:
        raise HcfError(f"the training diverged: {error}", "lower loop.learning_rate") from error
    except ImportError as error:
        raise MissingDependency(str(error), "pip install what is named") from error
    except ValueError as error:
        raise RecipeError(f"{recipe}: {error}", "see docs/training.md") from error
    if rank() == 0:
        finish(format, str(model), {"model": str(model)})


@training.command("plan")
def plan(
    preset: Annotated[list[str], typer.Argument(help="Such as A-300M, A-1.3B, SD-A, SR-S.")],
    gpus: Annotated[int, typer.Option(min=1)] = 32,
    hours: Annotated[float, typer.Option(help="Of the whole run.")] = 336.0,
    batch: Annotated[int, typer.Option(min=1, help="Global.")] = 4096,
    resolution: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    mfu: Annotated[float, typer.Option(help="Assumed share of the peak.")] = 0.27,
    device: Annotated[str, typer.Option(help="a100, h100, h200, ...")] = "a100",
    images: Annotated[float, typer.Option(help="Of the data set, for the passes.")] = 100e6,
    text: Annotated[str, typer.Option(help="none, frozen or trained: its encoder.")] = "none",
    format: FormatOption = Format.human,
) -> None:
    """Estimate what training a preset costs: rate, samples, passes, memory, checkpoints."""
    from taiji.train.plan import PlanConfig, table
    from taiji.train.plan import plan as work

    try:
        config = PlanConfig(
            gpus=gpus, hours=hours, batch=batch, resolution=resolution, mfu=mfu, device=device,
            images=images, text=text,
        )  # fmt: skip
        plans = [work(name, config) for name in preset]
    except ValueError as error:
        raise RecipeError(str(error), "see hcf train plan --help") from error
    finish(format, table(plans), {"plans": [p.model_dump(mode="json") for p in plans]})
