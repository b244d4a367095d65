"""Tiny decoder distillation: a few convolutions learn to decode, and encode, as the VAE does.

The student is diffusers' AutoencoderTiny (TAESD's architecture, madebyollin/taesd). It is trained
on the latents of images, and on ones the model itself samples: what the VAE decodes of them is its
target in L1 and in the features of a frozen network, and what the VAE's encoder says of that image
is its encoder's target in L2, so that image-to-image works too.

AutoencoderTiny works on latents as the U-Net sees them: `scaling_factor` 1 and no shift, which a
pipeline reads from its configuration. It squeezes them through 3 tanh(z / 3): what lies far beyond
3 is lost, and a model whose latents do is refused.

B batch, C latent channels, h w latent size, f the VAE's factor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.artifact import (
    INDEX,
    Sampling,
    clone_artifact,
    hcf_home,
    read_manifest,
    save_text,
    staged_folder,
    write_manifest,
)
from hcf.decode.tiles import decode_whole, latent_factor
from hcf.decode.tiny import TinyDecoder, compare_decoders
from hcf.distill.data import FOLDER, keep, kept, module_hash, read_captions, read_latents
from hcf.distill.job import Draw, Log
from hcf.distill.probe import Sampler, make_look, moved
from hcf.distill.save import teacher_sampling
from hcf.distill.student import seeded
from hcf.distill.trainer import GRIDS, diverging, loop_config
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.quality.features import Images
from hcf.settings import DecoderConfig, DistillConfig, PerceptualConfig
from hcf.source import open_pipeline
from hcf.trace import quiet

FAR, FAR_SHARE = 6.0, 0.01  # 3 tanh(z / 3) has a fourteenth of its slope there
CACHE_BYTES = 1 << 30  # of decoded images, kept in memory rather than decoded again each step


def make_tiny(vae: Any, config: DecoderConfig) -> AutoencoderTiny:
    """An untrained student for `vae`. Raises RecipeError for a first stage it cannot replace."""
    if not isinstance(vae, AutoencoderKL):
        what = "no `vae`" if vae is None else f"a {type(vae).__name__}"
        why = "" if not hasattr(vae, "quantize") else ", whose decoder looks codes up in a book"
        raise RecipeError(
            f"this pipeline has {what}{why}; an AutoencoderTiny can stand for an AutoencoderKL",
            fix="keep its own decoder",
        )
    if getattr(vae.config, "latents_mean", None) or getattr(vae.config, "latents_std", None):
        raise RecipeError(
            "this VAE normalises its latents per channel, which AutoencoderTiny has no setting for",
            fix="keep its own decoder",
        )
    stages = len(vae.config.block_out_channels)
    blocks = config.blocks or [*[3] * (stages - 1), 1]
    encoder_blocks = config.encoder_blocks or blocks[::-1]
    for name, found in (("blocks", blocks), ("encoder_blocks", encoder_blocks)):
        if len(found) != stages or min(found) < 0:
            raise RecipeError(
                f"distill.decoder.{name}={found}: the VAE has {stages} stages "
                f"({latent_factor(vae)} pixels a latent)",
                fix=f"give {stages} numbers, one a stage",
            )
    return AutoencoderTiny(
        in_channels=vae.config.in_channels,
        out_channels=vae.config.out_channels,
        encoder_block_out_channels=(config.channels,) * stages,
        decoder_block_out_channels=(config.channels,) * stages,
        num_encoder_blocks=tuple(encoder_blocks),
        num_decoder_blocks=tuple(blocks),
        latent_channels=vae.config.latent_channels,
    )


class DecoderObjective(nn.Module):
    """`perceptual` (x, y) -> distances (B,) of images (B, 3, f*h, f*w) in [-1, 1]."""

    def __init__(
        self, tiny: AutoencoderTiny, vae: Any, config: DecoderConfig, perceptual: nn.Module | None
    ) -> None:
        super().__init__()
        self.tiny, self.vae, self.config = tiny, vae.requires_grad_(False).eval(), config
        self.perceptual = perceptual

    def forward(
        self,
        latents: Tensor,
        generator: torch.Generator,
        images: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, h, w) as the U-Net sees them, with or without what `targets` makes of
        them -> scalar loss, parts"""
        from taiji.autoencoder.kl import edge_l1

        config = self.config
        if images is None or codes is None:
            images, codes = self.targets(latents)
        decoded = self.tiny.decode(latents).sample.float()
        losses = {
            "l1": F.l1_loss(decoded, images),
            "encoder": config.encoder_weight
            * F.mse_loss(self.tiny.encode(images).latents.float(), codes),
        }
        if config.edge_weight:
            losses["edge"] = config.edge_weight * edge_l1(decoded, images)
        if config.perceptual is not None and self.perceptual is not None:
            losses["perceptual"] = (
                config.perceptual.weight * self.perceptual(decoded, images).mean()
            )
        loss = sum(losses.values(), start=decoded.new_zeros(()))
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), images)
        parts = {name: value.item() for name, value in losses.items()}
        return loss, {**parts, "psnr": float(10 * torch.log10(4 / mse.clamp_min(1e-10)))}

    @torch.no_grad()
    def targets(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (B, C, h, w) -> the VAE's images (B, 3, f*h, f*w), its latents of those images"""
        factor = float(self.vae.config.scaling_factor)
        shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        with torch.autocast(latents.device.type, enabled=False):
            images = decode_whole(self.vae, latents.float() / factor + shift).clamp(-1, 1)
            means = self.vae.encode(images).latent_dist.mean
        return images, (means - shift) * factor


def check_range(latents: Tensor) -> None:
    """latents (N, C, h, w). RecipeError where AutoencoderTiny would lose too much of them."""
    share = float((latents.float().abs() > FAR).float().mean())
    if share > FAR_SHARE:
        raise RecipeError(
            f"{share:.0%} of the latents are beyond {FAR:g}, and AutoencoderTiny squeezes its "
            "input through 3 tanh(z / 3)",
            fix="measure the VAE's scaling_factor (1 / standard deviation of its latents)",
        )


def split(latents: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """latents (N, C, h, w) -> those to train on, and `held_out` evenly spread ones to measure on"""
    if len(latents) < 2 * held_out:
        raise InvalidArtifact(
            f"{len(latents)} latents, and {held_out} of them would only measure",
            fix="give more, or lower distill.decoder.held_out",
        )
    chosen = torch.zeros(len(latents), dtype=torch.bool)
    chosen[torch.arange(held_out) * len(latents) // held_out] = True
    return latents[~chosen], latents[chosen]


def sampled_latents(
    pipe: Any,
    captions: list[str],
    count: int,
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    log: Log,
) -> Tensor:
    """Latents (count, C, h, w) that the pipeline makes of captions in turn, kept in $HCF_HOME."""
    parts = [
        f"{name} {module_hash(part)}"
        for name, part in sorted(pipe.components.items())
        if isinstance(part, nn.Module) and name != "vae"
    ]
    said = json.dumps(
        [type(pipe).__name__, dict(pipe.scheduler.config), parts, captions, count, seed,
         sampling.model_dump()], default=str,
    )  # fmt: skip
    key = hashlib.sha256(said.encode()).hexdigest()
    path = hcf_home() / "latents" / f"{key[:32]}.safetensors"
    found = kept(path, key=key)
    if found is None:
        given = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
        given = {name: value for name, value in given.items() if value is not None}
        made = []
        for start in range(0, count, batch_size):
            chosen = range(start, min(start + batch_size, count))
            texts = [captions[i % len(captions)] for i in chosen]
            generators = [torch.Generator().manual_seed(seed + i) for i in chosen]
            with quiet(pipe), torch.no_grad():
                out = pipe(prompt=texts, generator=generators, output_type="latent", **given)
            made.append(out.images.half().cpu())
            log(f"{chosen.stop} of {count} latents sampled")
        found = {"latents": torch.cat(made)}
        keep(path, found, key=key)
    return found["latents"]


def batches(objective: DecoderObjective, latents: Tensor, batch_size: int) -> Draw:
    """Batches of latents, with their targets where all of those fit in memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = (n * latent_factor(objective.vae) for n in latents.shape[-2:])
    known: Mapping[str, Tensor] = {"latents": latents}
    if len(latents) * 3 * height * width * 2 <= CACHE_BYTES:
        objective.to(device)
        made = [
            tuple(t.half().cpu() for t in objective.targets(piece.to(device)))
            for piece in latents.split(batch_size)
        ]
        images, codes = (torch.cat(column) for column in zip(*made, strict=True))
        known = {"latents": latents, "images": images, "codes": codes}

    def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        pick = torch.from_numpy(rng.integers(0, len(latents), count))
        return {name: value[pick].float() for name, value in known.items()}

    return draw


def open_perceptual(config: PerceptualConfig | None) -> nn.Module | None:
    """Raises InvalidArtifact for a network that is missing or none."""
    if config is None:
        return None
    from taiji.autoencoder import perceptual

    try:
        settings = perceptual.PerceptualConfig(network=config.network, linear=config.linear)
        return perceptual.load_perceptual(settings)
    except (OSError, ValueError) as error:
        raise InvalidArtifact(
            f"distill.decoder.perceptual: {error}",
            fix="name a transformers folder or a safetensors file of VGG16, or leave it out",
        ) from error


@torch.no_grad()
def measured(pipe: Any, tiny: AutoencoderTiny, latents: Tensor) -> dict[str, float]:
    """The trained student against the pipeline's VAE on latents (N, C, h, w) it was not trained on.

    Raises HcfError for a student that is not yet of this latent space.
    """
    tiny.eval()
    latents = latents.float().to(next(pipe.vae.parameters()).device)
    try:
        decoder = TinyDecoder(pipe.vae, tiny)
    except HcfError as error:
        raise HcfError(
            f"the tiny decoder has not learned the VAE's colours: {error.message}",
            fix="raise distill.train_steps, or distill.learning_rate",
        ) from error
    found = compare_decoders(pipe, decoder, latents, rounds=5)
    objective = DecoderObjective(tiny, pipe.vae, DecoderConfig(), None)
    off, size = 0.0, 0.0
    for row in latents.split(1):
        images, codes = objective.targets(row)
        off += float((tiny.encode(images).latents - codes).square().sum())
        size += float(codes.square().sum())
    sizes = {
        f"{name}_parameters": float(sum(p.numel() for p in vae.decoder.parameters()))
        for name, vae in (("teacher", pipe.vae), ("student", tiny))
    }
    return {
        **sizes, "psnr_db": found.psnr_db, "ssim": found.ssim, "flop_ratio": found.flop_ratio,
        "time_ratio": found.time_ratio, "time_ratio_low": found.time_ratio_low,
        "time_ratio_high": found.time_ratio_high, "encoder_error": (off / size) ** 0.5,
        "held_out": float(len(latents)),
    }  # fmt: skip


def distill_decoder(
    model: Path, output: Path, config: DistillConfig, log: Log, *, work: Path | None = None
) -> Path:
    """As `hcf.distill.trainer.distill`, of the pipeline's `vae`: all else stays what it was."""
    from taiji.train.loop import Probe, run

    spec = config.decoder or DecoderConfig()
    pipe = open_pipeline(model)
    vae: Any = getattr(pipe, "vae", None)
    with seeded(config.seed):
        tiny = make_tiny(vae, spec)
    perceptual = open_perceptual(spec.perceptual)
    folder = config.data or model / FOLDER
    captions = read_captions(folder)
    latents = read_latents(folder, captions)[0]
    if latents.shape[1] != tiny.config.latent_channels:
        raise InvalidArtifact(
            f"{folder} has latents of {latents.shape[1]} channels, the VAE has "
            f"{tiny.config.latent_channels}",
            fix="encode the images with this model's own VAE",
        )
    train, held = split(latents, spec.held_out)
    if spec.sampled:
        own = sampled_latents(
            pipe, list(dict.fromkeys(captions)), spec.sampled, teacher_sampling(model),
            seed=config.seed, batch_size=config.batch_size, log=log,
        )  # fmt: skip
        train = torch.cat([train, own.to(train.dtype)])
    check_range(train)
    objective = DecoderObjective(tiny, vae, spec, perceptual)
    key = _key(config, vae, train, held)
    training = (work or output).with_name(f"{(work or output).name}.training-{key[:8]}")
    log(f"decoder: {config.train_steps} steps on {len(train)} latents, {len(held)} held out")
    probe = None
    if config.probe is not None:
        images = samplers(pipe, tiny)
        look = make_look(config, model, training / GRIDS, *images, log)
        probe = Probe(config.probe.every, look)
    with diverging(training):
        draw = batches(objective, train, config.batch_size)
        metrics = run(objective, draw, loop_config(config), training / "stage-0", log, probe=probe)
    metrics |= measured(pipe, tiny, held)
    log(
        f"{metrics['flop_ratio']:.2f}x fewer FLOPs and {metrics['time_ratio']:.2f}x less time than "
        f"the VAE's decoder, PSNR {metrics['psnr_db']:.2f} dB on {len(held)} latents held out"
    )
    with staged_folder(output) as staged:
        clone_artifact(model, staged)
        save_tiny(tiny, config, staged, metrics)
        if (training / GRIDS).is_dir():
            shutil.copytree(training / GRIDS, staged / GRIDS)
    shutil.rmtree(training, ignore_errors=True)
    return output


def save_tiny(
    tiny: AutoencoderTiny, config: DistillConfig, folder: Path, metrics: Mapping[str, float]
) -> None:
    """The student in the place of the staged folder's VAE; lineage noted."""
    shutil.rmtree(folder / "vae")
    tiny.to(torch.float16).save_pretrained(folder / "vae")
    index_path = folder / INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    index["vae"] = ["diffusers", type(tiny).__name__]
    save_text(index_path, json.dumps(index, indent=2))
    manifest = read_manifest(folder)
    manifest.distillation = {**config.model_dump(mode="json", exclude_none=True), **metrics}
    write_manifest(folder, manifest)


def samplers(pipe: Any, tiny: AutoencoderTiny) -> tuple[Sampler, Sampler]:
    """Images of the pipeline with the student for its VAE, and with the VAE."""
    from hcf.quality.sampling import generate_images

    vae = pipe.vae

    def images(texts: list[str], seeds: list[int], *, decoder: Any) -> Images:
        pipe.vae = decoder
        try:
            with moved(pipe, tiny):
                return generate_images(pipe, texts, seeds)
        finally:
            pipe.vae = vae

    return partial(images, decoder=tiny), partial(images, decoder=vae)


def _key(config: DistillConfig, vae: nn.Module, *latents: Tensor) -> str:
    """SHA-256 of what the training depends on."""
    settings = config.model_dump(mode="json", exclude={"check_memory"})
    digest = hashlib.sha256(json.dumps([settings, module_hash(vae)]).encode())
    for tensor in latents:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
