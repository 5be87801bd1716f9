"""A packed layer as one torch operator: ``torch.ops.sbn_lightning.packed_linear``.

A server compiles a model for any number of tokens and captures CUDA graphs for some numbers. The layer's choice of a
kernel depends on the number of tokens. If ``torch.compile`` saw this choice, the compiled code would hold for one
number of tokens alone. As an operator the layer is opaque to ``torch.compile``, and the choice is made in each call, or
once for each captured graph.

With tensor parallelism a layer may see slices of tokens. The scale of a token belongs to the whole token, so such a
layer is also given the magnitude of the whole tokens.

The operator has no gradient. It is registered as in :mod:`sbn_kernels.runtime.ops`: without the checks of
``torch.library.custom_op`` at each call, which take longer than most kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.sparsity.ternary import ternary_linear

_LIBRARY = torch.library.Library("sbn_lightning", "FRAGMENT")


def packed_linear(
    x: Tensor,
    codes: Tensor,
    gamma: Tensor,
    row_scale: Tensor,
    packed: Tensor | None,
    layout: str,
    kernel: str | None,
    activation_bits: int | None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Compute ``(x8 @ codes^T) * s * row_scale``, the product of :class:`PackedTernaryLinear` without a bias.

    Args:
        x: The tokens, ``[..., in_features]``.
        codes: The ternary codes, int8 ``[out_features, in_features]``.
        gamma: The weight scale of each part, float32 ``[parts]``.
        row_scale: gamma of each row, float32 ``[out_features]``.
        packed: The weight in the form that the kernel reads; None if the kernel reads the codes.
        layout: The form of ``packed``.
        kernel: The kernel for many tokens; None for plain PyTorch.
        activation_bits: 8, 4, or None to multiply the tokens as they are.
        magnitude: The :func:`~sbn_lightning.sparsity.ternary.token_magnitude` of the whole tokens, ``[..., 1]``, if
            ``x`` holds slices of tokens. None means that ``x`` holds whole tokens.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``.
    """
    if kernel is None:
        return ternary_linear(x, gamma, codes, row_scale, None, activation_bits, x.dtype, magnitude)
    from sbn_lightning.backends.products import multiply, quantize

    assert activation_bits is not None
    whole = None if magnitude is None else magnitude.reshape(-1, 1)
    x8, scale = quantize(x.reshape(-1, x.shape[-1]), activation_bits, whole)
    y = multiply(x8, scale, codes, row_scale, packed, layout, kernel, x.dtype)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def _shape(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    """An empty tensor like the result, for a trace."""
    return x.new_empty(*x.shape[:-1], codes.shape[0])


_LIBRARY.define(
    "packed_linear" + torch.library.infer_schema(packed_linear, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("packed_linear", packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sbn_lightning::packed_linear", _shape, lib=_LIBRARY)


def run_packed(layer: PackedTernaryLinear, x: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """Compute what a packed layer computes, without its bias, by the operator.

    Args:
        layer: The layer. It has chosen its kernel already, on the device where it runs.
        x: The tokens, ``[..., in_features]``.
        magnitude: As for :func:`packed_linear`.
    """
    y: Tensor = torch.ops.sbn_lightning.packed_linear(
        x,
        layer.codes,
        layer.gamma,
        layer.row_scale,
        layer._packed,
        layer._layout,
        layer._kernel,
        layer.activation_bits,
        magnitude,
    )
    return y
