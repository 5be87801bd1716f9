"""Two ternary layers with a SwiGLU between them, joined where both run on a backend that joins them.

Joined, the backward does less work (:mod:`sbn_lightning.backends.gated`); the results are the same. The layers run one
after the other if they have hooks, if the first one has a bias, and while only a share of the rounding takes effect.
Gate and up in two layers become one layer in a compiled training step (:mod:`sbn_lightning.backends.joined`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sbn_lightning.layers.options import in_compiled_training, is_hooked, result_dtype
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


def swiglu_between(
    first: nn.Module, last: nn.Module, x: Tensor, quantized: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Compute ``last(silu(gate) * up)`` with ``gate, up = first(x)``, side by side in one tensor.

    Args:
        first: The layer that makes gates and ups.
        last: The layer after the SwiGLU, which takes ``swiglu=True``.
        x: The tokens, ``[..., features]``.
        quantized: The codes of the tokens and their scales, if the first layer's backend takes them.

    Returns:
        ``[..., features]``.
    """
    y = _joined(first, last, x, quantized)
    if y is None:
        given = {} if quantized is None else {"quantized": quantized}
        gates = first(x, **given)
        product = _product(last, gates)
        y = last(gates, swiglu=True) if product is None else last(product)
    return y


def swiglu_of_pair(gate: nn.Module, up: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
    """Compute ``last(silu(gate(x)) * up(x))``; the backend of the last layer takes gates and ups in two tensors.

    Args:
        gate: The layer that makes the gates.
        up: The layer that makes the ups.
        last: The layer after the SwiGLU.
        x: The tokens, ``[..., features]``.

    Returns:
        ``[..., features]``.
    """
    y = _joined_pair(gate, up, last, x)
    return last(gate(x), swiglu=up(x)) if y is None else y


def _product(last: nn.Module, gate_up: Tensor) -> Tensor | None:
    """``silu(gate) * up`` before a layer that is partly rounded; None if the layer computes the product itself."""
    if type(last) is not SparseBitLinear or not last.is_partly_rounded:
        return None
    return last.backend.gated_product(gate_up)


def _can_join(layer: nn.Module) -> bool:
    return type(layer) is SparseBitLinear and not layer.is_partly_rounded and not is_hooked(layer)


def _joined_pair(gate: nn.Module, up: nn.Module, last: nn.Module, x: Tensor) -> Tensor | None:
    """The result in one step; None if the layers cannot be joined."""
    layers = (gate, up, last)
    if not in_compiled_training() or not all(_can_join(layer) for layer in layers) or not x.is_floating_point():
        return None
    backends = tuple(layer.backend for layer in layers)
    if len({type(backend) for backend in backends}) > 1:
        return None
    if gate.bias is not None or up.bias is not None:
        return None
    dtype = result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        operands = tuple(layer.for_gradients() for layer in layers)
        y: Tensor | None = gate.backend.gated_pair(x, operands, backends, dtype)
        return y if y is None or last.bias is None else y + last.bias.to(y.dtype)


def _joined(first: nn.Module, last: nn.Module, x: Tensor, quantized: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """The result in one step; None if the layers cannot be joined."""
    if not _can_join(first) or not _can_join(last) or not x.is_floating_point():
        return None
    if first.bias is not None or type(last.backend) is not type(first.backend):
        return None
    if not first.backend.joins_gated(last.backend):
        return None
    dtype = result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor | None = first.backend.gated(
            x, first.for_gradients(), last.for_gradients(), last.backend, dtype, quantized
        )
        return y if y is None or last.bias is None else y + last.bias.to(y.dtype)
