"""Smaller U-Nets from a teacher's: depth and width, whose weights they have, what they learn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from hcf.distill.reduction import reduced, reduced_config
from hcf.distill.structure import StructureObjective, costs
from hcf.distill.student import make_student
from hcf.distill.takeover import Axis, channel_axes, kept, kept_channels, source_name, taken_over
from hcf.distill.teacher import Guidance, Teacher
from hcf.distill.trainer import conditioning_scale, distill
from hcf.errors import RecipeError
from hcf.settings import DistillConfig, StructureConfig
from taiji.presets.imagen import A_TINY_UNET, B_1_3B_UNET
from taiji.presets.mini import MINI_UNET
from taiji.train.throughput import FlopCounter
from taiji.unet.efficient import EfficientUNet

SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
FLAT: dict[str, Any] = {**UNET, "block_out_channels": (16, 32, 32), "layers_per_block": 3,
                        "norm_num_groups": 4,
                        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
                        "attention_head_dim": (2, 4, 4),
                        "transformer_layers_per_block": (1, 3, 2)}  # fmt: skip

PLAIN = Guidance(1.0, 1.0, None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))


def unet(config: dict[str, Any] = FLAT) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def conditions(width: int = 32, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"encoder_hidden_states": torch.randn(count, 5, width, generator=generator)}


def says(net: Any, channels: int = 4, size: int = 8, **cond: Tensor) -> Tensor:
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net(x, torch.tensor([20, 700]), **(cond or conditions())).sample


def test_an_unchanged_structure_is_the_same_network() -> None:
    for config in (FLAT, A_TINY_UNET):
        teacher = unet(config)
        student = reduced(teacher, StructureConfig())
        assert {k: v for k, v in student.config.items() if k[0] != "_"} == {
            k: v for k, v in teacher.config.items() if k[0] != "_"
        }
        channels = teacher.config.in_channels
        assert torch.equal(says(student, channels), says(teacher, channels))


def test_the_variants_of_bk_sdm_have_the_published_sizes() -> None:
    """0.86, 0.58, 0.49 and 0.33 billion parameters in the U-Net (BK-SDM's model card)."""
    with torch.device("meta"):
        teacher: Any = UNet2DConditionModel(**SD15)
    weights = teacher.state_dict()
    sizes = {"base": 579.4, "small": 482.3, "tiny": 323.4}
    for variant, millions in sizes.items():
        spec = StructureConfig.model_validate({"variant": variant})
        with torch.device("meta"):
            student: Any = UNet2DConditionModel(**reduced_config(teacher, spec))
        count = sum(p.numel() for p in student.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)
        for name, value in student.state_dict().items():
            assert weights[source_name(name, teacher.config, student.config)].shape == value.shape
    assert student.config.block_out_channels == (320, 640, 1280)
    assert student.mid_block is None and student.config.layers_per_block == 1


def test_kept_layers_have_the_weights_of_their_role() -> None:
    assert [kept(4, n) for n in (1, 2, 3, 4)] == [[0], [0, 3], [0, 1, 3], [0, 1, 2, 3]]
    teacher = unet()
    student: Any = reduced(
        teacher, StructureConfig(layers=[1, 2, 1], transformer_layers=[1, 2, 1], middle=False)
    )
    assert student.config.layers_per_block == (1, 2, 1) and student.mid_block is None
    down, up = "down_blocks.1.attentions", "up_blocks.1.attentions"
    pairs = {
        "down_blocks.1.resnets.1.conv1": "down_blocks.1.resnets.2.conv1",
        f"{down}.1.transformer_blocks.1.norm1": f"{down}.2.transformer_blocks.2.norm1",
        "down_blocks.0.downsamplers.0.conv": "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.resnets.1.conv2": "up_blocks.0.resnets.3.conv2",
        "up_blocks.1.resnets.1.conv1": "up_blocks.1.resnets.1.conv1",
        f"{up}.2.transformer_blocks.1.attn1.to_k": f"{up}.3.transformer_blocks.2.attn1.to_k",
        "up_blocks.2.resnets.1.conv1": "up_blocks.2.resnets.3.conv1",
    }
    own, weights = student.state_dict(), teacher.state_dict()
    for mine, theirs in pairs.items():
        assert torch.equal(own[f"{mine}.weight"], weights[f"{theirs}.weight"]), mine
    cut: Any = reduced(teacher, StructureConfig(variant="tiny"))
    assert cut.config.up_block_types == ("CrossAttnUpBlock2D",) * 2
    assert torch.equal(
        cut.up_blocks[0].resnets[1].conv1.weight, teacher.up_blocks[1].resnets[3].conv1.weight
    )
    assert says(cut).shape == (2, 4, 8, 8)


def doubled(narrow: Any, heads: Any) -> Any:
    """A U-Net of twice the width that computes what `narrow` does: each channel is written twice,
    side by side, and what reads the pair reads the first."""
    config = {k: v for k, v in narrow.config.items() if not k.startswith("_")}
    config |= {"block_out_channels": tuple(2 * n for n in config["block_out_channels"]),
               "attention_head_dim": heads}  # fmt: skip
    wide: Any = UNet2DConditionModel(**config).eval()
    weights = {k: v.clone() for k, v in narrow.state_dict().items()}
    for name, shape in ((k, v.shape) for k, v in wide.state_dict().items()):
        if weights[name].shape == shape or "time_embedding" in name:
            continue
        for dim, own in enumerate(channel_axes(name, wide.config, narrow.config)):
            sizes = [a.kept for a in own]
            pieces = [
                twice(piece, dim, axis, once=dim > 0 or (".to_q." in name and not axis.whole))
                for axis, piece in zip(own, weights[name].split(sizes, dim), strict=True)
            ] if own else [weights[name]]  # fmt: skip
            weights[name] = torch.cat(pieces, dim)
        if ".to_q." in name and not channel_axes(name, wide.config, narrow.config)[0][0].whole:
            weights[name] *= 2**0.5  # products of a head of twice the width are divided by more
    weights["time_embedding.linear_1.weight"] = wide.time_embedding.linear_1.weight * 0
    wide.load_state_dict(weights)
    return wide


def twice(x: Tensor, dim: int, axis: Axis, *, once: bool) -> Tensor:
    """Every channel of x along `dim` twice, every head where the axis has whole ones; the second
    zero with `once`."""
    each = axis.size // axis.parts if axis.whole else 1
    x = x.movedim(dim, 0).unflatten(0, (-1, each))
    second = torch.zeros_like(x) if once else x
    return torch.stack([x, second], 1).flatten(0, 2).movedim(0, dim)


def first_of_pairs(axis: Axis, power: Tensor) -> Tensor:
    each = axis.size // axis.parts if axis.whole else 1
    return torch.arange(axis.size).view(-1, 2, each)[:, 0].flatten()


PAIRS: dict[str, tuple[dict[str, Any], Any, int, int, int]] = {
    "whole heads": (FLAT, (4, 8, 8), 4, 32, 8),
    "narrower heads": ({**FLAT, "attention_head_dim": (1, 1, 1)}, (1, 1, 1), 4, 32, 8),
    "of a demonstrator": (
        {**MINI_UNET, "addition_embed_type": None, "block_out_channels": (16, 32, 48)},
        (4, 8, 8), 8, 192, 8,
    ),
    "simple blocks": (A_TINY_UNET, 8, 3, 32, 16),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_half_of_a_doubled_network_is_the_network(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says of every parameter which channels each of its sides runs over: both parts of a skip,
    both halves of GEGLU, groups and heads. A wrong one, and the doubled network is another."""
    config, heads, channels, context, size = PAIRS[case]
    config = {**config, "time_embedding_dim": 64}
    narrow: Any = unet(config)
    narrow.time_embedding.linear_1.weight.data.zero_()  # its sinusoids are others
    wide = doubled(narrow, heads)
    given = conditions(context)
    wanted = says(narrow, channels, size, **given)
    assert torch.allclose(says(wide, channels, size, **given), wanted, atol=1e-4)
    monkeypatch.setattr("hcf.distill.takeover._most", first_of_pairs)
    student: Any = reduced(wide, StructureConfig(width=0.5))
    student.time_embedding.linear_1.weight.data.zero_()
    found = student.state_dict()
    for name, value in narrow.state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    # a narrower student's features are compared with the teacher's in the same channels
    objective = StructureObjective(
        student, Teacher(wide, None), DDIMScheduler(), PLAIN, StructureConfig(width=0.5)
    )
    x = torch.randn(2, channels, size, size)
    _, parts = objective(x, torch.Generator().manual_seed(0), **given)
    assert parts["feature"] < 1e-6 and parts["output"] < 1e-6 < parts["task"]


@pytest.mark.parametrize("width", [0.5, [0.75, 0.5, 0.5]])
def test_the_channels_with_the_largest_weights_stay(width: Any) -> None:
    teacher = unet()
    with torch.no_grad():  # of each group of 8 channels of the middle stage
        for name, p in teacher.named_parameters():
            if name.startswith("down_blocks.1.") and name.endswith("conv2.weight"):
                p[3::4] *= 9
        for fast in (slice(0, 4), slice(8, 12)):  # what a trained network hardly reads
            teacher.time_embedding.linear_1.weight[:, fast] = 0
    student: Any = reduced(teacher, StructureConfig(width=width))
    index = kept_channels(teacher, student)
    frozen = copy.deepcopy(teacher).bfloat16()  # as the teacher is when training is in bf16
    assert all(map(torch.equal, index, kept_channels(frozen, student)))
    assert set(range(3, 32, 4)) <= set(index[1].tolist()) and torch.equal(index[1], index[2])
    for stage, wide in enumerate(FLAT["block_out_channels"]):
        per_group = torch.bincount(index[stage] // (wide // 4))
        assert per_group.tolist() == [len(index[stage]) // 4] * 4
    steps = torch.arange(0, 1000, 50)
    times = [net.time_embedding(net.time_proj(steps)) for net in (teacher, student)]
    assert (times[0] - times[1]).norm() < 0.1 * times[0].norm()
    assert says(student).isfinite().all()


def test_costs_are_counted_on_shapes() -> None:
    teacher = unet(UNET)
    both: Any = reduced(teacher, StructureConfig(variant="tiny", width=0.5))
    found = costs(teacher, both, (4, 8, 8), conditions(count=1))
    assert found["flop_ratio"] == found["teacher_gflop"] / found["student_gflop"] > 4
    assert found["student_parameters"] == sum(p.numel() for p in both.parameters())
    with FlopCounter() as counter:
        says(teacher)
    assert found["teacher_gflop"] == pytest.approx(counter.flops / 2e9)  # of two rows


def test_losses_are_those_of_the_paper_and_reach_the_student_alone() -> None:
    teacher = unet()
    student: Any = reduced(teacher, StructureConfig(variant="small")).train()
    uncond = {"encoder_hidden_states": torch.zeros(1, 5, 32)}
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    spec = StructureConfig(
        task_weight=2.0, output_weight=3.0, feature_weight=4.0, feature_scale="absolute"
    )
    objective = StructureObjective(student, Teacher(teacher, uncond), scheduler, PLAIN, spec)
    x_0, cond = torch.randn(4, 4, 8, 8), conditions(count=4)
    loss, parts = objective(x_0, torch.Generator().manual_seed(3), **cond)
    loss.backward()
    total = 2 * parts["task"] + 3 * parts["output"] + 4 * parts["feature"]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    grads = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    student.enable_gradient_checkpointing()
    again, _ = objective(x_0, torch.Generator().manual_seed(3), **cond)
    again.backward()
    for p, wanted in zip(student.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, wanted, rtol=1e-3, atol=1e-6)
    draw = torch.Generator().manual_seed(3)
    t = torch.randint(1000, (4,), generator=draw)
    eps = torch.randn(x_0.shape, generator=draw)
    x_t = scheduler.add_noise(x_0, eps, t)
    kept_rows = torch.rand(4, generator=draw) >= 0.1
    cond = {k: torch.where(kept_rows.view(4, 1, 1), v, 0) for k, v in cond.items()}
    stages: dict[Any, list[Tensor]] = {}
    for net in (teacher, student):
        for block in (*net.down_blocks, *net.up_blocks):
            block.register_forward_hook(
                lambda m, _, out: stages.update({m: out[0] if isinstance(out, tuple) else out})
            )
    with torch.no_grad():
        said, taught = (net(x_t, t, **cond).sample for net in (student, teacher))
    velocity = scheduler.get_velocity(x_0, eps, t)
    assert parts["task"] == pytest.approx((said - velocity).square().mean().item(), rel=1e-4)
    assert parts["output"] == pytest.approx((said - taught).square().mean().item(), rel=1e-4)
    pairs = [*zip(teacher.down_blocks, student.down_blocks, strict=True),
             *zip(teacher.up_blocks, student.up_blocks, strict=True)]  # fmt: skip
    errors = [(stages[a] - stages[b]).square().mean().item() for a, b in pairs]
    assert parts["feature"] == pytest.approx(sum(errors), rel=1e-4)
    objective.config = StructureConfig()
    _, parts = objective(x_0, torch.Generator().manual_seed(3), **conditions(count=4))
    sizes = [stages[a].square().mean().item() for a, _ in pairs]
    relative = sum(e / s for e, s in zip(errors, sizes, strict=True))
    assert parts["feature"] == pytest.approx(relative, rel=1e-4)


def test_captions_are_dropped_in_a_share_of_the_rows() -> None:
    net = unet(UNET)
    uncond = {"encoder_hidden_states": torch.zeros(1, 5, 32)}
    objective = StructureObjective(
        reduced(net, StructureConfig()), Teacher(net, uncond), DDIMScheduler(), PLAIN,
        StructureConfig(drop_caption=0.25),
    )  # fmt: skip
    cond = conditions(count=4)
    found = objective.drop_captions(cond, torch.tensor([0.1, 0.3, 0.2, 0.9]))
    dropped = [not row.any() for row in found["encoder_hidden_states"]]
    assert dropped == [True, False, True, False]
    assert torch.equal(found["encoder_hidden_states"][3], cond["encoder_hidden_states"][3])


def prepare(folder: Path) -> None:
    data = folder / "hcf_data"
    data.mkdir()
    latents = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tensors = {"latents": latents.half(), "row": torch.arange(12)}
    save_file(tensors, data / "latents_distill.safetensors")
    (data / "captions_distill.json").write_text(json.dumps(["cat", "dog"] * 6))


def test_a_smaller_student_is_an_ordinary_pipeline_and_a_teacher_again(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prepare(tiny_folder)
    settings = {"steps": 2, "solver_steps": 4, "train_steps": 4, "batch_size": 4, "warmup_steps": 1,
                "guidance_scale": 2.0, "check_memory": False}  # fmt: skip
    spec = {"variant": "small", "width": 0.5}
    config = DistillConfig.model_validate({**settings, "method": "structure", "structure": spec})
    said: list[str] = []
    out = distill(tiny_folder, tmp_path / "small", config, said.append)
    student = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert student.unet.config.block_out_channels == [8, 16] and student.unet.mid_block is None
    teacher = DiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    assert student.scheduler.config == teacher.scheduler.config
    start = taken_over(teacher.unet, student.unet)
    weights = student.unet.state_dict()
    moved = [not torch.equal(v.half(), start[k].half()) for k, v in weights.items()]
    assert sum(moved) > len(moved) / 2
    calls: list[int] = []
    student.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    student.set_progress_bar_config(disable=True)
    student("cat", num_inference_steps=2, guidance_scale=2.0, output_type="np")
    assert calls == [2, 2]
    manifest = json.loads((out / "hcf_manifest.json").read_text())
    noted = manifest["distillation"]
    assert manifest["sampling"] == {} and noted["structure"]["variant"] == "small"
    assert noted["flop_ratio"] == noted["teacher_gflop"] / noted["student_gflop"] > 2
    assert noted["student_parameters"] == sum(p.numel() for p in student.unet.parameters())
    assert any("fewer FLOPs" in line for line in said)
    again = distill(out, tmp_path / "fast", DistillConfig.model_validate(settings), said.append)
    fast = DiffusionPipeline.from_pretrained(again, safety_checker=None)
    assert fast.unet.config.block_out_channels == [8, 16]
    # smaller still, it would be taught the one branch that it is sampled with
    assert conditioning_scale(config, again) == 1 and conditioning_scale(config, out) == 2
    assert fast.scheduler.config.timestep_spacing == "trailing"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers=4": ({"layers": 4}, "more than the teacher has"),
    "transformer_layers": ({"transformer_layers": [1, 4, 1]}, r"\[1, 4, 1\] is more than"),
    "stages": ({"stages": 4}, "stages=4 is more than the teacher has: 3"),
    "one value a stage": ({"layers": [1, 1]}, "2 values for 3 stages"),
    "no middle": ({"stages": 2, "middle": True}, "middle block with it"),
    "groups": ({"width": 0.6}, "leaves 9.6 of 16 channels"),
    "equal widths": ({"width": [1, 0.5, 0.75]}, "stages of equal width stay so"),
    "widths": ({"width": [0.5, 0.5]}, "2 factors for 3 stages"),
}  # fmt: skip


def test_what_cannot_be_left_out_is_named() -> None:
    teacher = unet()
    for spec, message in REFUSED.values():
        with pytest.raises(RecipeError, match=message):
            reduced_config(teacher, StructureConfig.model_validate(spec))


def test_what_cannot_be_reduced_is_named(tiny_pipeline: Any) -> None:
    with torch.device("meta"):
        other = EfficientUNet(**B_1_3B_UNET)
    with pytest.raises(RecipeError, match="EfficientUNet cannot be reduced"):
        reduced_config(other, StructureConfig(variant="base"))
    skip = {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    with pytest.raises(RecipeError, match="AttnDownBlock2D blocks"):
        reduced_config(UNet2DConditionModel(**skip), StructureConfig(layers=1))
    odd = {**UNET, "block_out_channels": (16, 48), "attention_head_dim": (2, 3)}
    with pytest.raises(RecipeError, match="40 channels do not divide into attention heads"):
        reduced_config(UNet2DConditionModel(**odd), StructureConfig(width=[1, 5 / 6]))
    for changes, message in (
        ({}, "say what the student leaves out"),
        ({"structure": {"width": 1.5}}, "at most 1"),
        ({"structure": {"layers": 0}}, "at least 1 stays"),
        ({"structure": {}, "student": {"kind": "lora"}}, "trains whole weights"),
    ):
        with pytest.raises(ValidationError, match=message):
            DistillConfig.model_validate({"method": "structure", **changes})
    told = DistillConfig.model_validate(
        {"method": "structure", "structure": {}, "guidance_embedding": {"width": 16}}
    )
    with pytest.raises(RecipeError, match="is not told its guidance scale"):
        make_student(tiny_pipeline.unet, told)
