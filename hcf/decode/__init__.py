"""VAE decode: checked outputs, a precision that is safe, tiles without seams, a tiny decoder."""

from hcf.decode.checks import check_image, decoder_dtype, prefer_channels_last
from hcf.decode.lpips import Lpips
from hcf.decode.tiles import (
    blend_tiles,
    decode,
    decode_exact,
    decode_tiled,
    latent_factor,
    seam_db,
)
from hcf.decode.tiny import (
    DecoderComparison,
    TinyDecoder,
    check_latent_space,
    compare_decoders,
    open_decoder,
)

__all__ = [
    "DecoderComparison",
    "Lpips",
    "TinyDecoder",
    "blend_tiles",
    "check_image",
    "check_latent_space",
    "compare_decoders",
    "decode",
    "decode_exact",
    "decode_tiled",
    "decoder_dtype",
    "latent_factor",
    "open_decoder",
    "prefer_channels_last",
    "seam_db",
]
