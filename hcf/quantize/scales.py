"""The numbers a quantised denoiser needs beside its weights: one `LayerScale` a layer.

Everything is symmetric: x_q = grid(x / scale), x ~ x_q * scale, scale = amax / q, q the largest
value of the grid (127, 448 or 7). Schemes and their grids are in `hcf.quantize.formats`.

On disk: `<component>/quantization.safetensors`. The metadata entry "schemes" is a JSON object from
layer to scheme (a file without it is int8 throughout); the tensors of a layer are

    <layer>.weight_amax       () per tensor, (O,) per output channel, or (O, blocks): the weight as
                              (O, I * kh * kw) cut into equal blocks along its second dimension
    <layer>.input_amax        (): static activations only
    <layer>.smooth            (I,): the input is divided by it, the weight multiplied
    <layer>.low_rank_up       (O, R) and
    <layer>.low_rank_down     (R, I * kh * kw): computed beside the layer in floating point
    <layer>.bucket_amax       (T,) largest input in each bucket of timesteps, and
    <layer>.bucket_edges      (T + 1,), rising

O output channels, I input channels, kh kw the kernel (1 for a Linear), R rank, T buckets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcf.errors import InvalidArtifact

INT8_MAX = 127
GRID_MAX = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
SCALES_FILE = "quantization.safetensors"
REPORT_FILE = "quantization.json"
# scheme -> (grid of the weights, grid of static activations or None)
SCHEMES: dict[str, tuple[str, str | None]] = {
    "int8": ("int8", "int8"),
    "fp8": ("fp8", "fp8"),
    "int8-weight": ("int8", None),
    "int4-weight": ("int4", None),
    "int4": ("int4", None),  # its activations have a scale a group, found when it runs
}
FIELDS = (
    "weight_amax",
    "input_amax",
    "smooth",
    "low_rank_up",
    "low_rank_down",
    "bucket_amax",
    "bucket_edges",
)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LayerScale:
    """How one layer is quantised; shapes as in the module's docstring, amax in the tensor's units.

    input_amax is None where the input stays in floating point or has its scales found at run time;
    with `smooth` it is that of the smoothed input. low_rank is (up (O, R), down (R, I * kh * kw)).
    """

    input_amax: float | None
    weight_amax: Array
    scheme: str = "int8"
    smooth: Array | None = None
    low_rank: tuple[Array, Array] | None = None
    bucket_amax: Array | None = None
    bucket_edges: Array | None = None

    @property
    def weight_grid(self) -> str:
        """Grid the weights lie on: int8, fp8 or int4."""
        return SCHEMES[self.scheme][0]

    @property
    def input_grid(self) -> str | None:
        """Grid of static activations, None where there is none."""
        return SCHEMES[self.scheme][1]

    @property
    def input_scale(self) -> float:
        """Size of one step of the input. ValueError where the input has no static range."""
        if self.input_amax is None or self.input_grid is None:
            raise ValueError(f"{self.scheme} has no static input range")
        return self.input_amax / GRID_MAX[self.input_grid]

    @property
    def weight_scale(self) -> Array:
        """Size of one step of the weight, in the shape of weight_amax.

        A channel of zeros (zero-initialised output projections) has amax 0; any positive scale
        represents it exactly.
        """
        amax = np.where(self.weight_amax > 0, self.weight_amax, np.float32(1.0))
        return np.asarray(amax / GRID_MAX[self.weight_grid], dtype=np.float32)

    @property
    def bucket_gain(self) -> Array | None:
        """(T,) >= 1: by what the input of each bucket is multiplied so that it fills the range.

        By homogeneity W x = (W (x g)) / g for any g > 0, so one constant scale serves all buckets.
        """
        if self.bucket_amax is None or self.input_amax is None:
            return None
        return np.maximum(np.float32(self.input_amax) / self.bucket_amax, 1).astype(np.float32)


def write_scales(path: Path, scales: Mapping[str, LayerScale]) -> None:
    """Write `path`; replacing it atomically is the caller's business: it writes into a staged
    folder."""
    from safetensors.numpy import save_file

    tensors: dict[str, Array] = {}
    for name, layer in scales.items():
        up, down = layer.low_rank if layer.low_rank is not None else (None, None)
        amax = None if layer.input_amax is None else np.asarray(layer.input_amax, np.float32)
        values = (layer.weight_amax, amax, layer.smooth, up, down)
        for field, value in zip(
            FIELDS, (*values, layer.bucket_amax, layer.bucket_edges), strict=True
        ):
            if value is not None:
                array = np.asarray(value, dtype=np.float32)
                tensors[f"{name}.{field}"] = array if array.ndim == 0 else array.copy(order="C")
    schemes = {name: layer.scheme for name, layer in scales.items()}
    save_file(tensors, str(path), metadata={"schemes": json.dumps(schemes, sort_keys=True)})


def read_scales(path: Path) -> dict[str, LayerScale]:
    """Read what `write_scales` wrote, in name order.

    Raises `InvalidArtifact` if the file is missing, cut short, lacks half of a pair, names an
    unknown scheme, or holds NaN, inf or amax <= 0.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidArtifact(
            f"{path} does not exist", fix="run `hcf quantize` on this model first"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            schemes = json.loads((file.metadata() or {}).get("schemes", "{}"))
            tensors: dict[str, Array] = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidArtifact(
            f"{path} cannot be read: {error}", fix="run `hcf quantize` again"
        ) from error
    fields: dict[str, dict[str, Array]] = {}
    for key in sorted(tensors):
        name, _, field = key.rpartition(".")
        if field not in FIELDS:
            raise InvalidArtifact(f"{path} holds an unknown tensor {key!r}")
        fields.setdefault(name, {})[field] = tensors[key]
    scales = {
        name: _layer_scale(name, schemes.get(name, "int8"), values, path)
        for name, values in fields.items()
    }
    check_scales(scales, str(path))
    return scales


def check_scales(scales: Mapping[str, LayerScale], where: str) -> None:
    """Raise `InvalidArtifact` naming every layer whose amax is NaN, infinite or no scale."""
    broken = [name for name, layer in scales.items() if not _usable(layer)]
    if broken:
        raise InvalidArtifact(
            f"{where}: {len(broken)} layer(s) have a range that is NaN, infinite or zero: "
            + ", ".join(sorted(broken)[:12]),
            fix="look for NaN weights or dead inputs, or add an `exclude` rule",
        )


def _usable(layer: LayerScale) -> bool:
    positive = [np.asarray(layer.input_amax), layer.smooth, layer.bucket_amax]
    if layer.input_amax is None:
        positive[0] = None
    finite = [layer.weight_amax, layer.bucket_edges, *(layer.low_rank or ())]
    return (
        all(a is None or (np.isfinite(a).all() and (a > 0).all()) for a in positive)
        and all(a is None or np.isfinite(a).all() for a in finite)
        and bool((layer.weight_amax >= 0).all())
    )


def _layer_scale(name: str, scheme: str, values: Mapping[str, Array], path: Path) -> LayerScale:
    again = "run `hcf quantize` again"
    if scheme not in SCHEMES:
        raise InvalidArtifact(
            f"{path}: {name} has the scheme {scheme!r}, known are {', '.join(SCHEMES)}", fix=again
        )
    needed = ["weight_amax", *(["input_amax"] if SCHEMES[scheme][1] else [])]
    for one, other in (("low_rank_up", "low_rank_down"), ("bucket_amax", "bucket_edges")):
        needed += [other] if one in values else []
        needed += [one] if other in values else []
    if missing := [field for field in needed if field not in values]:
        have = ", ".join(f"{name}.{field}" for field in values)
        raise InvalidArtifact(f"{path} has {have} but no {name}.{missing[0]}", fix=again)
    amax = values.get("input_amax")
    return LayerScale(
        input_amax=None if amax is None else float(amax),
        weight_amax=values["weight_amax"],
        scheme=scheme,
        smooth=values.get("smooth"),
        low_rank=(values["low_rank_up"], values["low_rank_down"])
        if "low_rank_up" in values
        else None,
        bucket_amax=values.get("bucket_amax"),
        bucket_edges=values.get("bucket_edges"),
    )
