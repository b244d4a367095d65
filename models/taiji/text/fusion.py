"""Fusion of two text encoders along tokens, with a pooled vector for the U-Net's time embedding.

Each encoder passes its own LayerNorm + MLP to the context width; the sequences are concatenated
along tokens; masked positions are replaced by a learned padding vector per position (HunyuanDiT's
practice). Pooled = [ImageCLIP projected CLS ; attention-pooled Sandwich].

B batch, S1/S2 tokens of ImageCLIP and Sandwich, D context width, P1 ImageCLIP projection width,
D2 Sandwich width.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


def _project(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width_in), nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width)
    )


class AttentionPool(nn.Module):
    """x (B, S, D), keep (B, S) bool -> (B, D): one learned query over the kept tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        # A row with no kept token has equal scores of -1e4: finite, and masked by the caller.
        scores = self.score(x).squeeze(-1).masked_fill(~keep, -1e4)
        weights = scores.softmax(dim=-1)
        return self.out((weights[..., None] * x).sum(dim=1))


class TextFusion(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        clip_width: int = 1024,
        clip_projection: int = 1024,
        clip_tokens: int = 52,
        sandwich_width: int = 1024,
        sandwich_tokens: int = 128,
        context_width: int = 1024,
    ) -> None:
        super().__init__()
        self.clip_proj = _project(clip_width, context_width)
        self.sandwich_proj = _project(sandwich_width, context_width)
        self.pool = AttentionPool(sandwich_width)
        self.padding = nn.Parameter(
            torch.randn(clip_tokens + sandwich_tokens, context_width) * 0.02
        )

    def forward(
        self,
        clip_hidden: Tensor,
        clip_pooled: Tensor,
        clip_mask: Tensor,
        sandwich_hidden: Tensor,
        sandwich_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Context (B, S1+S2, D) and pooled (B, P1+D2) of both encoders' states and masks (B, S).

        An encoder whose mask is all zero in a row is absent there: its tokens are padding and its
        half of the pooled vector is zero. Both absent is the null condition of guidance.
        """
        keep = torch.cat([clip_mask, sandwich_mask], dim=1).bool()
        context = torch.cat([self.clip_proj(clip_hidden), self.sandwich_proj(sandwich_hidden)], 1)
        context = torch.where(keep[..., None], context, self.padding.to(context.dtype))
        has_clip = clip_mask.bool().any(1, keepdim=True).to(context.dtype)
        has_sandwich = sandwich_mask.bool().any(1, keepdim=True).to(context.dtype)
        pooled = self.pool(sandwich_hidden, sandwich_mask.bool())
        return context, torch.cat([clip_pooled * has_clip, pooled * has_sandwich], dim=1)
