"""ImageCLIP (Taiji-CLIP): sizes, both towers, and the contrastive objective that trains them.

The towers are a `transformers` ChineseCLIPModel: ViT on images, Chinese RoBERTa-wwm on text.
Training: symmetric InfoNCE with the negatives of all processes and a learned temperature (Radford
et al., arXiv 2103.00020); a locked image tower first (Zhai et al., arXiv 2111.07991), as in
Chinese-CLIP (Yang et al., arXiv 2211.01335); patches left out at random (Li et al., FLIP,
arXiv 2212.00794); gradient caching (Gao et al., arXiv 2101.06983) for batches beyond the memory.

B rows of this process, R rows of all processes, S text tokens, L image patches, D projection width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from taiji import presets

Parts = dict[str, float]

MAX_LOGIT_SCALE = 100.0

# Arguments of ChineseCLIPConfig. The image towers of large and huge have 304.0M and 632.1M
# parameters with their projection.
IMAGE_CLIP: dict[str, dict[str, Any]] = {
    "tiny": presets.TINY_IMAGE_CLIP,
    "mini": {
        "text_config": presets.MINI_CLIP_TEXT,
        "vision_config": presets.MINI_CLIP_VISION,
        "projection_dim": presets.MINI_CLIP_PROJECTION,
    },
    "large": presets.IMAGE_CLIP_L14,
    "huge": presets.IMAGE_CLIP_H14,
}


def image_clip_config(preset: str, vocab_size: int) -> ChineseCLIPConfig:
    """Raises ValueError for a preset that is not in `IMAGE_CLIP`."""
    if preset not in IMAGE_CLIP:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(IMAGE_CLIP)}")
    towers = IMAGE_CLIP[preset]
    text = {**towers["text_config"], "vocab_size": vocab_size}
    return ChineseCLIPConfig(**{**towers, "text_config": text})


def text_length(image_clip: ChineseCLIPModel) -> int:
    """Tokens that the text tower is given."""
    return min(presets.IMAGE_CLIP_TOKENS, image_clip.config.text_config.max_position_embeddings)


class TextTower(nn.Module):
    """input_ids, attention_mask (B, S) -> (B, D) of length 1"""

    def __init__(self, image_clip: ChineseCLIPModel) -> None:
        super().__init__()
        self.model, self.projection = image_clip.text_model, image_clip.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(self.projection(hidden[:, 0]), dim=-1)


class ImageTower(nn.Module):
    """images (B, 3, H, W), optionally the patches to look at (B, L) int64 -> (B, D) of length 1"""

    def __init__(self, image_clip: ChineseCLIPModel) -> None:
        super().__init__()
        self.model, self.projection = image_clip.vision_model, image_clip.visual_projection

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.model.embeddings(images)
        if patches is not None:
            index = patches[..., None].expand(-1, -1, x.shape[-1])
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, index)], dim=1)
        x = self.model.encoder(inputs_embeds=self.model.pre_layrnorm(x)).last_hidden_state
        return normalize(self.projection(self.model.post_layernorm(x[:, 0])), dim=-1)


def lock_image_tower(image_clip: ChineseCLIPModel) -> None:
    """No weight of the image tower or its projection is trained: text learns to meet it."""
    for module in (image_clip.vision_model, image_clip.visual_projection):
        module.eval().requires_grad_(False)


@torch.no_grad()
def cap_logit_scale(image_clip: ChineseCLIPModel) -> None:
    image_clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def gather_rows(x: Tensor) -> Tensor:
    """x (B, ...) -> (R, ...): the rows of all processes. The gradient of a row is the sum of what
    every process's loss says about it."""
    return torch.cat(all_gather(x)) if is_initialized() else x


def contrastive_loss(
    text: Tensor, image: Tensor, concept: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """text, image (B, D), concept (B,), scale () -> loss, share of texts that find their image.

    Rows of one concept are positives of each other. The loss is of this process's rows against all
    rows; its mean over processes is the loss of the whole batch, and so are the gradients that
    data-parallel training averages.
    """
    texts, images, concepts = (gather_rows(t) for t in (text, image, concept))
    # bfloat16 has three digits: too few for cosines that differ in the third
    with torch.autocast(text.device.type, enabled=False):
        text_logits = scale.float() * (text.float() @ images.float().t())
        image_logits = scale.float() * (image.float() @ texts.float().t())
    same = (concept[:, None] == concepts[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    loss = -(target * text_logits.log_softmax(1)).sum(1).mean() / 2
    loss = loss - (target * image_logits.log_softmax(1)).sum(1).mean() / 2
    hit = same.gather(1, text_logits.argmax(1, keepdim=True)).mean()
    return loss, hit


class ImageClipObjective(nn.Module):
    """Symmetric InfoNCE of the two towers; rows of one concept are positives of each other.

    `chunk_size` caches gradients: the features of all chunks first, without their activations, then
    the loss over the whole batch, then each chunk again with its gradient. Activation checkpoints
    around the chunks do this inside one `backward`. `masking` is the share of patches left out.
    """

    def __init__(
        self,
        image_clip: ChineseCLIPModel,
        *,
        chunk_size: int | None = None,
        masking: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_clip = image_clip
        self.chunk_size, self.masking = chunk_size, masking

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        concept: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W), input_ids and attention_mask (B, S), concept (B,) -> loss, parts"""
        cap_logit_scale(self.image_clip)
        patches = self.draw_patches(len(images), generator)
        shown = (images,) if patches is None else (images, patches.to(images.device))
        image = self.in_chunks(ImageTower(self.image_clip), *shown)
        text = self.in_chunks(TextTower(self.image_clip), input_ids, attention_mask)
        loss, hit = contrastive_loss(text, image, concept, self.image_clip.logit_scale.exp())
        return loss, {"r1_batch": hit.item()}

    def draw_patches(self, count: int, generator: torch.Generator) -> Tensor | None:
        """(count, L') int64: for each image the patches that are kept."""
        if not self.masking:
            return None
        total = self.image_clip.vision_model.embeddings.num_patches
        kept = max(1, round(total * (1 - self.masking)))
        return torch.rand(count, total, generator=generator).argsort(1)[:, :kept]

    def in_chunks(self, tower: nn.Module, *inputs: Tensor) -> Tensor:
        """inputs (B, ...) -> (B, D)"""
        if self.chunk_size is None:
            return tower(*inputs)
        chunks = zip(*(x.split(self.chunk_size) for x in inputs), strict=True)
        return torch.cat([checkpoint(tower, *chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def retrieval_r1(text: Tensor, image: Tensor) -> tuple[float, float]:
    """text, image (N, D), pairs in order -> R@1 text to image and image to text, of N each"""
    similarity, rows = text @ image.t(), torch.arange(len(text), device=text.device)
    to_image = (similarity.argmax(1) == rows).float().mean().item()
    to_text = (similarity.argmax(0) == rows).float().mean().item()
    return to_image, to_text
