"""Images to be judged: fixed prompts, one fixed seed each, the same for every pipeline compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcf.artifact import Sampling
from hcf.errors import InvalidArtifact, RecipeError
from hcf.quality.features import Images
from hcf.trace import quiet

PROMPTS_FILE = "check_prompts.json"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a check. `kind` "shapes" has a `truth` for the rule judge; "emoji" and prompts
    without a kind are scored by CLIP-zh, on `label` where there is one."""

    id: str
    text: str
    kind: str | None = None
    split: str | None = None
    label: str | None = None
    truth: Mapping[str, Any] | None = None

    @property
    def concept(self) -> str:
        """What the image should show, as a caption for CLIP-zh."""
        return self.label or self.text


def load_prompts(source: Sequence[str] | Path) -> list[Prompt]:
    """Texts, or a JSON file of texts or of the fields of `Prompt`, with "prompt" for the text.

    Raises RecipeError for a missing or malformed file, no prompts, or an empty prompt.
    """
    if isinstance(source, Path):
        try:
            entries = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"the prompts {source} cannot be read: {error}",
                fix="give a JSON file like check_prompts.json or a list of texts",
            ) from error
    else:
        entries = list(source)
    if not isinstance(entries, list) or not entries:
        raise RecipeError("no prompts to check with", fix="give at least one prompt")
    return [_prompt(number, entry) for number, entry in enumerate(entries)]


def _prompt(number: int, entry: Any) -> Prompt:
    fields: Any = {"prompt": entry} if isinstance(entry, str) else entry
    text = fields.get("prompt") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"prompt {number} is empty or not a text: {entry!r}", "write a caption")
    return Prompt(
        id=str(fields.get("id", number)),
        text=text,
        kind=fields.get("kind"),
        split=fields.get("split"),
        label=fields.get("label"),
        truth=fields.get("truth"),
    )


def choose_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts: evenly spread over the list, or the list over and over (with new seeds)."""
    if count >= len(prompts):
        return [prompts[i % len(prompts)] for i in range(count)]
    return [prompts[i * len(prompts) // count] for i in range(count)]


def generate_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    log: Callable[[str], object] | None = None,
) -> Images:
    """N prompts, N seeds -> images (N, H, W, 3) uint8. `sampling` None leaves it to the pipeline.

    Every image has its own CPU generator, so that the batch size does not change its noise. Raises
    InvalidArtifact when the pipeline makes images that are not finite.
    """
    if len(prompts) != len(seeds):
        raise RecipeError(f"{len(prompts)} prompts but {len(seeds)} seeds", "give one seed each")
    sampling = sampling or Sampling()
    given = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    found: list[Images] = []
    with quiet(pipe), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            pixels = pipe(
                prompt=list(prompts[chosen]),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]],
                output_type="np",
                **{name: value for name, value in given.items() if value is not None},
            ).images
            bad = [i for i, image in enumerate(pixels) if not np.isfinite(image).all()]
            if bad:
                raise InvalidArtifact(
                    f"the image of {prompts[start + bad[0]]!r} is not finite",
                    fix="the weights, their precision or an engine are broken: `hcf inspect` them",
                )
            found.append(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))
            if log:
                log(f"{start + len(pixels)} of {len(prompts)} images")
    return np.concatenate(found)
