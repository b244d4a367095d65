from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import pad

from taiji import presets
from taiji.text import TextFusion
from taiji.text.fusion import left_out, unet_condition
from taiji.unet import load_sd1_unet, zero_pooled_text

SHIPPED = Path(__file__).parents[1] / "models/weights/taiji-sd-mini/fusion"
SIZES = {
    "clip_width": 8, "clip_projection": 6, "clip_tokens": 3,
    "sandwich_width": 10, "sandwich_tokens": 4, "context_width": 12,
}  # fmt: skip
SHARED = {**SIZES, "clip_tokens": 4, "form": "channels"}


def inputs(clip_tokens: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    clip_mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])[:, :clip_tokens]
    return [
        torch.randn(2, clip_tokens, 8, generator=g), torch.randn(2, 6, generator=g), clip_mask,
        torch.randn(2, 4, 10, generator=g), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]),
    ]  # fmt: skip


def test_masked_positions_hold_the_learned_padding() -> None:
    fusion = TextFusion(**SIZES)
    context, pooled = fusion(*inputs())
    assert context.shape == (2, 7, 12) and pooled.shape == (2, 16)
    assert torch.equal(context[0, 2], fusion.padding[2])
    assert torch.equal(context[1], fusion.padding)
    assert torch.isfinite(pooled).all()


def test_an_absent_encoder_gives_zero_in_its_half() -> None:
    _, pooled = TextFusion(**SIZES)(*inputs())
    assert pooled[0].abs().min() > 0
    assert torch.equal(pooled[1], torch.zeros(16))


def test_channels_stand_side_by_side_at_one_position() -> None:
    fusion = TextFusion(**SHARED)
    given = inputs(4)
    context, pooled = fusion(*given)
    assert context.shape == (2, 4, 24) and pooled.shape == (2, 16)
    assert torch.equal(context[0, :2, :12], fusion.clip_proj(given[0])[0, :2])
    assert torch.equal(context[0, :3, 12:], fusion.sandwich_proj(given[3])[0, :3])
    assert torch.equal(context[0, 2:, :12], fusion.padding[2:, :12])
    assert torch.equal(context[1], fusion.padding)


def test_channels_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 tokens: give both one tokenizer and one length"):
        TextFusion(**SIZES, form="channels")
    with pytest.raises(ValueError, match="form='tracks' is not known: one of"):
        TextFusion(**SIZES, form="tracks")
    with pytest.raises(ValueError, match="encoders='clip' is not known: one of"):
        TextFusion(**SIZES, encoders="clip")


@pytest.mark.parametrize("form", ["tokens", "channels"])
@pytest.mark.parametrize("use_pooled", [True, False])
@pytest.mark.parametrize("encoders", ["both", "image_clip", "sandwich"])
def test_ablations_leave_out_what_they_name(form: str, use_pooled: bool, encoders: str) -> None:
    sizes: dict[str, Any] = SHARED if form == "channels" else SIZES
    fusion = TextFusion(**sizes, encoders=encoders, use_pooled=use_pooled)
    given = inputs(sizes["clip_tokens"])
    given[2], given[4] = torch.ones_like(given[2]), torch.ones_like(given[4])
    context, pooled = fusion(*given)
    tokens = {"both": 7, "image_clip": 3, "sandwich": 4}[encoders]
    assert context.shape == ((2, 4, 24) if form == "channels" else (2, tokens, 12))
    assert pooled.shape == (2, 16)
    has = {"clip": encoders != "sandwich", "sandwich": encoders != "image_clip"}
    assert pooled[:, :6].any() == (has["clip"] and use_pooled)
    assert pooled[:, 6:].any() == (has["sandwich"] and use_pooled)
    for name, index in (("clip", (0, 1)), ("sandwich", (3,))):
        other = list(given)
        for i in index:
            other[i] = other[i] + 1
        changed, changed_pooled = fusion(*other)
        assert (not torch.equal(changed, context)) == has[name]
        assert (not torch.equal(changed_pooled, pooled)) == (has[name] and use_pooled)
    (context.sum() + pooled.sum()).backward()
    without_grad = [name for name, p in fusion.named_parameters() if p.grad is None]
    assert not without_grad


def test_the_shipped_fusion_loads_and_is_the_default_form() -> None:
    fusion = TextFusion.from_pretrained(SHIPPED)
    assert (fusion.config.form, fusion.config.encoders, fusion.config.use_pooled) == (
        "tokens", "both", True
    )  # fmt: skip
    assert {k: fusion.config[k] for k in presets.MINI_FUSION} == presets.MINI_FUSION
    assert set(fusion.state_dict()) == set(TextFusion(**presets.MINI_FUSION).state_dict())


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    fusion = TextFusion(**SHARED, encoders="sandwich")
    fusion.save_pretrained(tmp_path)
    again = TextFusion.from_pretrained(tmp_path)
    for found, wanted in zip(again(*inputs(4)), fusion(*inputs(4)), strict=True):
        assert torch.equal(found, wanted)


def tiny_text(fusion: TextFusion, rows: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    s1, s2 = fusion.config.clip_tokens, fusion.config.sandwich_tokens
    return [
        torch.randn(rows, s1, 32, generator=g), torch.randn(rows, 32, generator=g),
        torch.ones(rows, s1), torch.randn(rows, s2, 32, generator=g), torch.ones(rows, s2),
    ]  # fmt: skip


@pytest.mark.parametrize("design", ["A", "A3", "A4", "B", "C"])
def test_every_design_runs_and_trains_its_fusion(design: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**getattr(presets, f"TINY_SD_{design}_UNET"))
    every: dict[str, dict[str, Any]] = {
        "A4": {"use_pooled": False},
        "B": {"form": "channels", "clip_tokens": 24},
    }
    fusion = TextFusion(**{**presets.TINY_FUSION, **every.get(design, {})})
    context, pooled = fusion(*tiny_text(fusion))
    condition = unet_condition(unet.config, pooled, torch.zeros(2, 6))
    wanted = {"A3": {"class_labels"}, "A4": set()}.get(design, {"added_cond_kwargs"})
    assert set(condition) == wanted
    eps = unet(torch.randn(2, 4, 8, 8), 500, context, **condition).sample
    assert eps.shape == (2, 4, 8, 8)
    eps.square().mean().backward()
    assert all(p.grad is not None for p in fusion.parameters())
    # an encoder may be missing
    text = tiny_text(fusion)
    text[2] = torch.zeros_like(text[2])
    context, pooled = fusion(*text)
    condition = unet_condition(unet.config, pooled, torch.zeros(2, 6))
    alone = unet(torch.randn(2, 4, 8, 8), 500, context, **condition).sample
    assert torch.isfinite(alone).all()


@pytest.fixture
def sd1() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**presets.TINY_SD1_UNET).eval()


def predictions(sd1: Any, sd_c: Any) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 40, 32, generator=g)
    pooled, time_ids = torch.randn(2, 64, generator=g), torch.full((2, 6), 64.0)
    timestep = torch.tensor([10, 900])
    condition = unet_condition(sd_c.config, pooled, time_ids)
    with torch.no_grad():
        return (
            sd1(x, timestep, context).sample,
            sd_c(x, timestep, context, **condition).sample,
        )


def test_sd_c_predicts_what_stable_diffusion_does_at_step_0(sd1: Any) -> None:
    sd_c = load_sd1_unet(sd1, pooled_width=64, addition_time_embed_dim=8).eval()
    assert {k: sd_c.config[k] for k in presets.TINY_SD_C_UNET} == presets.TINY_SD_C_UNET
    before, after = predictions(sd1, sd_c)
    assert (before - after).abs().max() == 0
    optimizer = torch.optim.SGD(sd_c.add_embedding.parameters(), lr=0.1)
    time_ids = torch.full((2, 6), 64.0)
    condition = unet_condition(sd_c.config, torch.ones(2, 64), time_ids)
    out = sd_c(torch.ones(2, 4, 16, 16), 10, torch.ones(2, 40, 32), **condition).sample
    out.square().mean().backward()
    optimizer.step()  # a layer of zeros still learns
    before, after = predictions(sd1, sd_c)
    assert (before - after).abs().max() > 0


def test_sd_c_is_read_from_a_folder(sd1: Any, tmp_path: Path) -> None:
    sd1.save_pretrained(tmp_path / "unet")
    sd_c = load_sd1_unet(tmp_path / "unet", pooled_width=64, addition_time_embed_dim=8).eval()
    before, after = predictions(sd1, sd_c)
    assert (before - after).abs().max() == 0
    half = load_sd1_unet(
        tmp_path / "unet", pooled_width=64, addition_time_embed_dim=8, torch_dtype=torch.float16
    )
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_a_unet_with_a_pooled_condition_is_not_stable_diffusion_1(sd1: Any) -> None:
    sd_c = load_sd1_unet(sd1, pooled_width=64, addition_time_embed_dim=8)
    with pytest.raises(ValueError, match="the U-Net has .'addition_embed_type'. already"):
        load_sd1_unet(sd_c)
    with pytest.raises(ValueError, match="has no embedding of pooled text"):
        zero_pooled_text(sd1)
    a3 = UNet2DConditionModel(**presets.TINY_SD_A3_UNET)
    zero_pooled_text(a3)
    assert not a3.class_embedding.linear_2.weight.any()


def test_a_lengthened_fusion_repeats_its_padding() -> None:
    fusion = TextFusion(**SIZES)
    long = fusion.lengthened(10)
    assert long.config.sandwich_tokens == 10
    clip, pooled, clip_mask, sandwich, mask = inputs()
    context, both = long(clip, pooled, clip_mask, pad(sandwich, (0, 0, 0, 6)), pad(mask, (0, 6)))
    expected, same = fusion(clip, pooled, clip_mask, sandwich, mask)
    assert context.shape == (2, 13, 12) and torch.equal(both, same)
    assert torch.equal(context[:, :7], expected)
    assert torch.equal(context[1, 7:], fusion.padding[[3, 4, 5, 6, 3, 4]])
    without = TextFusion(**SIZES, encoders="image_clip")
    assert torch.equal(without.lengthened(10).padding, without.padding)
    with pytest.raises(ValueError, match="sandwich_tokens=3 is below the fusion's 4"):
        fusion.lengthened(3)
    with pytest.raises(ValueError, match="use form='tokens'"):
        TextFusion(**SHARED).lengthened(10)


def test_what_is_left_out_is_absent_until_it_is_back() -> None:
    fusion, given = TextFusion(**SIZES), inputs()
    context, pooled = fusion(*given)
    with left_out(fusion, encoders="image_clip"):
        alone, half = fusion(*given)
    assert torch.equal(alone[0, :3], context[0, :3]) and torch.equal(
        alone[0, 3:], fusion.padding[3:]
    )
    assert torch.equal(half[0, :6], pooled[0, :6]) and not half[0, 6:].any()
    with left_out(fusion, encoders="sandwich"):
        alone, half = fusion(*given)
    assert torch.equal(alone[0, 3:], context[0, 3:]) and torch.equal(
        alone[0, :3], fusion.padding[:3]
    )
    assert torch.equal(half[0, 6:], pooled[0, 6:]) and not half[0, :6].any()
    with left_out(fusion, use_pooled=False):
        same, none = fusion(*given)
    assert torch.equal(same, context) and not none.any()
    assert torch.equal(fusion(*given)[1], pooled)


def test_sandwich_overrules_the_pooled_image_clip() -> None:
    """New, it changes nothing; trained, it can put another vector in that half's place."""
    fusion, given = TextFusion(**SIZES), inputs()
    _, plain = fusion(*given)
    modulated = fusion.lengthened(4, modulate_pooled=True)
    assert torch.equal(modulated(*given)[1], plain)
    _, pooled = modulated(*given)
    pooled[0, :6].sum().backward()
    assert modulated.modulate.bias.grad.abs().min() > 0
    shift = torch.arange(6.0)
    with torch.no_grad():
        modulated.modulate.bias.copy_(torch.cat([torch.tensor([-1.0]), shift]))
        _, pooled = modulated(*given)
        assert torch.allclose(pooled[0, :6], shift) and torch.equal(pooled[0, 6:], plain[0, 6:])
        assert not pooled[1].any()  # without Sandwich no modulation
        assert torch.equal(modulated.lengthened(9).modulate.bias, modulated.modulate.bias)
        with left_out(modulated, encoders="image_clip"):
            assert torch.equal(modulated(*given)[1][0, :6], plain[0, :6])
    assert TextFusion(**SIZES, encoders="image_clip", modulate_pooled=True).modulate is None
