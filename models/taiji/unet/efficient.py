"""Efficient U-Net for pixel super-resolution (Saharia et al., arXiv 2205.11487).

Against the U-Net it starts from: most residual blocks sit at low resolution; a block halves the
resolution before its convolutions and doubles it after them; skip connections are scaled by
1/sqrt(2) and added. The deepest level does not halve. Layer plan and counts are those of
NVIDIA/NeMo's `EfficientUNetModel` (nets.py before 2025-08), which scales the shortcut inside each
residual block instead.

B batch, C channels, H W, S text tokens, Dt text width, D context width, T time width.
"""

import math

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from taiji.unet.blocks import Conditioning, LayerSizes
from taiji.unet.widths import check_size, check_unet


class EfficientUNet(ModelMixin, ConfigMixin):
    """sample (B, C, H, W) with the low-resolution image in its last channels, text (B, S, Dt)
    -> (B, C', H, W); called as a `UNet2DConditionModel`.

    Without `self_attention` only the text is attended to, and memory grows as the pixels do.
    H and W must divide by 2 to the number of levels less one.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 6,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024),
        layers_per_block: tuple[int, ...] = (2, 4, 8, 8, 8),
        attention_levels: tuple[bool, ...] = (False, False, False, True, True),
        self_attention: bool = True,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        encoder_hid_dim: int = 1024,
        norm_num_groups: int = 32,
        class_embed_type: str | None = "timestep",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_unet(self.config)
        widths = block_out_channels
        above = (widths[0], *widths[:-1])  # where the up block of a level ends
        sizes = LayerSizes(
            time_width=4 * widths[0],
            context_width=cross_attention_dim,
            head_dim=attention_head_dim,
            groups=norm_num_groups,
            dropout=dropout,
            self_attention=self_attention,
            always_project=True,
        )
        self.conditioning = Conditioning(
            widths[0],
            sizes.time_width,
            encoder_hid_dim,
            cross_attention_dim,
            noise_level=class_embed_type == "timestep",
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        levels_down = list(zip(above, widths, layers_per_block, attention_levels, strict=True))
        self.down_blocks = nn.ModuleList(
            _block(sizes, width_in, width, count, attended)
            for width_in, width, count, attended in levels_down
        )
        self.up_blocks = nn.ModuleList(
            _block(sizes, width_in, width, count, attended)
            for width, width_in, count, attended in reversed(levels_down)
        )
        halved = above[:-1]
        self.down_samplers = nn.ModuleList(
            nn.Conv2d(width, width, 4, stride=2, padding=1) for width in halved
        )
        self.up_samplers = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for width in reversed(halved)
        )
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """`encoder_attention_mask` (B, S), 0 where a token is padding; `class_labels` (B,) the
        noise level of the low-resolution image. Raises ValueError for a size or a condition it
        cannot take."""
        check_size(sample.shape, len(self.down_blocks))
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        time, context = self.conditioning(
            sample, timestep, encoder_hidden_states, mask, class_labels
        )
        x = self.conv_in(sample)
        skips = []
        for level, block in enumerate(self.down_blocks):
            if level < len(self.down_samplers):
                x = self.down_samplers[level](x)
            for layer in block.children():
                x = layer(x, time, context, mask)
            skips.append(x)
        skips.pop()  # the deepest goes straight on
        for level, block in enumerate(self.up_blocks):
            if level:
                x = x + skips.pop() * math.sqrt(0.5)
            for layer in block.children():
                x = layer(x, time, context, mask)
            if level:
                x = self.up_samplers[level - 1](x)
        x = self.conv_out(x)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)


def _block(
    sizes: LayerSizes, width_in: int, width: int, count: int, attended: bool
) -> nn.ModuleList:
    """`count` layers from `width_in` to `width`, the last of them attended."""
    ins = [width_in] + [width] * (count - 1)
    return nn.ModuleList(
        sizes.layer(n, width, attended and i == count - 1) for i, n in enumerate(ins)
    )
