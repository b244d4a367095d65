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
    method: Annotated[
        str | None,
        typer.Option(
            help="consistency (lcm, pcm), progressive, guidance, trajectory, "
            "distribution_matching (dmd2), structure (bk-sdm) or decoder (taesd)."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the student.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Folded into the student.")] = None,
    train_steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Distil a guided many-step teacher into a few-step or smaller student."""
    from hcf.recipe import stage_config
    from hcf.settings import DistillConfig

    options = {
        "method": method,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "train_steps": train_steps,
        "seed": seed,
    }
    config = stage_config(DistillConfig, "distill", recipe, set or (), **options)
    if dry_run:
        from hcf.distill.estimate import forecast

        paths = {"model": model, "output": output}
        return planned(format, "distill", config, paths, forecast(model, config))
    from hcf.distill.trainer import distill as work

    _wrote(format, work(model, output, config, make_log(format)))


def quantize(
    model: ModelOption,
    output: OutputOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    to: Annotated[
        str | None, typer.Option(help="int8, fp8, int8-weight, int4-weight or int4.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Rules of an architecture, or auto.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="max, percentile or mse.")] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Prompts to draw.")] = None,
    qat_steps: Annotated[int | None, typer.Option(help="Train under rounding this long.")] = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Quantise the denoiser, calibrated on its own trajectories."""
    from hcf.recipe import stage_config
    from hcf.settings import QuantizeConfig

    options = {
        "format": to,
        "preset": preset,
        "algorithm": algorithm,
        "calibration_samples": calibration_samples,
        "qat": {"steps": qat_steps} if qat_steps else None,
        "seed": seed,
    }
    config = stage_config(QuantizeConfig, "quantize", recipe, set or (), **options)
    if dry_run:
        return planned(format, "quantize", config, {"model": model, "output": output})
    from hcf.quantize.quantize import quantize as work

    _wrote(format, work(model, output, config, make_log(format)))


def sensitivity(
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write (.yaml).")],
    recipe: RecipeOption = None,
    set: SetOption = None,
    to: Annotated[list[str] | None, typer.Option(help="Candidate format. Repeatable.")] = None,
    latency_ratio: Annotated[
        float | None, typer.Option(help="Least error at this share of the default's latency.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Least latency under this relative error.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="openvino, tensorrt or macs.")] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Measure what each layer costs and loses, choose, and write the rules as a recipe."""
    from hcf.recipe import stage_config
    from hcf.settings import SensitivityConfig

    options = {
        "formats": to,
        "latency_ratio": latency_ratio,
        "max_error": max_error,
        "target": target,
        "threads": threads,
        "seed": seed,
    }
    config = stage_config(SensitivityConfig, "sensitivity", recipe, set or (), **options)
    if dry_run:
        return planned(format, "sensitivity", config, {"model": model, "output": output})
    from hcf.engines.search import search

    found = search(model, output, config, make_log(format))
    finish(format, f"{found}", {"output": str(found)})


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
    from hcf.recipe import stage_config
    from hcf.settings import ExportConfig

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
    timing_cache: Annotated[Path | None, typer.Option(help="File of TensorRT's timings.")] = None,
    refit: Annotated[bool | None, typer.Option("--refit", help="Weights can change later.")] = None,
    strip_weights: Annotated[
        bool | None, typer.Option("--strip-weights", help="Plan without weights.")
    ] = None,
    version_compatible: Annotated[
        bool | None, typer.Option("--version-compatible", help="For later TensorRT, too.")
    ] = None,
    hardware_compatibility_level: Annotated[
        str | None, typer.Option(help="ampere_plus or same_compute_capability.")
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="TensorRT's memory, in GB.")] = None,
    threads: ThreadsOption = None,
    dry_run: DryRunOption = False,
    format: FormatOption = Format.human,
) -> None:
    """Build every engine this machine can run, time them, and choose the fastest."""
    from hcf.recipe import stage_config
    from hcf.settings import BuildConfig

    options = {
        "engines": engine,
        "precisions": precision,
        "batch": batch,
        "min_shapes": parse_shapes("--min-shapes", min_shapes) or None,
        "opt_shapes": parse_shapes("--opt-shapes", opt_shapes) or None,
        "max_shapes": parse_shapes("--max-shapes", max_shapes) or None,
        "compute_capabilities": compute_capability,
        "builder_optimization_level": builder_optimization_level,
        "timing_cache": timing_cache,
        "refit": refit,
        "strip_weights": strip_weights,
        "version_compatible": version_compatible,
        "hardware_compatibility_level": hardware_compatibility_level,
        "workspace_gb": workspace,
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
