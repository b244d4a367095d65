"""Runs one distillation: teacher and data opened, student trained by the recipe's method, saved.

A run that was killed goes on from its last checkpoint in `<output>.training-<key>`, the key being
that of settings, teacher and data; the folder goes when the student is there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor, nn

from hcf.artifact import (
    Sampling,
    clone_artifact,
    default_sampling,
    hcf_home,
    read_manifest,
    refuse_foreign,
    save_text,
    staged_folder,
    write_manifest,
)
from hcf.distill.consistency import ConsistencyObjective
from hcf.distill.data import FOLDER, DistillationSet, keep, kept, module_hash, open_set
from hcf.distill.distribution_matching import DistributionMatchingObjective
from hcf.distill.guidance import GuidanceObjective
from hcf.distill.progressive import ProgressiveObjective
from hcf.distill.solver import SolverGrid, noise_schedule
from hcf.distill.student import make_student, merged, trainable, trained_share
from hcf.distill.teacher import Guidance, Teacher
from hcf.distill.trajectory import TrajectoryObjective, solve
from hcf.errors import HcfError
from hcf.settings import (
    ConsistencyConfig,
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    TrajectoryConfig,
)
from hcf.source import open_pipeline
from hcf.trace import denoiser_name

GRIDS = "grids"
Log = Callable[[str], None]
Draw = Callable[[np.random.Generator, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Distillation:
    """What every method is made from. `shape` (C, h, w) is that of a latent."""

    config: DistillConfig
    model: Path
    pipe: Any
    teacher: Teacher
    student: nn.Module
    guidance: Guidance
    data: DistillationSet
    shape: tuple[int, ...]
    log: Log


def distill(
    model: Path,
    output: Path,
    config: DistillConfig,
    log: Log = print,
    *,
    work: Path | None = None,
) -> Path:
    """Writes the student of pipeline folder `model` to `output`, a complete pipeline folder.

    Checkpoints go beside `work`, or beside the output. Raises RecipeError for settings that do not
    fit the teacher, InvalidArtifact for missing data, HcfError naming the last good checkpoint when
    the training diverges; `output` is then as it was.
    """
    refuse_foreign(output)
    pipe = open_pipeline(model)
    denoiser: nn.Module = getattr(pipe, denoiser_name(pipe))
    noise_schedule(pipe.scheduler)
    data = open_set(
        pipe,
        config.data or model / FOLDER,
        config.guidance_embedding.high if config.guidance_embedding else config.guidance_scale,
        images=needs_images(config),
        log=log,
    )
    teacher = Teacher(denoiser, data.uncond)
    guidance = Guidance.of(config, teacher)
    student = make_student(denoiser, config)
    job = Distillation(
        config, model, pipe, teacher, student, guidance, data, latent_shape(denoiser, data), log
    )
    key = hashlib.sha256(
        json.dumps([config.model_dump(mode="json"), module_hash(denoiser), _key(data)]).encode()
    ).hexdigest()
    folder = (work or output).with_name(f"{(work or output).name}.training-{key[:8]}")
    share = trained_share(student)
    log(f"{config.method}: {config.train_steps} steps, {share:.1%} of the parameters are trained")
    try:
        student, metrics = train(job, folder)
    except FloatingPointError as error:
        raise HcfError(
            f"the training diverged: {error}",
            fix=f"lower distill.learning_rate; checkpoints are under {folder}",
        ) from error
    with staged_folder(output) as staged:
        clone_artifact(model, staged)
        save_student(job, student, staged, {**metrics, "trained_share": share})
        if (folder / GRIDS).is_dir():
            shutil.copytree(folder / GRIDS, staged / GRIDS)
    shutil.rmtree(folder, ignore_errors=True)
    return output


def needs_images(config: DistillConfig) -> bool:
    """Whether the method is trained on latents of images, or on captions alone."""
    if config.method == "trajectory":
        return False
    if config.method == "distribution_matching":
        return (config.distribution_matching or DistributionMatchingConfig()).gan_weight > 0
    return True


def latent_shape(denoiser: Any, data: DistillationSet) -> tuple[int, ...]:
    """(C, h, w): that of the data, the denoiser's own size where there are captions alone"""
    if data.latents is not None:
        return tuple(data.latents.shape[1:])
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(denoiser.config.in_channels), int(height), int(width)


def train(job: Distillation, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Every stage of the method; the trained student and the last stage's metrics."""
    from taiji.train.loop import LoopConfig, Probe, run

    config = job.config
    progressive = config.method == "progressive"
    stages = (config.progressive or ProgressiveConfig()).halvings if progressive else 1
    loop = LoopConfig(
        steps=max(1, config.train_steps // stages),
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_share=config.decay_share,
        ema_decay=config.ema_decay,
        precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer,
        weight_decay=0.0,
        seed=config.seed,
        log_every=max(1, config.train_steps // stages // 10),
        checkpoint_every=config.checkpoint_every,
    )
    metrics: dict[str, float] = {}
    for stage in range(stages):
        if stages > 1:
            job.log(f"stage {stage + 1} of {stages}")
        objective, draw = make_objective(job, stage)
        probe = None
        if config.probe is not None and stage == stages - 1:
            look = make_look(job, folder / GRIDS)
            probe = Probe(config.probe.every, look)
        metrics = run(objective, draw, loop, folder / f"stage-{stage}", job.log, probe)
    return job.student, metrics


def make_objective(job: Distillation, stage: int = 0) -> tuple[nn.Module, Draw]:
    """What the loop minimises, and its batches."""
    config, scheduler = job.config, job.pipe.scheduler
    if config.method == "guidance":
        objective: nn.Module = GuidanceObjective(job.student, job.teacher, scheduler, job.guidance)
        return objective, job.data.draw
    if config.method == "progressive":
        halvings = (config.progressive or ProgressiveConfig()).halvings
        steps = config.steps * 2 ** (halvings - stage - 1)
        teacher = job.teacher
        if stage:
            before = merged(copy.deepcopy(job.student), config.student, None)
            teacher = Teacher(before, None)
        grid = SolverGrid(scheduler, 2 * steps, steps)
        objective = ProgressiveObjective(
            job.student, teacher, grid, job.guidance, teacher_is_student=stage > 0
        )
        return objective, job.data.draw
    if config.method == "distribution_matching":
        fake = trainable(copy.deepcopy(job.teacher.denoiser), config.student)
        objective = DistributionMatchingObjective(
            job.student,
            fake,
            job.teacher,
            SolverGrid(scheduler, config.steps, config.steps),
            noise_schedule(scheduler)[0],
            job.guidance,
            config.distribution_matching or DistributionMatchingConfig(),
            job.shape,
        )
        return objective, job.data.draw
    grid = SolverGrid(scheduler, config.solver_steps, config.steps)
    if config.method == "trajectory":
        section = config.trajectory or TrajectoryConfig()
        objective = TrajectoryObjective(job.student, grid, job.guidance, section.huber_c)
        return objective, trajectory_draw(job, grid, section)
    objective = ConsistencyObjective(
        job.student, job.teacher, grid, job.guidance, config.consistency or ConsistencyConfig()
    )
    return objective, job.data.draw


def trajectory_draw(job: Distillation, grid: SolverGrid, section: TrajectoryConfig) -> Draw:
    """Batches of the teacher's trajectories, which are solved once and kept under $HCF_HOME."""
    config, rows = job.config, job.data.rows
    said = json.dumps(
        [
            module_hash(job.teacher.denoiser),
            _key(job.data),
            [grid.points, grid.phase, grid.timesteps.tolist()],
            [job.guidance.low, job.guidance.high],
            [section.count, config.seed, list(job.shape)],
        ]
    )
    key = hashlib.sha256(said.encode()).hexdigest()
    path = hcf_home() / "trajectories" / f"{key[:32]}.safetensors"
    found = kept(path, key=key)
    if found is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tensors, caption = solve(
            job.teacher.to(device), grid.to(device), job.guidance, rows, job.shape, section.count,
            seed=config.seed, batch_size=config.batch_size, log=job.log,
        )  # fmt: skip
        found = {**tensors, "caption": caption}
        keep(path, found, key=key)
    points, scale, caption = found["points"], found["scale"], found["caption"]

    def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        pick = torch.from_numpy(rng.integers(0, len(points), count))
        own = {name: v[caption[pick]] for name, v in rows.items()}
        return {"points": points[pick], "scale": scale[pick], **own}

    return draw


def make_look(job: Distillation, folder: Path) -> Callable[[int], bool]:
    """Grids of images as the student is, and whether it passes the recipe's thresholds yet."""
    from PIL import Image

    from hcf.quality.gate import check, check_prompts
    from hcf.quality.sampling import generate_images
    from hcf.settings import CheckConfig

    probe = job.config.probe
    assert probe is not None
    check_config = CheckConfig(
        name="training", images=max(probe.images, probe.prompts), thresholds=probe.thresholds,
        seed=job.config.seed,
    )  # fmt: skip
    data_folder = job.model / FOLDER
    prompts = check_prompts(check_config, data_folder)
    if not probe.thresholds:
        prompts = prompts[: probe.prompts]
    texts, seeds = [p.text for p in prompts], [job.config.seed + i for i in range(len(prompts))]
    baseline: list[Any] = []

    def look(step: int) -> bool:
        with sampled_by(job, job.student):
            images = generate_images(job.pipe, texts, seeds, sampling=student_sampling(job))
        folder.mkdir(parents=True, exist_ok=True)
        row = np.concatenate(list(images[: probe.prompts]), axis=1)
        Image.fromarray(row).save(folder / f"step-{step:06d}.png")
        if not probe.thresholds:
            return False
        if not baseline:
            baseline.append(generate_images(job.pipe, texts, seeds))
        verdict = check(baseline[0], images, prompts, check_config, data_folder, job.log)
        return verdict.passed

    return look


@contextmanager
def sampled_by(job: Distillation, student: nn.Module) -> Iterator[None]:
    """The pipeline with the student and its scheduler in it, inside."""
    pipe, name = job.pipe, denoiser_name(job.pipe)
    before = getattr(pipe, name), pipe.scheduler
    setattr(pipe, name, student.eval())
    pipe.scheduler = student_scheduler(job.config, pipe.scheduler)
    try:
        yield
    finally:
        setattr(pipe, name, before[0])
        pipe.scheduler = before[1]
        student.train()


def student_scheduler(config: DistillConfig, scheduler: Any) -> Any:
    """The scheduler that steps as the training did; the teacher's where only guidance went."""
    if config.method == "guidance":
        return scheduler
    section = config.distribution_matching or DistributionMatchingConfig()
    if config.method == "distribution_matching" and section.sampler == "lcm":
        return LCMScheduler.from_config(
            scheduler.config,
            original_inference_steps=scheduler.config.num_train_timesteps,
            clip_sample=False,
        )
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=False
    )


def student_sampling(job: Distillation) -> Sampling:
    """Steps and guidance scale that the student is made for."""
    config = job.config
    guidance_alone = config.method == "guidance"
    steps = default_sampling(job.model).steps if guidance_alone else config.steps
    told = config.guidance_scale if config.guidance_embedding else 1.0
    return Sampling(steps=steps, guidance_scale=told)


def save_student(
    job: Distillation, student: nn.Module, folder: Path, metrics: dict[str, float]
) -> None:
    """Student weights, its scheduler and its defaults into the staged folder; lineage noted."""
    config, name = job.config, denoiser_name(job.pipe)
    plain = merged(student, config.student, folder / "lora")
    shutil.rmtree(folder / name)
    shutil.rmtree(folder / "scheduler")
    plain.to(torch.float16).save_pretrained(folder / name)  # type: ignore[operator]
    scheduler = student_scheduler(config, job.pipe.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    sampling = student_sampling(job)
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if "default_steps" in index:
        index["default_guidance_scale"] = sampling.guidance_scale
        index["default_steps"] = sampling.steps or index["default_steps"]
    save_text(index_path, json.dumps(index, indent=2))
    manifest = read_manifest(folder)
    manifest.sampling = sampling
    manifest.distillation = {**config.model_dump(mode="json", exclude_none=True), **metrics}
    write_manifest(folder, manifest)


def _key(data: DistillationSet) -> str:
    """SHA-256 of the data's content."""
    digest = hashlib.sha256()
    tensors = {**data.rows, "caption": data.caption}
    if data.latents is not None and data.latent is not None:
        tensors |= {"latents": data.latents, "latent": data.latent}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
