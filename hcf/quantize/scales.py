"""The numbers a quantised denoiser needs beside its weights: one `LayerScale` a layer.

INT8 here is symmetric: x_q = clip(round(x / scale), -128, 127), x ~ x_q * scale, scale = amax /
127. Activations have one scale a tensor, weights one scale an output channel (axis 0 of the torch
weight). On disk: `<component>/quantization.safetensors` with `<layer>.input_amax` () and
`<layer>.weight_amax` (O,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcf.errors import InvalidArtifact

INT8_MAX = 127
SCALES_FILE = "quantization.safetensors"
REPORT_FILE = "quantization.json"


@dataclass(frozen=True)
class LayerScale:
    """input_amax: scalar; weight_amax (O,): largest absolute value INT8 can hold, in the tensor's
    units."""

    input_amax: float
    weight_amax: NDArray[np.float32]

    @property
    def input_scale(self) -> float:
        """Size of one INT8 step of the input."""
        return self.input_amax / INT8_MAX

    @property
    def weight_scale(self) -> NDArray[np.float32]:
        """Size of one INT8 step of each output channel, (O,).

        A channel of zeros (zero-initialised output projections) has amax 0; any positive scale
        represents it exactly.
        """
        amax = np.where(self.weight_amax > 0, self.weight_amax, np.float32(1.0))
        return (amax / INT8_MAX).astype(np.float32)


def write_scales(path: Path, scales: Mapping[str, LayerScale]) -> None:
    """Write `path` (safetensors) atomically is the caller's business: it writes into a staged
    folder."""
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[np.float32]] = {}
    for name, layer in scales.items():
        tensors[f"{name}.input_amax"] = np.asarray(layer.input_amax, dtype=np.float32)
        tensors[f"{name}.weight_amax"] = np.ascontiguousarray(layer.weight_amax, dtype=np.float32)
    save_file(tensors, str(path))


def read_scales(path: Path) -> dict[str, LayerScale]:
    """Read what `write_scales` wrote, in name order.

    Raises `InvalidArtifact` if the file is missing, cut short, lacks half of a pair, or holds NaN,
    inf or amax <= 0.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise InvalidArtifact(
            f"{path} does not exist", fix="run `hcf quantize` on this model first"
        )
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidArtifact(
            f"{path} cannot be read: {error}", fix="run `hcf quantize` again"
        ) from error
    scales: dict[str, LayerScale] = {}
    for key in sorted(tensors):
        name, _, field = key.rpartition(".")
        if field not in ("input_amax", "weight_amax"):
            raise InvalidArtifact(f"{path} holds an unknown tensor {key!r}")
        other = "weight_amax" if field == "input_amax" else "input_amax"
        if f"{name}.{other}" not in tensors:
            raise InvalidArtifact(
                f"{path} has {key} but no {name}.{other}", fix="run `hcf quantize` again"
            )
        if field == "input_amax":
            scales[name] = LayerScale(float(tensors[key]), tensors[f"{name}.weight_amax"])
    check_scales(scales, str(path))
    return scales


def check_scales(scales: Mapping[str, LayerScale], where: str) -> None:
    """Raise `InvalidArtifact` naming every layer whose amax is NaN, infinite or no scale."""
    broken = [
        name
        for name, layer in scales.items()
        if not math.isfinite(layer.input_amax)
        or layer.input_amax <= 0
        or not np.isfinite(layer.weight_amax).all()
        or (layer.weight_amax < 0).any()
    ]
    if broken:
        raise InvalidArtifact(
            f"{where}: {len(broken)} layer(s) have a range that is NaN, infinite or zero: "
            + ", ".join(sorted(broken)[:12]),
            fix="look for NaN weights or dead inputs, or add an `exclude` rule",
        )
