"""What a layer computes with. A layer holds a backend; a precision plugin may give it another.

A backend sees tensors, never a module. ``prepare`` runs once an optimiser step and may pack the weight the way its
kernel wants it; ``linear`` runs for every micro-batch. The reference backend runs on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sbn_lightning.ternary import TernaryLinearFunction


class TernaryWeight(NamedTuple):
    """What depends only on the latent weight and its mask.

    Attributes:
        codes: int8 ``[out_features, in_features]`` in {-1, 0, 1}.
        row_scale: gamma of each row, ``[out_features]``, float32 (float64 for a float64 weight).
    """

    codes: Tensor
    row_scale: Tensor


class Backend(Protocol):
    """How a ternary layer multiplies."""

    name: str

    def prepare(self, weight: TernaryWeight) -> Any:
        """Turns codes and scales into whatever ``linear`` takes; called once after each change of the weight."""

    def linear(
        self, x: Tensor, latent: Tensor, prepared: Any, gradient_mask: Tensor | None, activation_bits: int | None
    ) -> Tensor:
        """``x [..., in_features] -> y [..., out_features]`` with gradients for ``x`` and ``latent``."""


class ReferenceBackend:
    """Plain PyTorch, any device and dtype."""

    name = "reference"

    def prepare(self, weight: TernaryWeight) -> TernaryWeight:
        return weight

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: TernaryWeight,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
    ) -> Tensor:
        y: Tensor = TernaryLinearFunction.apply(x, latent, *prepared, gradient_mask, activation_bits)
        return y


REFERENCE = ReferenceBackend()
