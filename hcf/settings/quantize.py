"""Sections of quantisation and of the search for what to quantise."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hcf.settings.base import Config, TrainingPrecision

# W8A8 and E4M3, weights alone in 8 or 4 bits, W4A4 with a low-rank branch; "int8-bf16" is the INT8
# graph with every other layer in bf16.
Format = Literal["int8", "fp8", "int8-weight", "int4-weight", "int4"]
LayerFormat = Literal["int8", "fp8", "int8-weight", "int4-weight", "int4", "none"]
Offload = Literal["auto", "none", "cpu", "disk"]


class ExcludeRule(Config):
    """Layers matching `pattern` stay in floating point (`exclude: false` takes them back in)."""

    pattern: str
    reason: str
    exclude: bool = True


class LayerRule(Config):
    """Layers matching `pattern` get `format` ("none": floating point); `smooth` is their alpha."""

    pattern: str
    format: LayerFormat
    reason: str
    smooth: float | None = Field(None, ge=0, le=1)


class QatConfig(Config):
    """Training of the weights under the quantisation, against the fp model's own outputs.

    `steps` 0 leaves it out. The loss is the relative squared error of the output, plus
    `feature_weight` times that of the blocks' outputs. `learn_scales` trains the ranges too (LSQ).
    """

    steps: int = Field(0, ge=0)
    learning_rate: float = Field(1e-5, gt=0)
    batch_size: int = Field(8, gt=0)
    feature_weight: float = Field(0.0, ge=0)
    learn_scales: bool = False
    precision: TrainingPrecision = "fp32"


class CalibratedConfig(Config):
    """What is measured on a model's own trajectories, and which those are.

    `calibration_prompts` is a list or a JSON file with one; without it the model's own captions,
    else the built-in bilingual ones. Steps and guidance are the artefact's unless given, height and
    width (pixels) the model's own; `offload` is where weights wait that do not fit into memory.
    """

    component: Literal["unet", "transformer"] = "unet"
    calibration_prompts: list[str] | Path = []
    calibration_samples: int = Field(64, gt=0)
    calibration_calls: int = Field(64, gt=0)
    calibration_steps: int | None = Field(None, gt=0)
    calibration_guidance: float | None = Field(None, ge=0)
    batch_size: int = Field(8, gt=0)
    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    offload: Offload = "auto"
    seed: int = 0


class QuantizeConfig(CalibratedConfig):
    """Quantisation of one component, layer by layer, from the model's own trajectories.

    Layers take `format` unless a rule says otherwise: the preset's rules first, then `exclude`,
    then `rules`; the last match decides. `preset` "auto" reads the architecture from the model's
    config. `algorithm` chooses activation ranges, `weight_algorithm` those of the weights ("auto":
    mse for 4 bits, max otherwise). `smooth` is SmoothQuant's alpha, "search" for the best one of
    each layer, "none", or "auto" (search for 4 bits, none otherwise). `low_rank` is the rank of a
    floating-point branch beside each layer ("auto": 32 for int4, 0 otherwise). `block_size` is the
    number of inputs that share a 4-bit scale. `timestep_buckets` > 0 gives layers whose range
    moves by more than `bucket_ratio` over the trajectory one range a bucket of timesteps.
    `weight_granularity` is for fp8. `attention` quantises the attention products too.
    """

    format: Format = "int8"
    preset: str = "auto"
    algorithm: Literal["max", "percentile", "mse"] = "max"
    percentile: float = Field(99.99, gt=50, le=100)
    weight_algorithm: Literal["auto", "max", "mse"] = "auto"
    weight_granularity: Literal["channel", "tensor"] = "channel"
    smooth: float | Literal["auto", "search", "none"] = "auto"
    low_rank: int | Literal["auto"] = "auto"
    block_size: Literal[16, 32, 64, 128] = 64
    timestep_buckets: int = Field(0, ge=0, le=64)
    bucket_ratio: float = Field(2.0, gt=1)
    attention: bool = False
    qat: QatConfig = QatConfig()
    exclude: list[ExcludeRule] = []
    rules: list[LayerRule] = []


class FeatureCacheConfig(Config):
    """DeepCache (Ma et al., arXiv 2312.00858): one full U-Net step in `interval`, others shallow.

    `branch` is the skip connection whose level the shallow steps still compute: 0 the outermost.
    `schedule` "power" puts the full steps densest at `center` (a fraction of the steps), more so
    the larger `power` is (the paper's non-uniform 1:N); it has as many full steps as "uniform".
    """

    interval: int = Field(3, ge=1)
    branch: int = Field(0, ge=0)
    schedule: Literal["uniform", "power"] = "uniform"
    center: float = Field(0.3, ge=0, le=1)
    power: float = Field(1.4, gt=1)


class SensitivityConfig(CalibratedConfig):
    """Which layers to quantise to what: error and cost of each, then an integer program.

    At most one target: `latency_ratio` (the least error at this share of the latency of the default
    rules) or `max_error` (the least latency whose relative error of the denoiser's output stays
    under it); without either, `latency_ratio` 1. `mode` "output" measures the denoiser's output
    with one layer quantised, "layer" the layer's own (one pass for all: big models). `target` is
    the engine whose times per layer are the cost; "macs" is a model of operations and bytes.
    """

    formats: list[Format] = ["int8"]
    latency_ratio: float | None = Field(None, gt=0)
    max_error: float | None = Field(None, gt=0)
    mode: Literal["output", "layer"] = "output"
    target: Literal["openvino", "tensorrt", "macs"] = "openvino"
    calls: int = Field(8, gt=0)
    held_out_calls: int = Field(8, gt=0)
    timestep_buckets: int = Field(4, gt=0)
    exchange_rounds: int = Field(2, ge=0)
    batch: int = Field(1, gt=0)
    repeats: int = Field(20, gt=0)
    threads: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_target(self) -> SensitivityConfig:
        if self.latency_ratio is not None and self.max_error is not None:
            raise ValueError("give latency_ratio or max_error, not both")
        return self
