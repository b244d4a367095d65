"""Vector quantisation, with losses and upkeep of the codebook (van den Oord et al., 1711.00937).

    L = |sg[z] - e|^2 + beta |z - sg[e]|^2                                eq. 3, sg: stop gradient
    N <- g N + (1 - g) n,   m <- g m + (1 - g) sum z,   e = m / N        appendix A.1, by EMA

diffusers' VQModel only has the form that latent-diffusion kept for its old checkpoints
(`VectorQuantizer(legacy=True)`): beta on the codebook's term instead of the encoder's. The losses
here are the paper's. The codebook itself is the VQModel's embedding, so a saved model is a plain
one. B batch, D code width, H W, K codes, V vectors (B H W).
"""

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import embedding, mse_loss

MAX_DISTANCES = 2**26  # held at once: 256 MiB, while 8192 codes and a batch of latents need GiB


class CodebookConfig(BaseModel):
    """How the codes are learned. `restart_after` batches without use a code is drawn anew."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    update: Literal["loss", "ema"] = "loss"
    beta: float = Field(0.25, ge=0)
    weight: float = Field(1.0, ge=0)
    decay: float = Field(0.99, ge=0, lt=1)
    restart_after: int | None = Field(None, gt=0)


def vectors(z: Tensor) -> Tensor:
    """z (B, D, H, W) -> (V, D) float32"""
    return z.movedim(1, -1).flatten(0, -2).float()


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """z (B, D, H, W), codebook (K, D) -> (B, H, W) int64"""
    rows = max(1, MAX_DISTANCES // len(codebook))
    parts = vectors(z).split(rows)
    codes = torch.cat([torch.cdist(part, codebook.float()).argmin(1) for part in parts])
    return codes.view(len(z), *z.shape[2:])


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """codes (B, H, W), codebook (K, D) -> (B, D, H, W)"""
    return embedding(codes, codebook).movedim(-1, 1)


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """z, e (B, D, H, W) -> e, through which the gradient reaches z unchanged"""
    return z + (e - z).detach()


def codebook_loss(z: Tensor, e: Tensor, config: CodebookConfig) -> Tensor:
    """z, e (B, D, H, W) -> scalar; by EMA the encoder's part: no gradient moves the codes"""
    commitment = config.beta * mse_loss(z, e.detach())
    return commitment if config.update == "ema" else commitment + mse_loss(e, z.detach())


def code_counts(codes: Tensor, size: int) -> Tensor:
    """codes (B, H, W) -> (K,) how often each was chosen"""
    return torch.bincount(codes.flatten(), minlength=size)


def perplexity(counts: Tensor) -> float:
    """counts (K,) -> exp of the entropy, from 1 (one code) to K (all alike)"""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def usage(counts: Tensor) -> float:
    """counts (K,) -> the share of codes chosen at least once"""
    return float((counts > 0).double().mean())


class CodebookUpkeep(nn.Module):
    """What gradients do not do to a codebook (K, D): running means, and restarts of dead codes.

    The running sum m is not kept: it is N e. In a process group the statistics are summed over the
    processes, whose codebooks stay equal.
    """

    def __init__(self, size: int, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.cluster_size: Tensor
        self.unused: Tensor
        # the initial codes count as one vector each
        self.register_buffer("cluster_size", torch.ones(size))
        self.register_buffer("unused", torch.zeros(size))

    @torch.no_grad()
    def update(
        self, codebook: Tensor, z: Tensor, codes: Tensor, generator: torch.Generator
    ) -> Tensor:
        """codebook (K, D) changed in place by z (B, D, H, W) and codes (B, H, W) -> counts (K,)"""
        flat, chosen = vectors(z), codes.flatten()
        counts = code_counts(codes, len(codebook)).float()
        sums = flat.new_zeros(codebook.shape).index_add_(0, chosen, flat)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        if not torch.isfinite(sums).all():
            return counts  # the training loop skips such a step; the codebook must outlive it
        if self.config.update == "ema":
            self._average(codebook, counts, sums)
        self.unused.add_(1).masked_fill_(counts > 0, 0)
        if self.config.restart_after is not None:
            dead = self.unused >= self.config.restart_after
            self._restart(codebook, dead, flat, chosen, generator)
        return counts

    def _average(self, codebook: Tensor, counts: Tensor, sums: Tensor) -> None:
        mean = self.cluster_size[:, None] * codebook
        self.cluster_size.lerp_(counts, 1 - self.config.decay)
        mean = mean.lerp(sums, 1 - self.config.decay) / self.cluster_size[:, None]
        # a code out of use keeps its place, as both of its running means fade alike
        codebook.copy_(torch.where((counts > 0)[:, None], mean, codebook))

    def _restart(
        self,
        codebook: Tensor,
        dead: Tensor,
        flat: Tensor,
        chosen: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Dead codes move to vectors of this batch, drawn by their squared error (k-means++, Arthur
        and Vassilvitskii 2007): uniform draws would all fall on the background."""
        error = (flat - codebook[chosen]).square().sum(1) + 1e-12
        picks = torch.multinomial(
            error.cpu(), len(codebook), replacement=True, generator=generator
        ).to(flat.device)
        fresh = flat[picks]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        codebook[dead] = fresh[dead].to(codebook.dtype)
        self.cluster_size[dead], self.unused[dead] = 1.0, 0.0
