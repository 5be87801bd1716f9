"""SwiGLU in plain PyTorch, with the quantisation after it and its gradient. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_kernels.quantize.reference import quantize_tokens_reference


def swiglu_reference(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[tokens, 2 features]``, gates then ups, in float32."""
    gate, up = x.float().chunk(2, -1)
    return F.silu(gate) * up


def swiglu_quantize_reference(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantised ``silu(gate) * up``: int8 ``[tokens, features]`` and the scale, float32 ``[tokens]``."""
    return quantize_tokens_reference(swiglu_reference(x), bits)


def swiglu_backward_reference(d: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``silu(gate) * up`` for gates and ups, in the dtype of ``x``.

    Args:
        d: Gradient of the product ``[tokens, features]``.
        x: Gates then ups, ``[tokens, 2 features]``.

    Returns:
        ``[tokens, 2 features]``.
    """
    wide = x.detach().float().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(swiglu_reference(wide), wide, d.float())
    return gradient.to(x.dtype)
