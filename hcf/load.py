"""A model folder as an ordinary diffusers pipeline whose denoiser and decoder run on an engine.

    pipe = hcf.load("out/quickstart")              # the engines that were fastest when built
    pipe = hcf.load(folder, engine="eager")        # plain torch, float32
    pipe.hcf_report                                # what really runs
    pipe.hcf_sampling                              # {"steps": 4, "guidance_scale": 1.0}

The pipeline keeps its class, its scheduler and its call; only two components change their inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from hcf.artifact import MANIFEST, EngineEntry, Manifest, default_sampling, read_manifest
from hcf.engines import PRECISIONS, Engine, EngineReport, check_precision
from hcf.engines.forms import entry_name, open_entry, open_torch, speed
from hcf.errors import HcfError, RecipeError
from hcf.export.component import VAE_DECODER, example_inputs
from hcf.source import open_pipeline
from hcf.trace import denoiser_name, flatten_call

TORCH_ENGINES = ("eager", "compile")


class EngineUNet(nn.Module):
    """Stands for a UNet2DConditionModel in a pipeline; computes float32 on the CPU."""

    def __init__(self, unet: nn.Module, engine: Engine, names: Sequence[str]) -> None:
        super().__init__()
        self.config = unet.config
        self.engine = engine
        self.names = tuple(names)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        if (embedding := getattr(unet, "add_embedding", None)) is not None:
            self.add_embedding = embedding  # SDXL pipelines read a size from it

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """sample (B, C, H, W), timestep () or (B,), conditioning (B, ...) -> (B, C, H, W)

        Raises HcfError for conditioning the engine was not built with, or without some it was.
        """
        call = flatten_call(
            self,
            (sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask),
            {
                "cross_attention_kwargs": cross_attention_kwargs,
                "added_cond_kwargs": added_cond_kwargs,
                "down_block_additional_residuals": down_block_additional_residuals,
                "mid_block_additional_residual": mid_block_additional_residual,
                "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
                "encoder_attention_mask": encoder_attention_mask,
            },
        )
        given = {"sample": call.sample, "timestep": call.timestep, **call.kwargs}
        if set(given) != set(self.names):
            raise HcfError(
                f"the U-Net is called with {', '.join(sorted(given))}; its engine takes "
                f"{', '.join(sorted(self.names))}",
                fix="call the pipeline as when it was exported, or load it with engine='eager'",
            )
        inputs = {name: given[name].float() for name in self.names}
        out = self.engine(inputs)["out_sample"].to(sample.device)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


class EngineVAE(nn.Module):
    """Stands for a first stage: `decode` runs the engine, all else is the original's."""

    def __init__(self, vae: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.vae = vae
        self.engine = engine

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        """z (B, C, H, W) -> (B, 3, f*H, f*W) in about [-1, 1]"""
        image = self.engine({"latents": z.float()})["image"].to(z.device)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def __getattr__(self, name: str) -> Any:
        if name in ("enable_slicing", "enable_tiling"):
            raise HcfError(
                f"{name} has no effect on an engine's decoder", fix="load with engine='eager'"
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("vae"), name)


def load(
    path: str | Path,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> Any:
    """The pipeline in folder `path`.

    `engine` "auto" takes what `hcf build` chose; a folder it has not seen runs eager. A named
    engine runs in its fastest `precision` that was built, or in the one given; then components that
    have it take it, and the denoiser must. `threads` holds for torch and the engines.

    Raises RecipeError or HcfError for an engine or precision that was not built, EngineMismatch for
    one that another version or machine built, InvalidArtifact and UnsafeFile for broken folders.
    """
    path = Path(path)
    _check_names(engine, precision)
    pipe = open_pipeline(path)
    _set_threads(threads)
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    sampling = manifest.sampling if manifest else default_sampling(path)
    _install(pipe, path, manifest, engine, precision)
    pipe.hcf_sampling = sampling.model_dump(exclude_none=True)
    return pipe


def accelerate(
    pipe: Any,
    path: str | Path,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
) -> Any:
    """Puts the engines of artefact `path` into a pipeline in hand, and returns it.

    `path` is what `hcf build` made of the same model: weights are not compared. Raises as `load`.
    """
    path = Path(path)
    _check_names(engine, precision)
    _set_threads(threads)
    manifest = read_manifest(path)
    _install(pipe, path, manifest, engine, precision)
    pipe.hcf_sampling = manifest.sampling.model_dump(exclude_none=True)
    return pipe


def _install(
    pipe: Any, path: Path, manifest: Manifest | None, engine: str, precision: str | None
) -> None:
    denoiser = denoiser_name(pipe)
    built = manifest.engines if manifest else {}
    if engine == "auto" and not built:
        engine = "eager"
    threads = torch.get_num_threads()
    reports: list[EngineReport] = []
    for component in (denoiser, VAE_DECODER):
        if component == VAE_DECODER and getattr(pipe, "vae", None) is None:
            continue
        if engine == "eager" and precision in (None, "fp32"):
            # the module itself, which still trains, saves and moves
            reports.append(open_torch(pipe, component, "eager", "fp32", []).report)
            continue
        if engine in TORCH_ENGINES:
            names = list(example_inputs(pipe, component, batch=1))
            runner = open_torch(pipe, component, engine, precision or "fp32", names)
        elif manifest is not None and (component == denoiser or component in built):
            # a quantised U-Net has a first stage that is not: only the denoiser must have it
            wanted = precision if component == denoiser else None
            entry = pick_entry(path, component, manifest, engine, wanted)
            names = list(entry.shapes)
            runner = open_entry(path, component, entry, manifest, pipe, threads)
        elif component == VAE_DECODER and built:
            reports.append(open_torch(pipe, component, "eager", "fp32", []).report)
            continue  # `build.components` left it out
        else:
            raise RecipeError(
                f"{path} has no {engine} engine: it is a plain pipeline folder",
                fix="run `hcf export` and `hcf build` on it, or load it with engine='eager'",
            )
        reports.append(runner.report)
        if component == VAE_DECODER:
            pipe.vae = EngineVAE(pipe.vae, runner)
        elif component == "unet":
            pipe.unet = EngineUNet(pipe.unet, runner, names)
        else:
            raise HcfError(f"engines replace a `unet`; this pipeline has a `{component}`")
    pipe.hcf_report = reports


def pick_entry(
    path: Path, component: str, manifest: Manifest, engine: str, precision: str | None
) -> EngineEntry:
    """The entry to open: what the build chose for "auto", else the fastest that fits.

    Raises RecipeError naming what was built where nothing fits.
    """
    entries = manifest.engines.get(component, [])
    fits = [
        e
        for e in entries
        if (e.engine == engine if engine != "auto" else e.latency_low_ms is not None)
        and (e.precision == precision if precision else True)
    ]
    if engine == "auto" and precision is None and component in manifest.chosen:
        chosen = manifest.chosen[component]
        fits = [e for e in entries if chosen in (e.engine, entry_name(e))]
    if not fits:
        there = ", ".join(entry_name(e) for e in entries) or "none"
        raise RecipeError(
            f"{path} has no {engine if engine != 'auto' else ''} {precision or ''} engine of "
            f"{component}; built are: {there}",
            fix="run `hcf build` with it in build.engines and build.precisions",
        )
    return min(fits, key=speed)


def _check_names(engine: str, precision: str | None) -> None:
    if engine not in ("auto", *PRECISIONS):
        raise RecipeError(
            f"there is no engine {engine!r}", fix=f"use auto, {', '.join(PRECISIONS)}"
        )
    if precision is not None and engine != "auto":
        check_precision(engine, precision)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise RecipeError(f"threads={threads}", fix="use 1 or more")
        torch.set_num_threads(threads)
