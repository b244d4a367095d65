"""Counted FLOPs and bytes: the published figures, and the rules on ops whose traffic is known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

import pytest

from hcf_bench.opcount import OpCost, count_ops, count_workload
from hcf_bench.presets import PRESETS
from hcf_bench.workloads import WORKLOADS, build_case, find_workload

TFLOPS = [name for name, w in WORKLOADS.items() if w.tflop is not None and w.kind == "module"]
# bf16 GEMM TFLOP/s and copy TB/s
A100, H100 = (271.2, 1.75), (794.5, 3.0)
WITHOUT_NORMS = ("conv", "linear", "attention", "copy")


def roofline_ms(
    ops: Sequence[OpCost], ceilings: tuple[float, float], kinds: Collection[str] = ()
) -> float:
    tflops, tbyte_s = ceilings
    counted = [op for op in ops if not kinds or op.kind in kinds]
    return 1e3 * sum(max(op.flops / tflops, op.bytes / tbyte_s) / 1e12 for op in counted)


@cache
def counted(name: str, batch: int) -> tuple[OpCost, ...]:
    """In bf16; FLOPs are the same in every dtype."""
    return tuple(count_workload(find_workload(name), batch, "bf16"))


def flops_of(ops: Sequence[OpCost], kind: str = "") -> int:
    return sum(op.flops for op in ops if not kind or op.kind == kind)


@pytest.mark.parametrize("name", TFLOPS)
def test_flops_are_the_published_ones(name: str) -> None:
    published = find_workload(name).tflop
    assert flops_of(counted(name, 1)) / 1e12 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_a_whole_image_is_its_steps_and_its_decode(key: str) -> None:
    workload = find_workload(f"{key}/pipeline")
    ops = counted(workload.name, 1)
    assert flops_of(ops) / 1e12 == pytest.approx(workload.tflop, rel=0.01)
    unet = sum(op.flops for op in ops if op.layer.startswith("unet."))
    assert unet == workload.steps * flops_of(counted(f"{key}/unet", 2))


@pytest.mark.parametrize(
    ("key", "conv", "linear", "attention"),
    [("sd15", 55, 29, 16), ("sd21", 44, 27, 29), ("sdxl", 24, 64, 12), ("kolors", 23, 64, 12)],
)
def test_flops_split_as_published(key: str, conv: int, linear: int, attention: int) -> None:
    ops = counted(f"{key}/unet", 1)
    shares = [100 * flops_of(ops, k) / flops_of(ops) for k in ("conv", "linear", "attention")]
    assert sum(shares) == pytest.approx(100)
    assert shares == pytest.approx([conv, linear, attention], abs=0.8)


@pytest.mark.parametrize(
    ("key", "batch", "ceilings", "published_ms"),
    [
        ("sd15", 2, A100, 6.97),
        ("sd15", 2, H100, 2.70),
        ("sd15", 1, H100, 1.52),
        ("sdxl", 2, A100, 56.6),
        ("sdxl", 2, H100, 20.6),
        ("sdxl", 1, H100, 10.4),
    ],
)
def test_roofline_sums_are_the_published_ones(
    key: str, batch: int, ceilings: tuple[float, float], published_ms: float
) -> None:
    ops = counted(f"{key}/unet", batch)
    assert roofline_ms(ops, ceilings) == pytest.approx(published_ms, rel=0.02)


@pytest.mark.parametrize(("key", "published_ms"), [("sd15", 2.30), ("sdxl", 17.7)])
def test_roofline_sums_without_norms_are_the_published_ones(key: str, published_ms: float) -> None:
    ops = counted(f"{key}/unet", 2)
    assert roofline_ms(ops, H100, WITHOUT_NORMS) == pytest.approx(published_ms, rel=0.01)


def moved(name: str, dtype: str = "bf16") -> dict[str, int]:
    ops = count_workload(find_workload(name), dtype=dtype)
    return {op.name: op.bytes for op in ops if op.bytes}


def test_norm_and_its_activation_are_one_pass() -> None:
    x, affine = 2 * 320 * 64 * 64, 2 * 320
    assert moved("kernel/group_norm_silu_2x320x64x64") == {
        "native_group_norm": 2 * (2 * x + affine)
    }
    assert moved("kernel/layer_norm_2x4096x640", "fp32") == {
        "native_layer_norm": 4 * (2 * 2 * 4096 * 640 + 2 * 640)
    }


def test_attention_does_not_move_its_scores() -> None:
    q, k = 2 * 10 * 4096 * 64, 2 * 10 * 77 * 64
    name = "kernel/attention_2x10x4096x64_keys77"
    assert moved(name) == {"scaled_dot_product_attention": 2 * (2 * q + 2 * k)}
    assert flops_of(count_workload(find_workload(name))) == 4 * q * 77


def test_a_gate_reads_both_halves_and_writes_one() -> None:
    rows, width = 2 * 1024, 1280
    both = rows * 8 * width
    assert moved("kernel/geglu_2x1024x1280") == {
        "addmm": 2 * (rows * width + 8 * width * width + 8 * width + both),
        "gelu": 2 * (both + both // 2),
    }


def test_gemm_and_convolution_read_weights_once() -> None:
    assert moved("kernel/gemm_2048x1280x5120") == {
        "mm": 2 * (2048 * 5120 + 1280 * 5120 + 2048 * 1280)
    }
    ops = count_workload(find_workload("kernel/conv3x3_2x640x32x32"), dtype="fp16")
    x, weight = 2 * 640 * 32 * 32, 640 * 640 * 9
    assert [(op.kind, op.flops, op.bytes, op.dtype) for op in ops] == [
        ("conv", 2 * 2 * 32 * 32 * weight, 2 * (2 * x + weight + 640), "fp16")
    ]


def test_bytes_follow_the_dtype_and_flops_do_not() -> None:
    half, full = (
        count_workload(find_workload("tiny/vae_decoder"), dtype=d) for d in ("bf16", "fp32")
    )
    assert 2 * sum(op.bytes for op in half) == sum(op.bytes for op in full)
    assert flops_of(half) == flops_of(full)


@pytest.mark.parametrize("name", ["tiny/unet", "tiny-xl/text_encoder_2", "mini/text_encoder"])
def test_layers_are_module_paths(name: str) -> None:
    case = build_case(find_workload(name), device="meta")
    paths = dict(case.module.named_modules())
    ops = count_ops(case)
    assert {op.layer for op in ops} <= set(paths)
    assert {type(paths[op.layer]).__name__ for op in ops if op.kind == "conv"} <= {"Conv2d"}
    assert {type(paths[op.layer]).__name__ for op in ops if op.name == "addmm"} <= {"Linear"}
    assert any(op.kind == "attention" for op in ops)


def test_counting_leaves_no_hook_behind() -> None:
    from torch.nn.modules import module as torch_module

    count_workload(find_workload("tiny/unet"))
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks


def test_a_pipeline_counts_each_part_as_often_as_it_runs() -> None:
    preset = PRESETS["tiny-xl"]
    total = flops_of(count_workload(find_workload("tiny-xl/pipeline"), batch=3))
    runs = {"unet": (preset.steps, 6), "vae_decoder": (1, 3)}
    expected = 0
    for name in preset.parts:
        times, batch = runs.get(name, (1, 6))
        expected += times * flops_of(count_workload(find_workload(f"tiny-xl/{name}"), batch))
    assert total == expected
