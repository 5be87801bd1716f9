"""What a layer computes with. A layer holds a backend; a precision plugin may give it another.

A backend sees tensors, never a module. ``prepare`` runs once an optimiser step: it makes the ternary weight (and a
fresh mask, if the old one has had its day) and may pack it the way its kernel wants it. ``linear`` runs for every
micro-batch. The reference backend here runs on every device; :mod:`sbn_lightning.backends.integer` has the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, top_n_mask, unpack_mask
from sbn_lightning.sparsity.ternary import TernaryLinearFunction, apply_swiglu, ternary_weight

Keep = int | Tensor
"""Weights kept in each group: one number, or an integer tensor ``[out_features]`` with one for each row."""


WeightSpec = SparsityConfig  # the name of version 0.1.0


class TernaryWeight(NamedTuple):
    """What depends only on the latent weight and its mask. Other backends add fields of their own.

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
        """The packed mask that keeps the ``keep`` largest magnitudes of each group of ``scores [out, in]``."""

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> Any:
        """Makes the ternary weight; called once after each change of the latent weight ``[out, in]``.

        Args:
            latent: Latent weight.
            mask_bits: The packed mask; None for a fresh one from the latent weight.
            keep: Weights that a fresh mask keeps in each group, or at most kept by the given one.
            sparsity: The options of the layer.

        Returns:
            What ``linear`` takes, with at least the attributes of :class:`TernaryWeight`.
        """

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: Any,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
    ) -> Tensor:
        """``x [..., in_features] -> y [..., out_features]`` with gradients for ``x`` and ``latent``.

        With ``swiglu`` the tokens are ``silu(gate) * up`` of gates and ups ``[..., 2 in_features]``.
        """


class ReferenceBackend:
    """Plain PyTorch, any device and dtype."""

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
    ) -> Tensor:
        if swiglu:
            x = apply_swiglu(x)
        codes, row_scale, _ = prepared
        y: Tensor = TernaryLinearFunction.apply(x, latent, codes, row_scale, gradient_mask, activation_bits)
        return y


REFERENCE = ReferenceBackend()
