"""INT8 post-training quantisation: an artefact in, the same with ranges and error report out.

Weights: symmetric, one scale an output channel. Activations: symmetric, static, one scale a tensor.
Conv2d and Linear only; norms, attention products and embeddings stay in floating point. The
artefact keeps its fp weights and stays a plain diffusers folder. Added to `<component>/`:

    calibration.safetensors    the denoiser calls the ranges were taken from
    quantization.safetensors   the ranges; `hcf.export.passes.insert_qdq` makes Q/DQ graphs of them
    quantization.json          settings, versions, what was left out and why, the error of each
                               layer and of the whole
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from hcf.artifact import clone_artifact, read_manifest, save_text, staged_folder, write_manifest
from hcf.errors import RecipeError
from hcf.quantize.calibrate import (
    CALIBRATION_FILE,
    choose_prompts,
    collect,
    save_calibration,
    spread,
)
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import LayerError, layer_errors, relative_error
from hcf.quantize.scales import REPORT_FILE, SCALES_FILE, write_scales
from hcf.recipe import QuantizeConfig
from hcf.source import open_pipeline

Log = Callable[[str], None]
CAPTIONS = Path("hcf_data") / "captions_distill.json"
REPORT_CALLS = 8  # calls the error table is taken over

# What is left in floating point unless a later rule says otherwise: (pattern of layer names, why).
DEFAULT_EXCLUSIONS: tuple[tuple[str, str], ...] = (
    (
        "conv_in",
        "first convolution: reads the latents, its error reaches every layer; few operations",
    ),
    ("conv_out", "last convolution: its error is the error of the prediction; few operations"),
    ("time_embedding.*", "time embedding: one row an image, and every block depends on it"),
    (
        "add_embedding.*",
        "pooled text and size embedding: one row an image, added to the time embedding",
    ),
    ("*.time_emb_proj", "projection of the time embedding: one row an image"),
    ("class_embedding*", "class embedding: one row an image"),
)


def quantize(model: Path, output: Path, config: QuantizeConfig, log: Log = print) -> Path:
    """Artefact `model` -> artefact `output`, calibrated on the model's own trajectories.

    Raises `RecipeError` for rules or settings that cannot be meant, `InvalidArtifact` for NaN, dead
    or unreached layers, `MissingDependency` without nvidia-modelopt.
    """
    started = time.perf_counter()
    pipe = open_pipeline(model)
    denoiser = getattr(pipe, config.component)
    layers, excluded = choose_layers(
        denoiser, [(rule.pattern, rule.reason, rule.exclude) for rule in config.exclude]
    )
    log(f"{config.component}: {len(layers)} layers to INT8, {len(excluded)} stay in floating point")
    steps, guidance_scale = sampling_of(pipe, model)
    prompts = choose_prompts(read_prompts(model, config), config.calibration_samples, config.seed)
    calls = collect(
        pipe,
        prompts,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
        log=log,
    )
    scales = calibrate_scales(denoiser, layers, calls, config.algorithm, config.percentile)
    sample = spread(calls, REPORT_CALLS)
    rows = layer_errors(denoiser, scales, sample)
    error = relative_error(denoiser, scales, sample)
    log(
        f"{config.component}: relative error {error:.4f}, "
        f"worst layer {rows[0].layer} ({rows[0].sqnr_db:.1f} dB)"
    )

    with staged_folder(output) as folder:
        manifest = clone_artifact(model, folder)
        target = folder / config.component
        for stale in (CALIBRATION_FILE, SCALES_FILE, REPORT_FILE):
            (target / stale).unlink(missing_ok=True)  # may be a hard link into another artefact
        sha256 = save_calibration(calls, target / CALIBRATION_FILE)
        write_scales(target / SCALES_FILE, scales)
        summary = {
            "format": config.format,
            "algorithm": config.algorithm,
            "layers": len(layers),
            "excluded": len(excluded),
            "calibration_sha256": sha256,
            "calibration_calls": len(calls),
            "calibration_samples": len(prompts),
            "steps": steps,
            "guidance_scale": guidance_scale,
            "relative_error": error,
            "worst_layer": rows[0].layer,
            "worst_sqnr_db": _finite(rows[0].sqnr_db),
            "seconds": round(time.perf_counter() - started, 1),
        }
        report = {
            **summary,
            "settings": config.model_dump(mode="json"),
            "versions": {
                name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "diffusers")
            },
            "exclusions": excluded,
            "layer_errors": [_row(row) for row in rows],
        }
        save_text(target / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False))
        manifest.quantization[config.component] = summary
        # graphs and engines of the parent were made without these ranges
        manifest.exports.pop(config.component, None)
        manifest.engines.pop(config.component, None)
        manifest.chosen.pop(config.component, None)
        for stale_file in [
            *target.glob("model*.onnx*"),
            *(folder / "engines" / config.component).glob("*"),
        ]:
            stale_file.unlink()
        write_manifest(folder, manifest)
    return output


def choose_layers(
    denoiser: nn.Module, rules: Sequence[tuple[str, str, bool]]
) -> tuple[list[str], dict[str, str]]:
    """Which Conv2d/Linear are quantised, and for the others why not: (layers, {layer: reason}).

    `rules` (pattern, reason, excluded) come after the default exclusions; the last match decides.
    Raises `RecipeError` for a rule that matches no layer, or when nothing is left to quantise.
    """
    names = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    excluded: dict[str, str] = {}
    for pattern, reason, exclude in [*((p, r, True) for p, r in DEFAULT_EXCLUSIONS), *rules]:
        matched = fnmatch.filter(names, pattern)
        if not matched and (pattern, reason) not in DEFAULT_EXCLUSIONS:
            raise RecipeError(
                f"quantize rule {pattern!r} matches none of {len(names)} Conv2d/Linear layers",
                fix=f"layer names look like {names[len(names) // 2]!r}; `*` matches across dots",
            )
        for name in matched:
            if exclude:
                excluded[name] = reason
            else:
                excluded.pop(name, None)
    layers = [name for name in names if name not in excluded]
    if not layers:
        raise RecipeError("every layer is excluded from quantisation", fix="remove an exclude rule")
    return layers, excluded


def read_prompts(model: Path, config: QuantizeConfig) -> list[str]:
    """The recipe's calibration prompts, else the captions the model ships; RecipeError if none."""
    if isinstance(config.calibration_prompts, list) and config.calibration_prompts:
        return config.calibration_prompts
    given = isinstance(config.calibration_prompts, Path)
    path = (
        config.calibration_prompts
        if isinstance(config.calibration_prompts, Path)
        else model / CAPTIONS
    )
    if not path.is_file():
        raise RecipeError(
            f"calibration prompts: {path} does not exist",
            fix="check the path"
            if given
            else "set quantize.calibration_prompts to a list or a JSON file",
        )
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"calibration prompts: {path} is not JSON: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RecipeError(f"calibration prompts: {path} is not a list of strings")
    return prompts


def sampling_of(pipe: Any, model: Path) -> tuple[int, float]:
    """(steps, guidance_scale) to sample the artefact with: manifest, else the pipeline's own."""
    steps: int | None = None
    guidance_scale: float | None = None
    if (model / "hcf_manifest.json").is_file():
        sampling = read_manifest(model).sampling
        steps, guidance_scale = sampling.steps, sampling.guidance_scale
    own = inspect.signature(pipe.__call__).parameters
    steps = steps or pipe.config.get("default_steps") or own["num_inference_steps"].default
    if guidance_scale is None:
        guidance_scale = pipe.config.get("default_guidance_scale") or own["guidance_scale"].default
    if steps is None or guidance_scale is None:
        raise RecipeError(
            f"{model} says neither how many steps nor which guidance scale it is sampled with",
            fix="set sampling.steps and sampling.guidance_scale in its hcf_manifest.json",
        )
    return int(steps), float(guidance_scale)


def _row(row: LayerError) -> dict[str, Any]:
    return {**asdict(row), "sqnr_db": _finite(row.sqnr_db)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: an exact layer has no SQNR."""
    return value if math.isfinite(value) else None
