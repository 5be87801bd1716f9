"""``SparseLinear``: the N:M-sparse linear layer without quantisation, the baseline of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers, prepare_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
from sbn_lightning.sparsity.config import Gradient, MaskSource
from sbn_lightning.sparsity.pattern import unpack_mask
from sbn_lightning.sparsity.ternary import MaskedLinearFunction, apply_swiglu

# In version 0.1.0 the other names of this list were defined in this file.
__all__ = [
    "Gradient",
    "MaskSource",
    "MaskedLinear",
    "SparseBitLinear",
    "SparseLinear",
    "masked_layers",
    "prepare_layers",
    "ternary_layers",
]


class SparseLinear(MaskedLinear):
    """The unquantised baseline: ``y = x (W * mask)^T + bias`` with a dense straight-through gradient.

    Args:
        in_features: The features of a token; a multiple of the pattern's M.
        out_features: The features of a result.
        bias: Whether the layer adds a bias.
        sparsity: The options of the layer: a :class:`SparsityConfig`, or only a pattern. Options for quantisation have
            no effect here.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        **options: Single fields of :class:`SparsityConfig`, for example ``pattern="2:4"``.

    Raises:
        ConfigError: If an option cannot work. The message names the layer.
    """

    kind = "masked"

    def values(self, masked: bool = True) -> Tensor:
        weight = self.latent()
        return weight * self.mask if masked else weight

    def effective_weight(self) -> Tensor:
        return self.values()

    def _multiply(
        self, x: Tensor, swiglu: bool, dtype: torch.dtype, quantized: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        x = x.to(dtype)
        if swiglu:
            x = apply_swiglu(x)
        mask_bits = self._graph_mask() if torch.compiler.is_compiling() else self.packed_mask()
        mask = unpack_mask(mask_bits, self.in_features)
        y: Tensor = MaskedLinearFunction.apply(x, self.weight, mask, self._gradient_mask(mask_bits))
        return y
