"""Every preset of the family has the parameters and the work its specification says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from taiji import presets
from taiji.text import SandwichTextEncoder, TextFusion
from taiji.unet import EfficientUNet, ImagenUNet, check_unet

ROOT = Path(__file__).parents[1]
SD, PIXEL = UNet2DConditionModel, EfficientUNet


@dataclass(frozen=True)
class Known:
    """`params` exact, or rounded as specified (299_200_000 is "299.2M"). `gmacs` of one sample by
    (sample size, text tokens); of first stages, of a decode by (latent size, 0)."""

    network: Any
    params: int
    gmacs: dict[tuple[int, int], float] = field(default_factory=dict)


KNOWN: dict[str, Known] = {
    "A_300M_UNET": Known(SD, 312_817_667, {(64, 128): 112.8, (64, 180): 114.0}),
    "A_1_3B_UNET": Known(SD, 1_292_364_803, {(64, 128): 442.3, (64, 180): 448.8}),
    "A_TINY_UNET": Known(SD, 853_443),
    "B_300M_UNET": Known(ImagenUNet, 299_200_000, {(64, 128): 96.3}),
    "B_1_3B_UNET": Known(ImagenUNet, 1_309_400_000, {(64, 128): 393.8}),
    "B_1_3B_COND1024_UNET": Known(ImagenUNet, 1_278_900_000),
    "SR256_IF_UNET": Known(SD, 437_504_387, {(256, 128): 1040.5}),
    "SR256_EFFICIENT_UNET": Known(PIXEL, 646_000_000, {(256, 128): 248.3}),
    "SR1024_EFFICIENT_UNET": Known(PIXEL, 639_200_000, {(1024, 128): 3920.9}),
    "SD1_UNET": Known(SD, 859_500_000, {(64, 77): 401.6}),
    "SD_A_UNET": Known(SD, 872_139_204, {(64, 180): 407.1}),
    "SD_A3_UNET": Known(SD, 870_173_124, {(64, 180): 407.0}),
    "SD_A4_UNET": Known(SD, 871_400_000, {(64, 205): 409.0}),
    "SD_B_UNET": Known(SD, 897_698_244, {(64, 128): 407.9}),
    "SD_C_UNET": Known(SD, 865_749_444, {(64, 180): 407.0}),
    "SR_S_UNET": Known(SD, 192_985_763, {(64, 128): 58.3, (128, 128): 225.7, (256, 128): 900.6}),
    "SR_S_X2_UNET": Known(SD, 192_998_723, {(64, 128): 58.4, (256, 128): 901.5}),
    "SR_L_UNET": Known(SD, 473_682_179, {(64, 128): 145.6, (128, 128): 570.2, (256, 128): 2277.4}),
    "LDM_SR_UNET": Known(UNet2DModel, 113_600_000, {(64, 0): 40.2}),
    "VQ_F4": Known(VQModel, 55_322_782, {(256, 0): 9488.0}),
    "VQ_F4_PLAIN": Known(VQModel, 53_219_486, {(256, 0): 5021.0}),
    "KL_F8": Known(AutoencoderKL, 83_653_863),
}
# No figure is specified for these: docs/models.md has what was counted.
COUNTED = {"VQ_F8": VQModel, "VQ_F16": VQModel, "VQ_F16_1024": VQModel, "KL_F4": AutoencoderKL}
TINY = {
    name: network
    for names, network in (
        ("A_TINY_UNET TINY_SR_IF_UNET TINY_SD1_UNET TINY_SD_A_UNET TINY_SD_A3_UNET "
         "TINY_SD_A4_UNET TINY_SD_B_UNET TINY_SD_C_UNET TINY_SR_UNET TINY_SR_X2_UNET", SD),
        ("TINY_B_UNET", ImagenUNet),
        ("TINY_EFFICIENT_UNET", EfficientUNet),
    )
    for name in names.split()
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@cache
def on_meta(name: str) -> Any:
    network = KNOWN[name].network if name in KNOWN else COUNTED[name]
    with torch.device("meta"):
        return network(**getattr(presets, name))


def inputs(config: dict[str, Any], size: int, tokens: int) -> dict[str, Any]:
    """What the U-Net of a preset is called with, batch 1, on the current default device."""
    given: dict[str, Any] = {
        "sample": torch.randn(1, config["in_channels"], size, size),
        "timestep": torch.full((1,), 500.0),
    }
    if not tokens:
        return given
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    given["encoder_hidden_states"] = torch.randn(1, tokens, width)
    pooled = config.get("projection_class_embeddings_input_dim", 0)
    if config.get("class_embed_type") == "timestep":
        given["class_labels"] = torch.full((1,), 20.0)
    elif config.get("class_embed_type") == "projection":
        given["class_labels"] = torch.randn(1, pooled)
    if config.get("addition_embed_type") == "text_time":
        text = torch.randn(1, pooled - 6 * config["addition_time_embed_dim"])
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(1, 6)}
    return given


@cache
def gmacs(name: str, size: int, tokens: int) -> float:
    network, config = on_meta(name), getattr(presets, name)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        if isinstance(network, VQModel | AutoencoderKL):
            latent = torch.empty(1, config["latent_channels"], size, size)
            quantised = {"force_not_quantize": True} if isinstance(network, VQModel) else {}
            network.decode(latent, **quantised)
        else:
            network(**inputs(config, size, tokens))
    return counter.get_total_flops() / 2e9


def unit(published: int) -> int:
    """The unit of the last digit that is not zero: 100_000 of 299_200_000, "299.2M"."""
    step = 1
    while published % (10 * step) == 0:
        step *= 10
    return step


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_work_are_as_specified(name: str) -> None:
    known = KNOWN[name]
    assert abs(parameters(on_meta(name)) - known.params) <= unit(known.params) / 2
    for (size, tokens), wanted in known.gmacs.items():
        assert gmacs(name, size, tokens) == pytest.approx(wanted, rel=0.01), (size, tokens)


def test_the_table_of_the_documentation_is_what_is_counted() -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \| ([^|]*) \|$", text, re.M)
    assert {name for name, _, _ in rows} == {*KNOWN, *COUNTED}
    for name, params, work in rows:
        assert parameters(on_meta(name)) == int(params.replace(",", "")), name
        counted = re.findall(r"([\d,.]+) \((\d+)(?:, (\d+))?\)", work)
        assert counted or not work.strip(), (name, work)
        for number, size, tokens in counted:
            wanted = float(number.replace(",", ""))
            assert gmacs(name, int(size), int(tokens or 0)) == pytest.approx(wanted, abs=0.051)


def test_the_efficient_unet_is_four_times_cheaper_than_its_peer() -> None:
    ratio = gmacs("SR256_IF_UNET", 256, 128) / gmacs("SR256_EFFICIENT_UNET", 256, 128)
    assert ratio == pytest.approx(4.2, abs=0.05)


def test_text_encoders_have_their_published_sizes() -> None:
    pooler = 1024 * 1024 + 1024  # BERT's, which the published 325.5M count
    with torch.device("meta"):
        bert = SandwichTextEncoder(**presets.SANDWICH_LARGE_BERT)
        sandwich = SandwichTextEncoder(**presets.SANDWICH_LARGE)
    assert abs(parameters(bert) + pooler - 325_500_000) < 50_000
    norms = 2 * 1024 * (48 + 1)  # of CogView's extra norms
    assert parameters(sandwich) == parameters(bert) + norms == 324_573_184
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        ids = torch.ones(1, 128, dtype=torch.int64)
        sandwich(ids, ids)
    assert counter.get_total_flops() / 2e9 == pytest.approx(39.5, rel=0.01)
    with torch.device("meta"):
        towers = {
            name: ChineseCLIPModel(ChineseCLIPConfig(**getattr(presets, name)))
            for name in ("IMAGE_CLIP_L14", "IMAGE_CLIP_H14")
        }
    assert [parameters(clip) for clip in towers.values()] == [406_233_089, 957_598_209]
    image = {"IMAGE_CLIP_L14": 304_000_000, "IMAGE_CLIP_H14": 632_100_000}
    text = {"IMAGE_CLIP_L14": 102_300_000, "IMAGE_CLIP_H14": 325_500_000}
    for name, clip in towers.items():
        projected = parameters(clip.vision_model) + parameters(clip.visual_projection)
        assert abs(projected - image[name]) < 50_000
        width = clip.config.text_config.hidden_size
        assert abs(parameters(clip.text_model) + width * (width + 1) - text[name]) < 50_000
        assert clip.text_projection.out_features == clip.config.projection_dim


@pytest.mark.parametrize("name", TINY)
def test_tiny_unets_run(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(presets, name)
    unet = TINY[name](**config)
    assert parameters(unet) < 3_000_000
    out = unet(**inputs(config, 16, 8)).sample
    assert out.shape == (1, config["out_channels"], 16, 16) and torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["TINY_VQ_F4", "TINY_KL_F4"])
def test_tiny_first_stages_run(name: str) -> None:
    torch.manual_seed(0)
    network = (VQModel if "VQ" in name else AutoencoderKL)(**getattr(presets, name))
    assert network(torch.zeros(1, 3, 32, 32)).sample.shape == (1, 3, 32, 32)


def test_tiny_text_encoders_fit_their_fusion() -> None:
    fusion = TextFusion(**presets.TINY_FUSION)
    clip = ChineseCLIPModel(ChineseCLIPConfig(**presets.TINY_IMAGE_CLIP))
    sandwich = SandwichTextEncoder(vocab_size=50, **presets.TINY_SANDWICH)
    s1, s2 = fusion.config.clip_tokens, fusion.config.sandwich_tokens
    ids = torch.ones(2, s2, dtype=torch.int64)
    hidden = clip.text_model(input_ids=ids[:, :s1], attention_mask=ids[:, :s1])[0]
    context, pooled = fusion(
        hidden, clip.text_projection(hidden[:, 0]), ids[:, :s1], sandwich(ids, ids), ids
    )
    assert context.shape == (2, s1 + s2, presets.TINY_SD_A_UNET["cross_attention_dim"])
    size = presets.TINY_SD_A_UNET["addition_time_embed_dim"]
    wanted = presets.TINY_SD_A_UNET["projection_class_embeddings_input_dim"]
    assert pooled.shape[1] + 6 * size == wanted


def test_fusions_fit_their_unets() -> None:
    for design in ("A", "A3", "A4", "B", "C"):
        unet = getattr(presets, f"SD_{design}_UNET")
        with torch.device("meta"):
            fusion = TextFusion(**getattr(presets, f"FUSION_SD_{design}"))
        assert fusion.padding.shape[1] == unet["cross_attention_dim"]


def test_every_unet_passes_the_check_of_its_widths() -> None:
    names = [name for name in presets.__all__ if name.endswith("_UNET")]
    assert len(names) > 25
    for name in names:
        check_unet(getattr(presets, name))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (400, r"width 400 of level 0 does not divide by the 32 groups .* use 384 or 416"),
        (416, r"width 1248 of level 2 is attended .* attention_head_dim=64: use 1216 or 1280"),
    ],
)
def test_widths_that_do_not_fit_are_refused_with_the_nearest(base: int, message: str) -> None:
    widths = tuple(base * factor for factor in (1, 2, 3, 4))
    for preset in (presets.A_1_3B_UNET, presets.B_1_3B_UNET):
        with pytest.raises(ValueError, match=message):
            check_unet({**preset, "block_out_channels": widths})
    with pytest.raises(ValueError, match=message):
        ImagenUNet(**{**presets.B_1_3B_UNET, "block_out_channels": widths})


def test_names_are_exported() -> None:
    assert len(set(presets.__all__)) == len(presets.__all__)
    assert all(isinstance(getattr(presets, name), dict | int | float) for name in presets.__all__)
