"""Device code of maxima that let a NaN through; ``tl.max`` and ``tl.maximum`` drop a NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(value):
    """The bits of |value|. They order as the values do, with NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger(a, b):
    """The larger of two numbers, or NaN if one of them is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
