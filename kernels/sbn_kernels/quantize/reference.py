"""Quantisation of tokens in plain PyTorch: what the kernel here is tested against. Needs no Triton.

Formulas (BitNet b1.58, arXiv 2402.17764)::

    8 bits: s = max(max|x|, 1e-5) / 127            x8 = clamp(round(x / s), -128, 127)
    4 bits: s = max(mean|x|, 1e-5) / sqrt(7)       x8 = clamp(round(x / s), -8, 7)
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_tokens_reference(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantises each row of ``x`` to signed integers.

    Args:
        x: ``[tokens, features]``, any float dtype.
        bits: 8 or 4.

    Returns:
        int8 ``[tokens, features]`` and the scale, float32 ``[tokens]``.
    """
    wide = x.float()
    if bits == 8:
        reduced, low, high, divisor = wide.abs().amax(1), -128, 127, 127.0
    else:
        reduced, low, high, divisor = wide.abs().mean(1), -8, 7, 7**0.5
    # divided by a tensor: CUDA multiplies by the reciprocal of a Python number, which is off in the last bit
    scale = reduced.clamp(min=1e-5) / wide.new_tensor(divisor)
    return (wide / scale[:, None]).round().clamp(low, high).to(torch.int8), scale
