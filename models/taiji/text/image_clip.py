"""Training objective of ImageCLIP, a `transformers` ChineseCLIPModel.

B batch, S text tokens, D projection width.
"""

import torch
from torch import Tensor, nn
from transformers import ChineseCLIPModel

Parts = dict[str, float]


class ImageClipObjective(nn.Module):
    """Symmetric InfoNCE of the two towers; rows of one concept are positives of each other."""

    def __init__(self, image_clip: ChineseCLIPModel) -> None:
        super().__init__()
        self.image_clip = image_clip

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        concept: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W), input_ids and attention_mask (B, S), concept (B,) -> loss, parts"""
        out = self.image_clip(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=images
        )
        logits = out.logits_per_text.float()
        same = (concept[:, None] == concept[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = -(target * logits.log_softmax(1)).sum(1).mean() / 2
        loss = loss - (target * logits.t().log_softmax(1)).sum(1).mean() / 2
        hit = same[torch.arange(len(logits)), logits.argmax(1)].mean()
        with torch.no_grad():  # CLIP's cap on the learned temperature
            self.image_clip.logit_scale.clamp_(max=4.6052)
        return loss, {"r1_batch": hit.item()}
