"""Layer statistics: what each layer reads, once, for every method of choosing ranges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hcf.errors import InvalidArtifact, RecipeError
from hcf.quantize.statistics import (
    HISTOGRAM_BINS,
    bucket_edges,
    bucket_of,
    collect_statistics,
    load_statistics,
    save_statistics,
)
from hcf.trace import DenoiserCall, call_denoiser

CONV = "down_blocks.0.resnets.0.conv1"
ATTENTION = [f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{n}" for n in "qkv"]


@pytest.fixture
def calls() -> list[DenoiserCall]:
    """Unit noise at three timesteps; the middle call mixes two of them."""
    generator = torch.Generator().manual_seed(0)
    return [
        DenoiserCall(
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.tensor(timesteps),
            {"encoder_hidden_states": torch.randn(2, 7, 32, generator=generator)},
        )
        for timesteps in ([900, 900], [900, 100], [100, 100])
    ]


def test_they_are_those_of_the_tensors(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    unet = tiny_pipeline.unet
    seen: list[torch.Tensor] = []
    handle = unet.get_submodule(CONV).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().abs())
    )
    for call in calls:
        call_denoiser(unet, call.sample, call.timestep, call.kwargs)
    handle.remove()
    x = torch.stack(seen)  # (calls, B, C, H, W)
    statistics = collect_statistics(unet, [CONV, *ATTENTION], calls, buckets=4)
    found = statistics[CONV]
    assert found.amax == float(x.max())
    assert torch.equal(found.channel_amax, x.amax((0, 1, 3, 4)))
    assert found.histogram.shape == (HISTOGRAM_BINS,) and found.histogram.dtype == torch.float64
    assert int(found.histogram.sum()) == x.numel()
    wanted = torch.histc(x, HISTOGRAM_BINS, min=0, max=found.amax).double()
    torch.testing.assert_close(found.histogram, wanted, atol=2, rtol=0)
    early = max(float(x[0].max()), float(x[1, 0].max()))
    late = max(float(x[2].max()), float(x[1, 1].max()))
    torch.testing.assert_close(
        found.bucket_amax,
        torch.tensor([late, torch.nan, torch.nan, early], dtype=torch.float64),
        equal_nan=True,
    )
    shared = [statistics[name] for name in ATTENTION]
    assert shared[0].amax == shared[1].amax == shared[2].amax
    assert torch.equal(shared[0].histogram, shared[2].histogram)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_one_layer_alone_gives_the_same_as_among_others(
    tiny_pipeline: Any, calls: list[DenoiserCall]
) -> None:
    unet = tiny_pipeline.unet
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    together = collect_statistics(unet, names, calls)
    assert list(together) == names and len(together) == len(names)
    for name in (names[0], ATTENTION[1], names[-1]):
        alone = collect_statistics(unet, [name], calls)[name]
        assert alone.amax == together[name].amax
        assert torch.equal(alone.histogram, together[name].histogram)
        assert torch.equal(alone.channel_amax, together[name].channel_amax)


def test_buckets_take_every_timestep(calls: list[DenoiserCall]) -> None:
    edges = bucket_edges(calls, 4)
    assert edges.tolist() == [100, 300, 500, 700, 900]
    found = bucket_of(edges, torch.tensor([-5, 100, 299, 300, 899, 900, 1000]))
    assert found.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert bucket_of(bucket_edges(calls[:1], 3), torch.tensor([900.0])).tolist() == [0]


def test_they_survive_the_disk(
    tiny_pipeline: Any, calls: list[DenoiserCall], tmp_path: Path
) -> None:
    path = tmp_path / "statistics.safetensors"
    wanted = collect_statistics(tiny_pipeline.unet, [CONV], calls)
    sha256 = save_statistics(wanted, path)
    found = load_statistics(path, sha256)
    assert list(found) == [CONV] and found[CONV].amax == wanted[CONV].amax
    assert torch.equal(found[CONV].histogram, wanted[CONV].histogram)
    assert torch.equal(found.bucket_edges, wanted.bucket_edges)
    with pytest.raises(InvalidArtifact, match="expected 00000"):
        load_statistics(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidArtifact, match="holds no layer statistics"):
        load_statistics(path)
    with pytest.raises(InvalidArtifact, match="does not exist"):
        load_statistics(tmp_path / "other.safetensors")


def test_broken_models_are_named(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    names = ["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"]
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidArtifact, match="NaN or infinite weights: mid_block.resnets.0.conv1"):
        collect_statistics(unet, names, calls)
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].norm2.bias.data.fill_(float("inf"))
    with pytest.raises(InvalidArtifact, match="first in the input of mid_block.resnets.0.conv2"):
        collect_statistics(unet, names, calls)
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].norm2.weight.data.zero_()
    unet.mid_block.resnets[0].norm2.bias.data.zero_()
    with pytest.raises(InvalidArtifact, match="zero: mid_block.resnets.0.conv2"):
        collect_statistics(unet, names, calls)
    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.spare = nn.Linear(4, 4)
    with pytest.raises(InvalidArtifact, match="never reached.*spare"):
        collect_statistics(unet, ["spare", names[0]], calls)


def test_calls_that_cannot_be_meant(tiny_pipeline: Any, calls: list[DenoiserCall]) -> None:
    unet = tiny_pipeline.unet
    with pytest.raises(RecipeError, match="calibration set is empty"):
        collect_statistics(unet, [CONV], [])
    with pytest.raises(RecipeError, match="0 timestep buckets"):
        collect_statistics(unet, [CONV], calls, buckets=0)
    broken = DenoiserCall(calls[0].sample * float("inf"), calls[0].timestep, calls[0].kwargs)
    with pytest.raises(InvalidArtifact, match="call 1: sample has NaN or infinite"):
        collect_statistics(unet, [CONV], [calls[0], broken])
    with pytest.raises(TypeError, match="not a Conv2d or Linear"):
        collect_statistics(unet, ["mid_block"], calls)
