"""Safetensors files checked without torch: header, length, types, and no NaN or infinity.

diffusers loads NaN and integer weights in silence; a file that is cut short fails far from its
cause. Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hcf.errors import InvalidArtifact

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
# Storage read as unsigned integers: (numpy type, mask, value) where (x & mask) == value is NaN or
# infinite. An all-ones exponent; E4M3 has no infinity and a single NaN pattern per sign.
NON_FINITE = {
    "F64": ("<u8", 0x7FF0000000000000, 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000, 0x7F800000),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
}
MAX_HEADER_BYTES = 100_000_000
COPY_AGAIN = "copy the file again from its source; it is damaged"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type, shape, and byte range [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """{name: entry} of a safetensors file; InvalidArtifact where the file is not whole."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InvalidArtifact(f"{file} is truncated: {size} bytes, no header", COPY_AGAIN)
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: TensorEntry(
                    item["dtype"],
                    tuple(item["shape"]),
                    8 + length + item["data_offsets"][0],
                    8 + length + item["data_offsets"][1],
                )
                for name, item in header.items()
            }
    except OSError as error:
        raise InvalidArtifact(f"{file} cannot be read: {error}", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidArtifact(f"{file} is not a safetensors file: {error}", COPY_AGAIN) from error
    for name, entry in entries.items():
        expected = prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
        if entry.dtype in ITEM_BYTES and entry.end - entry.start != expected:
            raise InvalidArtifact(
                f"{file}: {name} has shape {list(entry.shape)} {entry.dtype}, {expected} bytes, "
                f"but {entry.end - entry.start} are stored",
                COPY_AGAIN,
            )
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "too long"
        raise InvalidArtifact(f"{file} is {state}: {size} of {end} bytes", COPY_AGAIN)
    return entries


def check_weights(file: Path) -> dict[str, TensorEntry]:
    """`read_header`, and every value is finite and every weight or bias a floating-point number."""
    import numpy as np

    entries = read_header(file)
    for name, entry in entries.items():
        if entry.dtype not in NON_FINITE:
            if name.endswith((".weight", ".bias")):
                raise InvalidArtifact(
                    f"{file}: {name} is {entry.dtype}, not floating point",
                    fix="give the unquantised weights; `hcf quantize` makes the integer form",
                )
            continue
        kind, mask, value = NON_FINITE[entry.dtype]
        stored = (
            np.memmap(file, np.uint8, "r") if entry.end > entry.start else np.zeros(0, np.uint8)
        )
        # Offsets need not be aligned: bytes are sliced first, and copied where the view needs it.
        raw = np.ascontiguousarray(stored[entry.start : entry.end])
        bits = np.frombuffer(raw.tobytes() if raw.ctypes.data % 8 else raw, np.dtype(kind))
        broken = int(np.count_nonzero((bits & bits.dtype.type(mask)) == bits.dtype.type(value)))
        if broken:
            raise InvalidArtifact(
                f"{file}: {name} has {broken} NaN or infinite of {bits.size} values",
                fix="the model is damaged or its training diverged: use an earlier checkpoint",
            )
    return entries
