"""The names of `hcf.quantize.quantize` under the module's earlier name."""

from hcf.quantize.quantize import choose_layers, quantize, sampling_of

__all__ = ["choose_layers", "quantize", "sampling_of"]
