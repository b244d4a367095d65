"""Both encoders and their fusion as one step: token ids in, the U-Net's conditions out."""

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import ChineseCLIPModel

from taiji.text.fusion import TextFusion
from taiji.text.sandwich import SandwichTextEncoder


class TextConditioner(nn.Module):
    """The text side as one module: ids of both encoders -> context and pooled vector."""

    def __init__(
        self, image_clip: ChineseCLIPModel, text_encoder: SandwichTextEncoder, fusion: TextFusion
    ) -> None:
        super().__init__()
        self.image_clip = image_clip
        self.text_encoder = text_encoder
        self.fusion = fusion

    def forward(
        self,
        clip_ids: Tensor,
        clip_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        keep_clip: Tensor,
        keep_sandwich: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """ids, masks (B, S1), (B, S2); keep (B,) bool -> context (B, S1+S2, D), pooled (B, P)

        The towers see the true masks: a row with nothing to attend to is NaN in softmax. They
        run over the longest text of the batch; fusion replaces what lies beyond by its padding.
        """
        s1, s2 = int(clip_mask.sum(1).max()), int(mask.sum(1).max())
        hidden = self.image_clip.text_model(
            input_ids=clip_ids[:, :s1], attention_mask=clip_mask[:, :s1]
        )[0]
        pooled = self.image_clip.text_projection(hidden[:, 0])
        sandwich = self.text_encoder(ids[:, :s2], mask[:, :s2])
        hidden = pad(hidden, (0, 0, 0, clip_ids.shape[1] - s1))
        sandwich = pad(sandwich, (0, 0, 0, ids.shape[1] - s2))
        context, both = self.fusion(
            hidden, pooled, clip_mask * keep_clip[:, None], sandwich, mask * keep_sandwich[:, None]
        )
        return context, both
