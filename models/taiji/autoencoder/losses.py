"""Losses of the adversarial first stages (Esser et al., "Taming Transformers", arXiv 2012.09841;
Rombach et al., "Latent Diffusion", arXiv 2112.10752; factors as in CompVis/latent-diffusion).

    L = R + w min(norm dR/dW / (norm dG/dW + 1e-4), 1e4) G + regulariser,   R = L1 + w_p perceptual

W is the weight of the decoder's last layer, G the hinge loss of the generator. B batch, C channels,
H W, P patches that a discriminator scores.
"""

import torch
from torch import Tensor
from torch.nn.functional import relu

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPS = 1e-4


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """real, fake (B, 1, P, P) logits -> scalar (Lim and Ye, arXiv 1705.02894)"""
    return (relu(1 - real).mean() + relu(1 + fake).mean()) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    """fake (B, 1, P, P) logits -> scalar"""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Two scalar losses and a weight they depend on -> scalar without gradient (2012.09841, eq. 7).

    Keeps the graph, so that the losses can still be differentiated.
    """
    (pull,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = pull.float().norm() / (push.float().norm() + ADAPTIVE_EPS)
    return ratio.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def psnr(output: Tensor, images: Tensor) -> Tensor:
    """output, images (B, C, H, W) in [-1, 1] -> (B,) dB; the output is clipped to that range"""
    mse = (output.detach().float().clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-8))
