"""The calibration set of a denoiser: its own calls, over its own timesteps, on its own prompts.

A few-step student never sees the activations its teacher saw, so ranges are taken from the
trajectories the student itself walks. The set is stored once
(`<component>/calibration.safetensors`), and its SHA-256 goes into the manifest.

File: every distinct tensor once, under the first 16 hex digits of its SHA-256; the metadata entry
"calls" is a JSON list, one object a call, from input name (sample, timestep, encoder_hidden_states,
...) to that key. Text conditioning repeats at every step, so this is about a `steps`-th of the
plain size.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcf.errors import InvalidArtifact, RecipeError
from hcf.trace import DenoiserCall, record_calls

CALIBRATION_FILE = "calibration.safetensors"
MAX_CALLS = (
    64  # more calls do not move the ranges; a 50-step teacher would otherwise record hundreds
)


def choose_prompts(prompts: Sequence[str], samples: int, seed: int) -> list[str]:
    """`samples` prompts drawn with `seed`; no repeats while there are enough, then round again."""
    if not prompts:
        raise RecipeError(
            "no calibration prompts", fix="set quantize.calibration_prompts to a list or a file"
        )
    order = list(prompts)
    random.Random(seed).shuffle(order)
    return [order[index % len(order)] for index in range(samples)]


def collect(
    pipe: Any,
    prompts: list[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 8,
    max_calls: int = MAX_CALLS,
    log: Callable[[str], None] = lambda line: None,
) -> list[DenoiserCall]:
    """Run the pipeline on `prompts`; keep at most `max_calls` calls, spread evenly over all."""
    calls = record_calls(
        pipe, prompts, steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size
    )
    if not calls:
        raise RecipeError(
            "the pipeline never called its denoiser", fix=f"steps is {steps}: use at least 1"
        )
    kept = spread(calls, max_calls)
    log(
        f"calibration: {len(prompts)} prompts x {steps} steps, {len(calls)} calls, {len(kept)} kept"
    )
    return kept


def spread(calls: Sequence[DenoiserCall], count: int) -> list[DenoiserCall]:
    """At most `count` of `calls`, so that every part of the trajectory stays represented.

    A plain stride would meet the same timestep every time whenever it divides the steps.
    """
    if len(calls) <= count:
        return list(calls)
    by_time = sorted(calls, key=lambda call: -float(call.timestep.flatten()[0]))
    return [by_time[(2 * index + 1) * len(calls) // (2 * count)] for index in range(count)]


def save_calibration(calls: Sequence[DenoiserCall], path: Path) -> str:
    """Write the set and return the SHA-256 of the file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    index: list[dict[str, str]] = []
    for call in calls:
        entry: dict[str, str] = {}
        for name, value in flat_inputs(call).items():
            value = value.detach().cpu().contiguous()
            raw = value.view(torch.uint8) if value.ndim else value.reshape(1).view(torch.uint8)
            digest = hashlib.sha256(
                f"{value.dtype}{tuple(value.shape)}".encode() + raw.numpy().tobytes()
            )
            entry[name] = digest.hexdigest()[:16]
            tensors[entry[name]] = value
        index.append(entry)
    save_file(tensors, str(path), metadata={"calls": json.dumps(index, sort_keys=True)})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_calibration(path: Path, sha256: str | None = None) -> list[DenoiserCall]:
    """Read a set back; with `sha256` (from the manifest) the file must be that very one.

    Raises `InvalidArtifact` if the file is missing, cut short, edited, or not a calibration set.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidArtifact(
            f"{path} does not exist", fix="run `hcf quantize` on this model first"
        )
    if sha256 is not None and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise InvalidArtifact(
            f"{path} has SHA-256 {found[:12]}, the manifest says {sha256[:12]}",
            fix="run `hcf quantize` again",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            index = json.loads((file.metadata() or {})["calls"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        entries = [{name: tensors[key] for name, key in entry.items()} for entry in index]
        return [
            DenoiserCall(sample=entry.pop("sample"), timestep=entry.pop("timestep"), kwargs=entry)
            for entry in entries
        ]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InvalidArtifact(
            f"{path} is not a calibration set: {error}", fix="run `hcf quantize` again"
        ) from error


def flat_inputs(call: DenoiserCall) -> dict[str, Tensor]:
    """Every tensor of a call by the name it has as a graph input."""
    return {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
