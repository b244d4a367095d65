"""Ranges of weights, one layer at a time: the largest value, or that of least squared error.

The search for the least squared error is nvidia-modelopt's `MseCalibrator`, given our rounding, one
tensor at a time: modelopt's own entry takes a copy of the model.

O output channels, I input channels, K = I * kh * kw.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcf.errors import MissingDependency
from hcf.quantize.formats import block_of, codes, residual_weight
from hcf.quantize.scales import GRID_MAX, Array, LayerScale

START, STOP, STEP = 0.5, 1.0, 0.025  # candidates of the search, as shares of the largest value


@torch.no_grad()
def weight_amax(
    weight: Tensor,
    scale: LayerScale,
    *,
    algorithm: str = "max",
    granularity: str = "channel",
    block_size: int = 64,
) -> Array:
    """weight (O, I, ...) -> its range under scale.scheme, after smoothing and less the low rank.

    () per tensor, (O,) per channel, or (O, blocks) for 4 bits. `algorithm` is "max" or "mse".
    Raises MissingDependency for "mse" without nvidia-modelopt.
    """
    w = residual_weight(weight.detach(), scale).flatten(1)
    grid = scale.weight_grid
    if grid == "int4":
        rows = w.view(-1, block_of(w.shape[1], block_size))
    else:
        rows = w.reshape(1, -1) if granularity == "tensor" and grid == "fp8" else w
    amax = rows.abs().amax(1)
    if algorithm == "mse":
        amax = mse_rows(rows, amax, grid)
    if grid == "int4":
        amax = amax.view(len(w), -1)
    elif len(rows) == 1 and len(w) > 1:
        amax = amax[0]
    return np.asarray(amax.float().cpu().numpy(), dtype=np.float32)


def mse_rows(rows: Tensor, amax: Tensor, grid: str) -> Tensor:
    """rows (N, K), amax (N,) -> of 0.5, 0.525, .. 1 times amax that of least squared error."""
    with quiet():
        try:
            from modelopt.torch.quantization.calib import MseCalibrator
        except ImportError as error:
            raise MissingDependency(
                f"the search for ranges of least squared error needs nvidia-modelopt: {error}",
                fix="pip install 'nvidia-modelopt==0.47.*', or set quantize.weight_algorithm=max",
            ) from error

    def rounded(x: Tensor, candidate: Tensor) -> Tensor:
        step = (candidate.clamp_min(1e-30) / GRID_MAX[grid])[:, None]
        return codes(x, step, grid) * step

    search: Any = MseCalibrator(
        amax=amax.float(),
        axis=0,
        step_size=STEP,
        start_multiplier=START,
        stop_multiplier=STOP,
        quant_func=rounded,
    )
    search.collect(rows)
    found: Tensor = search.compute_amax()
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """modelopt warns about versions it was not tested with and prints what it inserts; errors still
    come through."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
