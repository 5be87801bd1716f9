"""What a layer computes with: the protocol of a backend, and the reference in plain PyTorch.

A layer holds a backend, and a precision plugin may give it another one. A backend sees tensors, never a module.
``prepare`` runs once an optimiser step: it makes the ternary weight, and a fresh mask if one is due, and may pack the
weight for its kernel. ``linear`` runs for every micro-batch. The reference runs on every device;
:mod:`sbn_lightning.backends.integer` has the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, top_n_mask, unpack_mask
from sbn_lightning.sparsity.ternary import apply_swiglu, ternary_linear, ternary_weight

Keep = int | Tensor
"""How many weights a mask leaves in each group: one number, or an integer tensor ``[out_features]``, one a row."""


WeightSpec = SparsityConfig  # the name of version 0.1.0


class TernaryWeight(NamedTuple):
    """What depends on the latent weight and its mask alone. Other backends add fields.

    Attributes:
        codes: int8 ``[out_features, in_features]`` in {-1, 0, 1}.
        row_scale: gamma of each row, ``[out_features]``, float32 (float64 for a float64 weight).
        mask_bits: The packed mask, uint8 ``[out_features, ceil(in_features / 8)]``.
    """

    codes: Tensor
    row_scale: Tensor
    mask_bits: Tensor


class Backend(Protocol):
    """How a ternary layer multiplies."""

    @property
    def name(self) -> str:
        """``"reference"``, ``"int8"`` or ``"sparse"``."""

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        """Makes the packed mask that keeps the ``keep`` largest magnitudes of each group of ``scores [out, in]``."""

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> Any:
        """Makes the ternary weight. A layer calls this once after each change of its latent weight.

        Args:
            latent: The latent weight ``[out_features, in_features]``.
            mask_bits: The packed mask; None: a fresh one is made from the latent weight.
            keep: The number of weights that a fresh mask leaves in each group, or that the given mask leaves at most.
            sparsity: The options of the layer.

        Returns:
            The weight for ``linear``, with at least the attributes of :class:`TernaryWeight`.
        """

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: Any,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Multiplies, with gradients for ``x`` and ``latent``: ``[..., in_features]`` -> ``[..., out_features]``.

        Args:
            x: The tokens. With ``swiglu``: gates and ups ``[..., 2 in_features]``, of which the tokens are
                ``silu(gate) * up``.
            latent: The latent weight, which gets a gradient.
            prepared: The result of ``prepare``.
            gradient_mask: The weights that get a gradient, bool; None: all.
            activation_bits: Bits of a quantised token, 8 or 4; None: tokens are not quantised.
            swiglu: Whether ``x`` holds gates and ups.
            dtype: The dtype of the result; None: the dtype of ``x``.
        """


class ReferenceBackend:
    """Plain PyTorch, on any device and in any dtype."""

    name = "reference"

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        return pack_mask(top_n_mask(scores, pattern, keep))

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> TernaryWeight:
        if mask_bits is None:
            mask_bits = self.fresh_mask(latent, sparsity.nm, keep)
        mask = unpack_mask(mask_bits, latent.shape[1])
        return TernaryWeight(*ternary_weight(latent, mask, sparsity.split_sizes, sparsity.gamma_over), mask_bits)

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: TernaryWeight,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if swiglu:
            x = apply_swiglu(x)
        codes, row_scale, _ = prepared
        return ternary_linear(x, latent, codes, row_scale, gradient_mask, activation_bits, dtype)


REFERENCE = ReferenceBackend()
