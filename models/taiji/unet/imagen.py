"""The U-Net of the Imagen paper (Saharia et al., arXiv 2205.11487): family B.

What sets it apart from a `UNet2DConditionModel`: self- and cross-attention are one softmax over
image and text tokens, the context has a width of its own, and pooled text enters the time
embedding. The layer plan is that of NVIDIA/NeMo's `UNetModel` (nemo/collections/multimodal/modules/
imagen/diffusionmodules/nets.py before 2025-08), which the parameter counts of docs/models.md match.

B batch, C channels, H W, S text tokens, Dt text width, D context width, T time width.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn.functional import silu

from taiji.unet.blocks import Conditioning, LayerSizes, zeroed
from taiji.unet.widths import check_size, check_unet


class ImagenUNet(ModelMixin, ConfigMixin):
    """sample (B, C, H, W), text (B, S, Dt) -> (B, C', H, W); called as a `UNet2DConditionModel`.

    H and W must divide by 2 to the number of levels less one.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        layers_per_block: tuple[int, ...] = (3, 3, 3, 3),
        attention_levels: tuple[bool, ...] = (False, True, True, True),
        attention_head_dim: int = 64,
        cross_attention_dim: int = 512,
        encoder_hid_dim: int = 1024,
        norm_num_groups: int = 32,
        class_embed_type: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_unet(self.config)
        widths = block_out_channels
        sizes = LayerSizes(
            time_width=4 * widths[0],
            context_width=cross_attention_dim,
            head_dim=attention_head_dim,
            groups=norm_num_groups,
            dropout=dropout,
        )
        self.conditioning = Conditioning(
            widths[0],
            sizes.time_width,
            encoder_hid_dim,
            cross_attention_dim,
            noise_level=class_embed_type == "timestep",
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.down_samplers, skips = _down_path(
            sizes, widths, layers_per_block, attention_levels
        )
        self.mid_block = nn.ModuleList(
            sizes.layer(widths[-1], widths[-1], attention) for attention in (True, False)
        )
        self.up_blocks, self.up_samplers = _up_path(
            sizes, widths, layers_per_block, attention_levels, skips
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[0])
        self.conv_out = zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1))

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
        noise level of a low-resolution image, if the U-Net has one. Raises ValueError for a size
        or a condition it cannot take."""
        check_size(sample.shape, len(self.down_blocks))
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        time, context = self.conditioning(
            sample, timestep, encoder_hidden_states, mask, class_labels
        )
        x = self.conv_in(sample)
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            for layer in block.children():
                x = layer(x, time, context, mask)
                skips.append(x)
            if level < len(self.down_samplers):
                x = self.down_samplers[level](x)
                skips.append(x)
        for layer in self.mid_block:
            x = layer(x, time, context, mask)
        for level, block in enumerate(self.up_blocks):
            for layer in block.children():
                x = layer(torch.cat([x, skips.pop()], dim=1), time, context, mask)
            if level < len(self.up_samplers):
                x = self.up_samplers[level](x)
        x = self.conv_out(silu(self.norm_out(x)))
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)


def _down_path(
    sizes: LayerSizes, widths: Sequence[int], counts: Sequence[int], attended: Sequence[bool]
) -> tuple[nn.ModuleList, nn.ModuleList, list[int]]:
    """Blocks and halving convolutions, level by level, and the width of every skip they leave."""
    blocks, samplers = nn.ModuleList(), nn.ModuleList()
    skips, width_in = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        ins = [width_in] + [width] * (counts[level] - 1)
        blocks.append(nn.ModuleList(sizes.layer(n, width, attended[level]) for n in ins))
        skips += [width] * counts[level]
        if level < len(widths) - 1:
            samplers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            skips.append(width)
        width_in = width
    return blocks, samplers, skips


def _up_path(
    sizes: LayerSizes,
    widths: Sequence[int],
    counts: Sequence[int],
    attended: Sequence[bool],
    skips: list[int],
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Blocks and doubling convolutions from the deepest level up; every layer takes one skip."""
    blocks, samplers = nn.ModuleList(), nn.ModuleList()
    left, width_in = list(skips), widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        ins = [width_in] + [width] * counts[level]
        blocks.append(
            nn.ModuleList(sizes.layer(n + left.pop(), width, attended[level]) for n in ins)
        )
        if level:
            samplers.append(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
        width_in = width
    return blocks, samplers
