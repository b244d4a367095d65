"""DeepCache (Ma et al., arXiv 2312.00858) as `hcf.feature_cache` does it, at branch 0.

One cycle is a full forward and the `interval - 1` shallow ones after it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcf.errors import HcfError
from hcf.feature_cache import FeatureCacheConfig, attach, install
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

CONFIG = FeatureCacheConfig(interval=3, branch=0)
TIMESTEP_STRIDE = 20  # between two of 50 steps over 1000 timesteps


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
    cache = attach(unets[0], CONFIG)
    where = names.index("timestep")
    # distinct even beyond the schedule's end: the timestep tells one step from the next
    ahead = [(CONFIG.interval - 1 - i) * TIMESTEP_STRIDE for i in range(CONFIG.interval)]
    timesteps = torch.stack([inputs[where].flatten()[0] + more for more in ahead])
    cycle = []
    for timestep in timesteps:
        moved = list(inputs)
        moved[where] = timestep.expand(inputs[where].shape)
        cycle.append(moved)

    def run() -> Tensor:
        cache.restart(timesteps)
        with torch.no_grad():
            for step in cycle:
                output: Tensor = case.module(*step)
        return output

    found = run()
    cache.restart()
    with torch.no_grad():
        wanted = case.module(*inputs)
    report |= {
        "interval": CONFIG.interval,
        "branch": CONFIG.branch,
        "shallow_flop_ratio": round(cache.cost.shallow_ratio, 4),
        "shallow_sqnr_db": round(sqnr_db(wanted, found), 2),
        "timesteps": timesteps.tolist(),
        "notes": "SQNR of the last shallow forward against a full one there, on the same latents",
    }
    return Prepared(run, forwards=CONFIG.interval, report=report)


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
    cache = install(pipe, CONFIG)
    return report | {
        "interval": CONFIG.interval,
        "branch": CONFIG.branch,
        "shallow_flop_ratio": round(cache.cost.shallow_ratio, 4),
    }


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
