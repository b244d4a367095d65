"""PatchGAN discriminator (Isola et al., arXiv 1611.07004): scores overlapping patches of an image.

Three layers of width 64 are the published discriminator of the VQ and KL first stages: 2,765,633
parameters, patches of 70x70 pixels. B batch, C channels, H W pixels, P patches a side.
"""

from torch import Tensor, nn

SLOPE = 0.2
MAX_WIDENING = 8


class PatchDiscriminator(nn.Module):
    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise ValueError(f"width {width} and layers {layers} must be at least 1")
        self.least_size = 3 * 2**layers
        widths = [width * min(2**i, MAX_WIDENING) for i in range(layers + 1)]
        body = [*_layer(channels, width, stride=2, normalised=False)]
        for i in range(1, layers + 1):
            body += _layer(widths[i - 1], widths[i], stride=2 if i < layers else 1)
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> logits (B, 1, P, P)"""
        if min(x.shape[-2:]) < self.least_size:
            raise ValueError(
                f"images of {x.shape[-1]}x{x.shape[-2]} leave no patch: use fewer layers, or "
                f"images of {self.least_size} pixels and more"
            )
        return self.body(x)


def _layer(ins: int, outs: int, *, stride: int, normalised: bool = True) -> list[nn.Module]:
    convolution = nn.Conv2d(ins, outs, 4, stride, padding=1, bias=not normalised)
    # no running statistics: a discriminator is only used while it trains, and so has no state
    # besides its parameters
    norm = [nn.BatchNorm2d(outs, track_running_stats=False)] if normalised else []
    return [convolution, *norm, nn.LeakyReLU(SLOPE)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
