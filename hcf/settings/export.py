"""Sections of export and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hcf.settings.base import Config
from hcf.settings.quantize import FeatureCacheConfig

EngineName = Literal["eager", "compile", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal[
    "fp32", "fp16", "bf16", "int8", "fp8", "int8-weight", "int4-weight", "int4", "int8-bf16"
]
GraphPrecision = Literal["fp32", "fp16", "bf16"]
GraphPass = Literal["fold", "cse", "casts", "norm", "attention", "dead"]


class ExportConfig(Config):
    """Components to ONNX graphs, each compared with torch before it is kept.

    `components`: without it the denoiser, the ControlNet and the VAE decoder, where there are such.
    `precisions`: graphs to write; fp16 and bf16 are made from the fp32 one, which is always there.
    `passes` run in this order, each counted; `sizes` are pixels (height, width) that parity is
    checked at besides the model's own; `tolerances` bound the relative L2 error of a precision's
    graph against torch (fp32: `tolerance`; fp16, bf16: from the graph's depth where not given).
    `islands`: module name patterns (fnmatch) that stay float32 in fp16 and bf16 graphs.
    `force_upcast` "measured": a first stage's `force_upcast` counts only where float16 overflows.
    `kernels`: "plain" operators; or where `hcf.fuse` has a kernel for them, "functions" of the
    domain hcf; or "plugins", the same in the precision of the graph, to be taken by
    `build.plugins` (`hcf.export.functions`; dynamo only).
    """

    components: list[str] | None = None
    precisions: list[GraphPrecision] = ["fp32"]
    opset: int = Field(21, ge=17, le=24)
    dynamic: bool = True
    exporter: Literal["dynamo", "torchscript"] = "dynamo"
    passes: list[GraphPass] = ["fold", "cse", "casts", "norm", "attention", "dead"]
    sizes: list[tuple[int, int]] = []
    tolerance: float = Field(1e-3, gt=0)
    tolerances: dict[GraphPrecision, float] = {}
    islands: list[str] = []
    force_upcast: Literal["config", "measured"] = "config"
    kernels: Literal["plain", "functions", "plugins"] = "plain"
    seed: int = 0

    @model_validator(mode="after")
    def _functions_need_dynamo(self) -> ExportConfig:
        if self.kernels != "plain" and self.exporter != "dynamo":
            raise ValueError(f"kernels: {self.kernels} needs exporter: dynamo")
        return self


class ShapeProfile(Config):
    """One TensorRT optimisation profile: a resolution bucket.

    Either `resolutions` ([[height, width], ...] in pixels: from their smallest to their largest,
    best for the first) with `batch` ([min, opt, max] rows of the component: twice the images under
    guidance), or min/opt/max shapes by input name.
    """

    resolutions: list[list[int]] = []
    batch: list[int] = [1, 2, 2]
    min_shapes: dict[str, list[int]] = {}
    opt_shapes: dict[str, list[int]] = {}
    max_shapes: dict[str, list[int]] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> ShapeProfile:
        if bool(self.resolutions) == bool(self.opt_shapes):
            raise ValueError("a profile needs either resolutions or opt_shapes")
        if any(len(size) != 2 or min(size) < 1 for size in self.resolutions):
            raise ValueError("resolutions are [height, width] in pixels")
        if len(self.batch) != 3 or self.batch != sorted(self.batch) or self.batch[0] < 1:
            raise ValueError("batch is [min, opt, max], ascending, from 1")
        return self


class BuildConfig(Config):
    """Engines to build and time; the fastest of each component is chosen by measurement.

    Shapes are `{input name: [1, 8, 16, 16]}`; without them `batch` and the model's own size.
    `device` "auto" is the GPU where torch has one. `compute_capabilities` ("8.0") are TensorRT
    targets that need no GPU here; its other options: `profiles` (without them one of the shapes),
    `timing_cache` (without it one per version and GPU under HCF_HOME), `refit` (weights can be
    replaced), `strip_weights` (restored from the graph at load), `workspace_gb` (the first rung;
    without it all free memory), `cuda_graphs`, `plugins` (nodes of the domain hcf that our kernels
    compute: `hcf.engines.tensorrt_plugins`). `providers` are ONNX Runtime's (empty: cuda on a
    GPU, else cpu); a node that falls back to the CPU is an error unless `allow_cpu_fallback`.
    `compile_mode` "regional" compiles the repeated blocks alone: seconds instead of minutes. An
    engine that cannot be built or does not get its precision stops the build, unless `keep_going`:
    then it is listed with its reason. With `cache` the pipeline is loaded with that feature cache;
    `components` then name its two steps ("unet_full_0", "unet_shallow_0") in place of the U-Net.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    profiles: list[ShapeProfile] = []
    tensorrt_driver: Literal["tensorrt", "tensorrt_rtx"] | None = None
    timing_cache: Path | None = None
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility_level: Literal["ampere_plus", "same_compute_capability"] | None = None
    workspace_gb: float | None = Field(None, gt=0)
    cuda_graphs: bool = True
    plugins: list[str] = []
    providers: list[Literal["cpu", "cuda", "tensorrt"]] = []
    allow_cpu_fallback: bool = False
    compile_mode: Literal["full", "regional"] = "full"
    compile_dynamic: bool = False
    keep_going: bool = False
    cache: FeatureCacheConfig | None = None
    engines: list[EngineName] = ["eager", "onnxruntime", "openvino"]
    precisions: list[Precision] = ["fp32", "bf16", "int8"]
    components: list[str] = ["unet", "vae_decoder"]
    batch: int = Field(1, gt=0)
    min_shapes: dict[str, list[int]] = {}
    opt_shapes: dict[str, list[int]] = {}
    max_shapes: dict[str, list[int]] = {}
    compute_capabilities: list[str] = []
    builder_optimization_level: int = Field(3, ge=0, le=5)
    threads: int | None = Field(None, gt=0)
    repeats: int = Field(20, gt=0)
    seed: int = 0
