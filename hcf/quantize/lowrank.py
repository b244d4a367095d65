"""Low-rank compensation, SVDQuant (Li et al., arXiv 2411.05007, eq. 4 and 5).

    W s = L1 L2 + R,      y = L1 (L2 x') + Q(R) Q(x'),      x' = x / s

The smoothed weight's largest singular directions, where its outliers are, are computed in floating
point beside the layer; only the rest is rounded. A Conv2d is taken as the matrix (O, I * kh * kw):
L2 becomes a convolution with the layer's own kernel to R channels, L1 a 1x1 convolution.

O output channels, K = I * kh * kw, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hcf.quantize.formats import residual_weight
from hcf.quantize.scales import Array, LayerScale


@torch.no_grad()
def low_rank_of(weight: Tensor, scale: LayerScale, rank: int) -> tuple[Array, Array]:
    """weight (O, I, ...) -> (up (O, R), down (R, K)), the best rank-R part of the smoothed weight.

    By the eigenvectors of the smaller Gram matrix, in float64: exact, and quicker than a singular
    value decomposition of a (1280, 11520) matrix.
    """
    w = residual_weight(weight, replace(scale, low_rank=None)).flatten(1).double()
    rank = min(rank, *w.shape)
    if w.shape[0] <= w.shape[1]:
        up = torch.linalg.eigh(w @ w.T).eigenvectors[:, -rank:]
        down = up.T @ w
    else:
        down = torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank:].T
        up = w @ down.T
    # the singular values go half to each side: both factors stay in the range of half precision
    size = (up.norm(dim=0) * down.norm(dim=1)).clamp_min(1e-30).sqrt()
    up = up / up.norm(dim=0).clamp_min(1e-30) * size
    down = down / down.norm(dim=1, keepdim=True).clamp_min(1e-30) * size[:, None]
    return _array(up), _array(down)


def can_have_low_rank(module: nn.Conv2d | nn.Linear, rank: int) -> bool:
    """Whether a branch of `rank` costs less than half of the layer's own work."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return False
    outputs, columns = module.weight.shape[0], module.weight[0].numel()
    return 2 * rank * (outputs + columns) <= outputs * columns


def _array(x: Tensor) -> Array:
    return np.ascontiguousarray(x.float().cpu().numpy())
