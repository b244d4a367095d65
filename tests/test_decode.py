"""VAE decode: what is refused, tiles that equal the whole, and decoders that are compared."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import noise, tiny_vae, tiny_vq
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcf.decode import (
    blend_tiles,
    check_image,
    decode,
    decode_exact,
    decode_tiled,
    decoder_dtype,
    prefer_channels_last,
    seam_db,
)
from hcf.errors import HcfError, RecipeError

MINI = Path(__file__).parents[1] / "models/weights/taiji-sd-mini"


def picture(count: int = 2, side: int = 16) -> Tensor:
    return (noise(count, 3, side, side) * 0.1).clamp(-1, 1)


# --- checks


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "is not finite"),
        (math.inf, "is not finite"),
        (-math.inf, "is not finite"),
        (0.25, r"is constant \(0.25 to 0.25\)"),
        (-1.0, "is constant"),
    ],
)
def test_broken_images_are_refused(value: float, message: str) -> None:
    image = picture()
    assert check_image(image, "vae_decoder") is image
    if math.isfinite(value):
        image[1] = value
    else:
        image[1, 2, 3, 4] = value
    with pytest.raises(HcfError, match=f"image 1 of vae_decoder {message}.*float16") as caught:
        check_image(image, "vae_decoder")
    assert "force_upcast" in caught.value.fix


def test_saturated_images_are_refused_and_flat_ones_are_not() -> None:
    varied = picture(1)
    with pytest.raises(HcfError, match="all black"):
        check_image(varied - 2, "vae_decoder")
    with pytest.raises(HcfError, match="all white"):
        check_image(varied + 2, "vae_decoder")
    flat = torch.full((1, 3, 16, 16), -0.98)
    flat[0, 0, 0, 0] += 3e-4
    check_image(flat, "vae_decoder")
    check_image(flat.bfloat16().float() + varied * 1e-2, "vae_decoder")
    check_image((varied - 1.2).clamp_min(-1.001), "vae_decoder", varied)


def test_blame_falls_on_the_denoiser_where_it_should() -> None:
    image = torch.full((1, 3, 16, 16), math.nan)
    broken = noise(1, 4, 8, 8)
    broken[0, 0, 0, 0] = math.nan
    for latents, blamed in (
        (broken, "latents are not finite either"),
        (torch.zeros(1, 4, 8, 8), "latents are constant too"),
        (noise(1, 4, 8, 8), "in its graph if not in torch"),
    ):
        with pytest.raises(HcfError, match=blamed):
            check_image(image, "vae_decoder", latents)
    with pytest.raises(HcfError, match=r"decoder \(SDXL's first stage does\)$"):
        try:
            check_image(image.half(), "vae_decoder")
        except HcfError as error:
            raise HcfError(error.message) from error


def test_an_overflowing_decoder_is_caught() -> None:
    vae = tiny_vae().eval()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
        for resnet in vae.decoder.mid_block.resnets:
            resnet.conv2.weight.mul_(1e6)
        latents = noise(1, 4, 8, 8)
        check_image(vae.decode(latents).sample, "vae_decoder")
        check_image(vae.bfloat16().decode(latents.bfloat16()).sample, "vae_decoder")
        overflown = vae.half().decode(latents.half()).sample
    with pytest.raises(HcfError, match="image 0 of vae_decoder is not finite; usually float16"):
        check_image(overflown, "vae_decoder", latents)


def test_force_upcast_is_honoured() -> None:
    vae = tiny_vae()
    assert vae.config.force_upcast and decoder_dtype(vae) == torch.float32
    assert decoder_dtype(vae, "bf16") == torch.bfloat16
    with pytest.raises(HcfError, match="force_upcast"):
        decoder_dtype(vae, "fp16")
    with pytest.raises(HcfError, match="force_upcast"):
        decoder_dtype(vae.half())
    assert decoder_dtype(vae, "fp16", upcast="bf16") == torch.bfloat16
    assert decoder_dtype(vae, upcast="fp32") == torch.float32
    vae.register_to_config(force_upcast=False)
    assert decoder_dtype(vae, "fp16") == decoder_dtype(vae) == torch.float16
    for asked, upcast in (("int8", None), ("fp16", "int8"), ("fp16", "fp16")):
        with pytest.raises(RecipeError):
            decoder_dtype(vae, asked, upcast=upcast)


def test_channels_last_where_it_pays() -> None:
    vae = tiny_vae().eval()
    assert not prefer_channels_last(vae)
    assert vae.decoder.conv_in.weight.is_contiguous()
    latents = noise(1, 4, 8, 8).bfloat16()
    with torch.no_grad():
        before = vae.bfloat16().decode(latents).sample
        assert prefer_channels_last(vae)
        assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert (vae.decode(latents).sample - before).abs().max() < 0.05
    assert not prefer_channels_last(nn.Linear(2, 2))


# --- tiles


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("size", [(2, 4, 16, 16), (2, 4, 17, 23), (1, 4, 9, 30), (1, 4, 3, 5)])
def test_exact_tiles_equal_the_whole(kind: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vae = tiny_vae().eval() if kind == "kl" else tiny_vq()
    latents = noise(*size)
    with torch.no_grad():
        wanted = vae.decode(latents).sample
    for tile in (1, 7, 8, 64) if size[-1] < 10 else (4, 7, 8, 64):
        found = decode_tiled(vae, latents, tile, 0)
        assert found.shape == wanted.shape
        assert (found - wanted).norm() / wanted.norm() < 1e-4


def test_exact_tiles_of_the_shipped_decoder(mini_vae: Any) -> None:
    latents = noise(2, 8, 21, 37)
    wanted = mini_vae.decode(latents).sample
    found = decode_exact(mini_vae, latents, 8)
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    assert seam_db(found, wanted, 32, 0) > 100
    half = mini_vae.bfloat16()
    try:
        rough = decode_exact(half, latents.bfloat16(), 8).float()
        untiled = half.decode(latents.bfloat16()).sample.float()
    finally:
        mini_vae.float()
    error = (untiled - wanted).norm()
    assert rough.isfinite().all() and (rough - wanted).norm() < 1.5 * error


def test_statistics_hold_for_activations_far_from_zero() -> None:
    """Sums of squares would lose the variance in float32; combined moments do not."""
    vae = tiny_vae().eval()
    with torch.no_grad():
        for resnet in vae.decoder.mid_block.resnets:
            resnet.conv2.bias += 3000.0
        latents = noise(1, 4, 16, 16)
        wanted = vae.double().decode(latents.double()).sample
        untiled = vae.float().decode(latents).sample
        found = decode_exact(vae, latents, 5)
    assert (found - wanted).norm() < 3 * (untiled - wanted).norm() + 1e-4 * wanted.norm()


def test_tiling_of_single_tiles_makes_seams_and_exact_tiles_do_not(mini_vae: Any) -> None:
    latents = torch.cat([noise(1, 8, 32, 32) * 0.2, noise(1, 8, 32, 32) * 3], dim=-1)
    wanted = mini_vae.decode(latents).sample
    blended = decode_tiled(mini_vae, latents, 16, 4, exact=False)
    abutting = decode_tiled(mini_vae, latents, 16, 0, exact=False)
    exact = decode_tiled(mini_vae, latents, 16, 4)
    seams = [seam_db(image, wanted, 64, 16) for image in (blended, exact)]
    assert seams[0] < 45 < 100 < seams[1]
    assert seam_db(abutting, wanted, 64, 0) < seams[0]
    assert seam_db(wanted, wanted, 64, 16) == math.inf


def test_a_routed_vae_is_decoded_past_its_replacement(mini_vae: Any) -> None:
    latents = noise(1, 8, 20, 20)
    wanted = mini_vae.decode(latents).sample
    mini_vae.decode = lambda *_, **__: pytest.fail("the replaced decode was called")
    try:
        for exact in (True, False):
            found = decode_tiled(mini_vae, latents, 10, 2, exact=exact)
            assert found.shape == wanted.shape
    finally:
        del mini_vae.decode


@pytest.mark.parametrize("sliced", [False, True])
def test_slices_and_tiles_are_those_the_vae_was_told(sliced: bool) -> None:
    vae = tiny_vae().eval().requires_grad_(False)
    latents = noise(2, 4, 20, 12)
    wanted = vae.decode(latents).sample
    vae.enable_slicing() if sliced else vae.disable_slicing()
    assert torch.allclose(decode(vae, latents), wanted, atol=1e-5)
    shapes: list[tuple[int, ...]] = []

    def run(rows: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        image: Tensor = vae.decoder(vae.post_quant_conv(rows))
        return image

    assert torch.allclose(decode(vae, latents, run), wanted, atol=1e-5)
    vae.enable_tiling()
    vae.tile_latent_min_size = 20
    decode(vae, latents, run)
    batch = 1 if sliced else 2
    assert set(shapes) == {(batch, 4, 20, 12)}  # nothing is larger than a tile
    vae.tile_latent_min_size = 8
    assert torch.allclose(decode(vae, latents), wanted, atol=1e-5)
    shapes.clear()
    assert decode(vae, latents, run).shape == wanted.shape
    assert set(shapes) == {(batch, 4, 8, 8)} and len(shapes) == (12 if sliced else 6)
    with pytest.raises(HcfError, match="image 0 of my_decoder is not finite"):
        decode(vae, latents, lambda z: run(z) * math.nan, "my_decoder")


def test_blending_weights_sum_to_one() -> None:
    """A decoder that is exact on every tile is exact on the whole, whatever the size."""

    def upscale(latents: Tensor) -> Tensor:
        assert latents.shape[-2:] == (8, 8)
        shapes.append(latents.shape)
        return latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)

    for size, calls in (((8, 8), 1), ((16, 16), 9), ((9, 30), 10), ((5, 20), 3), ((3, 3), 1)):
        for factor in (None, 2):
            shapes: list[Any] = []
            latents = noise(2, 4, *size)
            found = blend_tiles(upscale, latents, 8, 2, factor)
            wanted = latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)
            assert torch.allclose(found, wanted, atol=1e-6) and len(shapes) == calls
    ones = blend_tiles(lambda z: z.new_ones(1, 3, 16, 16), noise(1, 4, 19, 23), 8, 3)
    assert torch.allclose(ones, torch.ones(()), atol=1e-6)


def test_tiles_that_cannot_be_are_refused(mini_vae: Any) -> None:
    latents = noise(1, 4, 16, 16)
    for tile, overlap in ((0, 0), (8, 5), (8, -1)):
        with pytest.raises(RecipeError, match="overlap"):
            blend_tiles(lambda z: z, latents, tile, overlap)
    with pytest.raises(HcfError, match="not to factor 3"):
        blend_tiles(lambda z: z, latents, 8, 2, 3)
    with pytest.raises(HcfError, match="engine's graph hides"):
        decode_tiled(lambda z: z, latents, 8, 2)
    spatial = tiny_vq(norm_type="spatial", block_out_channels=(32, 32))
    with pytest.raises(HcfError, match="VQModel .*; they know"):
        decode_tiled(spatial, latents, 8, 2)
    with pytest.raises(HcfError, match="AutoencoderTiny"):
        decode_tiled(AutoencoderTiny(), latents, 8, 2)
    with pytest.raises(HcfError, match="differ"):
        seam_db(noise(1, 3, 8, 8), noise(1, 3, 8, 9), 4, 0)
    with pytest.raises(RecipeError, match="no seam"):
        seam_db(noise(1, 3, 8, 8), noise(1, 3, 8, 8), 8, 0)


class Peak(TorchDispatchMode):
    """Most bytes of CPU tensors that were alive at once. What waits on the host is on "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        back = func is torch.ops.aten._to_copy.default and args[0].is_meta
        if back and kwargs.get("device") == torch.device("cpu"):
            out = torch.zeros(args[0].shape, dtype=args[0].dtype)
        else:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def test_tiles_take_less_memory(mini_vae: Any) -> None:
    latents = noise(1, 8, 64, 64)
    peaks = []
    for tile in (None, 32, 16):
        with torch.no_grad(), Peak() as peak:
            if tile is None:
                mini_vae.decode(latents)
            else:
                decode_exact(mini_vae, latents, tile, host="meta")
        peaks.append(peak.most)
    assert peaks[1] < 0.5 * peaks[0] and peaks[2] < 0.3 * peaks[0]


@pytest.mark.gpu
def test_tiles_take_less_memory_on_a_gpu(mini_vae: Any) -> None:
    latents = noise(1, 8, 256, 256).cuda()
    vae = mini_vae.cuda()
    try:
        peaks, images = [], []
        for decode in (lambda: vae.decode(latents).sample, lambda: decode_exact(vae, latents, 64)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            images.append(decode())
            peaks.append(torch.cuda.max_memory_allocated() - before)
    finally:
        mini_vae.cpu()
    assert peaks[1] < 0.5 * peaks[0]
    assert (images[0] - images[1]).norm() / images[0].norm() < 1e-3  # TF32 may be on


# --- a smaller decoder
