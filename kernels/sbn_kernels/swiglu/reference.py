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


def saved_gates_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes of gates and ups that ``swiglu_quantize_and_save`` saves, and their scales.

    Args:
        x: Gates then ups, ``[tokens, 2 features]``.

    Returns:
        int8 ``[tokens, 2 features]`` and float32 ``[tokens, 2]``.
    """
    codes, scales = zip(*(quantize_tokens_reference(half) for half in x.chunk(2, -1)), strict=True)
    return torch.cat(codes, -1), torch.stack(scales, -1)


def gates_of_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """The gates and ups that codes stand for, float32 ``[tokens, 2 features]``."""
    return (codes.unflatten(-1, (2, -1)) * scale.unsqueeze(-1)).flatten(-2)
