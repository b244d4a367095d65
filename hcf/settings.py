"""The sections of a recipe: strict typed models, one a stage, no unknown keys.

`seed`, `threads` and `prompts` of a recipe's top level hold for every section that has the field
and does not set it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EngineName = Literal["eager", "compile", "onnxruntime", "openvino", "tensorrt"]
# W8A8 and E4M3, weights alone in 8 or 4 bits, W4A4 with a low-rank branch; "int8-bf16" is the INT8
# graph with every other layer in bf16.
Format = Literal["int8", "fp8", "int8-weight", "int4-weight", "int4"]
LayerFormat = Literal["int8", "fp8", "int8-weight", "int4-weight", "int4", "none"]
Precision = Literal[
    "fp32", "fp16", "bf16", "int8", "fp8", "int8-weight", "int4-weight", "int4", "int8-bf16"
]
GraphPrecision = Literal["fp32", "fp16", "bf16"]
GraphPass = Literal["fold", "cse", "casts", "norm", "attention", "dead"]
Offload = Literal["auto", "none", "cpu", "disk"]


class Config(BaseModel):
    """One section of a recipe: no unknown keys, no changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    precision: Literal["fp32", "bf16"] = "fp32"


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


class Threshold(Config):
    """Bounds on one metric of the candidate: absolute, relative to the baseline, or a difference.

    `drop_max`: baseline minus candidate may not exceed it.
    """

    min: float | None = None
    max: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    drop_max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Threshold:
        if not self.model_fields_set:
            raise ValueError("a threshold needs one of min, max, ratio_min, ratio_max, drop_max")
        return self


class GuidanceEmbedding(Config):
    """The student is told its guidance scale, of `low` to `high`, by an embedding of `width`."""

    low: float = Field(1.0, ge=1)
    high: float = Field(8.0, ge=1)
    width: int = Field(256, gt=0, multiple_of=2)


class StudentConfig(Config):
    """All weights of the student are trained, or LoRA matrices of `rank` that are merged on save.

    `targets` are the ends of layer names; the default is every convolution and projection.
    """

    kind: Literal["full", "lora"] = "full"
    rank: int = Field(64, gt=0)
    targets: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
        "time_emb_proj",
    )  # fmt: skip


class ConsistencyConfig(Config):
    """The teacher goes `skip` points of the solver's grid per target."""

    skip: int = Field(1, gt=0)
    huber_c: float = Field(1e-3, gt=0)


class ProgressiveConfig(Config):
    """The first of `halvings` stages has steps * 2^halvings teacher steps."""

    halvings: int = Field(3, gt=0)


class TrajectoryConfig(Config):
    """`count` trajectories of the teacher, from noise and captions alone, kept and used again."""

    count: int = Field(2048, gt=0)
    huber_c: float = Field(1e-3, gt=0)


class DistributionMatchingConfig(Config):
    """`fake_updates` of the fake score per one of the student, at `fake_lr_scale` of its rate.

    `gan_weight` 0 needs no images. `sampler`: steps along the ODE, or to clean and noised again.
    """

    fake_updates: int = Field(5, gt=0)
    fake_lr_scale: float = Field(1.0, gt=0)
    gan_weight: float = Field(1e-3, ge=0)
    sampler: Literal["ddim", "lcm"] = "ddim"
    low: float = Field(0.02, ge=0, lt=1)
    high: float = Field(0.98, gt=0, le=1)


class StructureConfig(Config):
    """Depth and width of a smaller U-Net; what is not given stays. `variant`: that of BK-SDM.

    `layers` of a down block, an up block has one more; `transformer_layers` of each attention;
    `stages` kept, the outermost; `middle` false leaves the middle block out; `width` is a factor
    on the channels. Lists have a value a stage, outermost first. The weights are those of the
    losses, `drop_caption` the share of rows that train the unconditional branch. `feature_scale`:
    a stage's error relative to the teacher's mean square there, or absolute as in the paper.
    """

    variant: Literal["base", "small", "tiny"] | None = None
    layers: int | list[int] | None = None
    transformer_layers: int | list[int] | None = None
    stages: int | None = Field(None, gt=0)
    middle: bool | None = None
    width: float | list[float] = 1.0
    task_weight: float = Field(1.0, ge=0)
    output_weight: float = Field(1.0, ge=0)
    feature_weight: float = Field(1.0, ge=0)
    feature_scale: Literal["relative", "absolute"] = "relative"
    drop_caption: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_something(self) -> StructureConfig:
        for name in ("layers", "transformer_layers"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"{name}: at least 1 stays")
        factors = self.width if isinstance(self.width, list) else [self.width]
        if not all(0 < factor <= 1 for factor in factors):
            raise ValueError("width: factors are above 0 and at most 1")
        return self


class PerceptualConfig(Config):
    """Distance in the features of `network`, a transformers folder or a safetensors file of VGG16;
    `linear` are LPIPS' learned weights for it."""

    network: Path
    linear: Path | None = None
    weight: float = Field(1.0, gt=0)


class DecoderConfig(Config):
    """A diffusers AutoencoderTiny of `channels`; `blocks` a stage of the decoder, coarsest first
    (default 3 each, 1 in the last), `encoder_blocks` the other way round (default mirrored).

    L1 on pixels, `edge_weight` times that of their differences, `encoder_weight` times the square
    error of the encoder's latents. `sampled` latents that the model makes itself join those of
    images; `held_out` latents only measure.
    """

    channels: int = Field(64, gt=0)
    blocks: list[int] | None = None
    encoder_blocks: list[int] | None = None
    edge_weight: float = Field(0.0, ge=0)
    perceptual: PerceptualConfig | None = None
    encoder_weight: float = Field(1.0, gt=0)
    sampled: int = Field(0, ge=0)
    held_out: int = Field(64, gt=0)


class ProbeConfig(Config):
    """Every `every` steps: a grid of `prompts` images, and with `thresholds` a check of `images`
    against the teacher that ends the training where it passes."""

    every: int = Field(gt=0)
    prompts: int = Field(8, gt=0)
    images: int = Field(64, gt=0)
    thresholds: dict[str, Threshold] = {}


# What the field calls the methods, by the names they have here.
METHOD_NAMES = {
    "lcm": "consistency",
    "pcm": "consistency",
    "pd": "progressive",
    "cfg": "guidance",
    "dmd": "distribution_matching",
    "dmd2": "distribution_matching",
    "bk-sdm": "structure",
    "taesd": "decoder",
}


class DistillConfig(Config):
    """Teacher into a student of `steps` steps, its guidance folded in or told.

    The teacher's ODE has `solver_steps` points, cut into `steps` phases. `data` is a folder of
    latents and captions, the model's own hcf_data where not given. `precision` is that of training.
    The section of another method than `method` is refused; `METHOD_NAMES` are accepted too. What
    the training takes is estimated first and refused where the device has less, unless
    `check_memory` is false.
    """

    method: Literal[
        "consistency", "progressive", "guidance", "trajectory", "distribution_matching",
        "structure", "decoder",
    ] = "consistency"  # fmt: skip
    steps: int = Field(4, gt=0)
    guidance_scale: float = Field(3.0, ge=1)
    guidance_embedding: GuidanceEmbedding | None = None
    solver_steps: int = Field(48, gt=0)
    student: StudentConfig = StudentConfig()
    consistency: ConsistencyConfig | None = None
    progressive: ProgressiveConfig | None = None
    trajectory: TrajectoryConfig | None = None
    distribution_matching: DistributionMatchingConfig | None = None
    structure: StructureConfig | None = None
    decoder: DecoderConfig | None = None
    data: Path | None = None
    train_steps: int = Field(1000, gt=0)
    batch_size: int = Field(64, gt=0)
    micro_batches: int = Field(1, gt=0)
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(50, ge=0)
    decay_share: float = Field(0.5, ge=0, le=1)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    check_memory: bool = True
    checkpoint_every: int = Field(500, gt=0)
    probe: ProbeConfig | None = None
    seed: int = 0

    @field_validator("method", mode="before")
    @classmethod
    def _by_another_name(cls, value: Any) -> Any:
        return METHOD_NAMES.get(value.lower(), value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _own_section(self) -> DistillConfig:
        sections = ("consistency", "progressive", "trajectory", "distribution_matching",
                    "structure", "decoder")  # fmt: skip
        foreign = [n for n in sections if n != self.method and getattr(self, n) is not None]
        if foreign:
            raise ValueError(f"{foreign[0]}: is for method={foreign[0]}, not {self.method}")
        return self

    @model_validator(mode="after")
    def _whole_network(self) -> DistillConfig:
        """What a student of another structure than its teacher cannot be."""
        if self.method not in ("structure", "decoder"):
            return self
        if self.method == "structure" and self.structure is None:
            raise ValueError("structure: say what the student leaves out, {variant: small} say")
        if self.student.kind == "lora":
            raise ValueError(f"student.kind: method={self.method} trains whole weights, not lora")
        if self.method == "decoder" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: diffusers' AutoencoderTiny computes another function "
                "under it (its encoder skips the scaling of the image)"
            )
        return self


class CheckConfig(Config):
    """Candidate against baseline on `images` fixed seeds; a threshold on a missing metric fails.

    `baseline` and `candidate` name artefacts of the run: the given model, the distilled student,
    the built result. `prompts` is a list or a file like check_prompts.json; each is drawn
    `images_per_prompt` times, which the metric `diversity` needs.
    """

    name: str = "quality"
    baseline: Literal["teacher", "student"] = "teacher"
    candidate: Literal["student", "result"] = "result"
    images: int = Field(256, gt=0)
    images_per_prompt: int = Field(1, gt=0)
    batch_size: int = Field(16, gt=0)
    prompts: list[str] | Path | None = None
    thresholds: dict[str, Threshold] = {}
    threads: int | None = Field(None, gt=0)
    seed: int = 0


class BenchConfig(Config):
    """Interleaved pairs of teacher and result until decided, within `budget_s` seconds.

    A ratio within `threshold` of 1 or a difference below `floor_ms` counts as the same speed.
    `min_speedup`: the lower bound of the end-to-end interval must reach it; `min_denoiser_speedup`
    likewise for the denoiser alone, over eager fp32.
    """

    pairs: int = Field(10, gt=0)
    budget_s: float = Field(60.0, gt=0)
    batch: int = Field(1, gt=0)
    prompts: list[str] = []
    threads: int | None = Field(None, gt=0)
    threshold: float = Field(0.01, ge=0)
    floor_ms: float = Field(0.0, ge=0)
    min_speedup: float | None = Field(None, gt=0)
    min_denoiser_speedup: float | None = Field(None, gt=0)
    seed: int = 0


class ReportConfig(Config):
    """The page, the card and the grid: teacher, student and result side by side.

    `prompts` (without it the first `images` of the model's check prompts) from seeds `seed` on.
    `licence` (SPDX, lower case) goes into the model card; `name` is the recipe's unless given.
    """

    name: str = ""
    title: str = ""
    prompts: list[str] = []
    images: int = Field(12, gt=0)
    licence: str = ""
    threads: int | None = Field(None, gt=0)
    seed: int = 0
