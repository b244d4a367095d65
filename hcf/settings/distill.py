"""Sections of distillation: one shared, one a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hcf.settings.base import Config, Threshold, TrainingPrecision


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
    `regression_steps` on the teacher's trajectories come first, as for the paper's one-step ones.
    """

    regression_steps: int = Field(0, ge=0)
    regression_learning_rate: float = Field(5e-4, gt=0)
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
    latents and captions, the model's own hcf_data where not given. `precision` is that of training:
    fp32, bf16, or auto, which is read as bf16 where the device has it, as fp32 where it does not.
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
    precision: TrainingPrecision = "fp32"
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
