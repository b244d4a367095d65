"""Checkpoints of a training run: safetensors + JSON, written beside and renamed, never a pickle.

The loop draws all randomness of step i from generators seeded by (seed, i), so weights, EMA,
optimiser moments and the step number are the whole state: a resumed run repeats the uninterrupted
one exactly.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def _flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": value.detach().clone().contiguous()
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    shadow: list[Tensor],
    optimizer: Optimizer,
    step: int,
    extra: dict[str, Any] | None = None,
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, temporary / "model.safetensors")
    save_file({str(i): t.contiguous() for i, t in enumerate(shadow)}, temporary / "ema.safetensors")
    save_file(_flatten(optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **(extra or {})}))
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        os.replace(folder, previous)
    os.replace(temporary, folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(
    folder: Path, *, model: nn.Module, shadow: list[Tensor], optimizer: Optimizer
) -> dict[str, Any]:
    """Restores in place and returns the JSON state. Raises ValueError when tensors do not fit."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    saved = load_file(folder / "model.safetensors")
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())[:3]
        raise ValueError(f"{folder} holds another model: {odd} differ; start in an empty folder")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
        for i, tensor in load_file(folder / "ema.safetensors").items():
            shadow[int(i)].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads((folder / "state.json").read_text())


def save_component(component: Any, folder: Path) -> None:
    """`component.save_pretrained` beside `folder`, then in its place."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    component.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
