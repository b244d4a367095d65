"""Quantisation-aware distillation: weights trained under their rounding, for what PTQ cannot hold.

The teacher is the model itself before the training, on its own recorded calls:

    L = |y_q - y|^2 / |y|^2 + feature_weight * mean over blocks |h_q - h|^2 / |h|^2

Rounding has a straight-through gradient (Bengio et al., arXiv 1308.3432), cut where the code is
clipped; the learning rate falls to zero along a cosine. With `learn_scales` the step sizes are
trained too, as in LSQ (Esser et al., arXiv 1902.08153), here by their logarithm, which keeps them
positive. The forward pass is the simulation the exported graph is compared with, so what is trained
is what runs.

Memory: the weights, their gradients and AdamW's two moments; with features also the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hcf.errors import HcfError
from hcf.quantize.report import outputs_of
from hcf.quantize.scales import GRID_MAX, LayerScale
from hcf.quantize.simulate import SimulatedLayer, quantisable, replaced_forwards
from hcf.quantize.statistics import run_call
from hcf.settings import QatConfig
from hcf.trace import DenoiserCall

Log = Callable[[str], None]
SCALE_RATE = 10.0  # learning rate of log step sizes over that of the weights
REPORTS = 5  # lines of the log over a training


def train_quantised(
    denoiser: nn.Module,
    scales: Mapping[str, LayerScale],
    calls: Sequence[DenoiserCall],
    config: QatConfig,
    *,
    seed: int = 0,
    log: Log = lambda line: None,
) -> dict[str, LayerScale]:
    """Trains the parameters of `denoiser` in place; returns the scales that go with them.

    Raises HcfError where the loss is not finite; the weights are then as they were.
    """
    wanted = outputs_of(denoiser, calls)
    teacher = _frozen_copy(denoiser) if config.feature_weight else None
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    layers = {
        name: SimulatedLayer(quantisable(denoiser, name), scale, hold=False)
        for name, scale in scales.items()
    }
    logs = _log_steps(layers) if config.learn_scales else {}
    denoiser.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": list(denoiser.parameters())}]
    if logs:
        steps = [tensor for each in logs.values() for tensor in each.values()]
        groups.append({"params": steps, "lr": SCALE_RATE * config.learning_rate})
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(seed)
    try:
        with replaced_forwards(denoiser, layers):
            for step in range(config.steps):
                call, target = _batch(calls, wanted, config.batch_size, generator)
                for name, each in logs.items():
                    layers[name].trained = {kind: value.exp() for kind, value in each.items()}
                loss = _loss(denoiser, teacher, call, target, config)
                if not torch.isfinite(loss):
                    raise HcfError(
                        f"QAT: the loss is {loss.item()} at step {step}",
                        fix=f"lower quantize.qat.learning_rate (it is {config.learning_rate})",
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                decay.step()
                if step % max(1, config.steps // REPORTS) == 0 or step == config.steps - 1:
                    log(f"qat: step {step + 1}/{config.steps}, loss {loss.item():.3e}")
    except BaseException:
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(before[name])
        raise
    finally:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
    return {name: _trained(scale, logs.get(name, {})) for name, scale in scales.items()}


def _loss(
    denoiser: nn.Module,
    teacher: nn.Module | None,
    call: DenoiserCall,
    target: Tensor,
    config: QatConfig,
) -> Tensor:
    device = target.device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        if teacher is None:
            return _relative(run_call(denoiser, call), target)
        with _block_outputs(teacher) as theirs, torch.no_grad():
            run_call(teacher, call)
        with _block_outputs(denoiser) as ours:
            found = run_call(denoiser, call)
        features = torch.stack([_relative(a, b) for a, b in zip(ours, theirs, strict=True)])
        return _relative(found, target) + config.feature_weight * features.mean()


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2, in float32."""
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


def _batch(
    calls: Sequence[DenoiserCall],
    wanted: Sequence[Tensor],
    size: int,
    generator: torch.Generator,
) -> tuple[DenoiserCall, Tensor]:
    """At most `size` rows of one call, with what the teacher made of them."""
    index = int(torch.randint(len(calls), (1,), generator=generator))
    call = calls[index]
    rows = torch.randperm(len(call.sample), generator=generator)[:size]
    kwargs = {
        name: value[rows] if value.ndim and len(value) == len(call.sample) else value
        for name, value in call.kwargs.items()
    }
    return DenoiserCall(call.sample[rows], call.timestep[rows], kwargs), wanted[index][rows]


def _log_steps(layers: Mapping[str, SimulatedLayer]) -> dict[str, dict[str, Tensor]]:
    """Logarithms of each layer's step sizes, as leaves that require grad."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        device = layer.module.weight.device
        values = {"weight": layer.scale.weight_scale}
        if layer.scale.input_grid is not None and layer.scale.bucket_amax is None:
            values["input"] = np.asarray(layer.scale.input_scale, np.float32)
        found[name] = {
            kind: torch.tensor(value, device=device).log().requires_grad_(True)
            for kind, value in values.items()
        }
    return found


def _trained(scale: LayerScale, logs: Mapping[str, Tensor]) -> LayerScale:
    """The scale with the ranges of trained step sizes."""
    if "weight" in logs:
        steps = logs["weight"].detach().exp().cpu().numpy()
        amax = np.asarray(steps * GRID_MAX[scale.weight_grid], np.float32)
        scale = replace(scale, weight_amax=amax)
    if "input" in logs and scale.input_grid is not None:
        step = float(logs["input"].detach().exp())
        scale = replace(scale, input_amax=step * GRID_MAX[scale.input_grid])
    return scale


def _frozen_copy(denoiser: nn.Module) -> nn.Module:
    return copy.deepcopy(denoiser).eval().requires_grad_(False)


@contextmanager
def _block_outputs(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """The first output of each block of a U-Net or of a transformer, in the order of the forward
    pass."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks: list[nn.Module] = []
    for name in ("down_blocks", "mid_block", "up_blocks", "transformer_blocks"):
        part = getattr(denoiser, name, None)
        if isinstance(part, nn.ModuleList):
            blocks += list(part)
        elif part is not None:
            blocks.append(part)
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
