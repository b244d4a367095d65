"""A quantised layer in floating-point arithmetic: what an engine computes from its scales.

    y = (1 / g) W' Q((x / s) g) + L1 L2 (x / s) + b,      W' = Q(W s - L1 L2)

s smoothing (I,), g the gain of the timestep's bucket (B,), L1 L2 the low-rank branch; each is there
only if the layer's scale has it. The exported graph has the same operations in the same order.

B batch, O output channels, I input channels, K = I * kh * kw, T timestep buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hcf.quantize.formats import (
    codes,
    fake_quantize_groups,
    group_of,
    input_channels,
    weight_on_grid,
)
from hcf.quantize.scales import LayerScale
from hcf.quantize.statistics import bucket_of

HELD_BYTES = 2 * 2**30  # rounded weights kept beside the model; above it they are made at each call


class SimulatedLayer:
    """One layer under its scale; called as its forward. `gain` (B,) is set for each denoiser call.

    `trained` replaces the scales by tensors that require grad: {"input": (), "weight": like
    weight_amax}, both step sizes.
    """

    def __init__(
        self,
        module: nn.Conv2d | nn.Linear,
        scale: LayerScale,
        *,
        hold: bool = True,
        trained: Mapping[str, Tensor] | None = None,
    ) -> None:
        weight = module.weight
        self.module, self.scale, self.trained = module, scale, trained or {}
        self.axis = 1 if isinstance(module, nn.Conv2d) else -1
        self.smooth = self._per_channel(scale.smooth)
        self.low_rank: tuple[Tensor, Tensor] | None = None
        if scale.low_rank is not None:
            up, down = (torch.from_numpy(part).to(weight) for part in scale.low_rank)
            if isinstance(module, nn.Conv2d):
                up, down = up[..., None, None], down.view(-1, *weight.shape[1:])
            self.low_rank = up, down
        self.group = (
            group_of(scale, input_channels(module), weight[0].numel())
            if scale.scheme == "int4"
            else 0
        )
        self.gain: Tensor | None = None
        with torch.no_grad():
            self.weight = weight_on_grid(weight.detach(), scale) if hold else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) or (B, ..., I) -> what the module makes of it, in x's type."""
        if self.smooth is not None:
            x = x * self.smooth.to(x.dtype)
        gain = None if self.gain is None else self.gain.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        weight = self.weight
        if weight is None:
            weight = weight_on_grid(self.module.weight, self.scale, self.trained.get("weight"))
        apart = gain is not None or self.low_rank is not None
        y = self._product(
            self._rounded(x if gain is None else x * gain),
            weight.to(x.dtype),
            None if apart else self.module.bias,
        )
        if gain is not None:
            y = y / gain
        if self.low_rank is not None:
            y = y + self._branch(x, *self.low_rank)
        if apart and self.module.bias is not None:
            y = y + self._bias().to(y.dtype)
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        if self.group:
            return fake_quantize_groups(x, self.axis, self.group)
        if (grid := self.scale.input_grid) is None:
            return x
        step = self.trained.get("input")
        if step is None:
            step = torch.tensor(self.scale.input_scale, dtype=torch.float32, device=x.device)
        return (codes(x, step, grid) * step).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            return self.module._conv_forward(x, weight, bias)
        return nn.functional.linear(x, weight, bias)

    def _branch(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            inner = self.module._conv_forward(x, down.to(x.dtype), None)
            return nn.functional.conv2d(inner, up.to(x.dtype))
        return nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def _bias(self) -> Tensor:
        bias = cast(Tensor, self.module.bias)
        return bias.view(-1, 1, 1) if isinstance(self.module, nn.Conv2d) else bias

    def _per_channel(self, smooth: Any) -> Tensor | None:
        """1 / s, broadcastable to the input."""
        if smooth is None:
            return None
        inverse = torch.from_numpy(1 / smooth).to(self.module.weight.device)
        return inverse.view(-1, 1, 1) if isinstance(self.module, nn.Conv2d) else inverse


@contextmanager
def fake_quantized(denoiser: nn.Module, scales: Mapping[str, LayerScale]) -> Iterator[nn.Module]:
    """Inside, `denoiser` computes what engines with `scales` compute, in its own arithmetic; then
    it is as it was. Rounded weights take as much memory as the layers, up to 2 GiB."""
    modules = {name: quantisable(denoiser, name) for name in scales}
    size = sum(m.weight.numel() * m.weight.element_size() for m in modules.values())
    layers = {
        name: SimulatedLayer(module, scales[name], hold=size <= HELD_BYTES)
        for name, module in modules.items()
    }
    with replaced_forwards(denoiser, layers):
        yield denoiser


@contextmanager
def replaced_forwards(denoiser: nn.Module, layers: Mapping[str, SimulatedLayer]) -> Iterator[None]:
    """Inside, the modules called as in `layers` are computed by these."""
    gains = timestep_gains(layers)

    def set_gains(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        for name, (table, edges) in gains.items():
            layer = layers[name]
            layer.gain = table[bucket_of(edges, timestep)].to(layer.module.weight.device)

    handle = denoiser.register_forward_pre_hook(set_gains, with_kwargs=True) if gains else None
    before: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers.values():
            # routed and offloaded modules have a forward of their own on the instance
            before.append((layer.module, layer.module.__dict__.get("forward")))
            layer.module.forward = layer  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
        if handle is not None:
            handle.remove()


def timestep_gains(layers: Mapping[str, SimulatedLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer with buckets: (gains (T,), edges (T + 1,) float64)."""
    return {
        name: (torch.from_numpy(gain), torch.from_numpy(edges).double())
        for name, layer in layers.items()
        if (gain := layer.scale.bucket_gain) is not None
        and (edges := layer.scale.bucket_edges) is not None
    }


def quantisable(denoiser: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """The Conv2d or Linear called `name`; TypeError for any other module."""
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Conv2d or Linear")
    return module
