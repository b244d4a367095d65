"""How close a kernel has to be: as close to float64 as torch is in the same dtype, times a factor.

|kernel - fp64|_max <= factor * |torch - fp64|_max + eps(dtype) * |fp64|_max
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Tensor]


def to_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating-point tensors of `arguments` in float64, everything else as it is."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return float((found.double() - exact).abs().max())


def assert_as_close_as_torch(
    found: Tensor, reference: Operator, *arguments: Any, factor: float = 2.0
) -> None:
    """AssertionError where `found` is further from the float64 `reference` than the rule allows.

    `reference(*arguments)` is the operator in plain torch, in the dtype of the arguments.
    """
    exact = reference(*to_float64(arguments)).double()
    same = reference(*arguments)
    assert found.shape == same.shape, f"shape {tuple(found.shape)} != {tuple(same.shape)}"
    assert found.dtype == same.dtype, f"dtype {found.dtype} != {same.dtype}"
    assert torch.isfinite(found).all() == torch.isfinite(exact).all(), "values that are not finite"
    error, torchs = largest_error(found, exact), largest_error(same, exact)
    limit = factor * torchs + torch.finfo(same.dtype).eps * float(exact.abs().max())
    assert error <= limit, f"error {error:.3g}, torch's {torchs:.3g}, limit {limit:.3g}"


def assert_same_codes(found: Tensor, exact: Tensor, share: float = 1e-3) -> None:
    """8-bit codes: none further than one step apart, at most `share` of them apart at all.

    int8 steps are integers; e4m3 steps are neighbours in the order of their bit patterns. A value
    that lies on the edge between two codes may fall either way.
    """
    assert found.dtype == exact.dtype and found.shape == exact.shape
    steps = (_ordinal(found) - _ordinal(exact)).abs()
    assert int(steps.max()) <= 1, f"codes up to {int(steps.max())} steps apart"
    apart = float((steps > 0).double().mean())
    assert apart <= share, f"{apart:.2%} of the codes differ, {share:.2%} may"


def _ordinal(codes: Tensor) -> Tensor:
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)
