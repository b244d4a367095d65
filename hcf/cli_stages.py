"""`hcf distill`, `quantize`, `export`, `build`: one stage of a run on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcf.terminal import (
    DryRunOption,
    Format,
    FormatOption,
    ModelOption,
    OutputOption,
    RecipeOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    finish,
    make_log,
    parse_shapes,
    planned,
)


def distill(
    model: ModelOption,
    output: OutputOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    steps: Annotated[int | None, typer.Option(help="Of the student.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Folded into the student.")] = None,
    train_steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Distil a guided many-step teacher into a few-step student."""
    from hcf.recipe import DistillConfig, stage_config

    options = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "train_steps": train_steps,
        "seed": seed,
    }
    config = stage_config(DistillConfig, "distill", recipe, set or (), **options)
    if dry_run:
        return planned(format, "distill", config, {"model": model, "output": output})
    from hcf.distill.consistency import distill as work

    _wrote(format, work(model, output, config, make_log(format)))


def quantize(
    model: ModelOption,
    output: OutputOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    algorithm: Annotated[str | None, typer.Option(help="max, percentile or mse.")] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Prompts to draw.")] = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Quantise the denoiser to INT8, calibrated on its own trajectories."""
    from hcf.recipe import QuantizeConfig, stage_config

    options = {"algorithm": algorithm, "calibration_samples": calibration_samples, "seed": seed}
    config = stage_config(QuantizeConfig, "quantize", recipe, set or (), **options)
    if dry_run:
        return planned(format, "quantize", config, {"model": model, "output": output})
    from hcf.quantize.int8 import quantize as work

    _wrote(format, work(model, output, config, make_log(format)))


def export(
    model: ModelOption,
    output: OutputOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset.")] = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Export the components to ONNX, with explicit Q/DQ where they are quantised."""
    from hcf.recipe import ExportConfig, stage_config

    config = stage_config(ExportConfig, "export", recipe, set or (), opset=opset)
    if dry_run:
        return planned(format, "export", config, {"model": model, "output": output})
    from hcf.export.onnx import export as work

    _wrote(format, work(model, output, config, make_log(format)))


def build(
    model: ModelOption,
    output: OutputOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    engine: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at a time.")] = None,
    min_shapes: Annotated[list[str] | None, typer.Option(help="name:1x4x64x64")] = None,
    opt_shapes: Annotated[list[str] | None, typer.Option(help="name:1x4x64x64")] = None,
    max_shapes: Annotated[list[str] | None, typer.Option(help="name:4x4x64x64")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="TensorRT target without a GPU, e.g. 8.0.")
    ] = None,
    builder_optimization_level: Annotated[int | None, typer.Option(help="0 to 5.")] = None,
    threads: ThreadsOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Build every engine this machine can run, time them, and choose the fastest."""
    from hcf.recipe import BuildConfig, stage_config

    options = {
        "engines": engine,
        "precisions": precision,
        "batch": batch,
        "min_shapes": parse_shapes("--min-shapes", min_shapes) or None,
        "opt_shapes": parse_shapes("--opt-shapes", opt_shapes) or None,
        "max_shapes": parse_shapes("--max-shapes", max_shapes) or None,
        "compute_capabilities": compute_capability,
        "builder_optimization_level": builder_optimization_level,
        "threads": threads,
    }
    config = stage_config(BuildConfig, "build", recipe, set or (), **options)
    if dry_run:
        return planned(format, "build", config, {"model": model, "output": output})
    from hcf.engines.build import build as work

    _wrote(format, work(model, output, config, make_log(format)))


def _wrote(format: Format, path: Path) -> None:
    from hcf.artifact import read_manifest

    manifest = read_manifest(path)
    data = {"output": str(path), "content_hash": manifest.content_hash}
    finish(format, f"{path}  {manifest.content_hash[:16]}", data)
