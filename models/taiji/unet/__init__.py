"""U-Nets that diffusers does not have, the check of their widths, and SD's weights in Taiji-SD."""

from taiji.unet.efficient import EfficientUNet
from taiji.unet.imagen import ImagenUNet
from taiji.unet.stable_diffusion import load_sd1_unet, zero_pooled_text
from taiji.unet.widths import check_unet, check_widths

__all__ = [
    "EfficientUNet",
    "ImagenUNet",
    "check_unet",
    "check_widths",
    "load_sd1_unet",
    "zero_pooled_text",
]
