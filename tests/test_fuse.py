"""Fused kernels in models: same outputs, same names, and out again bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_controlnet, make_tiny_pipeline, make_tiny_xl_pipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import hcf
from hcf.errors import RecipeError
from hcf.fuse import OPS, fuse, is_fused, unfuse, unfused
from hcf.fuse.modules import FusedResnetBlock2D, is_plain

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def call(unet: Any, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(batch, 16, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(sample, 7, context, **extra(unet, batch)).sample


def extra(unet: Any, batch: int) -> dict[str, Any]:
    if unet.config.addition_embed_type != "text_time":
        return {}
    width = unet.config.projection_class_embeddings_input_dim
    pooled = width - 6 * unet.config.addition_time_embed_dim
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, pooled, generator=generator)
    return {"added_cond_kwargs": {"text_embeds": text, "time_ids": torch.ones(batch, 6)}}


@pytest.mark.parametrize("make", [make_tiny_pipeline, make_tiny_xl_pipeline], ids=["sd", "sdxl"])
def test_a_fused_unet_computes_the_same_and_comes_back_bit_for_bit(make: Any) -> None:
    unet = make().unet
    before = call(unet)
    names, classes = list(unet.state_dict()), [type(m) for m in unet.modules()]
    report = fuse(unet, OPS)
    assert set(report.counts()) == set(OPS) and is_fused(unet)
    assert list(unet.state_dict()) == names and isinstance(unet.mid_block.resnets[0], ResnetBlock2D)
    torch.testing.assert_close(call(unet), before, **CLOSE)
    assert unfuse(unet) == len(report.swapped) + 1  # the SiLU that the last norm had absorbed
    assert [type(m) for m in unet.modules()] == classes and not is_fused(unet)
    assert torch.equal(call(unet), before)
    assert not any("hcf" in key for module in unet.modules() for key in module.__dict__)


@pytest.mark.parametrize("op", OPS)
def test_each_operator_alone(op: Any) -> None:
    unet = make_tiny_pipeline().unet
    before = call(unet)
    report = fuse(unet, [op])
    assert set(report.counts()) == {op}
    torch.testing.assert_close(call(unet), before, **CLOSE)
    unfuse(unet)
    assert torch.equal(call(unet), before)


def test_first_stages_and_controlnets(mini_vae: Any) -> None:
    pipe = make_tiny_pipeline()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for vae in (pipe.vae, mini_vae):
        size = torch.randn(1, vae.config.latent_channels, 8, 8)
        with torch.no_grad():
            before = vae.decode(size).sample
            assert fuse(vae, OPS).counts()["group_norm_silu"] > 5
            torch.testing.assert_close(vae.decode(size).sample, before, **CLOSE)
            unfuse(vae)
            assert torch.equal(vae.decode(size).sample, before)
    controlnet = make_tiny_controlnet(pipe.unet)
    generator = torch.Generator().manual_seed(0)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    image = torch.randn(1, 3, 8 * factor, 8 * factor, generator=generator)
    made = latents, 3, torch.randn(1, 16, 32, generator=generator), image
    with torch.no_grad():
        wanted = controlnet(*made, return_dict=False)[1]
        assert fuse(controlnet, OPS).swapped
        torch.testing.assert_close(controlnet(*made, return_dict=False)[1], wanted, **CLOSE)


def test_a_whole_pipeline_and_its_image() -> None:
    pipe = make_tiny_pipeline()

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, output_type="pt", generator=generator).images

    wanted = image()
    report = hcf.fuse(pipe, OPS)
    assert {name.partition(".")[0] for name in report.swapped} == {"unet", "vae"}
    assert "group_norm_silu in" in str(report)
    torch.testing.assert_close(image(), wanted, rtol=1e-3, atol=1e-4)
    assert hcf.unfuse(pipe) and torch.equal(image(), wanted)


def test_masked_text_reaches_the_kernel() -> None:
    unet = make_tiny_pipeline().unet
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    mask = torch.ones(2, 16)
    mask[:, 9:] = 0
    with torch.no_grad():
        wanted = unet(sample, 3, context, encoder_attention_mask=mask).sample
        fuse(unet, ["attention"])
        found = unet(sample, 3, context, encoder_attention_mask=mask).sample
        torch.testing.assert_close(found, wanted, **CLOSE)
        changed = context.clone()
        changed[:, 9:] += 5
        assert torch.equal(unet(sample, 3, changed, encoder_attention_mask=mask).sample, found)


def test_scale_shift_and_resampling_blocks() -> None:
    temb = torch.randn(2, 24)
    for options in (
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
        {"output_scale_factor": 2.0, "out_channels": 16},
        {"skip_time_act": True},
        {"non_linearity": "gelu"},
    ):
        block = ResnetBlock2D(in_channels=32, temb_channels=24, groups=8, **options).eval()
        nn.init.normal_(block.norm2.weight)
        x = torch.randn(2, 32, 6, 6)
        with torch.no_grad():
            wanted = block(x, temb)
            assert fuse(block, OPS).swapped and type(block) is FusedResnetBlock2D
            torch.testing.assert_close(block(x, temb), wanted, **CLOSE)


def test_an_upsampling_block_follows_its_weights() -> None:
    from diffusers.models.upsampling import Upsample2D

    block = Upsample2D(16, use_conv=True).eval()
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        wanted, sized = block(x), block(x, output_size=(9, 13))
        assert fuse(block, ["upsample_conv3x3"]).counts() == {"upsample_conv3x3": 1}
        torch.testing.assert_close(block(x), wanted, **CLOSE)
        torch.testing.assert_close(block(x, output_size=(9, 13)), sized, **CLOSE)
        block.conv.weight.mul_(2)
        found = block(x)
        unfuse(block)
        torch.testing.assert_close(found, block(x), **CLOSE)
        assert not torch.allclose(found, wanted, atol=0.1)
    report = fuse(Upsample2D(16), ["upsample_conv3x3"])
    assert report.kept == {"": "it is not nearest-neighbour with a convolution"}


def test_what_is_kept_is_named_with_its_reason() -> None:
    unet = make_tiny_pipeline().unet
    block = unet.mid_block.resnets[0]
    block.nonlinearity = nn.ReLU()
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.processor = AttnProcessor()
    before = call(unet)
    report = fuse(unet, OPS)
    assert report.kept["mid_block.resnets.0"] == "its activation is ReLU()"
    assert "AttnProcessor" in report.kept["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert "not mid_block.resnets.0: its activation is ReLU()" in str(report)
    assert not isinstance(block.norm1, type(None)) and type(block.norm1) is nn.GroupNorm
    torch.testing.assert_close(call(unet), before, **CLOSE)


def test_lora_and_fused_blocks_work_together(tmp_path: Path) -> None:
    from peft import LoraConfig

    unet = make_tiny_pipeline().unet
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "ff.net.0.proj", "conv1"])
    plain = copy.deepcopy(unet)
    plain.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted, without = call(plain), call(unet)
    assert not torch.allclose(wanted, without, atol=1e-3)
    fuse(plain, OPS)
    torch.testing.assert_close(call(plain), wanted, **CLOSE)
    # loaded into a model that is fused already
    fuse(unet, OPS)
    unet.add_adapter(config)
    unet.load_state_dict(plain.state_dict())
    torch.testing.assert_close(call(unet), wanted, **CLOSE)
    unet.disable_adapters()
    torch.testing.assert_close(call(unet), without, **CLOSE)


def test_simulated_quantisation_of_a_fused_model_is_that_of_the_plain_one(
    tiny_quantized: Path,
) -> None:
    from hcf.quantize.scales import read_scales
    from hcf.quantize.simulate import fake_quantized
    from hcf.source import open_pipeline

    unet = open_pipeline(tiny_quantized).unet
    scales = read_scales(tiny_quantized / "unet" / "quantization.safetensors")
    with fake_quantized(unet, scales):
        wanted = call(unet)
    assert not torch.allclose(wanted, call(unet), atol=1e-4)
    fuse(unet, OPS)
    with fake_quantized(unet, scales):
        torch.testing.assert_close(call(unet), wanted, rtol=1e-3, atol=1e-3)


def test_it_compiles_to_one_graph() -> None:
    unet = make_tiny_pipeline().unet
    before = call(unet)
    fuse(unet, OPS)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    sample = torch.randn(2, 4, 8, 8, generator=(g := torch.Generator().manual_seed(0)))
    context = torch.randn(2, 16, 32, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(compiled(sample, 7, context).sample, before, **CLOSE)


def test_a_copy_and_a_save_of_a_fused_model(tmp_path: Path) -> None:
    unet = make_tiny_pipeline().unet
    before = call(unet)
    fuse(unet, OPS)
    unet.save_pretrained(tmp_path)
    plain = type(unet).from_pretrained(tmp_path)
    assert not is_fused(plain) and torch.equal(call(plain), before)
    copied = copy.deepcopy(unet)
    assert is_fused(copied) and unfuse(copied) and is_fused(unet)
    assert torch.equal(call(copied), before)


def test_inside_unfused_a_model_is_torchs_own() -> None:
    unet = make_tiny_pipeline().unet
    before = call(unet)
    fuse(unet, OPS)
    fused = call(unet)
    with unfused(unet):
        assert not is_fused(unet) and torch.equal(call(unet), before)
    assert is_fused(unet) and torch.equal(call(unet), fused)
    with pytest.raises(ZeroDivisionError), unfused(unet):
        raise ZeroDivisionError
    assert is_fused(unet)


def test_on_a_cpu_nothing_is_fused_unless_it_is_named() -> None:
    pipe = make_tiny_pipeline()
    report = fuse(pipe)
    assert not report.swapped and not is_fused(pipe) and set(report.kept) == {"unet", "vae"}
    assert "name them in ops" in str(report)


def test_what_cannot_be_fused_is_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown operator 'conv'"):
        fuse(make_tiny_pipeline().unet, ["conv"])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="nothing in Linear"):
        fuse(nn.Linear(2, 2), OPS)
    with pytest.raises(RecipeError, match="neither a pipeline nor a model"):
        fuse("out/model")


def test_only_plain_layers_give_their_weights_to_a_kernel() -> None:
    linear = nn.Linear(2, 2)
    assert is_plain(linear, nn.Linear)
    handle = linear.register_forward_hook(lambda *args: None)
    assert not is_plain(linear, nn.Linear)
    handle.remove()
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(linear, nn.Linear) and not is_plain(nn.Conv2d(1, 1, 1), nn.Linear)


@pytest.fixture(scope="module")
def scales_of() -> Any:
    from hcf.quantize.scales import GRID_MAX, LayerScale

    def make(unet: Any, scheme: str, **more: Any) -> dict[str, Any]:
        return {
            name: LayerScale(
                input_amax=6.0,
                weight_amax=module.weight.detach().abs().flatten(1).amax(1).numpy(),
                scheme=scheme,
                **{key: value(module) for key, value in more.items()},
            )
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and "time" not in name
        }

    assert set(GRID_MAX) >= {"int8", "fp8"}
    return make


def assert_layers_compute_what_is_simulated(unet: Any, scales: Any) -> None:
    from hcf.quantize.simulate import SimulatedLayer

    generator = torch.Generator().manual_seed(0)
    fuse(unet, ["layer_norm"], scales)
    for name, scale in scales.items():
        layer = unet.get_submodule(name)
        image = layer.weight.ndim == 4
        size = (2, layer.weight.shape[1], 8, 8) if image else (2, 5, layer.in_features)
        # inside the range, whose ends are -127 and 127 here and -128 and 127 in ONNX
        x = (2 * torch.randn(size, generator=generator)).clamp(-2.9, 2.9)
        found = layer(x)
        unfuse(layer)
        wanted = SimulatedLayer(layer, scale)(x)
        # x / (step s) and (x / s) / step: a few codes in a thousand fall on either side of an edge
        assert (found - wanted).norm() < 3e-3 * wanted.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_layers_in_8_bits_compute_what_is_simulated(scheme: str, scales_of: Any) -> None:
    from hcf.quantize.simulate import fake_quantized

    unet = make_tiny_pipeline().unet
    before, scales = call(unet), scales_of(unet, scheme)
    with fake_quantized(unet, scales):
        noise = float((call(unet) - before).norm())
    counts = fuse(unet, OPS, scales=scales).counts()
    assert counts[f"{scheme} product"] + counts[f"{scheme} convolution"] == len(scales)
    # rounding is chaotic: a last bit in the first layer moves codes in the last, so the noise is
    # as large and not the same
    assert 0.7 * noise < float((call(unet) - before).norm()) < 1.4 * noise
    unfuse(unet)
    assert torch.equal(call(unet), before)
    assert_layers_compute_what_is_simulated(unet, scales)


@torch.no_grad()
def test_smoothing_and_low_rank_branches_in_8_bits(scales_of: Any) -> None:
    unet = make_tiny_pipeline().unet
    generator = torch.Generator().manual_seed(0)

    def smooth(module: Any) -> Any:
        inputs = module.weight.shape[1]
        return (0.5 + 0.5 * torch.rand(inputs, generator=generator)).numpy()  # weights shrink

    def low_rank(module: Any) -> Any:
        if isinstance(module, nn.Conv2d):
            return None
        rows, columns = module.weight.shape
        parts = torch.randn(rows, 2, generator=generator), torch.randn(2, columns)
        return tuple(0.02 * part.numpy() for part in parts)

    scales = scales_of(unet, "int8", smooth=smooth, low_rank=low_rank)
    assert_layers_compute_what_is_simulated(unet, scales)


def test_scales_that_do_not_fit_are_told(scales_of: Any) -> None:
    unet = make_tiny_pipeline().unet
    scales = scales_of(unet, "int8")
    with pytest.raises(RecipeError, match="name 'elsewhere' and 0 more layers"):
        fuse(unet, scales={"elsewhere": next(iter(scales.values()))})
    weight_only = scales_of(unet, "int8-weight")
    report = fuse(unet, ["layer_norm"], {"conv_in": weight_only["conv_in"]})
    assert report.kept == {"conv_in": "int8-weight has no 8-bit product"}


def test_a_processor_that_was_set_since_stays() -> None:
    unet = make_tiny_pipeline().unet
    fuse(unet, ["attention"])
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    mine = AttnProcessor()
    attn.set_processor(mine)
    unfuse(unet)
    assert attn.processor is mine and not is_fused(unet)


def test_inside_unfused_layers_in_8_bits_keep_their_codes(scales_of: Any) -> None:
    unet = make_tiny_pipeline().unet
    before = call(unet)
    fuse(unet, OPS, scales=scales_of(unet, "int8"))
    in_8_bits = call(unet)
    with unfused(unet):
        assert torch.equal(call(unet), before)
    assert torch.equal(call(unet), in_8_bits) and not torch.equal(in_8_bits, before)


def test_a_model_in_8_bits_is_not_exported_as_if_it_were_not(
    tmp_path: Path, scales_of: Any
) -> None:
    from hcf.errors import HcfError
    from hcf.export.onnx import export_components
    from hcf.settings import ExportConfig

    pipe = make_tiny_pipeline()
    fuse(pipe, OPS, scales=scales_of(pipe.unet, "int8"))
    with pytest.raises(HcfError, match="more layers compute in 8 bits") as told:
        export_components(pipe, tmp_path, ExportConfig(components=["unet"]), print)
    assert "hcf.unfuse" in str(told.value.fix) and list(tmp_path.iterdir()) == []


def test_a_replaced_forward_and_a_norm_over_two_axes_are_kept() -> None:
    block = nn.Sequential(nn.LayerNorm((4, 8)), nn.LayerNorm(8), nn.LayerNorm(8))
    block[2].forward = lambda x: x  # type: ignore[method-assign]
    report = fuse(block, OPS)
    assert report.swapped == {"1": "layer_norm"}
    assert report.kept == {
        "0": "it is over more than the last axis",
        "2": "something else has replaced its forward",
    }


def test_a_failure_leaves_nothing_fused(scales_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hcf.fuse import modules

    def fail(attn: Any) -> None:
        raise ZeroDivisionError

    unet = make_tiny_pipeline().unet
    before = call(unet)
    monkeypatch.setattr(modules, "takes_processor", fail)
    with pytest.raises(ZeroDivisionError):
        fuse(unet, OPS, scales_of(unet, "int8"))
    assert not is_fused(unet) and torch.equal(call(unet), before)


def test_a_block_that_drops_in_training_still_does() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4, dropout=0.5)
    x = torch.randn(1, 16, 4, 4)
    fuse(block, OPS)
    with torch.no_grad():
        torch.manual_seed(0)
        found = block.train()(x, None)
        unfuse(block)
        torch.manual_seed(0)
        assert torch.equal(found, block(x, None))
        assert not torch.equal(found, block.eval()(x, None))
