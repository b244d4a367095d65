"""Two recipes for one model against each other: error, images and latency, on fresh prompts.

This is the proof of a search: the default rules and the recipe it wrote, calibrated alike, run on
prompts and seeds that neither has seen, and timed in turns on OpenVINO.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hcf.artifact import Sampling
from hcf.engines.layer_cost import fastest
from hcf.engines.openvino import OpenVinoEngine
from hcf.engines.timing import time_interleaved, torch_threads
from hcf.engines.trial import INSTANCES, export_graph, graph_with, open_openvino
from hcf.export.component import example_inputs, graph_inputs
from hcf.quality.fidelity import fidelity
from hcf.quality.sampling import generate_images
from hcf.quantize.calibrate import calibration_prompts, choose_prompts
from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration
from hcf.quantize.presets import choose, quantisable_layers
from hcf.quantize.quantize import request_of
from hcf.quantize.ranges import calibrate_scales
from hcf.quantize.report import layers_by_format
from hcf.quantize.scales import LayerScale
from hcf.quantize.simulate import fake_quantized
from hcf.quantize.statistics import BUCKETS, run_call
from hcf.settings import QuantizeConfig, SensitivityConfig
from hcf.source import open_pipeline
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
FRESH = 1000  # added to the seed: neither calibration nor search has seen these prompts and noises


@dataclass(frozen=True)
class Compared:
    """One recipe. error: of the engine's output on fresh calls, relative to torch in fp32.

    latency_ms: 10th percentile and median, in turns; ratio: of the 10th percentiles, over the
    first recipe's.
    psnr_db: of images against fp32's, None without images.
    """

    name: str
    formats: dict[str, int]
    error: float
    latency_ms: float
    median_ms: float
    ratio: float
    psnr_db: float | None

    def __str__(self) -> str:
        psnr = "" if self.psnr_db is None else f", PSNR {self.psnr_db:.2f} dB"
        return (
            f"{self.name}: {self.formats}, relative error {self.error:.5f}{psnr}, "
            f"{self.latency_ms:.3f} ms (median {self.median_ms:.3f}; {self.ratio:.4f} of the first)"
        )


def compare(
    model: Path,
    recipes: Mapping[str, QuantizeConfig],
    config: SensitivityConfig,
    *,
    images: int = 32,
    fresh_prompts: int = 16,
    log: Log = print,
) -> list[Compared]:
    """`recipes` by name, the first being the base of the ratios; `config` says what is timed."""
    pipe = open_pipeline(model)
    denoiser: nn.Module = getattr(pipe, config.component)
    threads = config.threads or torch.get_num_threads()
    request = request_of(pipe, model, config)
    with torch_threads(threads), tempfile.TemporaryDirectory(prefix=".hcf-compare-") as folder:
        scales = {
            name: _scales(pipe, denoiser, request, recipe, log) for name, recipe in recipes.items()
        }
        fresh = _fresh(model, request, config, fresh_prompts)
        with open_calibration(pipe, fresh, log, config.offload) as calibration:
            calls = calibration.calls(config.calls + config.held_out_calls)
        inputs = example_inputs(
            pipe, config.component, batch=config.batch, height=config.height, width=config.width
        )
        graph = export_graph(pipe, config.component, inputs, Path(folder))
        engines = [
            (name, open_openvino(graph_with(graph, each, f"recipe-{i}"), each, inputs, threads))
            for _ in range(INSTANCES)
            for i, (name, each) in enumerate(scales.items())
        ]
        errors = {name: _engine_error(denoiser, engine, calls) for name, engine in engines}
        samples = time_interleaved(
            [partial(engine, inputs) for _, engine in engines], config.repeats
        )
        # of each recipe the faster instance: see `latencies`
        times = [min(samples[i :: len(scales)], key=fastest) for i in range(len(scales))]
        psnr = _image_psnr(pipe, denoiser, scales, fresh, images, log) if images else {}
    rows: list[Compared] = []
    for (name, each), own in zip(scales.items(), times, strict=True):
        rows.append(
            Compared(
                name,
                layers_by_format(each),
                errors[name],
                fastest(own),
                statistics.median(own),
                fastest(own) / fastest(times[0]),
                psnr.get(name),
            )
        )
        log(str(rows[-1]))
    return rows


def _scales(
    pipe: Any, denoiser: nn.Module, request: CalibrationRequest, recipe: QuantizeConfig, log: Log
) -> dict[str, LayerScale]:
    """What `hcf quantize` would calibrate with this recipe."""
    choice = choose(denoiser, recipe, lambda line: None)
    with open_calibration(pipe, request, log, recipe.offload) as calibration:
        statistics = calibration.statistics(
            denoiser,
            quantisable_layers(denoiser),
            count=recipe.calibration_calls,
            buckets=recipe.timestep_buckets or BUCKETS,
            log=log,
        )
        calls = calibration.calls(recipe.calibration_calls)
    return calibrate_scales(denoiser, choice.formats, statistics, recipe, calls, choice.alphas)


def _fresh(
    model: Path, request: CalibrationRequest, config: SensitivityConfig, count: int
) -> CalibrationRequest:
    """The same sampling from other noises; prompts that were not calibrated with, if there are."""
    prompts = calibration_prompts(config.calibration_prompts, model)
    others = [prompt for prompt in prompts if prompt not in request.prompts] or prompts
    seed = config.seed + FRESH
    chosen = tuple(choose_prompts(others, count, seed))
    return replace(request, prompts=chosen, seed=seed)


@torch.no_grad()
def _engine_error(denoiser: nn.Module, engine: OpenVinoEngine, calls: list[DenoiserCall]) -> float:
    noise = signal = 0.0
    for call in calls:
        wanted = run_call(denoiser, call)
        (found,) = engine(graph_inputs(call)).values()
        noise += float((found - wanted).double().square().sum())
        signal += float(wanted.double().square().sum())
    return math.sqrt(noise / max(signal, 1e-300))


def _image_psnr(
    pipe: Any,
    denoiser: nn.Module,
    scales: Mapping[str, Mapping[str, LayerScale]],
    request: CalibrationRequest,
    count: int,
    log: Log,
) -> dict[str, float]:
    """PSNR of `count` images of each set of scales against fp32's, same prompts and noises."""
    prompts = choose_prompts(request.prompts, count, request.seed)
    seeds = [request.seed + i for i in range(count)]
    sampling = Sampling(steps=request.steps, guidance_scale=request.guidance_scale)

    def images() -> Any:
        return generate_images(
            pipe, prompts, seeds, batch_size=request.batch_size, sampling=sampling
        )

    wanted = images()
    found: dict[str, float] = {}
    for name, each in scales.items():
        log(f"{count} images with {name}")
        with fake_quantized(denoiser, each):
            found[name] = fidelity(wanted, images()).psnr_db
    return found
