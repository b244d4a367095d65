"""Rounding to 8 bits inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2**23: added to a float32 below 2**22 and taken off again, the fraction is rounded away,
# to nearest even. Triton's own rint is not in its interpreter.
MAGIC = tl.constexpr(12582912.0)
# The interpreter's conversion to e4m3 cuts subnormals off and loses the carry into the exponent
# (0.4999 becomes 0.25): it is given values that are on the grid already.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_codes(v, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
    """v / scale in float32 -> int8 of -127..127, or e4m3 of -448..448"""
    if INT8:
        clamped = tl.minimum(tl.maximum(v, -127.0), 127.0)
        codes = ((clamped + MAGIC) - MAGIC).to(tl.int8)
    else:
        clamped = tl.minimum(tl.maximum(v, -448.0), 448.0)
        if INTERPRETED:
            clamped = _on_e4m3_grid(clamped)
        codes = clamped.to(tl.float8e4nv)
    return codes


@triton.jit
def _on_e4m3_grid(v):  # type: ignore[no-untyped-def]
    """Three bits after the leading one, down to 2**-6, then steps of 2**-9."""
    exponent = (v.to(tl.int32, bitcast=True) >> 23) & 255
    step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
    return ((v / step + MAGIC) - MAGIC) * step
