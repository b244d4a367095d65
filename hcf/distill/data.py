"""What students are trained on: latents with captions, or captions alone, and their conditioning.

N latents, M captions, R distinct captions, C channels, h w latent size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hcf.artifact import hcf_home
from hcf.errors import InvalidArtifact
from hcf.trace import CONCATENATED, conditioning, denoiser_name

Log = Callable[[str], None]
FOLDER = "hcf_data"
LATENTS, CAPTIONS = "latents_distill.safetensors", "captions_distill.json"
NOT_TEXT = ("vae", "movq", "scheduler")
UNSETTLED = ("transformers_version", "dtype", "torch_dtype")  # of who saved or loaded the module


@dataclass(frozen=True)
class DistillationSet:
    """`rows`: conditioning of the R distinct captions, each (R, ...); `caption` (M,) says which
    one, `latent` (M,) which of `latents` (N, C, h, w) a pair has. Without images the last two are
    None. `uncond`: the unconditional branch, one row each. `own`: conditioning that comes with a
    latent, each (N, ...), before that of its caption: the image to be enlarged, its noise level."""

    rows: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None
    caption: Tensor
    latents: Tensor | None
    latent: Tensor | None
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def draw(self, rng: Any, count: int) -> dict[str, Tensor]:
        """`count` pairs: {"latents" (B, C, h, w), conditioning (B, ...)}"""
        pick = torch.from_numpy(rng.integers(0, len(self.caption), count))
        said = {name: v[self.caption[pick]] for name, v in self.rows.items()}
        if self.latents is None or self.latent is None:
            return said
        row = self.latent[pick]
        own = {name: v[row].float() for name, v in self.own.items()}
        return {"latents": self.latents[row].float(), **said, **own}


def open_set(
    pipe: Any, folder: Path, guidance_scale: float, *, images: bool, log: Log
) -> DistillationSet:
    """The set in `folder`, its captions encoded by `pipe` or found in the cache.

    Raises InvalidArtifact where a file is missing or the parts do not fit together or the U-Net.
    """
    captions = read_captions(folder)
    denoiser = getattr(pipe, denoiser_name(pipe))
    latents = row = None
    own: dict[str, Tensor] = {}
    if images:
        latents, row, own = read_latents(folder, captions)
        check_latents(folder / LATENTS, latents, own, denoiser)
    distinct = list(dict.fromkeys(captions))
    rows, uncond = cached_conditioning(pipe, distinct, guidance_scale)
    check_text(rows, denoiser)
    rows = {name: v for name, v in rows.items() if name not in own}
    number = {caption: i for i, caption in enumerate(distinct)}
    pairs = "captions alone" if latents is None else f"{len(latents)} latents"
    log(f"{pairs}, {len(captions)} captions, {len(distinct)} of them distinct")
    uncond = uncond and {name: v for name, v in uncond.items() if name in rows}
    caption = torch.tensor([number[c] for c in captions])
    return DistillationSet(rows, uncond, caption, latents, row, own)


def is_given_an_image(denoiser: Any) -> bool:
    """Whether its input is longer than its output: super-resolution, inpainting."""
    settings = denoiser.config
    return bool(settings.in_channels > settings.out_channels)


def check_latents(path: Path, latents: Tensor, own: Mapping[str, Tensor], denoiser: Any) -> None:
    """Raises InvalidArtifact for latents, or images beside them, that are not this denoiser's."""
    settings = denoiser.config
    channels = min(settings.in_channels, settings.out_channels)
    if latents.shape[1] != channels:
        raise InvalidArtifact(
            f"{path} has latents of {latents.shape[1]} channels, the denoiser takes {channels}: "
            "they are of another first stage",
            fix="encode the images with this model's own VAE",
        )
    given, wanted = own.get(CONCATENATED), settings.in_channels - channels
    found = 0 if given is None else given.shape[1]
    if found != wanted:
        raise InvalidArtifact(
            f"{path} has {found} channels beside its latents (`{CONCATENATED}`), the denoiser "
            f"takes {wanted}",
            fix="write the image that is enlarged as docs/distillation.md describes"
            if wanted
            else f"leave `{CONCATENATED}` out",
        )
    if not all(bool(torch.isfinite(t).all()) for t in (latents, *own.values())):
        raise InvalidArtifact(f"{path} has values that are not finite", fix="encode it again")


def check_text(rows: Mapping[str, Tensor], denoiser: Any) -> None:
    """Raises InvalidArtifact for text states of another width than the denoiser attends to."""
    settings = dict(denoiser.config)
    wanted = settings.get("encoder_hid_dim") or settings.get("cross_attention_dim")
    text = rows.get("encoder_hidden_states")
    if text is not None and isinstance(wanted, int) and text.shape[-1] != wanted:
        raise InvalidArtifact(
            f"the text encoder gives states of width {text.shape[-1]}, the denoiser attends to "
            f"{wanted}: they are of different models",
            fix="give a folder whose text encoder and denoiser were trained together",
        )


def read_captions(folder: Path) -> list[str]:
    path = folder / CAPTIONS
    if not path.is_file():
        raise InvalidArtifact(
            f"{path} is missing: distillation needs captions, and most methods latents",
            fix="write them as docs/distillation.md describes, or name a folder: distill.data",
        )
    captions = json.loads(path.read_text(encoding="utf-8"))
    if not captions or not all(isinstance(c, str) for c in captions):
        raise InvalidArtifact(f"{path} is not a list of captions")
    return list(captions)


def read_latents(folder: Path, captions: list[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scaled latents (N, C, h, w), row (M,): caption m is of latent row[m]; and by name what else
    each latent has (N, ...)."""
    path = folder / LATENTS
    if not path.is_file():
        raise InvalidArtifact(
            f"{path} is missing: this method needs latents of images",
            fix="write them as docs/distillation.md describes, or use a method of prompts alone: "
            "trajectory, or distribution_matching with gan_weight=0",
        )
    own = load_file(path)
    latents, row = own.pop("latents"), own.pop("row")
    if len(row) != len(captions) or not 0 <= int(row.min()) <= int(row.max()) < len(latents):
        raise InvalidArtifact(
            f"{folder}: {len(captions)} captions, {len(row)} rows and {len(latents)} latents "
            "do not fit together"
        )
    for name, tensor in own.items():
        if len(tensor) != len(latents):
            raise InvalidArtifact(
                f"{path}: {len(tensor)} rows of `{name}` for {len(latents)} latents"
            )
    return latents, row, own


def cached_conditioning(
    pipe: Any, captions: list[str], guidance_scale: float, batch_size: int = 64
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Flat conditioning of the captions (R, ...) and one unconditional row (1, ...) or None.

    Kept under $HCF_HOME by the content of captions and text encoders: every method, and every run,
    encodes them once.
    """
    guided = guidance_scale != 1
    said = json.dumps([captions, guided, type(pipe).__name__], ensure_ascii=False)
    digest = hashlib.sha256(said.encode())
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module) and name not in (*NOT_TEXT, denoiser_name(pipe)):
            digest.update(f"{name} {module_hash(component)}".encode())
        elif hasattr(component, "get_vocab"):
            words = json.dumps([component.model_max_length, component.get_vocab()], sort_keys=True)
            digest.update(f"{name} {words}".encode())
    path = hcf_home() / "conditioning" / f"{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        parts, uncond = [], None
        for start in range(0, len(captions), batch_size):
            cond, uncond = conditioning(pipe, captions[start : start + batch_size], guidance_scale)
            parts.append(cond)
        tensors = {f"cond.{k}": torch.cat([p[k] for p in parts]) for k in parts[0]}
        tensors |= {f"uncond.{k}": v[:1].clone() for k, v in (uncond or {}).items()}
        keep(path, tensors)
    found = load_file(path)
    rows = {k.removeprefix("cond."): v for k, v in found.items() if k.startswith("cond.")}
    uncond = {k.removeprefix("uncond."): v for k, v in found.items() if k.startswith("uncond.")}
    return rows, uncond or None


def keep(path: Path, tensors: Mapping[str, Tensor], **said: str) -> None:
    """Writes safetensors beside `path` and then in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".hcf-{os.getpid()}-{path.name}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, staging, said)
    os.replace(staging, path)


def kept(path: Path, **said: str) -> dict[str, Tensor] | None:
    """Tensors that `keep` wrote with the same words, None where there are none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}) != said:
                return None
        return load_file(path)
    except SafetensorError:  # a machine that went down left half a file: it is made again
        return None


def module_hash(module: nn.Module) -> str:
    """SHA-256 of configuration and weights, the same wherever the module was loaded from."""
    config: Any = getattr(module, "config", {})
    tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    settings = {k: v for k, v in tree.items() if not k.startswith("_") and k not in UNSETTLED}
    said = json.dumps([type(module).__name__, settings], sort_keys=True, default=str)
    digest = hashlib.sha256(said.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
