"""Decoding in tiles, for images whose activations do not fit, without seams.

Tiles that are decoded on their own normalise on their own: GroupNorm's statistics differ from tile
to tile, and the picture gets steps and colour shifts that blending only blurs.

`decode_exact` goes through the decoder layer by layer and tile by tile instead. The whole
activation waits on the host; one tile, with the halo its convolution reaches into, is on the
device. Every tile gives the moments of its outputs, which are combined (Chan, Golub and LeVeque
1979) into those of the whole before the next norm uses them. What attends over all positions, the
middle block, runs on the whole latent. The result is the untiled one up to rounding.

`blend_tiles` is for engines, whose graphs have no seam to open: overlapping tiles that fade into
each other (`hcf_kernels.tile_blend`).

B batch, C channels, G groups, H W positions, f the first stage's factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.decode.checks import check_image
from hcf.errors import HcfError, RecipeError
from hcf_kernels.tile_blend import tile_blend, tile_starts

Run = Callable[[Tensor], Tensor]


def decode(
    vae: Any, latents: Tensor, run: Run | None = None, component: str = "vae_decoder"
) -> Tensor:
    """latents (B, C, H, W), divided by the scaling factor -> image (B, 3, f*H, f*W), checked

    `vae`'s own decoder, or `run` in its place, with the slices of `vae.enable_slicing` and the
    tiles of `vae.enable_tiling`: exact ones of the module, blended ones of `run`. Whatever replaced
    `vae.decode` is not called. Raises HcfError for an image that cannot be right.
    """
    tile = int(getattr(vae, "tile_latent_min_size", 0))
    tiled = bool(getattr(vae, "use_tiling", False)) and max(latents.shape[-2:]) > tile
    rows = latents.split(1) if getattr(vae, "use_slicing", False) else (latents,)
    images = []
    for row in rows:
        if not tiled:
            images.append(decode_whole(vae, row) if run is None else run(row))
        elif run is None:
            images.append(decode_exact(vae, row, tile))
        else:
            overlap = round(tile * vae.tile_overlap_factor)
            images.append(blend_tiles(run, row, tile, overlap, latent_factor(vae)))
    return check_image(torch.cat(images), component, latents)


def decode_tiled(
    decoder: Any, latents: Tensor, tile: int, overlap: int, exact: bool = True
) -> Tensor:
    """latents (B, C, H, W), divided by the scaling factor -> image (B, 3, f*H, f*W)

    `decoder` is a VAE or, where not `exact`, also a function latents -> image such as an engine.
    `tile` and `overlap` are in latents; exact tiles need no overlap. Raises RecipeError for sizes
    that cannot be meant, HcfError for a decoder that exact tiles cannot go through.
    """
    if isinstance(decoder, nn.Module):
        if exact:
            return decode_exact(decoder, latents, tile)
        whole: Run = lambda z: decode_whole(decoder, z)  # noqa: E731
        return blend_tiles(whole, latents, tile, overlap)
    if exact:
        raise HcfError(
            "exact tiles share statistics inside the decoder, which an engine's graph hides",
            fix="use exact=False, or decode with the torch module",
        )
    return blend_tiles(decoder, latents, tile, overlap)


def blend_tiles(
    run: Run, latents: Tensor, tile: int, overlap: int, factor: int | None = None
) -> Tensor:
    """latents (B, C, H, W) -> image (B, 3, f*H, f*W), from tiles that all are `tile` x `tile`.

    Neighbours overlap by `overlap` latents or more, and fade into each other linearly. A side
    shorter than a tile is padded with its edge. `factor` is read off the first tile without it.
    """
    _check_tile(tile, overlap)
    height, width = latents.shape[-2:]
    short = (0, max(0, tile - width), 0, max(0, tile - height))
    padded = F.pad(latents, short, mode="replicate") if any(short) else latents
    parts: list[Tensor] = []
    for top in tile_starts(padded.shape[-2], tile, overlap):
        for left in tile_starts(padded.shape[-1], tile, overlap):
            part = run(padded[..., top : top + tile, left : left + tile].contiguous())
            factor = factor or part.shape[-1] // tile
            if part.shape[-2:] != (tile * factor, tile * factor):
                raise HcfError(
                    f"a {tile}x{tile} tile decodes to {tuple(part.shape)}, not to factor {factor}"
                )
            parts.append(part)
    assert factor is not None
    planes = torch.stack(parts).flatten(1, 2)  # of all images at once
    image = tile_blend(planes, height * factor, width * factor, overlap * factor)
    return image.unflatten(0, (len(latents), -1))


def seam_db(image: Tensor, reference: Tensor, tile: int, overlap: int) -> float:
    """How visible the seams of `image` (B, C, H, W) are: 10 log10(4 / step^2), higher is better.

    `step` is the jump of image - reference across the lines where tiles begin or end, in RMS above
    that of the other lines; 4 is the squared range of [-1, 1]; inf without a jump. `tile` and
    `overlap` are in pixels of the image.
    """
    if image.shape != reference.shape:
        raise HcfError(f"image {tuple(image.shape)} and reference {tuple(reference.shape)} differ")
    error = (image.double() - reference.double()).cpu()
    seams: list[float] = []
    others: list[float] = []
    for axis in (-2, -1):
        size = error.shape[axis]
        starts = tile_starts(size, tile, overlap)
        lines = {s for s in starts if s} | {s + tile for s in starts if s + tile < size}
        jumps = error.diff(dim=axis).square().movedim(axis, 0).flatten(1).mean(1)
        for line, jump in enumerate(jumps.tolist(), start=1):
            (seams if line in lines else others).append(jump)
    if not seams:
        raise RecipeError(
            f"tiles of {tile} pixels make no seam in an image of {tuple(error.shape[-2:])}",
            fix="use a larger image or a smaller tile",
        )
    step = _mean(seams) - _mean(others)
    return float(10 * torch.log10(torch.tensor(4 / step))) if step > 0 else float("inf")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _check_tile(tile: int, overlap: int) -> None:
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise RecipeError(
            f"tiles of {tile} latents that overlap by {overlap}",
            fix="use a tile of 1 or more, and an overlap of at most half of it",
        )


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    """The image of `latents` in one piece, past whatever replaced `vae.decode`."""
    if not hasattr(vae, "post_quant_conv"):
        image: Tensor = vae.decoder(latents)
        return image
    image = vae.decoder(_decoder_input(vae, latents))
    return image


def latent_factor(vae: Any) -> int:
    """Pixels of the image per latent, along one side."""
    config = vae.config
    if hasattr(config, "block_out_channels"):
        return int(2 ** (len(config.block_out_channels) - 1))
    return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))


def _decoder_input(vae: Any, latents: Tensor) -> Tensor:
    if hasattr(vae, "quantize"):
        latents = vae.quantize(latents)[0]
    return latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)


@torch.no_grad()
def decode_exact(
    vae: Any, latents: Tensor, tile: int, *, host: torch.device | str = "cpu"
) -> Tensor:
    """latents (B, C, H, W) -> image (B, 3, f*H, f*W), equal to the untiled decode up to rounding.

    Peak memory of the device is about that of decoding one `tile` x `tile` latent, or of the middle
    block on the whole one if that is more; `host` holds the activations. For AutoencoderKL and
    VQModel; raises HcfError for other decoders.
    """
    _check_tile(tile, 0)
    _require_layered(vae)
    images = []
    for row in latents.split(1):  # GroupNorm's statistics are each image's own
        decoder = vae.decoder
        walk = _Walk(decoder.mid_block(decoder.conv_in(_decoder_input(vae, row))), host, tile)
        for block in decoder.up_blocks:
            attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                walk.resnet(resnet)
                if attention is not None:
                    walk.whole(attention)
            for upsampler in block.upsamplers or ():
                walk.upsample(upsampler)
        walk.convolve(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
        images.append(walk.x)
    return torch.cat(images).to(latents.device)


def _require_layered(vae: Any) -> None:
    decoder = getattr(vae, "decoder", None)
    blocks = [type(block).__name__ for block in getattr(decoder, "up_blocks", ())]
    norm = getattr(decoder, "conv_norm_out", None)
    known = {"UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    if not blocks or set(blocks) - known or not isinstance(norm, nn.GroupNorm):
        what = ", ".join(sorted(set(blocks) - known)) or type(norm).__name__
        raise HcfError(
            f"exact tiles cannot go through the decoder of {type(vae).__name__} ({what}); they "
            "know AutoencoderKL and VQModel with GroupNorm",
            fix="use exact=False",
        )


@dataclass(frozen=True)
class _Moments:
    """Mean and variance (1, C) over the positions of one tile, and how many those are."""

    mean: Tensor
    variance: Tensor
    count: int


class _Walk:
    """An activation (1, C, H, W) on the host, on its way through a decoder, and its moments."""

    def __init__(self, x: Tensor, host: torch.device | str, tile: int) -> None:
        self.x, self.device, self.tile = x.to(host), x.device, tile
        self.moments = [_moments(x)]

    def resnet(self, block: Any) -> None:
        """ResnetBlock2D without a time embedding: norm, act, conv, norm, act, conv, shortcut."""
        before = self.x
        self.convolve(block.norm1, block.nonlinearity, block.conv1)
        shortcut = block.conv_shortcut

        def add(tile: Tensor, y: slice, x: slice) -> Tensor:
            skip = before[..., y, x].to(self.device)
            skip = skip if shortcut is None else shortcut(skip)
            return (skip + tile) / block.output_scale_factor

        self.convolve(block.norm2, block.nonlinearity, block.conv2, add)

    def upsample(self, layer: nn.Module) -> None:
        self._map(layer, factor=2)
        self.tile *= 2

    def whole(self, layer: nn.Module) -> None:
        """A layer that every position of the output depends on every one of the input in."""
        x = layer(self.x.to(self.device))
        self.x, self.moments = x.to(self.x.device), [_moments(x)]

    def convolve(
        self,
        norm: nn.GroupNorm,
        act: nn.Module,
        conv: nn.Module,
        after: Callable[[Tensor, slice, slice], Tensor] | None = None,
    ) -> None:
        scale, shift = self._normaliser(norm)

        def layer(window: Tensor) -> Tensor:
            normed = torch.addcmul(shift, window.float(), scale).to(window.dtype)
            result: Tensor = conv(act(normed))
            return result

        self._map(layer, after=after)

    def _map(
        self,
        layer: Callable[[Tensor], Tensor],
        factor: int = 1,
        after: Callable[[Tensor, slice, slice], Tensor] | None = None,
    ) -> None:
        """Every tile, with a halo of 1 where it has neighbours, through a 3x3 convolution.

        The layer pads with zeros all around, which is right at the image's border; where the halo
        is, the outer ring of the result is wrong and cut off.
        """
        height, width = self.x.shape[-2:]
        out, moments = None, []
        for y, x in self._tiles():
            halo = [
                slice(max(0, y.start - 1), min(height, y.stop + 1)),
                slice(max(0, x.start - 1), min(width, x.stop + 1)),
            ]
            part = layer(self.x[..., halo[0], halo[1]].to(self.device))
            inner = [
                slice((own.start - all_.start) * factor, (own.stop - all_.start) * factor)
                for own, all_ in zip((y, x), halo, strict=True)
            ]
            part = part[..., inner[0], inner[1]]
            if after is not None:
                part = after(part, y, x)
            if out is None:
                size = (1, part.shape[1], height * factor, width * factor)
                out = torch.empty(size, dtype=part.dtype, device=self.x.device)
            out[..., _times(y, factor), _times(x, factor)] = part.to(out.device)
            moments.append(_moments(part))
        assert out is not None
        self.x, self.moments = out, moments

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        height, width = self.x.shape[-2:]
        for top in range(0, height, self.tile):
            for left in range(0, width, self.tile):
                yield (
                    slice(top, min(top + self.tile, height)),
                    slice(left, min(left + self.tile, width)),
                )

    def _normaliser(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """scale, shift (1, C, 1, 1) float32 on the device: GroupNorm over the whole activation."""
        mean, variance = _combine(self.moments, norm.num_groups)
        inverse = torch.rsqrt(variance + norm.eps)
        per_channel = norm.num_channels // norm.num_groups
        scale = inverse.repeat_interleave(per_channel, 1)
        shift = -(mean * inverse).repeat_interleave(per_channel, 1)
        if norm.affine:
            shift = shift * norm.weight.float() + norm.bias.float()
            scale = scale * norm.weight.float()
        return scale[..., None, None], shift[..., None, None]


def _moments(x: Tensor) -> _Moments:
    variance, mean = torch.var_mean(x.float(), dim=(-2, -1), correction=0)
    return _Moments(mean, variance, x.shape[-2] * x.shape[-1])


def _combine(parts: Sequence[_Moments], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (1, G) over all tiles and the channels of each group."""
    means = torch.stack([part.mean for part in parts]).unflatten(-1, (groups, -1))
    variances = torch.stack([part.variance for part in parts]).unflatten(-1, (groups, -1))
    counts = torch.tensor([part.count for part in parts], device=means.device)
    weights = (counts / (counts.sum() * means.shape[-1]))[:, None, None, None]
    mean = (weights * means).sum((0, -1))
    spread = (means - mean[..., None]).square()
    return mean, (weights * (variances + spread)).sum((0, -1))


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
