"""Adapters on tiny denoisers: nothing changes without them, and files come back as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import ChineseCLIPModel

from taiji import presets
from taiji.adapters.decoupled import (
    TaijiIPAdapterPipeline,
    adapter_parameters,
    attach,
    image_condition,
    image_projection,
    ip_adapter_state,
    new_ip_adapter,
    save_ip_adapter,
    set_scale,
)
from taiji.adapters.image_tokens import Drops, ImageTokens, image_features, image_prompt
from taiji.adapters.lora import (
    BatchShares,
    LoraSettings,
    add_lora,
    dreambooth_loss,
    save_lora,
    trained_share,
)
from taiji.diffusion.condition import Text, text_arguments
from taiji.text.image_clip import image_clip_config
from taiji.unet import ImagenUNet

MINI = Path(__file__).parents[1] / "models/weights/taiji-sd-mini"
S = 10


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def family_a() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**presets.A_TINY_UNET).eval()


def sd() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {**presets.TINY_SD_A_UNET, "addition_embed_type": None}
    return UNet2DConditionModel(**config, act_fn="silu").eval()


def family_b() -> ImagenUNet:
    torch.manual_seed(0)
    unet = ImagenUNet(**presets.TINY_B_UNET).eval()
    for parameter in unet.parameters():
        if not parameter.any():  # its branches begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


@torch.no_grad()
def call(unet: Any, rows: int = 2, masked: bool = True) -> Tensor:
    x = noise(rows, unet.config.in_channels, 16, 16)
    mask = torch.ones(rows, S, dtype=torch.int64)
    mask[:, 7:] = 0
    text = Text(noise(rows, S, 32, seed=1) * mask[..., None], mask if masked else None)
    out: Tensor = unet(x, torch.tensor(500), **text_arguments(unet, [text])).sample
    return out


TOKENS = noise(2, 4, 32, seed=2)


@pytest.mark.parametrize("make", [family_a, sd, family_b])
def test_scale_0_is_the_model_without_an_image_bit_for_bit(make: Any) -> None:
    unet = make()
    plain = call(unet)
    with image_prompt(unet, TOKENS, 0.0):
        assert torch.equal(call(unet), plain)
    with image_prompt(unet, TOKENS):
        assert (call(unet) - plain).abs().max() > 1e-4
    assert torch.equal(call(unet), plain)  # and nothing is left behind


def test_a_dropped_row_and_the_null_condition_see_no_image() -> None:
    unet = sd()
    plain = call(unet, 4)
    with image_prompt(unet, TOKENS):
        guided = call(unet, 4)
    assert torch.allclose(guided[:2], plain[:2], atol=1e-5)
    assert (guided[2:] - plain[2:]).abs().amax((1, 2, 3)).min() > 1e-4
    with image_prompt(unet, TOKENS, keep=torch.tensor([True, False])):
        kept = call(unet)
    plain = call(unet)
    assert torch.allclose(kept[1], plain[1], atol=1e-5) and (kept[0] - plain[0]).abs().max() > 1e-4


def test_the_pooled_text_of_family_a_stays_text_alone() -> None:
    unet, pooled = family_a(), list[Tensor]()
    unet.add_embedding.register_forward_hook(lambda _, __, out: pooled.append(out))
    call(unet)
    with image_prompt(unet, TOKENS):
        call(unet)
    assert torch.equal(*pooled)


@pytest.mark.parametrize("masked", [True, False])
def test_the_scale_multiplies_the_weight_of_a_token(masked: bool) -> None:
    unet = sd()
    with image_prompt(unet, TOKENS, 2.0):
        twice = call(unet, masked=masked)
    with image_prompt(unet, torch.cat([TOKENS, TOKENS], dim=1)):  # each token stands there twice
        assert torch.allclose(call(unet, masked=masked), twice, atol=3e-4)
    plain, distances = call(unet, masked=masked), []
    for scale in (1e-4, 0.1, 0.5, 1.0):
        with image_prompt(unet, TOKENS, scale):
            distances.append(float((call(unet, masked=masked) - plain).abs().mean()))
    assert distances == sorted(distances) and distances[0] < 0.01 * distances[-1]


def test_prompts_that_do_not_fit_are_refused() -> None:
    unet = family_a()
    with pytest.raises(ValueError, match="one image a row"), image_prompt(unet, TOKENS):
        call(unet, 3)
    with pytest.raises(ValueError, match="as wide as the context"):
        with image_prompt(unet, noise(2, 4, 48)):
            call(unet)
    with pytest.raises(ValueError, match="as many as the 8x8 positions"):
        with image_prompt(unet, noise(2, 64 - S, 32)):
            call(unet)
    with pytest.raises(ValueError, match="must not be negative"), image_prompt(unet, TOKENS, -1):
        pass
    with pytest.raises(ValueError, match="ImagenUNet in torch.float32 takes scale 0 or 1"):
        with image_prompt(family_b(), TOKENS, 0.5):
            pass
    with pytest.raises(ValueError, match="needs a diffusers U-Net in float32"):
        with image_prompt(family_a().bfloat16(), TOKENS, 0.5):
            pass


def test_tokens_of_both_features_and_their_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = ChineseCLIPModel(image_clip_config("tiny", 50)).eval()
    images = noise(2, 3, 64, 64).clamp(-1, 1)
    patches = image_features(clip, images, "patches")
    pooled = image_features(clip, images, "pooled")
    assert patches.shape == (2, 17, 32) and pooled.shape == (2, 32)
    assert torch.allclose(pooled.norm(dim=1), torch.ones(2))
    resampler = ImageTokens(32, 48, 16, "patches", 32, 2, 4).eval()
    tokens = resampler(patches)
    assert tokens.shape == (2, 16, 48)
    shuffled = resampler(patches[:, torch.randperm(17)])  # a set of tokens, any number of them
    assert torch.allclose(shuffled, tokens, atol=1e-5)
    assert ImageTokens(32, 48, 4, "pooled")(pooled).shape == (2, 4, 48)
    resampler.save_pretrained(tmp_path)
    assert torch.equal(ImageTokens.from_pretrained(tmp_path).eval()(patches), tokens)
    with pytest.raises(ValueError, match="are not the patches of width 32"):
        resampler(pooled)
    with pytest.raises(ValueError, match="resize them to 64"):
        image_features(clip, images[..., :32], "pooled")
    with pytest.raises(ValueError, match="width=30 must be divisible by heads=4"):
        ImageTokens(32, 48, 16, "patches", 30, 2, 4)


def test_rows_lose_image_and_text_in_the_shares_asked_for() -> None:
    image, text = Drops(image=0.1, text=0.2, both=0.3).draw(20000, torch.Generator().manual_seed(0))
    shares = [(~image & text).float().mean(), (image & ~text).float().mean()]
    shares += [(~image & ~text).float().mean()]
    assert [float(share) for share in shares] == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    with pytest.raises(ValueError, match="exceed all rows"):
        Drops(image=0.5, text=0.5, both=0.5)


def test_decoupled_attention_of_sd_a_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**presets.SD_A_UNET)
    state = new_ip_adapter(unet, 1024)
    assert len(state["ip_adapter"]) == 16 * 2
    assert sum(t.numel() for t in state["ip_adapter"].values()) == 25_559_040
    assert sum(t.numel() for t in state["image_proj"].values()) == 4_200_448
    assert sum(p.numel() for p in attach(unet, state)) == 25_559_040 + 4_200_448


@pytest.mark.parametrize("sizes, shape", [((128,), (2, 128)), ((128, 6, 64), (2, 65, 128))])
def test_decoupled_scale_0_is_the_base_and_its_file_comes_back(
    sizes: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path
) -> None:
    pipe = TaijiIPAdapterPipeline.from_pretrained(MINI)
    settings = {"num_inference_steps": 2, "output_type": "pt"}

    def draw(**image: Tensor) -> Tensor:
        out: Any = pipe(
            ["红色的圆形", "蓝色"], generator=torch.Generator().manual_seed(0), **settings, **image
        )
        images: Tensor = out.images
        return images

    plain, embeds = draw(), noise(*shape)
    with pytest.raises(ValueError, match=r"pipe.load_ip_adapter"):
        draw(image_embeds=embeds)
    torch.manual_seed(0)
    attach(pipe.unet, new_ip_adapter(pipe.unet, *sizes))
    assert image_projection(pipe.unet)(embeds).shape == (2, sizes[1] if sizes[1:] else 4, 192)
    shown = draw(image_embeds=embeds)
    assert (shown - plain).abs().max() > 1e-3 and not torch.equal(draw(), shown)
    assert torch.equal(draw(), draw(image_embeds=torch.zeros(shape)))
    set_scale(pipe.unet, 0.0)
    assert torch.equal(draw(image_embeds=embeds), plain) and torch.equal(draw(), plain)
    path = save_ip_adapter(pipe.unet, tmp_path)
    assert path.name == "ip_adapter.safetensors" and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]
    before = ip_adapter_state(pipe.unet)

    pipe = TaijiIPAdapterPipeline.from_pretrained(MINI)
    pipe.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None
    )
    after = ip_adapter_state(pipe.unet)
    assert all(
        torch.equal(t, after[part][k]) for part, row in before.items() for k, t in row.items()
    )
    assert torch.allclose(draw(image_embeds=embeds), shown, atol=1e-5)
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        draw(image_embeds=embeds[:1])
    with pytest.raises(ValueError, match="has an IP-Adapter already"):
        attach(pipe.unet, before)


def test_decoupled_attention_trains_alone_and_not_in_family_a() -> None:
    unet = sd()
    with pytest.raises(ValueError, match="not exactly one IP-Adapter"):
        ip_adapter_state(unet)
    unet.requires_grad_(False)
    trained = attach(unet, new_ip_adapter(unet, 24))
    assert trained == adapter_parameters(unet)
    for parameter in trained:
        parameter.requires_grad_(True)
    inputs = noise(2, 4, 16, 16), torch.tensor(5), noise(2, S, 32)
    with image_condition(unet, noise(2, 24)):
        unet(*inputs).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with pytest.raises(ValueError, match="3 images for 2 rows"):
        with image_condition(unet, noise(3, 24)):
            unet(*inputs)
    with pytest.raises(ValueError, match="append image tokens instead"):
        new_ip_adapter(family_a(), 24)
    with pytest.raises(ValueError, match="patch_width=96 is no multiple of 64"):
        new_ip_adapter(sd(), 24, 4, 96)


@pytest.mark.parametrize("make", [family_a, sd])
def test_a_lora_starts_as_nothing_and_its_file_comes_back(make: Any, tmp_path: Path) -> None:
    unet = make()
    plain, size = call(unet), sum(p.numel() for p in unet.parameters())
    trained = add_lora(unet, LoraSettings(rank=4))
    assert torch.equal(call(unet), plain)
    assert all("lora" in n for n, p in unet.named_parameters() if p.requires_grad)
    number, share = trained_share(unet, trained)
    assert number == sum(p.numel() for p in trained) and share == pytest.approx(number / size)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    moved = call(unet)
    assert (moved - plain).abs().max() > 1e-3
    path = save_lora(unet, tmp_path / "lora")
    assert [p.name for p in path.parent.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = make()
    fresh.load_lora_adapter(str(path.parent), prefix=None, use_safetensors=True)
    assert torch.allclose(call(fresh), moved, atol=1e-6)
    fresh.disable_adapters()
    assert torch.equal(call(fresh), plain)
    with pytest.raises(ValueError, match="has an adapter 'default'"):
        add_lora(unet, LoraSettings())
    with pytest.raises(ValueError, match="Linear has none of to_q"):
        add_lora(torch.nn.Linear(1, 1), LoraSettings())


def test_rank_64_of_sd_a_is_counted() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**presets.SD_A_UNET)
        trained = add_lora(unet, LoraSettings(rank=64))
    wanted = 0
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            width, context = module.to_q.in_features, module.to_k.in_features
            wanted += 64 * (2 * (width + width) + 2 * (context + width))
    assert trained_share(unet, trained)[0] == wanted


def test_the_loss_of_dreambooth_is_a_mean_over_its_rows() -> None:
    errors = torch.arange(16.0)
    shares = BatchShares(replay=0.25, prior_weight=0.5)
    assert shares.rows(16) == (6, 6, 4)
    loss, parts = dreambooth_loss(lambda rows: (errors[rows].mean(), {}), 16, shares)
    assert parts == {"subject": 2.5, "prior": 8.5, "replay": 13.5}
    assert float(loss) == pytest.approx((errors[:6].sum() + errors[6:12].sum() / 2 + 54) / 16)
    assert BatchShares(replay=0.0, prior_weight=0.0).rows(3) == (3, 0, 0)
    with pytest.raises(ValueError, match="a batch of 2 leaves no row"):
        BatchShares(replay=0.2).rows(2)
