"""`hcf check`: quality of a model against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcf.errors import GateFailed
from hcf.terminal import (
    EngineOption,
    Format,
    FormatOption,
    ModelOption,
    RecipeOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    finish,
    make_log,
)

BaselineOption = Annotated[Path, typer.Option("--baseline", "-b", help="What it is held against.")]
CandidateOption = Annotated[Path, typer.Option("--candidate", "-c", help="What is judged.")]
ResultOption = Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")]


def check(
    baseline: BaselineOption,
    candidate: CandidateOption,
    recipe: RecipeOption = None,
    set: SetOption = None,
    images: Annotated[int | None, typer.Option(min=1, help="Prompts, one seed each.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of both, not each its own.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="Of both, not each its own.")
    ] = None,
    engine: EngineOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = None,
    output: ResultOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Compare quality on fixed seeds; exit code 3 when a threshold of the recipe is missed."""
    from hcf.artifact import save_text
    from hcf.recipe import stage_config
    from hcf.run_stages import check_artifacts
    from hcf.settings import CheckConfig

    options = {
        "images": images, "steps": steps, "guidance_scale": guidance_scale,
        "threads": threads, "seed": seed,
    }  # fmt: skip
    config = stage_config(CheckConfig, "check", recipe, set or (), **options)
    verdict = check_artifacts(baseline, candidate, config, engine=engine, log=make_log(format))
    if output:
        save_text(output, verdict.model_dump_json(indent=1))
    state = "passed" if verdict.passed else "failed"
    finish(format, f"check {verdict.name}: {state}", verdict.model_dump(mode="json"))
    if not verdict.passed:
        raise GateFailed("\n".join(verdict.reasons), "improve the candidate, or the thresholds")


def decoder(
    model: ModelOption,
    tiny: Annotated[Path, typer.Option("--tiny", help="AutoencoderTiny or AutoencoderKL folder.")],
    images: Annotated[int, typer.Option(min=1, help="Images to decode twice.")] = 8,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="LPIPS weights (.safetensors); without them no LPIPS.")
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    format: FormatOption = Format.human,
) -> None:
    """Say what a tiny decoder costs in quality and saves in time, on the model's own latents."""
    from dataclasses import asdict

    from hcf.decode import TinyDecoder, compare_decoders, open_decoder
    from hcf.generate import sample_latents
    from hcf.load import load

    pipe = load(model, engine="eager", threads=threads)
    latents = sample_latents(pipe, images, seed or 0)
    lpips = lpips_weights is not None
    small = TinyDecoder(pipe.vae, open_decoder(tiny))
    found = compare_decoders(pipe, small, latents, lpips=lpips, lpips_weights=lpips_weights)
    text = (
        f"{found.images} images: PSNR {found.psnr_db:.1f} dB, SSIM {found.ssim:.3f}, "
        + (f"LPIPS {found.lpips:.3f}, " if found.lpips is not None else "")
        + f"{found.flop_ratio:.1f}x fewer operations, {found.time_ratio:.1f}x faster "
        f"[{found.time_ratio_low:.1f}, {found.time_ratio_high:.1f}]"
    )
    finish(format, text, asdict(found))
