"""Consistency distillation with the guidance scale folded in, for a fixed number of steps.

The student starts from the teacher. Its N steps cut the teacher's probability-flow ODE into N
phases; within a phase it learns to jump from any solver point t straight to the phase's end s
(phased consistency: Wang et al., "Phased Consistency Models", arXiv 2405.18407; N = 1 is latent
consistency distillation, Luo et al., arXiv 2310.04378). `skip` guided DDIM steps of the teacher,
t -> u, give

    loss = d(f(x_t, t -> s), sg f(x_u, u -> s)),   f(x_u, u -> s) = x_u at u = s,

so guidance costs nothing at sampling, and sampling is N plain DDIM steps: the student is an
ordinary diffusers pipeline with a DDIM scheduler. Guidance is one number, not an embedding. With
`skip` a whole phase the target is the teacher's own solution, exact and dear; with 1 it is mostly
the student's, cheap and slow to settle.

B batch, C channels, H W latent size. alpha is the cumulative alpha of the noise schedule.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from hcf.artifact import (
    Sampling,
    clone_artifact,
    read_manifest,
    save_text,
    staged_folder,
    write_manifest,
)
from hcf.errors import InvalidArtifact, RecipeError
from hcf.settings import DistillConfig
from hcf.source import open_pipeline
from hcf.trace import call_denoiser, conditioning, denoiser_name

Log = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """The solver's grid. `timesteps` (S,) descends; alpha (S+1,) ends with 1 (clean data);
    `edge` (S,) is the grid index where each point's phase ends."""

    timesteps: Tensor
    alpha: Tensor
    edge: Tensor
    prediction_type: str


def solver_schedule(scheduler: Any, solver_steps: int, steps: int) -> Schedule:
    """Trailing grid of `solver_steps` points in `steps` phases.

    Raises RecipeError where the phases do not divide the grid, and where the teacher predicts eps
    at zero terminal SNR, which leaves x_0 undefined at the first step.
    """
    if solver_steps % steps:
        raise RecipeError(
            f"distill.solver_steps={solver_steps} is no multiple of distill.steps={steps}",
            fix=f"use solver_steps={steps * max(1, round(solver_steps / steps))}",
        )
    cumulative = scheduler.alphas_cumprod.double()
    kind = scheduler.config.prediction_type
    total = len(cumulative)
    grid = (total - torch.arange(solver_steps) * total / solver_steps).round().long() - 1
    alpha = torch.cat([cumulative[grid], torch.ones(1, dtype=torch.double)])
    if kind == "epsilon" and float(alpha[0]) < 1e-8:
        raise RecipeError(
            "the teacher predicts epsilon at zero terminal SNR: its first step is undefined",
            fix="use a v_prediction teacher, or rescale_betas_zero_snr=False",
        )
    length = solver_steps // steps
    edge = (torch.arange(solver_steps) // length + 1) * length
    return Schedule(grid, alpha.float(), edge, kind)


def jump(prediction: Tensor, x_t: Tensor, alpha_t: Tensor, alpha_s: Tensor, kind: str) -> Tensor:
    """DDIM from alpha_t to alpha_s (B,): prediction, x_t (B, C, H, W) -> x_s (B, C, H, W)."""
    a, b = _column(alpha_t.sqrt()), _column((1 - alpha_t).sqrt())
    if kind == "v_prediction":
        x_0, eps = a * x_t - b * prediction, a * prediction + b * x_t
    elif kind == "epsilon":
        x_0, eps = (x_t - b * prediction) / a, prediction
    elif kind == "sample":
        x_0, eps = prediction, (x_t - a * prediction) / b
    else:
        raise RecipeError(f"unknown prediction_type {kind!r}; v_prediction, epsilon or sample")
    return _column(alpha_s.sqrt()) * x_0 + _column((1 - alpha_s).sqrt()) * eps


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def angle(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """sin of the angle between two noise levels (B,): how far x_s moves per unit of v."""
    return (alpha_s.sqrt() * (1 - alpha_t).sqrt() - alpha_t.sqrt() * (1 - alpha_s).sqrt()).abs()


class ConsistencyObjective(nn.Module):
    """Holds student and frozen teacher; `forward` is the loss of one batch of clean latents."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        schedule: Schedule,
        *,
        guidance_scale: float,
        huber_c: float,
        uncond: Mapping[str, Tensor] | None,
        skip: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.huber_c = huber_c
        self.uncond = uncond
        self.skip = skip

    def forward(
        self, latents: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W), cond (B, ...) each -> scalar loss, parts"""
        grid, count = self.schedule, len(latents)
        # Half of the draws sit where sampling evaluates the student: on the phases' first points.
        index = torch.randint(len(grid.timesteps), (count,), generator=generator)
        first = torch.rand(count, generator=generator) < 0.5
        length = int(grid.edge[0])
        index = torch.where(first, index // length * length, index // self.skip * self.skip)
        eps = torch.randn(latents.shape, generator=generator)
        alpha_t, edge, ahead = grid.alpha[index], grid.edge[index], index + self.skip
        alpha_u, alpha_s = grid.alpha[ahead], grid.alpha[edge]
        x_t = _column(alpha_t.sqrt()) * latents + _column((1 - alpha_t).sqrt()) * eps
        with torch.no_grad():
            target = x_t
            for i in range(self.skip):
                guided = self.guided(target, grid.timesteps[index + i], cond)
                levels = grid.alpha[index + i], grid.alpha[index + i + 1]
                target = jump(guided, target, *levels, grid.prediction_type)
            rest = ahead < edge  # rows whose phase goes on after u
            if rest.any():
                own = {k: v[rest] for k, v in cond.items()}
                x_u, at = target[rest], grid.timesteps[ahead[rest]]
                prediction = call_denoiser(self.student, x_u, at, own).float()
                levels = alpha_u[rest], alpha_s[rest]
                target[rest] = jump(prediction, x_u, *levels, grid.prediction_type)
        prediction = call_denoiser(self.student, x_t, grid.timesteps[index], cond).float()
        student = jump(prediction, x_t, alpha_t, alpha_s, grid.prediction_type)
        # In units of the network's output: a late short jump counts as much as an early long one.
        error = (student - target) / _column(angle(alpha_t, alpha_s).clamp_min(0.05))
        loss = torch.mean((error.square().mean((1, 2, 3)) + self.huber_c**2).sqrt() - self.huber_c)
        return loss, {"mse": error.detach().square().mean().item()}

    def guided(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The teacher's guided prediction (B, C, H, W), both branches in one call."""
        if self.uncond is None:
            return call_denoiser(self.teacher, x_t, timestep, cond).float()
        count = len(x_t)
        both = {
            k: torch.cat([self.uncond[k].expand(count, *v.shape[1:]), v]) for k, v in cond.items()
        }
        out = call_denoiser(self.teacher, torch.cat([x_t, x_t]), timestep.repeat(2), both).float()
        uncond, conditional = out.chunk(2)
        return uncond + self.guidance_scale * (conditional - uncond)


@torch.no_grad()
def encode_captions(
    pipe: Any, captions: list[str], guidance_scale: float, batch_size: int = 64
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Flat conditioning of the distinct captions (N, ...) and one unconditional row (1, ...)."""
    parts, uncond = [], None
    for start in range(0, len(captions), batch_size):
        cond, uncond = conditioning(pipe, captions[start : start + batch_size], guidance_scale)
        parts.append(cond)
    rows = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return rows, None if uncond is None else {k: v[:1] for k, v in uncond.items()}


def read_distillation_set(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Scaled latents (N, C, h, w), row (M,), M captions; caption m is of latent row[m].

    Raises InvalidArtifact where a file is missing or the two do not fit.
    """
    latents_path = folder / "hcf_data" / "latents_distill.safetensors"
    captions_path = folder / "hcf_data" / "captions_distill.json"
    for path in (latents_path, captions_path):
        if not path.exists():
            raise InvalidArtifact(
                f"{path} is missing: distillation needs latents and their captions",
                fix="write both beside the weights, as docs/distillation.md describes",
            )
    tensors = load_file(latents_path)
    captions = json.loads(captions_path.read_text())
    latents, row = tensors["latents"].float(), tensors["row"]
    if len(row) != len(captions) or not 0 <= int(row.min()) <= int(row.max()) < len(latents):
        raise InvalidArtifact(
            f"{folder}: {len(captions)} captions, {len(row)} rows and {len(latents)} latents "
            "do not fit together"
        )
    return latents, row, captions


def distill(model: Path, output: Path, config: DistillConfig, log: Log = print) -> Path:
    """Writes the student of pipeline folder `model` to `output`, a complete pipeline folder.

    Raises RecipeError for settings that do not fit the teacher, InvalidArtifact for missing data,
    FloatingPointError when the training diverges; `output` is then as it was.
    """
    from taiji.train.loop import LoopConfig, run

    pipe = open_pipeline(model)
    name = denoiser_name(pipe)
    teacher: nn.Module = getattr(pipe, name)
    latents, row, captions = read_distillation_set(model)
    schedule = solver_schedule(pipe.scheduler, config.solver_steps, config.steps)
    if (config.solver_steps // config.steps) % config.skip:
        raise RecipeError(
            f"distill.skip={config.skip} does not divide the {config.solver_steps // config.steps} "
            "solver steps of a phase",
            fix=f"use skip=1 or skip={config.solver_steps // config.steps}",
        )
    distinct = list(dict.fromkeys(captions))
    rows, uncond = encode_captions(pipe, distinct, config.guidance_scale)
    number = {caption: i for i, caption in enumerate(distinct)}
    condition = torch.tensor([number[c] for c in captions])
    student = copy.deepcopy(teacher).requires_grad_(True)
    objective = ConsistencyObjective(
        student.train(),
        teacher,
        schedule,
        guidance_scale=config.guidance_scale,
        huber_c=config.huber_c,
        uncond=uncond,
        skip=config.skip,
    )

    def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        pick = torch.from_numpy(rng.integers(0, len(captions), count))
        own = {k: v[condition[pick]] for k, v in rows.items()}
        return {"latents": latents[row[pick]], **own}

    log(f"{len(latents)} latents, {len(distinct)} captions, {config.train_steps} steps")
    with staged_folder(output) as folder:
        clone_artifact(model, folder)
        metrics = run(
            objective,
            draw,
            LoopConfig(
                steps=config.train_steps,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                warmup_steps=config.warmup_steps,
                decay_share=0.5,
                ema_decay=config.ema_decay,
                precision=config.precision,
                weight_decay=0.0,
                seed=config.seed,
                log_every=max(1, config.train_steps // 10),
                checkpoint_every=config.train_steps + 1,
            ),
            folder / "training",
            log,
        )
        _finish(pipe, student, name, folder, config, metrics)
    return output


def _finish(
    pipe: Any,
    student: nn.Module,
    name: str,
    folder: Path,
    config: DistillConfig,
    metrics: dict[str, float],
) -> None:
    """Student weights, its scheduler and its defaults into the staged folder; lineage noted."""
    import shutil

    shutil.rmtree(folder / "training")
    for component in (name, "scheduler"):
        shutil.rmtree(folder / component)
    student.eval().to(torch.float16).save_pretrained(folder / name)  # type: ignore[operator]
    DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if "default_steps" in index:
        index |= {"default_steps": config.steps, "default_guidance_scale": 1.0}
    save_text(index_path, json.dumps(index, indent=2))
    manifest = read_manifest(folder)
    manifest.sampling = Sampling(steps=config.steps, guidance_scale=1.0)
    manifest.distillation = {**config.model_dump(mode="json"), **metrics}
    write_manifest(folder, manifest)
