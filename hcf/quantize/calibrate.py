"""The calibration set of a denoiser: its own calls, over its own timesteps, on its own prompts.

A few-step student never sees the activations its teacher saw, so ranges are taken from the
trajectories the student itself walks. They are recorded once (`hcf.quantize.calibration_cache`);
what an artefact was calibrated with is kept in it (`<component>/calibration.safetensors`), and its
SHA-256 goes into the manifest.

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

from hcf.artifact import hash_file
from hcf.errors import InvalidArtifact, RecipeError
from hcf.quantize.prompts import CALIBRATION_PROMPTS
from hcf.trace import DenoiserCall

CALIBRATION_FILE = "calibration.safetensors"
CAPTIONS = Path("hcf_data") / "captions_distill.json"
MAX_CALLS = (
    64  # more calls do not move the ranges; a 50-step teacher would otherwise record hundreds
)


def calibration_prompts(given: Sequence[str] | Path, model: Path | None = None) -> list[str]:
    """`given` (a list or a JSON file with one), else the captions of `model`, else the built-in.

    Raises RecipeError for a file that is missing or no list of texts.
    """
    if not isinstance(given, Path):
        if given:
            return list(given)
        if model is None or not (model / CAPTIONS).is_file():
            return list(CALIBRATION_PROMPTS)
    path = given if isinstance(given, Path) else Path(str(model)) / CAPTIONS
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"calibration prompts: {path} cannot be read: {error}", "check the path"
        ) from error
    except ValueError as error:
        raise RecipeError(
            f"calibration prompts: {path} is not JSON: {error}", fix='write ["a text", ...]'
        ) from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RecipeError(
            f"calibration prompts: {path} is not a list of strings", fix='write ["a text", ...]'
        )
    return prompts


def choose_prompts(prompts: Sequence[str], samples: int, seed: int) -> list[str]:
    """`samples` prompts drawn with `seed`; no repeats while there are enough, then round again."""
    if not prompts:
        raise RecipeError(
            "no calibration prompts", fix="set quantize.calibration_prompts to a list or a file"
        )
    order = list(dict.fromkeys(prompts))
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
    height: int | None = None,
    width: int | None = None,
    max_calls: int = MAX_CALLS,
    log: Callable[[str], None] = lambda line: None,
) -> list[DenoiserCall]:
    """Run the pipeline on `prompts`; keep at most `max_calls` calls, spread evenly over all.

    Calls that were recorded before, by whatever asked for the same, come from the cache.
    """
    from hcf.quantize.calibration_cache import CalibrationRequest, open_calibration

    request = CalibrationRequest(
        tuple(prompts), steps, guidance_scale, seed, batch_size, height, width
    )
    with open_calibration(pipe, request, log) as calibration:
        kept = calibration.calls(max_calls)
    log(
        f"calibration: {len(prompts)} prompts x {steps} steps, {len(calibration.index)} calls, "
        f"{len(kept)} kept"
    )
    return kept


def spread(calls: Sequence[DenoiserCall], count: int) -> list[DenoiserCall]:
    """At most `count` of `calls`, so that every part of the trajectory stays represented."""
    return [
        calls[i] for i in spread_indices([float(c.timestep.flatten()[0]) for c in calls], count)
    ]


def spread_indices(times: Sequence[float], count: int) -> list[int]:
    """Which of the calls at `times` `spread` keeps: all, or `count` in order of falling time.

    A plain stride would meet the same timestep every time whenever it divides the steps.
    """
    if len(times) <= count:
        return list(range(len(times)))
    by_time = sorted(range(len(times)), key=lambda i: -times[i])
    return [by_time[(2 * index + 1) * len(times) // (2 * count)] for index in range(count)]


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
    return hash_file(path)


def load_calibration(
    path: Path,
    sha256: str | None = None,
    *,
    only: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> list[DenoiserCall]:
    """Read a set back; with `sha256` (from the manifest) the file must be that very one.

    Calls `only`, in that order, or all; with `names` only these tensors, the sample then empty
    where it is not among them. Raises `InvalidArtifact` if the file is missing, cut short, edited,
    or not a calibration set.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidArtifact(
            f"{path} does not exist", fix="run `hcf quantize` on this model first"
        )
    if sha256 is not None and (found := hash_file(path)) != sha256:
        raise InvalidArtifact(
            f"{path} has SHA-256 {found[:12]}, the manifest says {sha256[:12]}",
            fix="run `hcf quantize` again",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            index: list[dict[str, str]] = json.loads((file.metadata() or {})["calls"])
            wanted = index if only is None else [index[i] for i in only]
            if names:
                wanted = [{n: key for n, key in entry.items() if n in names} for entry in wanted]
            keys = dict.fromkeys(key for entry in wanted for key in entry.values())
            tensors = {key: file.get_tensor(key) for key in keys}
        entries = [{name: tensors[key] for name, key in entry.items()} for entry in wanted]
        return [
            DenoiserCall(
                sample=entry.pop("sample") if not names else entry.pop("sample", torch.empty(0)),
                timestep=entry.pop("timestep"),
                kwargs=entry,
            )
            for entry in entries
        ]
    except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
        raise InvalidArtifact(
            f"{path} is not a calibration set: {error}", fix="run `hcf quantize` again"
        ) from error


def flat_inputs(call: DenoiserCall) -> dict[str, Tensor]:
    """Every tensor of a call by the name it has as a graph input."""
    return {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
