"""The student: the teacher's network with all weights trained, or LoRA matrices alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.distill.reduction import reduced
from hcf.errors import MissingDependency, RecipeError
from hcf.settings import DistillConfig, StudentConfig

ADAPTER = "student"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights that begin at random in here, as those of LoRA do, depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_student(denoiser: nn.Module, config: DistillConfig) -> nn.Module:
    """A trainable copy of the frozen `denoiser`, told its guidance scale where the recipe says so,
    smaller where its method is structure.

    Raises RecipeError where the denoiser has no input for that, no layer that LoRA could reach, or
    is no U-Net that can be made so small.
    """
    embedding = config.guidance_embedding
    if config.structure is not None:
        told = getattr(denoiser.config, "time_cond_proj_dim", None)
        if embedding is not None and told is None:
            raise RecipeError(
                f"this {type(denoiser).__name__} is not told its guidance scale, and structure "
                "distillation leaves guidance as it is",
                fix="leave distill.guidance_embedding out; distil guidance before or after",
            )
        student = reduced(denoiser, config.structure)
    else:
        student = copy.deepcopy(denoiser)
    if embedding is not None:
        student = with_guidance_input(student, embedding.width)
    return trainable(student, config.student)


def trainable(module: nn.Module, config: StudentConfig) -> nn.Module:
    """`module` with what is to be trained switched on; LoRA starts as no change at all."""
    module.train()
    if config.kind == "full":
        return module.requires_grad_(True)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependency(
            "a LoRA student needs peft", fix="pip install 'hcf-toolkit[lora]'"
        ) from error
    module.requires_grad_(False)
    reached = [n for n, _ in module.named_modules() if n.endswith(tuple(config.targets))]
    if not reached:
        raise RecipeError(
            f"no layer of {type(module).__name__} ends with one of "
            f"{', '.join(config.targets[:4])}, ...",
            fix="name its layers in distill.student.targets",
        )
    adapter: Any = LoraConfig(
        r=config.rank, lora_alpha=config.rank, target_modules=list(config.targets)
    )
    module.add_adapter(adapter, ADAPTER)  # type: ignore[operator]
    added = getattr(getattr(module, "time_embedding", None), "cond_proj", None)
    if added is not None:
        added.requires_grad_(True)
    return module


def with_guidance_input(denoiser: Any, width: int) -> nn.Module:
    """The U-Net with `time_cond_proj_dim`, whose projection starts at zero: nothing changes yet.

    Raises RecipeError for a denoiser that has no such input, or has one of another width.
    """
    found = dict(denoiser.config).get("time_cond_proj_dim", "absent")
    if found == "absent":
        raise RecipeError(
            f"{type(denoiser).__name__} has no input for its guidance scale (time_cond_proj_dim)",
            fix="leave distill.guidance_embedding out: one guidance scale is folded in",
        )
    if found == width:
        return denoiser
    if found is not None:
        raise RecipeError(
            f"the teacher is told its guidance scale by an embedding of {found}, not {width}",
            fix=f"use distill.guidance_embedding.width={found}",
        )
    told = type(denoiser).from_config(denoiser.config, time_cond_proj_dim=width)
    missing, unexpected = told.load_state_dict(denoiser.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise RecipeError(f"{type(denoiser).__name__} cannot be told its guidance scale")
    nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return told


@torch.no_grad()
def frozen_in(module: nn.Module, precision: str) -> nn.Module:
    """`module`, its matrices that are not trained in bfloat16 where that is the precision of
    training; those that are trained stay float32, and vectors do, which normalisations multiply
    float32 by."""
    if precision == "bf16":
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
    return module


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """What LoRA leaves as it was, by parameter name."""
    return {n: p.data for n, p in module.named_parameters() if not p.requires_grad}


def give_back(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`frozen_weights` in the place of their bfloat16 copies."""
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.data = weights[name].to(parameter.device)


@contextmanager
def in_float32(*modules: nn.Module) -> Iterator[None]:
    """Inside, every parameter is float32, for calls without autocast; then as before."""
    lowered = [p for m in modules for p in m.parameters() if p.dtype == torch.bfloat16]
    for parameter in lowered:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in lowered:
            parameter.data = parameter.data.bfloat16()


def trained_share(module: nn.Module) -> float:
    """Trained parameters over those of the network itself."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    added = sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
    return trained / (sum(p.numel() for p in module.parameters()) - added)


def merged(student: nn.Module, config: StudentConfig, adapter_folder: Path | None) -> nn.Module:
    """The student as a plain network, LoRA in its weights. The matrices alone go to
    `adapter_folder`, for `pipe.load_lora_weights`."""
    student = student.eval().float()
    if config.kind == "lora":
        if adapter_folder is not None:
            from diffusers.loaders import StableDiffusionLoraLoaderMixin
            from peft import get_peft_model_state_dict

            matrices = get_peft_model_state_dict(student, adapter_name=ADAPTER)
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                adapter_folder, unet_lora_layers={k: v.contiguous() for k, v in matrices.items()}
            )
        with torch.no_grad():
            student.fuse_lora(adapter_names=[ADAPTER])  # type: ignore[operator]
        student.unload_lora()  # type: ignore[operator]
    return student.requires_grad_(False)
