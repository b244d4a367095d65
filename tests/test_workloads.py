"""Workloads are the true architectures: published counts, and outputs that show every part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, MissingDependency, RecipeError
from hcf_bench import pipelines
from hcf_bench.pipelines import build_network, build_preset_pipeline
from hcf_bench.presets import PRESETS, Part, Preset, context_width, pooled_width
from hcf_bench.workloads import (
    DTYPES,
    WORKLOADS,
    Case,
    DecodeForward,
    LabelledDenoiseForward,
    Workload,
    build_case,
    build_pipeline,
    find_workload,
    workload_names,
)
from taiji import presets as taiji

PARTS = [(f"{key}/{c}", part) for key, p in PRESETS.items() for c, part in p.parts.items()]
COUNTED = [(name, part) for name, part in PARTS if part.params is not None]
SMALL = (
    "tiny/unet",
    "tiny/vae_decoder",
    "tiny/text_encoder",
    "tiny-xl/unet",
    "tiny-xl/text_encoder_2",
    "mini/unet",
    "mini/vae_decoder",
    "mini/text_encoder",
    "mini/image_clip",
    "kernel/group_norm_silu_1x32x16x16",
    "kernel/geglu_2x256x1280",
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(part: Part) -> Any:
    return build_network(part, device="meta", dtype=torch.float32, seed=0)


def sqnr_db(found: Tensor, wanted: Tensor) -> float:
    error = (found.double() - wanted.double()).square().mean()
    return float(10 * torch.log10(wanted.double().square().mean() / error.clamp_min(1e-30)))


def digit(published: int) -> int:
    """The unit of the last digit that is not zero: 100_000 of 859_500_000, "859.5M"."""
    unit = 1
    while published % (10 * unit) == 0:
        unit *= 10
    return unit


@pytest.mark.parametrize(("name", "part"), COUNTED, ids=[name for name, _ in COUNTED])
def test_parameters_are_the_published_ones(name: str, part: Part) -> None:
    network = on_meta(part)
    network = network.text_model if part.kind == "image_clip" else network
    assert part.params is not None
    assert abs(parameters(network) - part.params) <= digit(part.params) / 2


def test_named_configurations_of_the_family_are_exact() -> None:
    configs = {
        853_443: Part("unet", taiji.A_TINY_UNET),
        312_817_667: Part("unet", taiji.A_300M_UNET),
        192_998_723: Part("unet", {**taiji.SR_S_UNET, "in_channels": 15}),  # the x2 form
        55_322_782: Part("vq", taiji.VQ_F4),
    }
    assert {count: parameters(on_meta(part)) for count, part in configs.items()} == {
        count: count for count in configs
    }


def test_kolors_is_sdxl_with_a_projection_and_a_wider_pooled_vector() -> None:
    kolors, sdxl = (on_meta(PRESETS[key].parts["unet"]) for key in ("kolors", "sdxl"))
    projection = parameters(kolors.encoder_hid_proj)
    wider = parameters(kolors.add_embedding) - parameters(sdxl.add_embedding)
    assert (projection, wider) == (8_390_656, 3_604_480)
    assert parameters(kolors) - parameters(sdxl) == projection + wider


def test_decoder_is_the_half_that_runs() -> None:
    case = build_case(find_workload("sd15/vae_decoder"), device="meta")
    assert round(parameters(case.module) / 1e6, 1) == 49.5


def test_every_workload_builds_on_meta() -> None:
    for name in workload_names():
        workload = find_workload(name)
        # several billion weights take seconds even there: the counts test builds those
        if workload.kind == "pipeline" or (workload.params or 0) > 400e6:
            continue
        case = build_case(workload, device="meta", dtype="bf16")
        tensors = [*case.module.parameters(), *case.inputs.values()]
        assert {t.device.type for t in tensors} == {"meta"}, name


def test_defaults_follow_guidance() -> None:
    assert [find_workload(f"sdxl/{c}").batch for c in ("unet", "vae_decoder", "pipeline")] == [
        2,
        1,
        1,
    ]
    case = build_case(find_workload("sdxl/unet"), device="meta", dtype="bf16")
    assert {name: tuple(t.shape) for name, t in case.inputs.items()} == {
        "sample": (2, 4, 128, 128),
        "timestep": (2,),
        "encoder_hidden_states": (2, 77, 2048),
        "text_embeds": (2, 1280),
        "time_ids": (2, 6),
    }
    assert case.inputs["timestep"].dtype == torch.float32
    assert case.inputs["sample"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_finite_and_varied_in_every_dtype(name: str) -> None:
    workload = find_workload(name)
    wanted = build_case(workload).run()
    assert wanted.isfinite().all() and wanted.std() > 0.1 and wanted.abs().max() < 100
    for dtype, bound in (("bf16", 30.0), ("fp16", 45.0)):
        found = build_case(workload, dtype=dtype).run()
        assert found.dtype == DTYPES[dtype]
        assert found.isfinite().all()
        assert sqnr_db(found, wanted) > bound, dtype


def test_weights_follow_the_seed_and_round_with_the_dtype() -> None:
    workload = find_workload("tiny/unet")
    one, same = build_case(workload, seed=1), build_case(workload, seed=1)
    assert torch.equal(one.run(), same.run())
    assert not torch.equal(one.run(), build_case(workload, seed=2).run())
    half = build_case(workload, seed=1, dtype="bf16")
    pairs = zip(one.module.parameters(), half.module.parameters(), strict=True)
    assert all(torch.equal(wide.bfloat16(), narrow) for wide, narrow in pairs)
    assert torch.equal(one.inputs["sample"].bfloat16(), half.inputs["sample"])


def test_no_weight_is_left_as_it_was_made() -> None:
    case = build_case(find_workload("tiny/unet"))
    for name, weight in case.module.named_parameters():
        assert weight.isfinite().all() and weight.std() > 0, name


@pytest.mark.parametrize("name", ["tiny/unet", "tiny-xl/unet"])
def test_no_input_and_no_branch_is_hidden(name: str) -> None:
    case = build_case(find_workload(name))
    wanted = case.run()
    for key, value in case.inputs.items():
        changed = Case(case.workload, case.module, {**case.inputs, key: value.flip(0) * 0.5 + 1})
        assert sqnr_db(changed.run(), wanted) < 40, key
    branches = ("attn1", "attn2", "ff", "conv1", "conv2", "time_emb_proj", "proj_out")
    for path, module in case.module.named_modules():
        if path.rsplit(".", 1)[-1] not in branches:
            continue
        hook = module.register_forward_hook(lambda module, args, out: out * 0)
        assert sqnr_db(case.run(), wanted) < 60, path
        hook.remove()


@pytest.mark.parametrize("name", [*SMALL, "kernel/group_norm_silu_1x32x16x16_nhwc"])
def test_cases_export_whole(name: str) -> None:
    case = build_case(find_workload(name))
    program = torch.export.export(case.module, tuple(case.inputs.values()))
    found = program.module()(*case.inputs.values())
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, case.run())


def test_noise_levels_and_vq_latents_are_positional_too() -> None:
    unet = {**taiji.SR_S_UNET, "sample_size": 16, "block_out_channels": (32, 32, 32, 64)}
    unet["cross_attention_dim"] = 32
    network = build_network(Part("unet", unet), device="cpu", dtype=torch.float32, seed=0)
    module, level = LabelledDenoiseForward(network), torch.tensor([20.0, 20.0])
    inputs = torch.randn(2, 6, 16, 16), torch.tensor([501.0, 501.0]), torch.randn(2, 5, 32)
    with torch.inference_mode():
        low, high = module(*inputs, level), module(*inputs, level + 300)
    assert low.shape == (2, 3, 16, 16) and not torch.allclose(low, high)
    vq = {**taiji.VQ_F4_PLAIN, "block_out_channels": (32, 32, 32), "num_vq_embeddings": 16}
    decoder = DecodeForward(
        build_network(Part("vq", vq), device="cpu", dtype=torch.bfloat16, seed=0)
    )
    with torch.inference_mode():
        image = decoder(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16))
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()


def test_nhwc_kernels_have_their_layout() -> None:
    case = build_case(find_workload("kernel/conv3x3_2x1280x16x16_nhwc"), batch=1)
    assert case.inputs["x"].shape == (1, 1280, 16, 16)
    for tensor in (case.inputs["x"], case.module.weight, case.run()):
        assert isinstance(tensor, Tensor)
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_text_towers_get_texts_of_their_own_length() -> None:
    ids = build_case(find_workload("sd15/text_encoder"), device="cpu", seed=0).inputs["input_ids"]
    assert ids.shape == (1, 77)
    assert ids[0, 0] == 512 and ids[0, -1] == 513 and ids[0, 1:-1].max() < 512


def test_mini_counts_are_of_its_shipped_weights() -> None:
    for component in ("unet", "vae_decoder", "text_encoder", "image_clip"):
        workload = find_workload(f"mini/{component}")
        shapes, weights = build_case(workload, device="meta"), build_case(workload)
        assert parameters(shapes.module) == parameters(weights.module)
        assert [t.shape for t in shapes.inputs.values()] == [
            t.shape for t in weights.inputs.values()
        ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny/pipeline", "tiny-xl/pipeline", "mini/pipeline"])
def test_pipelines_draw_offline(name: str, dtype: str) -> None:
    workload = find_workload(name)
    check_pipeline(build_pipeline(workload, dtype=dtype), workload.guidance_scale, 64)


def test_kolors_draws_from_random_embeddings() -> None:
    tiny = PRESETS["tiny-xl"]
    unet = {
        **tiny.parts["unet"].config,
        "encoder_hid_dim": 48,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    }
    assert (context_width(unet), pooled_width(unet)) == (48, 48)
    parts = {"unet": Part("unet", unet, tokens=9), "vae_decoder": tiny.parts["vae_decoder"]}
    preset = Preset("small Kolors", 64, parts, "kolors", 2, 5.0)
    check_pipeline(build_preset_pipeline(preset, device="cpu", dtype=torch.float32, seed=0), 5, 64)


def test_taiji_draws_with_random_towers() -> None:
    preset = replace(PRESETS["mini"], pipeline="taiji")
    pipe = build_preset_pipeline(preset, device="cpu", dtype=torch.float32, seed=0)
    check_pipeline(pipe, 2.0, 64)


def check_pipeline(pipe: Any, guidance_scale: float, size: int) -> None:
    def draw(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        out = pipe(
            [prompt],
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        )
        return out.images.float()

    image, again, other = draw("红色的圆"), draw("红色的圆"), draw("blue square")
    assert image.shape == (1, 3, size, size)
    assert image.isfinite().all() and image.std() > 0.02
    assert torch.equal(image, again) and not torch.equal(image, other)


def test_a_typo_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="sd15/unett") as caught:
        find_workload("sd15/unett")
    assert "sd15/unet" in caught.value.fix
    with pytest.raises(RecipeError):
        find_workload("")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny/pipeline", {}),
        ("tiny/unet", {"batch": 0}),
        ("tiny/unet", {"dtype": "fp8"}),
        ("tiny/unet", {"device": "gpu"}),
    ],
)
def test_what_cannot_be_built_says_why(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        build_case(find_workload(name), **options)
    assert caught.value.fix
    with pytest.raises(RecipeError):
        build_pipeline(find_workload("tiny/unet"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(MissingDependency):
        build_case(find_workload("tiny/unet"), device="cuda")


def test_missing_shipped_weights_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "SHIPPED", Path("weights", "nowhere"))
    with pytest.raises(InvalidArtifact) as caught:
        build_case(find_workload("mini/unet"))
    assert "checkout" in caught.value.fix


def test_names_are_unique_and_say_what_they_are() -> None:
    assert len(set(workload_names())) == len(WORKLOADS)
    for name, workload in WORKLOADS.items():
        assert isinstance(workload, Workload) and workload.name == name
        assert name.startswith(f"{workload.preset}/{workload.component}")
