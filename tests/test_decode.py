"""VAE decode: what is refused, tiles that equal the whole, and decoders that are compared."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcf.decode import (
    Lpips,
    TinyDecoder,
    blend_tiles,
    check_image,
    check_latent_space,
    compare_decoders,
    decode,
    decode_exact,
    decode_tiled,
    decoder_dtype,
    latent_factor,
    open_decoder,
    prefer_channels_last,
    seam_db,
    tile_starts,
)
from hcf.decode.lpips import SCALE, SHIFT, _unit
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError

MINI = Path(__file__).parents[1] / "models/weights/taiji-sd-mini"


def tiny_vq(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 8,
        "num_vq_embeddings": 32,
    }
    return VQModel(**config | changes).eval()


@pytest.fixture(scope="module")
def mini_vae() -> Any:
    vae = AutoencoderKL.from_pretrained(MINI / "vae").eval()
    return vae.requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    assert tile_starts(30, 8, 2) == [0, 6, 12, 18, 22]
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


def rescaled(vae: Any, factor: float) -> Any:
    """The same decoder, for latents of another scaling factor."""
    twin = AutoencoderKL.from_config(vae.config).eval().requires_grad_(False)
    twin.load_state_dict(vae.state_dict())
    twin.decoder.conv_in.weight.mul_(1 / vae.config.scaling_factor * factor)
    twin.register_to_config(scaling_factor=factor)
    return twin


def test_a_tiny_decoder_gets_latents_of_its_own_scale(mini_vae: Any) -> None:
    latents = noise(1, 8, 16, 16)
    tiny = TinyDecoder(mini_vae, rescaled(mini_vae, 1.0))
    wanted = mini_vae.decode(latents).sample
    assert torch.allclose(tiny(latents), wanted, atol=1e-3)
    assert check_latent_space(mini_vae, tiny) > 0.999
    shifted = rescaled(mini_vae, 2.0)
    shifted.register_to_config(shift_factor=0.5)
    moved = TinyDecoder.__new__(TinyDecoder)
    nn.Module.__init__(moved)
    moved.tiny, moved.given, moved.wanted = shifted, (0.5, 0.25), (2.0, 0.5)
    scaled = (latents - 0.25) * 0.5 / 2.0 + 0.5
    assert torch.allclose(moved(latents), shifted.decode(scaled).sample, atol=1e-5)


def test_decoders_of_other_latents_are_refused(mini_vae: Any) -> None:
    torch.manual_seed(1)
    config = {
        "block_out_channels": (16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
    }
    unrelated = AutoencoderKL(latent_channels=8, **config).eval()
    with pytest.raises(HcfError, match="trained on other latents"):
        TinyDecoder(mini_vae, unrelated)
    with pytest.raises(HcfError, match="4 latent channels, the VAE has 8"):
        TinyDecoder(mini_vae, AutoencoderKL(latent_channels=4, **config))
    tiny = AutoencoderTiny(latent_channels=8)
    assert latent_factor(tiny) == 8 and latent_factor(mini_vae) == 4
    with pytest.raises(HcfError, match="8 pixels a latent, the VAE has 4"):
        TinyDecoder(mini_vae, tiny)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
              "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}  # fmt: skip
    with pytest.raises(HcfError, match="AutoencoderTiny was trained on other latents"):
        TinyDecoder(mini_vae, AutoencoderTiny(latent_channels=8, **blocks).eval())
    with pytest.raises(HcfError, match="VQModel"):
        TinyDecoder(tiny_vq(), mini_vae)
    normalised = AutoencoderKL(latent_channels=8, latents_mean=(0.1,) * 8, **config)
    with pytest.raises(HcfError, match="per channel"):
        TinyDecoder(normalised, mini_vae)


def test_decoder_folders(tmp_path: Path, mini_vae: Any) -> None:
    assert open_decoder(mini_vae) is mini_vae
    mini_vae.save_pretrained(tmp_path / "small")
    opened = open_decoder(tmp_path / "small")
    assert isinstance(opened, AutoencoderKL) and not opened.training
    assert torch.equal(opened.decoder.conv_in.weight, mini_vae.decoder.conv_in.weight)
    with pytest.raises(InvalidArtifact, match="holds no decoder"):
        open_decoder(tmp_path)
    tiny_vq().save_pretrained(tmp_path / "vq")
    with pytest.raises(InvalidArtifact, match="'VQModel'"):
        open_decoder(tmp_path / "vq")
    (tmp_path / "small" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InvalidArtifact, match="cannot be opened"):
        open_decoder(tmp_path / "small")


class Pipe:
    def __init__(self, vae: Any) -> None:
        self.vae = vae


def trained_small_decoder(vae: Any, steps: int = 60) -> Any:
    """A decoder of a quarter of the width, taught the VAE's own decodes of noise."""
    torch.manual_seed(0)
    config = dict(vae.config) | {"block_out_channels": (16, 16, 16), "norm_num_groups": 4}
    small = AutoencoderKL.from_config(config).train()
    optimizer = torch.optim.AdamW(small.decoder.parameters(), lr=3e-3)
    for step in range(steps):
        latents = noise(4, 8, 16, 16, seed=step) / vae.config.scaling_factor
        with torch.no_grad():
            wanted = vae.decode(latents).sample
        loss = (small.decode(latents).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return small.eval().requires_grad_(False)


def test_decoders_are_compared(mini_vae: Any, tmp_path: Path) -> None:
    pipe = Pipe(mini_vae)
    latents = noise(2, 8, 16, 16)
    equal = compare_decoders(pipe, TinyDecoder(mini_vae, mini_vae), latents, rounds=3)
    assert (equal.psnr_db, equal.ssim) == (100.0, pytest.approx(1.0)) and equal.lpips is None
    assert equal.flop_ratio == 1 and equal.images == 2
    small = TinyDecoder(mini_vae, trained_small_decoder(mini_vae))
    torch.manual_seed(0)
    path = tmp_path / "lpips.safetensors"
    save_file({k: v.abs() for k, v in Lpips().state_dict().items()}, path)
    found = compare_decoders(pipe, small, latents, lpips=True, lpips_weights=path, rounds=3)
    assert 10 < found.psnr_db < 50 and 0 < found.ssim < 1 and found.flop_ratio > 2
    assert found.lpips is not None and found.lpips > 0
    assert 0 < found.time_ratio_low <= found.time_ratio <= found.time_ratio_high
    with pytest.raises(MissingDependency, match="LPIPS needs"):
        compare_decoders(pipe, small, latents, lpips=True)
    with pytest.raises(RecipeError, match="the VAE has 8 channels"):
        compare_decoders(pipe, small, noise(1, 4, 16, 16))


def test_lpips_is_a_distance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {k: v.abs() if k.startswith("lin") else v for k, v in Lpips().state_dict().items()}
    assert {"features.10.bias", "lin4.weight"} < set(state)
    path = tmp_path / "lpips.safetensors"
    save_file(state, path)
    network = Lpips.open(path)
    a, b = noise(2, 3, 64, 64).tanh(), noise(2, 3, 64, 64, seed=1).tanh()
    assert torch.equal(network(a, a), torch.zeros(2))
    assert torch.allclose(network(a, b), network(b, a)) and (network(a, b) > 0).all()
    assert (network(a, a + 0.01 * b) < network(a, b)).all()
    del state["lin2.weight"]
    save_file(state, path)
    with pytest.raises(InvalidArtifact, match="lin2"):
        Lpips.open(path)
    with pytest.raises(MissingDependency, match=r"features\.\*"):
        Lpips.open(tmp_path / "absent.safetensors")


def test_lpips_has_the_constants_of_torchmetrics() -> None:
    from torchmetrics.functional.image import lpips

    x = noise(2, 64, 7, 7)
    assert torch.allclose(_unit(x), lpips._normalize_tensor(x), atol=1e-5)
    scaling = lpips.ScalingLayer()
    assert scaling.shift.flatten().tolist() == pytest.approx(SHIFT)
    assert scaling.scale.flatten().tolist() == pytest.approx(SCALE)
