"""Low-rank adapters (Hu et al., arXiv 2106.09685) and DreamBooth (Ruiz et al., arXiv 2208.12242).

An avatar: a few images of one subject under a rare word, with images that the model itself draws
of the subject's class, so that the class stays what it was (prior preservation). A style of game
art: images of the domain under a style word. Either replays a share of general data. The format is
diffusers': `load_lora_adapter` of the U-Net reads what is saved, so do LoRA loaders and mergers.

B rows, C channels, h w latent grid.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

# of self- and cross-attention; the last two are family A's, for the text
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
WEIGHTS = "pytorch_lora_weights.safetensors"


class LoraSettings(BaseModel):
    """The update of a weight is alpha / rank times a product of two matrices of `rank`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(64, gt=0)
    alpha: float | None = Field(None, gt=0)  # None: as the rank, a factor of 1
    dropout: float = Field(0.0, ge=0, lt=1)


class BatchShares(BaseModel):
    """A batch of DreamBooth: `replay` of the rows are general data, the others half subject and
    half prior. `prior_weight` is the factor on the loss of the prior's rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replay: float = Field(0.15, ge=0, lt=1)
    prior_weight: float = Field(1.0, ge=0)

    def rows(self, count: int) -> tuple[int, int, int]:
        """Rows of subject, prior and replay, of `count`. Raises ValueError when one would have
        none that should have some."""
        replay = round(count * self.replay)
        prior = (count - replay) // 2 if self.prior_weight else 0
        subject = count - replay - prior
        if min(subject, prior or not self.prior_weight, replay or not self.replay) == 0:
            raise ValueError(
                f"a batch of {count} leaves no row for the subject, the prior or a replay of "
                f"{self.replay}: use a larger batch_size"
            )
        return subject, prior, replay


def add_lora(unet: Any, settings: LoraSettings, name: str = "default") -> list[nn.Parameter]:
    """Puts a new adapter beside every attention projection and returns its parameters, the only
    ones of the U-Net that are left to train. The U-Net computes what it did until they move.

    Raises ValueError when the name is taken or the U-Net has no such projection, ImportError
    without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'hcf-toolkit[lora]'") from error
    if name in getattr(unet, "peft_config", {}):
        raise ValueError(f"the U-Net has an adapter {name!r}: delete_adapters({name!r}) first")
    leaves = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear)]
    if not any(leaf.endswith(PROJECTIONS) for leaf in leaves):
        raise ValueError(f"{type(unet).__name__} has none of {', '.join(PROJECTIONS)}")
    unet.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(PROJECTIONS),
        init_lora_weights="gaussian",
    )
    unet.add_adapter(config, adapter_name=name)
    return [p for p in unet.parameters() if p.requires_grad]


def save_lora(unet: Any, folder: Path, name: str = "default") -> Path:
    """`folder`/pytorch_lora_weights.safetensors, for
    `unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)`; rank and alpha are in its
    metadata."""
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    unet.save_lora_adapter(staging, adapter_name=name, weight_name=WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(staging / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(staging)
    return folder / WEIGHTS


def dreambooth_loss(
    loss_of: Callable[[slice], tuple[Tensor, dict[str, float]]], count: int, shares: BatchShares
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch of B = `count` rows that are subject, prior and replay, in that order,
    and each part's mean. `loss_of(rows)` is the mean loss of a slice of it.

    Equation 2 of DreamBooth, as a mean over rows: subject + prior_weight prior + replay.
    """
    total, parts, first = torch.zeros(()), dict[str, float](), 0
    weights = {"subject": 1.0, "prior": shares.prior_weight, "replay": 1.0}
    for (name, weight), rows in zip(weights.items(), shares.rows(count), strict=True):
        if rows:
            loss, _ = loss_of(slice(first, first + rows))
            total = total.to(loss.device) + weight * rows / count * loss
            parts[name] = loss.item()
            first += rows
    return total, parts


def trained_share(unet: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[int, float]:
    """How many parameters are trained, and their share of the frozen ones."""
    number = sum(p.numel() for p in trained)
    return number, number / (sum(p.numel() for p in unet.parameters()) - number)
