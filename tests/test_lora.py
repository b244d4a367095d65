"""Effective weights, their token and hash, and refusals, on tiny pipelines with real peft LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from safetensors.torch import save_file
from torch import Tensor, nn

from hcf.errors import HcfError, InvalidArtifact, UnsafeFile
from hcf.lora import (
    check_lora,
    check_pipeline_lora,
    clean_module,
    effective_weights,
    touch,
    unwatch,
    watch,
    weights_hash,
    weights_token,
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_shortcut", "proj_in", "ff.net.0.proj"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


def lora(module: nn.Module, targets: list[str], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """A LoRA of `module` in peft's keys, made by peft; every factor random."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    model = copy.deepcopy(module)
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, **options}, target_modules=targets)
    inject_adapter_in_model(config, model, "default")
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator) * 0.2
        for key, tensor in get_peft_model_state_dict(model, adapter_name="default").items()
    }


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


def kohya(state: dict[str, Tensor], prefix: str, alpha: float) -> dict[str, Tensor]:
    """The same under kohya's names (`lora_unet_..._to_q.lora_down.weight`), with an alpha."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        name = f"{prefix}_{layer.replace('.', '_')}"
        out[f"{name}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def merged(module: nn.Module, *loras: tuple[dict[str, Tensor], float]) -> dict[str, Tensor]:
    """W + scale * B @ A by hand, from the formula."""
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for state, scale in loras:
        for key in state:
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                down, up = state[key], state[f"{layer}.lora_B.weight"]
                weights[f"{layer}.weight"] += scale * (up.flatten(1) @ down.flatten(1)).view_as(
                    weights[f"{layer}.weight"]
                )
    return weights


def assert_same(found: Any, wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=tolerance, rtol=tolerance)


def sample(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([5.0])
    text = torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        out: Tensor = unet(*inputs, text, return_dict=False)[0]
    return out


def test_without_adapters_the_weights_are_the_state_dict(tiny_pipeline: Any) -> None:
    for module in (tiny_pipeline.unet, tiny_pipeline.text_encoder, tiny_pipeline.vae):
        weights = effective_weights(module)
        state = module.state_dict()
        assert set(weights) == set(state) and not weights.touched
        assert all(weights[name].data_ptr() == state[name].data_ptr() for name in state)


@pytest.mark.parametrize("targets", [ATTENTION, CONVOLUTIONS])
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_loaded_weights_follow_the_formula(
    tiny_pipeline: Any, targets: list[str], style: str
) -> None:
    unet = tiny_pipeline.unet
    state = lora(unet, targets)
    plain = copy.deepcopy(unet)
    given = prefixed(state, "unet") if style == "diffusers" else kohya(state, "lora_unet", 2.0)
    layers = len(state) // 2
    assert check_lora(unet, given) == layers
    assert check_pipeline_lora(tiny_pipeline, given) == {"unet": layers}
    tiny_pipeline.load_lora_weights(given, adapter_name="a")
    scale = 1.0 if style == "diffusers" else 0.5  # alpha / rank
    weights = effective_weights(unet)
    assert_same(weights, merged(plain, (state, scale)))
    assert {name.removesuffix(".weight") for name in weights.touched if "bias" not in name} == {
        key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key
    }
    assert_same(effective_weights(unet, adapters=False), plain.state_dict(), 0.0)
    torch.testing.assert_close(sample(clean_module(unet)), sample(unet), atol=1e-5, rtol=1e-5)


def test_a_then_b_then_a_again(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    watch(unet)
    pristine = weights_hash(unet)
    seen, hashes = [weights_token(unet)], []
    a, b = lora(unet, ATTENTION, 1), lora(unet, CONVOLUTIONS, 2)
    outputs = []
    for state in (a, b, a):
        tiny_pipeline.load_lora_weights(prefixed(state, "unet"), adapter_name="one")
        seen.append(weights_token(unet))
        hashes.append(weights_hash(unet))
        outputs.append(sample(clean_module(unet)))
        assert weights_token(unet) == seen[-1]  # reading changes nothing
        tiny_pipeline.unload_lora_weights()
        seen.append(weights_token(unet))
        assert weights_hash(unet) == pristine
    assert len(set(seen)) == len(seen)
    assert hashes[0] == hashes[2] != hashes[1] and pristine not in hashes
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_weights_two_adapters_and_switching_off(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    plain = copy.deepcopy(unet)
    a, b = lora(unet, ATTENTION, 1), lora(unet, ATTENTION[:2] + CONVOLUTIONS, 2)
    tiny_pipeline.load_lora_weights(prefixed(a, "unet"), adapter_name="a")
    tiny_pipeline.load_lora_weights(prefixed(b, "unet"), adapter_name="b")
    tokens, hashes = [], []

    def note(*active: tuple[dict[str, Tensor], float]) -> None:
        tokens.append(weights_token(unet))
        hashes.append(weights_hash(unet))
        weights = effective_weights(unet)
        assert_same(weights, merged(plain, *active), 2e-6)
        torch.testing.assert_close(sample(clean_module(unet)), sample(unet), atol=1e-4, rtol=1e-4)

    tiny_pipeline.set_adapters("a", 0.3)
    note((a, 0.3))
    tiny_pipeline.set_adapters("a", 1.0)
    note((a, 1.0))
    for weight in (-1.0, -2.0):  # Python's hash(-1.0) == hash(-2.0)
        tiny_pipeline.set_adapters("a", weight)
        note((a, weight))
    tiny_pipeline.set_adapters(["a", "b"], [0.3, 0.7])
    note((a, 0.3), (b, 0.7))
    tiny_pipeline.disable_lora()
    note()
    tiny_pipeline.enable_lora()
    tiny_pipeline.set_adapters(["b"], [1.0])
    note((b, 1.0))
    assert len(set(tokens)) == len(tokens) and len(set(hashes)) == len(hashes)
    tiny_pipeline.delete_adapters("b")
    tiny_pipeline.set_adapters("a", 0.3)
    assert weights_token(unet) not in tokens
    assert weights_hash(unet) == hashes[0]


def test_fuse_unfuse_unload(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    plain = copy.deepcopy(unet)
    watch(unet)
    pristine = weights_hash(unet)
    tokens = [weights_token(unet)]
    a = lora(unet, ATTENTION, 1)
    tiny_pipeline.load_lora_weights(prefixed(a, "unet"), adapter_name="a")
    active = weights_hash(unet)
    tokens.append(weights_token(unet))
    tiny_pipeline.fuse_lora(components=["unet"])
    tokens.append(weights_token(unet))
    assert weights_hash(unet) == active  # the same weights, held otherwise
    assert_same(effective_weights(unet), merged(plain, (a, 1.0)))
    assert_same(effective_weights(unet, adapters=False), plain.state_dict(), 1e-6)
    # fused, then switched off: forward takes it out of the weight
    tiny_pipeline.disable_lora()
    assert_same(effective_weights(unet), plain.state_dict(), 1e-6)
    tiny_pipeline.enable_lora()
    assert weights_token(unet) == tokens[-1]
    tiny_pipeline.unfuse_lora(components=["unet"])
    tokens.append(weights_token(unet))
    assert_same(effective_weights(unet), merged(plain, (a, 1.0)))
    tiny_pipeline.fuse_lora(components=["unet"], lora_scale=0.5)
    tiny_pipeline.unload_lora_weights()
    tokens.append(weights_token(unet))
    assert_same(effective_weights(unet), merged(plain, (a, 0.5)))
    assert weights_hash(unet) not in (pristine, active)
    assert len(set(tokens)) == len(tokens)


def test_loaded_fused_and_unloaded_between_two_looks(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    watch(unet)
    token, digest = weights_token(unet), weights_hash(unet)
    a = prefixed(lora(unet, ATTENTION, 1), "unet")
    tiny_pipeline.load_lora_weights(a)
    tiny_pipeline.fuse_lora(components=["unet"])
    tiny_pipeline.unload_lora_weights()
    assert weights_token(unet) != token
    assert weights_hash(unet) != digest


def test_a_module_that_is_not_watched_is_hashed_anew(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    digest = weights_hash(unet)
    unet.conv_in.weight.data.mul_(2.0)  # leaves no trace
    assert weights_hash(unet) != digest
    digest = weights_hash(unet)
    unet.conv_in.weight.data.mul_(2.0)
    watch(unet)
    assert weights_hash(unet) != digest


def test_weight_changed_while_fused(tiny_pipeline: Any) -> None:
    """Unfusing takes out another amount than was fused; the token of before must not come back."""
    unet = tiny_pipeline.unet
    tiny_pipeline.load_lora_weights(prefixed(lora(unet, ATTENTION, 1), "unet"), adapter_name="a")
    tiny_pipeline.set_adapters("a", 0.3)
    token, digest = weights_token(unet), weights_hash(unet)
    tiny_pipeline.set_adapters("a", 1.0)
    tiny_pipeline.fuse_lora(components=["unet"])
    tiny_pipeline.set_adapters("a", 0.3)
    tiny_pipeline.unfuse_lora(components=["unet"])
    assert weights_token(unet) != token
    assert weights_hash(unet) != digest


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_text_encoder(tiny_pipeline: Any, style: str) -> None:
    encoder = tiny_pipeline.text_encoder
    plain = copy.deepcopy(encoder)
    watch(encoder)
    pristine, token = weights_hash(encoder), weights_token(encoder)
    state = lora(encoder, TEXT)
    if style == "diffusers":
        given = prefixed(state, "text_encoder")
    else:
        whole = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in state.items()}
        given = kohya(whole, "lora_te", 4.0)
    counts = check_pipeline_lora(tiny_pipeline, given)
    assert counts == {"text_encoder": len(state) // 2}
    assert check_lora(encoder, given, "text_encoder") == len(state) // 2
    tiny_pipeline.load_lora_weights(given)
    assert weights_token(encoder) != token
    assert_same(effective_weights(encoder), merged(plain, (state, 1.0)))
    ids = torch.randint(0, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = clean_module(encoder)(ids)[0], encoder(ids)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    tiny_pipeline.fuse_lora(components=["text_encoder"])
    assert_same(effective_weights(encoder), merged(plain, (state, 1.0)))
    tiny_pipeline.unfuse_lora(components=["text_encoder"])
    token = weights_token(encoder)
    tiny_pipeline.unload_lora_weights()
    assert weights_token(encoder) != token
    assert_same(effective_weights(encoder), plain.state_dict(), 1e-6)
    assert weights_hash(encoder) != pristine or style == "kohya"  # fused and unfused: rounding


def test_sdxl_with_both_parts(tiny_xl_pipeline: Any) -> None:
    pipe = tiny_xl_pipeline
    unet, encoder = lora(pipe.unet, ATTENTION), lora(pipe.text_encoder_2, TEXT)
    given = prefixed(unet, "unet") | prefixed(encoder, "text_encoder_2")
    counts = check_pipeline_lora(pipe, given)
    assert counts == {"text_encoder_2": len(encoder) // 2, "unet": len(unet) // 2}
    plain = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder_2)
    pipe.load_lora_weights(given)
    assert_same(effective_weights(pipe.unet), merged(plain[0], (unet, 1.0)))
    assert_same(effective_weights(pipe.text_encoder_2), merged(plain[1], (encoder, 1.0)))


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}])
def test_variants_peft_can_merge(tiny_pipeline: Any, options: dict[str, bool]) -> None:
    from peft import LoraConfig

    unet = tiny_pipeline.unet
    # layers with a bias, which lora_bias needs
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_out.0", "conv1"], **options), "a")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    clean = clean_module(unet)
    torch.testing.assert_close(sample(clean), sample(unet), atol=1e-4, rtol=1e-4)
    assert torch.equal(sample(clean_module(unet)), sample(clean))  # and left no trace


def test_an_adapter_that_cannot_be_merged_is_named(tiny_pipeline: Any) -> None:
    from peft import LoraConfig

    unet = tiny_pipeline.unet
    config = LoraConfig(r=4, target_modules=["to_q"], lora_bias=True)  # to_q has no bias
    with pytest.warns(UserWarning, match="no bias"):
        unet.add_adapter(config, "a")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(HcfError, match=r"to_q\.weight: adapter a cannot be merged"):
        clean_module(unet)
    assert_same(unet.state_dict(), before, 0.0)


def test_half_precision_layers_are_merged_in_float32(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    a = lora(unet, ATTENTION, 1)
    unet.to(torch.bfloat16)
    plain = copy.deepcopy(unet).float()
    tiny_pipeline.load_lora_weights(prefixed(a, "unet"), adapter_name="a")
    weights = effective_weights(unet)
    name = next(name for name in sorted(weights.touched) if name.endswith("weight"))
    assert weights[name].dtype == torch.float32
    assert weights["conv_in.weight"].dtype == torch.bfloat16
    assert unet.state_dict()[name.replace(".weight", ".base_layer.weight")].dtype == torch.bfloat16
    wanted = merged(plain, (a, 1.0))[name]
    torch.testing.assert_close(weights[name], wanted, atol=5e-3, rtol=1e-2)


def test_other_changes_change_token_and_hash(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    watch(unet)
    seen = [(weights_token(unet), weights_hash(unet))]
    state = {name: tensor + 1e-3 for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(state)
    seen.append((weights_token(unet), weights_hash(unet)))
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.5)
    seen.append((weights_token(unet), weights_hash(unet)))
    unet.conv_out.weight = nn.Parameter(torch.zeros_like(unet.conv_out.weight))
    seen.append((weights_token(unet), weights_hash(unet)))
    unet.load_state_dict({name: tensor * 2 for name, tensor in state.items()}, assign=True)
    seen.append((weights_token(unet), weights_hash(unet)))
    unet.conv_in.weight.data.zero_()  # leaves no trace
    touch(unet)
    seen.append((weights_token(unet), weights_hash(unet)))
    assert len({token for token, _ in seen}) == len({digest for _, digest in seen}) == len(seen)
    assert weights_hash(copy.deepcopy(unet)) == seen[-1][1]


def test_moving_and_running_change_nothing(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    tiny_pipeline.load_lora_weights(prefixed(lora(unet, ATTENTION), "unet"))
    watch(unet)
    token, digest = weights_token(unet), weights_hash(unet)
    sample(unet)
    unet.to("cpu")
    clean_module(unet)
    copy.deepcopy(unet).load_state_dict(unet.state_dict())
    assert weights_token(unet) == token and weights_hash(unet) == digest


def test_new_embeddings_change_the_token(tiny_pipeline: Any) -> None:
    encoder = tiny_pipeline.text_encoder
    watch(encoder)
    tokens = [weights_token(encoder)]
    hashes = [weights_hash(encoder)]
    for value in (1.0, 2.0):
        encoder.resize_token_embeddings(515)
        encoder.get_input_embeddings().weight.data[514] = value  # as textual inversion does
        tokens.append(weights_token(encoder))
        hashes.append(weights_hash(encoder))
    assert len(set(tokens)) == 3 and len(set(hashes)) == 3


def test_hotswap_is_noticed(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    plain = copy.deepcopy(unet)
    a, b = (prefixed(lora(unet, ATTENTION, seed), "unet") for seed in (1, 2))
    tiny_pipeline.load_lora_weights(a, adapter_name="x")
    watch(unet)
    token, digest = weights_token(unet), weights_hash(unet)
    tiny_pipeline.load_lora_weights(b, adapter_name="x", hotswap=True)
    assert weights_token(unet) != token and weights_hash(unet) != digest
    assert_same(effective_weights(unet), merged(plain, (lora(plain, ATTENTION, 2), 1.0)))


def test_unwatch_takes_everything_back(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    before = dict(unet.__dict__)
    watch(unet)
    tiny_pipeline.load_lora_weights(prefixed(lora(unet, ATTENTION), "unet"))
    unwatch(unet)
    assert set(unet.__dict__) - set(before) == {"peft_config"} | (
        set(unet.__dict__) & {"_hf_peft_config_loaded"}
    )
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert all(type(m.merged_adapters) is list for m in unet.modules()
               if isinstance(m, BaseTunerLayer))  # fmt: skip


def test_clean_module_shares_what_is_untouched_and_goes_round_engines(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    wanted = sample(unet)
    tiny_pipeline.load_lora_weights(prefixed(lora(unet, ATTENTION), "unet"))
    unet.forward = lambda *args, **kwargs: None
    clean = clean_module(unet)
    assert clean.conv_in is unet.conv_in and "forward" in unet.__dict__
    assert not any("lora" in name or "base_layer" in name for name, _ in clean.named_modules())
    assert not hasattr(clean, "peft_config") and hasattr(unet, "peft_config")
    assert sample(clean).shape == wanted.shape and not torch.equal(sample(clean), wanted)


def test_lora_of_another_base_is_refused_before_anything_changes(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    pipe = tiny_pipeline
    wide = UNet2DConditionModel(**{**UNET, "cross_attention_dim": 48})
    deep = UNet2DConditionModel(**{**UNET, "transformer_layers_per_block": 2})
    modules = [name for name, _ in pipe.unet.named_modules()]
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for state, match in (
        (
            lora(wide, ATTENTION),
            r"attn2\.to_k has lora_A \(4, 48\) and lora_B \(32, 4\), needed is lora_A \(4, 32\)",
        ),
        (lora(deep, ATTENTION), r"does not have, first .*transformer_blocks\.1\.attn1"),
    ):
        for given in (prefixed(state, "unet"), kohya(state, "lora_unet", 4.0)):
            with pytest.raises(InvalidArtifact, match=match):
                check_lora(pipe.unet, given)
            with pytest.raises(InvalidArtifact, match=match):
                check_pipeline_lora(pipe, given)
            save_file(given, tmp_path / "lora.safetensors")
            with pytest.raises(InvalidArtifact, match=match):
                check_pipeline_lora(pipe, tmp_path / "lora.safetensors")
    assert [name for name, _ in pipe.unet.named_modules()] == modules
    assert_same(pipe.unet.state_dict(), before, 0.0)
    assert not hasattr(pipe.unet, "peft_config")


def test_parts_for_no_component_are_refused(tiny_pipeline: Any, tiny_xl_pipeline: Any) -> None:
    text = lora(tiny_xl_pipeline.text_encoder_2, TEXT)
    unet = prefixed(lora(tiny_pipeline.unet, ATTENTION), "unet")
    with pytest.raises(InvalidArtifact, match="is for text_encoder_2; StableDiffusionPipeline"):
        check_pipeline_lora(tiny_pipeline, unet | prefixed(text, "text_encoder_2"))
    with pytest.raises(InvalidArtifact, match="nothing for unet"):
        check_lora(tiny_pipeline.unet, prefixed(text, "text_encoder"))


def test_files_that_are_no_lora(tiny_pipeline: Any, tmp_path: Path) -> None:
    unet = tiny_pipeline.unet
    with pytest.raises(InvalidArtifact, match="no LoRA's tensor"):
        check_lora(unet, dict(unet.state_dict()))
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(UnsafeFile):
        check_lora(unet, tmp_path / "lora.bin")
    with pytest.raises(InvalidArtifact, match="no LoRA in safetensors"):
        check_pipeline_lora(tiny_pipeline, str(tmp_path), weight_name="gone.safetensors")
    with pytest.raises(InvalidArtifact, match="is no file"):
        check_lora(unet, tmp_path / "gone.safetensors")
    state = prefixed(lora(unet, ATTENTION), "unet")
    state[next(iter(state))].fill_(float("nan"))
    with pytest.raises(InvalidArtifact, match="NaN"):
        check_lora(unet, state)
