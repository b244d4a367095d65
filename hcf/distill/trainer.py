"""Runs one distillation: teacher and data opened, student trained by the recipe's method, saved.

A run that was killed goes on from its last checkpoint in `<output>.training-<key>`, the key being
that of settings, teacher and data; the folder goes when the student is there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hcf.artifact import clone_artifact, hcf_home, refuse_foreign, staged_folder
from hcf.code_hash import code_hash
from hcf.distill.consistency import ConsistencyObjective
from hcf.distill.data import (
    FOLDER,
    DistillationSet,
    is_given_an_image,
    keep,
    kept,
    module_hash,
    open_set,
)
from hcf.distill.distribution_matching import DistributionMatchingObjective
from hcf.distill.estimate import device_memory, estimate, require_fit, shapes_of
from hcf.distill.guidance import GuidanceObjective
from hcf.distill.job import Distillation, Draw, Log
from hcf.distill.probe import make_look, samplers
from hcf.distill.progressive import ProgressiveObjective
from hcf.distill.save import save_student, teacher_sampling
from hcf.distill.solver import SolverGrid, noise_schedule
from hcf.distill.structure import StructureObjective, costs, told_scales
from hcf.distill.student import (
    frozen_in,
    frozen_weights,
    give_back,
    make_student,
    merged,
    seeded,
    trainable,
    trained_share,
)
from hcf.distill.teacher import Bounds, Guidance, Teacher
from hcf.distill.trajectory import TrajectoryObjective, solve
from hcf.errors import HcfError, RecipeError
from hcf.settings import (
    ConsistencyConfig,
    DistillConfig,
    DistributionMatchingConfig,
    ProgressiveConfig,
    StructureConfig,
    TrajectoryConfig,
)
from hcf.source import open_pipeline
from hcf.trace import denoiser_name

GRIDS, BASE = "grids", "base.safetensors"
# whose change makes kept trajectories stale
TRAJECTORY_SOURCES = tuple(f"hcf/distill/{n}.py" for n in ("solver", "teacher", "trajectory"))


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
    if config.method == "decoder":
        from hcf.distill.decoder import distill_decoder

        return distill_decoder(model, output, config, log, work=work)
    pipe = open_pipeline(model)
    denoiser: nn.Module = getattr(pipe, denoiser_name(pipe))
    noise_schedule(pipe.scheduler)
    check_denoiser(denoiser, config)
    data = open_set(
        pipe,
        config.data or model / FOLDER,
        conditioning_scale(config, model),
        images=needs_images(config) or is_given_an_image(denoiser),
        log=log,
    )
    if config.check_memory:
        check_memory(denoiser, data, config, log)
    teacher = Teacher(denoiser, data.uncond, Bounds.of(pipe))
    structure = config.method == "structure"
    guidance = told_scales(config) if structure else Guidance.of(config, teacher)
    with seeded(config.seed):
        student = make_student(denoiser, config)
    job = Distillation(
        config, model, pipe, teacher, student, guidance, data, latent_shape(denoiser, data), log
    )
    asked = config.model_dump(mode="json", exclude={"check_memory"})
    said = json.dumps([asked, module_hash(denoiser), _key(data)])
    key = hashlib.sha256(said.encode()).hexdigest()
    folder = (work or output).with_name(f"{(work or output).name}.training-{key[:8]}")
    base = folder / BASE
    if config.precision == "bf16" and (frozen := frozen_weights(student)):
        keep(base, frozen)  # the student is saved on these, not on their bfloat16 copies
    noted = {"trained_share": trained_share(student), **smaller(job)}
    for network in (denoiser, student):
        frozen_in(network, config.precision)
    share = noted["trained_share"]
    log(
        f"{config.method}: {config.train_steps} steps in {config.precision}, {share:.1%} of the "
        "parameters are trained"
    )
    with diverging(folder):
        student, metrics = train(job, folder)
    if base.exists():
        give_back(student, load_file(base))
    with staged_folder(output) as staged:
        clone_artifact(model, staged)
        save_student(job, student, staged, {**metrics, **noted})
        if (folder / GRIDS).is_dir():
            shutil.copytree(folder / GRIDS, staged / GRIDS)
    shutil.rmtree(folder, ignore_errors=True)
    return output


@contextmanager
def diverging(folder: Path) -> Iterator[None]:
    """HcfError, naming where the checkpoints are, for a training that ends in NaN."""
    try:
        yield
    except FloatingPointError as error:
        raise HcfError(
            f"the training diverged: {error}",
            fix=f"lower distill.learning_rate; checkpoints are under {folder}",
        ) from error


def conditioning_scale(config: DistillConfig, model: Path) -> float:
    """The guidance scale that conditioning is recorded with: 1 has no unconditional branch. A
    smaller structure has the branches that the teacher is sampled with."""
    if config.guidance_embedding is not None:
        return config.guidance_embedding.high
    if config.method == "structure":
        return teacher_sampling(model).guidance_scale or config.guidance_scale
    return config.guidance_scale


def smaller(job: Distillation) -> dict[str, float]:
    """What a smaller structure saves; nothing for a student of the teacher's own."""
    if job.config.method != "structure":
        return {}
    cond = {name: rows[:1] for name, rows in {**job.data.rows, **job.data.own}.items()}
    found = costs(job.teacher.denoiser, job.student, job.shape, cond)
    job.log(
        f"{found['flop_ratio']:.2f}x fewer FLOPs ({found['teacher_gflop']:.4g} -> "
        f"{found['student_gflop']:.4g} GFLOP), {found['teacher_parameters'] / 1e6:.4g} -> "
        f"{found['student_parameters'] / 1e6:.4g} M parameters"
    )
    return found


def check_memory(denoiser: Any, data: DistillationSet, config: DistillConfig, log: Log) -> None:
    """Says what the training takes; HcfError where the device has less."""
    size = latent_shape(denoiser, data)[1:]
    rows = shapes_of({**data.rows, **data.own})
    guided = data.uncond is not None
    device, available = device_memory(denoiser)
    memory = estimate(denoiser, config, rows, guided=guided, size=(size[0], size[1]), device=device)
    log(str(memory))
    require_fit(memory, available, denoiser, config, rows, guided=guided, size=(size[0], size[1]))


def check_denoiser(denoiser: Any, config: DistillConfig) -> None:
    """Raises RecipeError for a denoiser that the method cannot train."""
    settings = denoiser.config
    if settings.out_channels > settings.in_channels:
        raise RecipeError(
            f"{type(denoiser).__name__} has {settings.out_channels} channels out for "
            f"{settings.in_channels} in: it predicts its variance too, which no method here learns",
            fix="use a model with as many channels out as its latents have",
        )
    regressed = config.distribution_matching and config.distribution_matching.regression_steps
    if is_given_an_image(denoiser) and (config.method == "trajectory" or regressed):
        raise RecipeError(
            f"{type(denoiser).__name__} enlarges or completes an image ({settings.in_channels} "
            f"channels in, {settings.out_channels} out); trajectories are of captions alone",
            fix="use method=consistency, progressive, guidance or distribution_matching without "
            "regression_steps",
        )


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
    from taiji.train.loop import Probe, run

    config = job.config
    progressive = config.method == "progressive"
    stages = (config.progressive or ProgressiveConfig()).halvings if progressive else 1
    loop = loop_config(config, stages)
    metrics: dict[str, float] = {}
    seconds = _regressed(job, folder)
    for stage in range(stages):
        if stages > 1:
            job.log(f"stage {stage + 1} of {stages}")
        with seeded(config.seed):
            objective, draw = make_objective(job, stage)
        probe = None
        if config.probe is not None and stage == stages - 1:
            look = make_look(config, job.model, folder / GRIDS, *samplers(job), job.log)
            probe = Probe(config.probe.every, look)
        metrics = run(objective, draw, loop, folder / f"stage-{stage}", job.log, probe=probe)
        seconds += metrics["seconds"]
    return job.student, {**metrics, "seconds": seconds}


def _regressed(job: Distillation, folder: Path) -> float:
    """Seconds of the regression on the teacher's trajectories that distribution matching may begin
    with."""
    from taiji.train.loop import run

    config, matching = job.config, job.config.distribution_matching
    if matching is None or not matching.regression_steps:
        return 0.0
    steps, rate = matching.regression_steps, matching.regression_learning_rate
    job.log(f"{steps} steps of regression on the teacher's trajectories")
    # no more of them than are drawn
    count = min(TrajectoryConfig().count, steps * config.batch_size)
    section = TrajectoryConfig(count=count)
    grid = SolverGrid(job.pipe.scheduler, config.solver_steps, config.steps)
    objective = TrajectoryObjective(job.student, grid, job.guidance, section.huber_c)
    loop = loop_config(config.model_copy(update={"train_steps": steps, "learning_rate": rate}))
    draw = trajectory_draw(job, grid, section)
    return run(objective, draw, loop, folder / "regression", job.log)["seconds"]


def loop_config(config: DistillConfig, stages: int = 1) -> Any:
    """The settings of one of `stages` trainings for taiji's loop."""
    from taiji.train.settings import LoopConfig

    steps = max(1, config.train_steps // stages)
    return LoopConfig(
        steps=steps,
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
        log_every=max(1, steps // 10),
        checkpoint_every=config.checkpoint_every,
    )


def make_objective(job: Distillation, stage: int = 0) -> tuple[nn.Module, Draw]:
    """What the loop minimises, and its batches."""
    config, scheduler = job.config, job.pipe.scheduler
    if config.method == "guidance":
        objective: nn.Module = GuidanceObjective(job.student, job.teacher, scheduler, job.guidance)
        return objective, job.data.draw
    if config.method == "structure":
        spec = config.structure or StructureConfig()
        objective = StructureObjective(job.student, job.teacher, scheduler, job.guidance, spec)
        return objective, job.data.draw
    if config.method == "progressive":
        halvings = (config.progressive or ProgressiveConfig()).halvings
        steps = config.steps * 2 ** (halvings - stage - 1)
        teacher = job.teacher
        if stage:
            before = merged(copy.deepcopy(job.student), config.student, None)
            teacher = Teacher(frozen_in(before, config.precision), None)
        grid = SolverGrid(scheduler, 2 * steps, steps)
        objective = ProgressiveObjective(
            job.student, teacher, grid, job.guidance, teacher_is_student=stage > 0
        )
        return objective, job.data.draw
    if config.method == "distribution_matching":
        # trained weights are float32 masters whatever the teacher's copy of them is in
        fake = trainable(copy.deepcopy(job.teacher.denoiser).float(), config.student)
        fake = frozen_in(fake, config.precision)
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
            code_hash(TRAJECTORY_SOURCES),
            _key(job.data, images=False),
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
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            tensors, caption = solve(
                job.teacher.to(device), grid.to(device), job.guidance, rows, job.data.caption,
                job.shape, section.count,
                seed=config.seed, batch_size=config.batch_size, log=job.log,
            )  # fmt: skip
        job.teacher.to("cpu")  # its memory is the student's now
        found = {**tensors, "caption": caption}
        keep(path, found, key=key)
    points, scale, caption = found["points"], found["scale"], found["caption"]

    def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        pick = torch.from_numpy(rng.integers(0, len(points), count))
        own = {name: v[caption[pick]] for name, v in rows.items()}
        return {"points": points[pick], "scale": scale[pick], **own}

    return draw


def _key(data: DistillationSet, *, images: bool = True) -> str:
    """SHA-256 of the data's content, of its captions alone without `images`."""
    digest = hashlib.sha256()
    tensors = {**data.rows, "caption": data.caption, **(data.own if images else {})}
    if images and data.latents is not None and data.latent is not None:
        tensors |= {"latents": data.latents, "latent": data.latent}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
