"""A smaller decoder in place of a VAE's own, and what it costs and gives, measured.

A few convolutions (AutoencoderTiny, a smaller AutoencoderKL) decode in a fraction of the time, with
less detail. They have to have been trained on the latents of this very first stage: SD 1.5's and
SDXL's have the same shape and mean different things, which is why colours are compared before use.

B batch, C channels, H W latent size, f the first stage's factor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hcf.decode.lpips import SMALLEST, Lpips
from hcf.decode.tiles import decode_whole, latent_factor
from hcf.errors import HcfError, InvalidArtifact, RecipeError
from hcf.quality.features import Images
from hcf.quality.fidelity import fidelity

LEAST_CORRELATION = 0.5  # of the colours of both decodes; of unrelated latent spaces about 0


class TinyDecoder(nn.Module):
    """Decodes what `vae` would with `tiny`: latents (B, C, H, W) as the pipeline gives `vae` them.

    Raises HcfError for a `tiny` of another latent space: its channels, factor or colours differ.
    """

    def __init__(self, vae: Any, tiny: Any) -> None:
        super().__init__()
        _check_shapes(vae, tiny)
        self.tiny = tiny
        self.given = _scaling(vae)
        self.wanted = _scaling(tiny)
        found = check_latent_space(vae, self)
        if found < LEAST_CORRELATION:
            raise HcfError(
                f"{type(tiny).__name__} was trained on other latents: on a test picture the "
                f"colours of its decode and of the VAE's correlate by {found:.2f}, needed is "
                f"{LEAST_CORRELATION}",
                fix="give a decoder made for this first stage (of SD 1.5, of SDXL, ...)",
            )

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W), divided by the VAE's scaling factor -> image (B, 3, f*H, f*W)"""
        (scale, shift), (own_scale, own_shift) = self.given, self.wanted
        if (scale, shift) != (own_scale, own_shift):
            latents = (latents - shift) * (scale / own_scale) + own_shift
        return decode_whole(self.tiny, latents)


def open_decoder(source: Path | str | nn.Module) -> Any:
    """A folder of AutoencoderTiny or AutoencoderKL, float32, in eval mode; a module as it is.

    Raises InvalidArtifact for a folder that holds neither.
    """
    import json

    import diffusers

    if isinstance(source, nn.Module):
        return source
    path = Path(source)
    try:
        name = json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{path} holds no decoder: {error!r}") from error
    if name not in ("AutoencoderTiny", "AutoencoderKL"):
        raise InvalidArtifact(
            f"{path} holds {name!r}", fix="give an AutoencoderTiny or a smaller AutoencoderKL"
        )
    try:
        module = getattr(diffusers, name).from_pretrained(
            path, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArtifact(f"{path} cannot be opened as {name}: {error}") from error
    return module.eval().requires_grad_(False)


def _check_shapes(vae: Any, tiny: Any) -> None:
    if getattr(vae.config, "latents_mean", None) or getattr(vae.config, "latents_std", None):
        raise HcfError(
            "this VAE normalises its latents per channel, which a tiny decoder is not made for",
            fix="keep the VAE's own decoder",
        )
    if hasattr(vae, "quantize"):
        raise HcfError("a VQModel has no latents a tiny decoder could be made for")
    pairs = {
        "latent channels": (vae.config.latent_channels, tiny.config.latent_channels),
        "pixels a latent": (latent_factor(vae), latent_factor(tiny)),
        "image channels": (vae.config.out_channels, tiny.config.out_channels),
    }
    for what, (wanted, found) in pairs.items():
        if wanted != found:
            raise HcfError(
                f"{type(tiny).__name__} has {found} {what}, the VAE has {wanted}",
                fix="give a decoder made for this first stage",
            )


def _scaling(vae: Any) -> tuple[float, float]:
    """(scaling factor, shift): latents for `decode` are z / factor + shift."""
    shift = getattr(vae.config, "shift_factor", None)
    return float(vae.config.scaling_factor), float(shift or 0.0)


@torch.no_grad()
def check_latent_space(vae: Any, decode: Callable[[Tensor], Tensor]) -> float:
    """Correlation of the coarse colours of `decode` and of the VAE's own, on a picture of patches.

    About 1 for decoders of one latent space, about 0 for others.
    """
    factor = latent_factor(vae)
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
    picture = patches.repeat_interleave(4 * factor, -1).repeat_interleave(4 * factor, -2)
    weight = next(vae.parameters())
    latents = vae.encode(picture.to(weight.device, weight.dtype)).latent_dist.mean
    coarse = [
        torch.nn.functional.adaptive_avg_pool2d(image.float(), 8).flatten(2)
        for image in (decode_whole(vae, latents), decode(latents))
    ]
    wanted, found = (image - image.mean(-1, keepdim=True) for image in coarse)
    scale = wanted.norm() * found.norm()
    return float((wanted * found).sum() / scale) if scale > 0 else 0.0


@dataclass(frozen=True)
class DecoderComparison:
    """A tiny decoder against the VAE's own on `images` latents.

    PSNR and SSIM of the 8-bit images; LPIPS (0 equal) is None where it was not asked for.
    `flop_ratio` and `time_ratio` are the VAE's over the tiny one's: above 1 it is cheaper. The
    interval holds the middle half of the rounds.
    """

    images: int
    psnr_db: float
    ssim: float
    lpips: float | None
    flop_ratio: float
    time_ratio: float
    time_ratio_low: float
    time_ratio_high: float


@torch.no_grad()
def compare_decoders(
    pipe: Any,
    tiny: TinyDecoder,
    latents: Tensor,
    *,
    lpips: bool = False,
    lpips_weights: Path | None = None,
    rounds: int = 9,
) -> DecoderComparison:
    """latents (N, C, H, W) as the pipeline's output_type="latent" gives them.

    Raises MissingDependency for `lpips` without a weights file, RecipeError for latents that cannot
    be compared.
    """
    network = Lpips.open(lpips_weights) if lpips else None
    scale, shift = _scaling(pipe.vae)
    if latents.ndim != 4 or latents.shape[1] != pipe.vae.config.latent_channels or rounds < 1:
        raise RecipeError(
            f"latents of shape {tuple(latents.shape)} in {rounds} rounds; the VAE has "
            f"{pipe.vae.config.latent_channels} channels",
            fix="give latents (N, C, H, W) of this pipeline, and at least one round",
        )
    rows = [(row / scale + shift) for row in latents.split(1)]
    own: Callable[[Tensor], Tensor] = partial(decode_whole, pipe.vae)
    decoded = [torch.cat([run(row).float() for row in rows]).clamp(-1, 1) for run in (own, tiny)]
    found = fidelity(*(_to_uint8(image) for image in decoded))
    distance = None
    if network is not None:
        if min(decoded[0].shape[-2:]) < SMALLEST:
            raise RecipeError(
                f"LPIPS needs images of {SMALLEST} pixels, not {tuple(decoded[0].shape[-2:])}"
            )
        pairs = zip(*(image.cpu().split(1) for image in decoded), strict=True)
        distance = float(torch.cat([network(a, b) for a, b in pairs]).mean())
    ratios = sorted(_time_ratios(own, tiny, rows, rounds))
    return DecoderComparison(
        images=len(rows),
        psnr_db=found.psnr_db,
        ssim=found.ssim,
        lpips=distance,
        flop_ratio=_flop(own, rows[0]) / _flop(tiny, rows[0]),
        time_ratio=statistics.median(ratios),
        time_ratio_low=ratios[len(ratios) // 4],
        time_ratio_high=ratios[-1 - len(ratios) // 4],
    )


def _to_uint8(image: Tensor) -> Images:
    """image (N, 3, H, W) in [-1, 1] -> (N, H, W, 3)"""
    pixels = (image.permute(0, 2, 3, 1) * 127.5 + 127.5).round().cpu().numpy()
    return pixels.astype(np.uint8)


def _flop(run: Callable[[Tensor], Tensor], row: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(row)
    return counter.get_total_flops()


def _time_ratios(
    own: Callable[[Tensor], Tensor],
    tiny: Callable[[Tensor], Tensor],
    rows: Sequence[Tensor],
    rounds: int,
) -> list[float]:
    """own / tiny of each round; which of the two comes first alternates."""
    found = []
    for turn in range(rounds + 1):
        row = rows[turn % len(rows)]
        order = (own, tiny) if turn % 2 else (tiny, own)
        times = {run: _seconds(run, row) for run in order}
        if turn:  # the first is a warm-up
            found.append(times[own] / times[tiny])
    return found


def _seconds(run: Callable[[Tensor], Tensor], row: Tensor) -> float:
    if row.device.type == "cuda":
        torch.cuda.synchronize(row.device)
    start = time.perf_counter()
    run(row)
    if row.device.type == "cuda":
        torch.cuda.synchronize(row.device)
    return time.perf_counter() - start
