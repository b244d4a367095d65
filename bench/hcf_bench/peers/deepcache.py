"""DeepCache (Ma et al., arXiv 2312.00858): most steps run only the outermost layers of a U-Net.

A full step keeps what flows into the last layer of the last up block, before the skip connection
is put to it (B, C, H, W). The `interval - 1` steps after it run the input convolution, that one
layer (resnet, attention) on the kept tensor, and the output convolution: branch 0 of the paper.
The embeddings of timestep and text are new in every step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError
from hcf_bench.peers import Check, Peer, PeerOptions, Prepared, missing_unless, sqnr_db
from hcf_bench.peers.eager import (
    bf16_arithmetic,
    pipeline_report,
    set_up_torch,
    to_channels_last,
    torch_report,
)

if TYPE_CHECKING:
    from hcf_bench.workloads import Case

INTERVAL = 3
TIMESTEP_STRIDE = 20  # between two of 50 steps over 1000 timesteps


class Kept(nn.Module):
    """Stands in for the middle of a U-Net: whatever comes in, the kept tensor goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, sample: Tensor, emb: Tensor) -> Tensor:
        """sample (B, C, H, W), emb (B, D) -> kept (B, C', H, W)"""
        if self.hidden is None:
            raise HcfError("a shallow step before any full one has nothing to start from")
        return self.hidden


class DeepCache:
    """`forward` for `unet`: call 0, interval, 2 interval... are full, those between are shallow.

    Raises HcfError for anything but a UNet2DConditionModel whose last up block has two layers.
    """

    def __init__(self, unet: Any, interval: int = INTERVAL) -> None:
        _require_supported(unet)
        self.interval = interval
        self.calls = 0
        self.kept = Kept()
        self.full: Callable[..., Any] = unet.forward
        self.shallow: Callable[..., Any] = _shallow(unet, self.kept).forward
        skipped = unet.conv_in.out_channels

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.kept.hidden = args[0][:, :-skipped]

        unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep)

    def reset(self, *_: Any, **__: Any) -> None:
        """A new image: the next call is full."""
        self.calls, self.kept.hidden = 0, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the U-Net's own."""
        step = self.full if self.calls % self.interval == 0 else self.shallow
        self.calls += 1
        return step(*args, **kwargs)


def prepare_deepcache(case: Case, options: PeerOptions, precision: str) -> Prepared:
    """One cycle a run: a full forward at a noisier timestep, then shallow ones down to the case's
    own; the output is the last one's. The latents are the same in all of them."""
    from diffusers import UNet2DConditionModel

    set_up_torch(options)
    names = list(case.inputs)
    inputs = list(case.inputs.values())
    if precision != "fp32":
        inputs = to_channels_last(case.module, inputs)
    unets = [m for m in case.module.modules() if isinstance(m, UNet2DConditionModel)]
    if len(unets) != 1 or "timestep" not in names:
        raise HcfError(f"DeepCache needs a U-Net; {case.workload.name} is none")
    report = torch_report("deepcache", case.module, case.workload.name, precision, options)
    cache = DeepCache(unets[0])
    unets[0].forward = cache.forward
    where = names.index("timestep")
    cycle = []
    for steps_before in reversed(range(cache.interval)):
        moved = list(inputs)
        moved[where] = (inputs[where] + steps_before * TIMESTEP_STRIDE).clamp(max=999)
        cycle.append(moved)

    def run() -> Tensor:
        cache.reset()
        with torch.no_grad():
            for step in cycle:
                output: Tensor = case.module(*step)
        return output

    found = run()
    cache.reset()
    with torch.no_grad():
        wanted = case.module(*inputs)
    report |= {
        "interval": cache.interval,
        "branch": 0,
        "shallow_sqnr_db": round(sqnr_db(wanted, found), 2),
        "timesteps": [float(step[where].flatten()[0]) for step in cycle],
        "notes": "SQNR of the last shallow forward against a full one there, on the same latents",
    }
    return Prepared(run, forwards=cache.interval, report=report)


def prepare_deepcache_pipeline(pipe: Any, options: PeerOptions, precision: str) -> dict[str, Any]:
    """Puts the caching forward into `pipe.unet`; each call of the pipeline starts afresh, for it
    sets its scheduler's timesteps."""
    set_up_torch(options)
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module) or not hasattr(pipe.scheduler, "set_timesteps"):
        raise HcfError(f"DeepCache needs a U-Net and a scheduler; {type(pipe).__name__} lacks one")
    if precision != "fp32":
        to_channels_last(unet, [])
        to_channels_last(pipe.vae, [])
    report = pipeline_report("deepcache", pipe, precision, options)
    cache = DeepCache(unet)
    unet.forward = cache.forward
    set_timesteps = pipe.scheduler.set_timesteps

    def set_timesteps_and_reset(*args: Any, **kwargs: Any) -> Any:
        cache.reset()
        return set_timesteps(*args, **kwargs)

    pipe.scheduler.set_timesteps = set_timesteps_and_reset
    return report | {"interval": cache.interval, "branch": 0}


def _shallow(unet: Any, kept: Kept) -> Any:
    """The same U-Net, weights shared, without its down blocks and all but one layer going up."""
    last = _without_children(unet.up_blocks[-1])
    for name in ("resnets", "attentions"):
        if layers := getattr(last, name, None):
            setattr(last, name, nn.ModuleList([layers[-1]]))
    shallow = _without_children(unet)
    shallow.down_blocks = nn.ModuleList()
    shallow.mid_block = kept
    shallow.up_blocks = nn.ModuleList([last])
    return shallow


def _without_children(module: nn.Module) -> Any:
    """A copy whose children can be replaced without touching the original's."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _require_supported(unet: Any) -> None:
    from diffusers import UNet2DConditionModel

    if not isinstance(unet, UNet2DConditionModel):
        raise HcfError(f"DeepCache needs a UNet2DConditionModel, not a {type(unet).__name__}")
    last = unet.up_blocks[-1]
    if len(getattr(last, "resnets", ())) < 2 or getattr(last, "upsamplers", None):
        raise HcfError(f"DeepCache cannot cut {type(last).__name__}: it needs two layers or more")


def _deepcache(name: str, dtype: str, devices: tuple[str, ...], *checks: Check) -> Peer:
    return Peer(
        name=name,
        dtype=dtype,
        min_sqnr_db=-math.inf,
        devices=devices,
        kinds=("module", "pipeline"),
        missing=missing_unless(devices, *checks),
        prepare=lambda case, options: prepare_deepcache(case, options, dtype),
        prepare_pipeline=lambda pipe, options: prepare_deepcache_pipeline(pipe, options, dtype),
        components=("unet", "pipeline"),
    )


ADAPTED = (
    _deepcache("deepcache-3", "fp32", ("cpu", "cuda")),
    _deepcache("deepcache-3-bf16", "bf16", ("cpu", "cuda"), bf16_arithmetic),
)
