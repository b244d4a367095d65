"""`hcf generate`: prompts to PNG files, through whichever engine the artefact chose."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcf.errors import InvalidArtifact, RecipeError

BATCH = 16


@dataclass(frozen=True)
class Request:
    """What to draw. `images` per prompt, seeds counting up from `seed`; `columns` > 0: one grid."""

    prompts: tuple[str, ...]
    output: Path
    negative_prompt: str | None = None
    images: int = 1
    columns: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise RecipeError("the prompt is empty", "say what to draw: -p 一只红色的猫")
        if self.output.suffix.lower() != ".png":
            raise RecipeError(f"the output {self.output} is not a .png file", "-o cat.png")


def generate_files(
    model: Path,
    request: Request,
    *,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Draws and writes the images; the paths are `output`, or `output` numbered from 0.

    Raises what `hcf.load` raises, InvalidArtifact for images that are not finite, StorageError.
    """
    from hcf.load import load
    from hcf.report.grid import as_image, replace_file, save_grid

    pipe = load(model, engine=engine, precision=precision, threads=threads)
    runs = ", ".join(f"{r.component} on {r.engine} {r.precision}" for r in pipe.hcf_report)
    log(f"{model}: {runs}")
    prompts = [prompt for prompt in request.prompts for _ in range(request.images)]
    images = _draw(pipe, prompts, request)
    if request.columns:
        return [save_grid(request.output, images, request.columns, captions=prompts)]
    files = []
    for number, image in enumerate(images):
        name = f"{request.output.stem}-{number}.png" if len(images) > 1 else request.output.name
        buffer = io.BytesIO()
        as_image(image).save(buffer, "PNG")
        files.append(replace_file(request.output.with_name(name), buffer.getvalue()))
    return files


def sample_latents(pipe: Any, images: int, seed: int) -> Any:
    """latents (N, C, H, W) of the pipeline on built-in prompts, as its denoiser leaves them."""
    import torch

    from hcf.quantize.prompts import CALIBRATION_PROMPTS as PROMPTS
    from hcf.trace import quiet

    options = {
        "num_inference_steps": pipe.hcf_sampling.get("steps"),
        "guidance_scale": pipe.hcf_sampling.get("guidance_scale"),
    }
    given = {name: value for name, value in options.items() if value is not None}
    with quiet(pipe), torch.no_grad():
        return pipe(
            prompt=[PROMPTS[i % len(PROMPTS)] for i in range(images)],
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(images)],
            output_type="latent",
            **given,
        ).images


def _draw(pipe: Any, prompts: list[str], request: Request) -> list[Any]:
    """Images (H, W, 3) of the prompts, each from its own generator."""
    import numpy as np
    import torch

    from hcf.trace import quiet

    given = {
        "num_inference_steps": request.steps or pipe.hcf_sampling.get("steps"),
        "guidance_scale": pipe.hcf_sampling.get("guidance_scale")
        if request.guidance_scale is None
        else request.guidance_scale,
    }
    options = {name: value for name, value in given.items() if value is not None}
    images: list[Any] = []
    with quiet(pipe), torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            seeds = range(request.seed + start, request.seed + start + len(batch))
            if request.negative_prompt is not None:
                options["negative_prompt"] = [request.negative_prompt] * len(batch)
            images += list(
                pipe(
                    prompt=batch,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    output_type="np",
                    **options,
                ).images
            )
    broken = [p for p, image in zip(prompts, images, strict=True) if not np.isfinite(image).all()]
    if broken:
        raise InvalidArtifact(
            f"the image of {broken[0]!r} is not finite",
            fix="the weights or an engine are broken: `hcf verify` the folder",
        )
    return images
