"""The Imagen U-Net and the Efficient U-Net, on tiny ones with every branch awake."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from taiji import presets
from taiji.unet import EfficientUNet, ImagenUNet, check_unet, check_widths
from taiji.unet.blocks import TextAttention

Network = ImagenUNet | EfficientUNet
NETWORKS = ["imagen", "efficient", "efficient-cross"]


def build(name: str, **changes: Any) -> Any:
    """Branches start at zero: here they are given weights, so that what they do can be seen."""
    torch.manual_seed(0)
    unet: Network
    if name == "imagen":
        unet = ImagenUNet(**{**presets.TINY_B_UNET, **changes})
    else:
        attends = {"self_attention": name == "efficient"}
        unet = EfficientUNet(**{**presets.TINY_EFFICIENT_UNET, **attends, **changes})
    return awake(unet).eval()


def awake(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def inputs(unet: Any, batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    given = {
        "sample": torch.randn(batch, unet.config.in_channels, 16, 16, generator=g),
        "timestep": torch.full((batch,), 300),
        "encoder_hidden_states": torch.randn(batch, 6, 32, generator=g),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]).repeat(batch, 1),
    }
    if unet.config.class_embed_type:
        given["class_labels"] = torch.full((batch,), 20.0)
    return given


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_called_as_a_unet_of_diffusers(name: str) -> None:
    unet = build(name)
    given = inputs(unet)
    out = unet(**given)
    assert out.sample.shape == (2, 3, 16, 16) and torch.isfinite(out.sample).all()
    for timestep in (300, torch.tensor(300), torch.tensor([300])):
        assert torch.equal(unet(**{**given, "timestep": timestep}).sample, out.sample)
    assert torch.equal(unet(**given, return_dict=False)[0], out.sample)
    other = unet(**{**given, "timestep": 301}).sample
    assert not torch.equal(other, out.sample)
    wide = {**given, "sample": torch.zeros(2, unet.config.in_channels, 8, 24)}
    assert unet(**wide).sample.shape == (2, 3, 8, 24)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_only_kept_tokens_have_influence(name: str) -> None:
    unet = build(name)
    given = inputs(unet)
    out = unet(**given).sample
    text = given["encoder_hidden_states"]
    masked, kept = text.clone(), text.clone()
    masked[:, 4:] += 5
    kept[:, 3] += 5
    assert torch.allclose(unet(**{**given, "encoder_hidden_states": masked}).sample, out, atol=1e-6)
    assert (unet(**{**given, "encoder_hidden_states": kept}).sample - out).abs().max() > 1e-3
    cut = {**given, "encoder_hidden_states": text[:, :4], "encoder_attention_mask": None}
    assert torch.allclose(unet(**cut).sample, out, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_row_without_text_is_finite_and_the_same_for_every_text(name: str) -> None:
    unet = build(name)
    given = inputs(unet)
    given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [0] * 6])
    out = unet(**given).sample
    other = unet(**{**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1}).sample
    assert torch.isfinite(out).all()
    assert torch.allclose(out[1], other[1], atol=1e-6)
    assert (out[0] - other[0]).abs().max() > 1e-3


@torch.no_grad()
def test_fused_attention_is_one_softmax_over_image_and_text() -> None:
    torch.manual_seed(0)
    attention: Any = awake(TextAttention(16, 12, head_dim=8, groups=4, self_attention=True))
    x, context = torch.randn(1, 16, 3, 5), torch.randn(1, 4, 12)
    mask = torch.tensor([[True, True, False, True]])
    image = attention.image(attention.image_norm(x).flatten(2).transpose(1, 2))
    keys, values = torch.cat([image, attention.text(attention.context_norm(context))], 1).chunk(
        2, -1
    )
    query = attention.query(attention.norm(x).flatten(2).transpose(1, 2))
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        scores = query[..., head] @ keys[..., head].transpose(1, 2) / math.sqrt(8)
        scores[..., 15 + 2] = -math.inf  # the masked token follows the 15 of the image
        heads.append(scores.softmax(-1) @ values[..., head])
    wanted = x + attention.out(torch.cat(heads, -1)).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(attention(x, context, mask), wanted, atol=1e-5)


@torch.no_grad()
def test_without_self_attention_pixels_do_not_see_each_other() -> None:
    attention: Any = awake(TextAttention(16, 12, head_dim=8, groups=4, self_attention=False))
    assert attention.image is None
    query = torch.zeros(1, 16, 2, 2)
    context = torch.randn(1, 4, 12)
    out = attention(query, context, None)
    assert torch.allclose(out, out[..., :1, :1].expand_as(out), atol=1e-6)


def resolutions(unet: Any) -> list[tuple[int, int]]:
    """(width, height) of what every residual block of a 16x16 sample puts out, in order."""
    seen: list[tuple[int, int]] = []
    hooks = [
        layer.resnet.register_forward_hook(lambda m, i, o: seen.append((o.shape[1], o.shape[2])))
        for block in (*unet.down_blocks, *unet.up_blocks)
        for layer in block
    ]
    with torch.no_grad():
        unet(**inputs(unet))
    for hook in hooks:
        hook.remove()
    return seen


def test_the_efficient_unet_halves_before_its_blocks_and_doubles_after_them() -> None:
    down = [(16, 8), (32, 4), (64, 4), (64, 4)]
    up = [(32, 4), (32, 4), (16, 4), (16, 8)]
    assert resolutions(build("efficient")) == down + up
    assert resolutions(build("imagen")) == [(32, 16), (64, 8), (64, 8), (64, 8), (32, 16), (32, 16)]


@torch.no_grad()
def test_skips_of_the_efficient_unet_are_scaled_by_one_over_root_two() -> None:
    unet = build("efficient")
    skips: list[Tensor] = []
    firsts: list[Tensor] = []
    ups: list[Tensor] = []
    unet.down_blocks[0][-1].register_forward_hook(lambda m, i, o: skips.append(o))
    unet.up_blocks[-1][0].register_forward_pre_hook(lambda m, i: firsts.append(i[0]))
    unet.up_samplers[0].register_forward_hook(lambda m, i, o: ups.append(o))
    unet(**inputs(unet))
    assert torch.allclose(firsts[0], ups[0] + skips[0] / math.sqrt(2), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    unet = build(name)
    given = inputs(unet)
    unet(**given).sample.square().mean().backward()
    plain = [p.grad.clone() for p in unet.parameters()]
    assert all(torch.isfinite(g).all() for g in plain)
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    calls = 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1

    unet.down_blocks[0][0].resnet.register_forward_pre_hook(counted)
    unet(**given).sample.square().mean().backward()
    assert calls == 2  # once more on the way back
    for parameter, grad in zip(unet.parameters(), plain, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_saved_and_loaded_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    unet = build(name)
    unet.save_pretrained(tmp_path / "unet")
    assert {p.suffix for p in (tmp_path / "unet").iterdir()} == {".json", ".safetensors"}
    again = type(unet).from_pretrained(tmp_path / "unet").eval()
    assert torch.equal(again(**inputs(unet)).sample, unet(**inputs(unet)).sample)
    half = type(unet).from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16).eval()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(unet).items()}
    assert half(**given).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns(name: str) -> None:
    unet = build(name).train()
    given = inputs(unet, batch=4)
    target = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = (unet(**given).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_a_loop_holds_either_kind_of_unet() -> None:
    """The same call for family A, family B and the Efficient U-Net."""
    torch.manual_seed(0)
    stock = UNet2DConditionModel(**presets.TINY_SR_IF_UNET).eval()
    fused = build("imagen", in_channels=6, class_embed_type="timestep")
    for unet in (stock, fused, build("efficient")):
        scheduler = DDIMScheduler(clip_sample=True)
        scheduler.set_timesteps(3)
        given = inputs(unet)
        low_resolution = given.pop("sample")[:, 3:]
        x = torch.randn(2, 3, 16, 16)
        for timestep in scheduler.timesteps:
            sample = torch.cat([x, low_resolution], 1)
            eps = unet(**{**given, "sample": sample, "timestep": timestep}).sample
            x = scheduler.step(eps, timestep, x).prev_sample
        assert torch.isfinite(x).all()


@torch.no_grad()
def test_the_noise_level_is_wanted_or_refused() -> None:
    unet = build("efficient")
    given = inputs(unet)
    out = unet(**given).sample
    noisier = {**given, "class_labels": given["class_labels"] + 100}
    assert (unet(**noisier).sample - out).abs().max() > 1e-4
    with pytest.raises(ValueError, match="class_labels is missing: pass the noise level"):
        unet(**{**given, "class_labels": None})
    base = build("imagen")
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        base(**inputs(base), class_labels=torch.zeros(2))


@torch.no_grad()
def test_what_does_not_fit_is_named_with_the_remedy() -> None:
    unet = build("efficient")
    given = inputs(unet)
    with pytest.raises(ValueError, match="must be multiples of 4: the U-Net halves them 2 times"):
        unet(**{**given, "sample": torch.zeros(2, 6, 18, 16)})
    with pytest.raises(ValueError, match="reads texts of width 32: .* encoder_hid_dim=48"):
        unet(**{**given, "encoder_hidden_states": torch.zeros(2, 6, 48)})
    with pytest.raises(ValueError, match=r"layers_per_block=\(1, 1, 1\) for 2 levels: give each"):
        build("imagen", layers_per_block=(1, 1, 1))
    with pytest.raises(ValueError, match="class_embed_type='simple' is not known"):
        build("imagen", class_embed_type="simple")
    with pytest.raises(ValueError, match="width 60 of level 1 does not divide by the 8 groups"):
        build("imagen", block_out_channels=(32, 60))
    # attended nowhere but in the middle, and the up block of a level ends at the width above
    with pytest.raises(ValueError, match="width 72 of level 1 is attended .*: use 64 or 80"):
        build("imagen", block_out_channels=(32, 72), attention_levels=(False, False),
              attention_head_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match="width 40 of level 2 is attended .*: use 32 or 48"):
        build("efficient", block_out_channels=(16, 40, 64), attention_head_dim=16)
    with pytest.raises(ValueError, match="2 widths, 1 attention levels and 2 head sizes"):
        check_widths((32, 64), (True,), 8, (8, 8))
    with pytest.raises(ValueError, match="is attended and does not divide by attention_head_dim=5"):
        check_unet({**presets.TINY_SD_A_UNET, "attention_head_dim": (5, 4)})


class Positional(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.unet(*inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", ["imagen", "efficient-cross"])
@torch.no_grad()
def test_it_exports_with_any_batch_and_length_of_text(name: str) -> None:
    unet = build(name)
    given = tuple(inputs(unet).values())
    free = {0: torch.export.Dim.AUTO}
    text = {**free, 1: torch.export.Dim.AUTO}
    axes = (free, free, text, text, free)[: len(given)]
    program = torch.export.export(Positional(unet), given, dynamic_shapes=(axes,))
    sample, timestep, states, mask, *level = inputs(unet, batch=3).values()
    other = (sample, timestep, states[:, :5], mask[:, :5], *level)
    assert torch.allclose(program.module()(*other), unet(*other).sample, atol=1e-6)
