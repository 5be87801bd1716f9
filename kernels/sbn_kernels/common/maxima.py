"""Maxima that a NaN comes through, in device code: ``tl.max`` and ``tl.maximum`` drop it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(value):
    """The bits of |value|: in their order, NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger(a, b):
    """The larger of two numbers."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
