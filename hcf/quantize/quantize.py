"""Quantisation of a component: an artefact in, the same with scales and error report out.

Conv2d and Linear only; norms and embeddings stay in floating point. Formats are those of
`hcf.quantize.formats`, layer by layer. The artefact keeps its fp weights (with QAT the trained
ones) and stays a plain diffusers folder. Added to `<component>/`:

    calibration.safetensors    the denoiser calls the ranges were taken from
    quantization.safetensors   the scales; `hcf.export.passes.insert_qdq` makes Q/DQ graphs of them
    quantization.json          settings, versions, what was left out and why, format, range method
                               and error of each layer, the error of the whole
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from hcf.artifact import clone_artifact, read_manifest, save_text, staged_folder, write_manifest
from hcf.errors import HcfError, RecipeError
from hcf.quantize.calibrate import (
    CALIBRATION_FILE,
    calibration_prompts,
    choose_prompts,
    save_calibration,
    spread,
)
from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration, probe_of
from hcf.quantize.estimate import Estimate, estimate_quantization, fitted
from hcf.quantize.presets import Choice, choose
from hcf.quantize.qat import train_quantised
from hcf.quantize.ranges import FOUR_BITS, calibrate_scales, weight_algorithm
from hcf.quantize.report import LayerError, layer_errors, layers_by_format, outputs_of, relative_to
from hcf.quantize.scales import REPORT_FILE, SCALES_FILE, SCHEMES, LayerScale, write_scales
from hcf.quantize.statistics import BUCKETS
from hcf.settings import CalibratedConfig, QuantizeConfig
from hcf.source import open_pipeline
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
REPORT_CALLS = 8  # calls the error table is taken over
SMOOTHING_PASSES = 3  # over the calls: one for the search, two for the ranges it leaves
BACKWARD_PASSES = 4  # a step of training over a forward pass
VERSIONS = ("torch", "diffusers", "nvidia-modelopt")
# packages whose modules or tensors hold quantised weights
QUANTISERS = ("modelopt", "torchao", "bitsandbytes", "optimum.quanto", "gguf")


@dataclass(frozen=True)
class Quantised:
    """A component with its scales. `error`: relative error of its output against what it computed
    before; `rows`: the error of each layer alone, worst first; `choice`: who got which format."""

    scales: dict[str, LayerScale]
    choice: Choice
    rows: list[LayerError]
    error: float
    calls: list[DenoiserCall]
    steps: int
    guidance_scale: float


def quantize(model: Path, output: Path, config: QuantizeConfig, log: Log = print) -> Path:
    """Artefact `model` -> artefact `output`, calibrated on the model's own trajectories.

    Raises `HcfError` for a model that is quantised already, `RecipeError` for rules or settings
    that cannot be meant, `InvalidArtifact` for NaN, dead or unreached layers, `MissingDependency`
    without a package that a setting needs.
    """
    started = time.perf_counter()
    refuse_quantised(model / config.component)
    pipe = open_pipeline(model)
    found = quantize_component(pipe, config, log, model)
    with staged_folder(output) as folder:
        manifest = clone_artifact(model, folder)
        target = folder / config.component
        if config.qat.steps:
            _save_weights(getattr(pipe, config.component), target)
        summary = write_quantised(target, found, config)
        summary["seconds"] = round(time.perf_counter() - started, 1)
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


def quantize_component(
    pipe: Any, config: QuantizeConfig, log: Log = print, model: Path | None = None
) -> Quantised:
    """Calibrate the component of a pipeline in hand. Nothing in it changes, but its weights with
    `qat.steps`. `model`: the folder it comes from, for its captions and its sampling."""
    if config.attention and config.format != "int8":
        raise RecipeError(
            f"quantize.attention with format {config.format}: the products of attention are "
            "quantised to int8 only",
            fix="use format int8, or leave quantize.attention out",
        )
    denoiser: nn.Module = getattr(pipe, config.component)
    refuse_quantised_modules(denoiser, config.component)
    choice = choose(denoiser, config, log)
    log(
        f"{config.component}: preset {choice.preset}, "
        + ", ".join(f"{n} layers to {f}" for f, n in _counts(choice.formats).items())
        + f", {len(choice.excluded)} stay in floating point"
    )
    request = request_of(pipe, model, config)
    with open_calibration(pipe, request, log, config.offload) as calibration:
        calls = calibration.calls(config.calibration_calls)
        log(
            f"calibration: {len(request.prompts)} prompts x {request.steps} steps, "
            f"{len(calibration.index)} calls, {len(calls)} kept"
        )
        estimate = _estimate(pipe, request, choice, config, len(calls))
        with fitted(pipe, estimate, config.offload, log):
            statistics = calibration.statistics(
                denoiser,
                list(choice.formats),
                count=config.calibration_calls,
                buckets=config.timestep_buckets or BUCKETS,
                log=log,
            )
            scales = calibrate_scales(
                denoiser, choice.formats, statistics, config, calls, choice.alphas
            )
            sample = spread(calls, REPORT_CALLS)
            wanted = outputs_of(denoiser, sample)
            if config.qat.steps:
                before = relative_to(denoiser, scales, sample, wanted)
                log(f"{config.component}: relative error {before:.4f} before training")
                scales = train_quantised(
                    denoiser, scales, calls, config.qat, seed=config.seed, log=log
                )
            rows = layer_errors(denoiser, scales, sample)
            error = relative_to(denoiser, scales, sample, wanted)
    log(
        f"{config.component}: relative error {error:.4f}, "
        f"worst layer {rows[0].layer} ({rows[0].sqnr_db:.1f} dB)"
    )
    return Quantised(scales, choice, rows, error, calls, request.steps, request.guidance_scale)


def write_quantised(target: Path, found: Quantised, config: QuantizeConfig) -> dict[str, Any]:
    """Write the three files into the component folder `target`; returns the manifest's summary."""
    for stale in (CALIBRATION_FILE, SCALES_FILE, REPORT_FILE):
        (target / stale).unlink(missing_ok=True)  # may be a hard link into another artefact
    sha256 = save_calibration(found.calls, target / CALIBRATION_FILE)
    write_scales(target / SCALES_FILE, found.scales)
    summary = {
        "format": config.format,
        "algorithm": config.algorithm,
        "preset": found.choice.preset,
        "layers": len(found.scales),
        "formats": layers_by_format(found.scales),
        "excluded": len(found.choice.excluded),
        "calibration_sha256": sha256,
        "calibration_calls": len(found.calls),
        "calibration_samples": config.calibration_samples,
        "steps": found.steps,
        "guidance_scale": found.guidance_scale,
        "relative_error": found.error,
        "worst_layer": found.rows[0].layer,
        "worst_sqnr_db": _finite(found.rows[0].sqnr_db),
    }
    report = {
        **summary,
        "settings": config.model_dump(mode="json"),
        "versions": {name: _version(name) for name in VERSIONS},
        "exclusions": found.choice.excluded,
        "layer_errors": [_row(row, found, config) for row in found.rows],
    }
    save_text(target / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False))
    return summary


def choose_layers(
    denoiser: nn.Module, rules: Sequence[tuple[str, str, bool]] = ()
) -> tuple[list[str], dict[str, str]]:
    """INT8 by the rules for this architecture and `rules` (pattern, reason, excluded):
    (layers, {excluded layer: reason}). Raises as `choose`."""
    config = QuantizeConfig.model_validate(
        {"exclude": [{"pattern": p, "reason": r, "exclude": e} for p, r, e in rules]}
    )
    choice = choose(denoiser, config, lambda line: None)
    return list(choice.formats), choice.excluded


def refuse_quantised(folder: Path) -> None:
    """Raises HcfError where a component's folder says that its weights are quantised already."""
    if (folder / REPORT_FILE).is_file() or (folder / SCALES_FILE).is_file():
        raise HcfError(
            f"{folder} is quantised already ({REPORT_FILE} is there)",
            fix="quantise the model it was made from: `hcf inspect` names the parent",
        )
    config = folder / "config.json"
    if not config.is_file():
        return
    try:
        entry = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # opening the pipeline says what is wrong with it
    if entry:
        method = entry.get("quant_method", "unknown method") if isinstance(entry, dict) else entry
        raise HcfError(
            f"{config} has a quantization_config ({method}): the weights are quantised already",
            fix="start from the floating-point weights of this model",
        )


def refuse_quantised_modules(denoiser: nn.Module, component: str) -> None:
    """Raises HcfError where modules or weights of a component belong to a quantisation package."""
    for name, module in denoiser.named_modules():
        weight = getattr(module, "weight", None)
        for thing in (module, weight, getattr(weight, "data", None)):
            package = type(thing).__module__
            if any(package == q or package.startswith(f"{q}.") for q in QUANTISERS):
                raise HcfError(
                    f"{component}.{name or '(root)'} is a {package}.{type(thing).__name__}: it is "
                    "quantised already",
                    fix="start from the floating-point weights of this model",
                )


def request_of(pipe: Any, model: Path | None, config: CalibratedConfig) -> CalibrationRequest:
    """The trajectories that `config` is measured on; equal settings ask for the same ones."""
    steps, guidance_scale = sampling_of(pipe, model)
    prompts = calibration_prompts(config.calibration_prompts, model)
    given = config.calibration_guidance
    return CalibrationRequest(
        prompts=tuple(choose_prompts(prompts, config.calibration_samples, config.seed)),
        steps=config.calibration_steps or steps,
        guidance_scale=guidance_scale if given is None else given,
        seed=config.seed,
        batch_size=config.batch_size,
        height=config.height,
        width=config.width,
    )


def sampling_of(pipe: Any, model: Path | None) -> tuple[int, float]:
    """(steps, guidance_scale) to sample the artefact with: manifest, else the pipeline's own."""
    steps: int | None = None
    guidance_scale: float | None = None
    if model is not None and (model / "hcf_manifest.json").is_file():
        sampling = read_manifest(model).sampling
        steps, guidance_scale = sampling.steps, sampling.guidance_scale
    own = inspect.signature(pipe.__call__).parameters
    steps = steps or pipe.config.get("default_steps") or own["num_inference_steps"].default
    if guidance_scale is None:
        guidance_scale = pipe.config.get("default_guidance_scale") or own["guidance_scale"].default
    if steps is None or guidance_scale is None:
        raise RecipeError(
            f"{model or type(pipe).__name__} says neither how many steps nor which guidance scale "
            "it is sampled with",
            fix="set quantize.calibration_steps and quantize.calibration_guidance",
        )
    return int(steps), float(guidance_scale)


def range_method(scale: LayerScale, config: QuantizeConfig) -> str:
    """How a layer's ranges were found, in words."""
    parts = []
    if SCHEMES[scale.scheme][1] is not None:
        parts.append(f"input {config.algorithm}")
    elif scale.scheme == "int4":
        parts.append("input per group, at run time")
    parts.append(f"weight {weight_algorithm(scale.scheme, config)}")
    if scale.smooth is not None:
        parts.append("awq" if scale.scheme in FOUR_BITS[1:] else "smoothquant")
    if scale.low_rank is not None:
        parts.append(f"low rank {scale.low_rank[0].shape[1]}")
    if scale.bucket_amax is not None:
        parts.append(f"{len(scale.bucket_amax)} timestep buckets")
    return ", ".join(parts)


def _estimate(
    pipe: Any, request: CalibrationRequest, choice: Choice, config: QuantizeConfig, kept: int
) -> Estimate:
    """What is ahead once the calls are recorded: passes for ranges, smoothing, training, report."""
    found = probe_of(pipe, request)
    estimate = estimate_quantization(found, kept, REPORT_CALLS)
    extra = 0.0
    four_bits = any(form in FOUR_BITS for form in choice.formats.values())
    if (
        choice.alphas
        or config.smooth not in ("auto", "none")
        or (config.smooth == "auto" and four_bits)
    ):
        extra += SMOOTHING_PASSES * kept
    share = min(1.0, config.qat.batch_size / max(1, found.batch))
    extra += BACKWARD_PASSES * share * config.qat.steps
    weights = found.weights[config.component]
    return replace(
        estimate,
        seconds=estimate.seconds + extra * found.step_s,
        # what training keeps: the weights before it, gradients, and AdamW's two moments
        host_bytes=estimate.host_bytes + (4 * weights if config.qat.steps else 0),
    )


def _row(row: LayerError, found: Quantised, config: QuantizeConfig) -> dict[str, Any]:
    return {
        **asdict(row),
        "sqnr_db": _finite(row.sqnr_db),
        "range": range_method(found.scales[row.layer], config),
        "reason": found.choice.reasons.get(row.layer, ""),
    }


def _save_weights(denoiser: Any, target: Path) -> None:
    """The trained weights in place of the parent's, whose files may be shared by hard links."""
    for stale in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
        if stale.name not in (CALIBRATION_FILE, SCALES_FILE):
            stale.unlink()
    (target / "config.json").unlink(missing_ok=True)
    denoiser.save_pretrained(target)


def _counts(formats: Mapping[str, str]) -> dict[str, int]:
    return {form: list(formats.values()).count(form) for form in dict.fromkeys(formats.values())}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: float) -> float | None:
    """JSON has no infinity: an exact layer has no SQNR."""
    return value if math.isfinite(value) else None
