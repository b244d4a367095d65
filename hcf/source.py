"""Opens a model folder as an ordinary fp32 diffusers pipeline: how every stage reads a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hcf.artifact import check_model_folder
from hcf.errors import InvalidArtifact


def open_pipeline(path: Path) -> Any:
    """The pipeline in folder `path`, on the CPU, float32, in eval mode, without gradients.

    Its class is the one `model_index.json` names, from diffusers or from `taiji.pipelines`. Nothing
    is downloaded. Raises InvalidArtifact for a folder that is no pipeline or has a broken or
    non-finite file, UnsafeFile for pickled weights.
    """
    check_model_folder(path)
    pipeline = pipeline_class(path)
    try:
        with _no_progress_bars():
            pipe = pipeline.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArtifact(
            f"{path} cannot be opened as {pipeline.__name__}: {error}",
            fix="check that every folder model_index.json names is complete (`hcf verify`)",
        ) from error
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            # transformers keeps the stored dtype whatever the pipeline asked for
            component.float().eval().requires_grad_(False)
    return pipe


def pipeline_class(path: Path) -> Any:
    """The pipeline class that `model_index.json` in folder `path` names."""
    import diffusers

    index = path / "model_index.json"
    if not index.is_file():
        raise InvalidArtifact(
            f"{path} has no model_index.json, so it is not a diffusers pipeline",
            fix="give the folder that `save_pretrained` wrote",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{index} names no pipeline class: {error!r}") from error
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        import taiji.pipelines

        found = getattr(taiji.pipelines, str(name), None)
    if found is None:
        raise InvalidArtifact(
            f"{index} names the pipeline {name!r}, which neither diffusers {diffusers.__version__}"
            " nor taiji.pipelines has",
            fix="install the diffusers version the model was saved with",
        )
    return found


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw bars while they read local files, also where nobody watches."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
