"""What a layer computes with: the interface of a backend.

A layer holds a backend, and a precision plugin may give it another one. A backend sees tensors, never a module.
``prepare`` runs once an optimiser step: it makes the ternary weight, and a fresh mask if one is due, and may pack the
weight for its kernel. ``linear`` runs for every micro-batch.

Every backend makes masks, prepares weights and multiplies. The other methods and attributes are offers, each with a
default that declines it. Backends of kernels (:mod:`sbn_lightning.backends.integer`) join work, and the backend of a
sharded weight (:mod:`sbn_lightning.distributed.packed`) has other rows and leaves than its layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern

Keep = int | Tensor
"""How many weights a mask leaves in each group: one number, or an integer tensor ``[out_features]``, one a row."""

Gradients = Literal["bf16", "int8", "int8-dx", "int8-dw"]
"""The kinds of gradients: exact, or rounded to int8 for both products of a backward, or for one of the two."""

SavedGates = Literal["full", "int8"]
"""How the gates and ups of a SwiGLU are saved for the backward: as they are, or as codes."""

Operands = tuple[Tensor, Any, Tensor | None, int | None]
"""What ``linear`` takes of a layer: its latent weight, prepared weight, mask of the gradient, and bits of a token."""


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


class Backend(ABC):
    """How a ternary layer multiplies.

    Attributes:
        seed: The seed for stochastic rounding, int64 ``[1]`` on the layer's device; None if nothing is drawn.
        takes_pairs: Whether ``linear`` takes gates and ups in two tensors: ``swiglu`` may be the ups.
        takes_quantized: Whether ``linear`` has an argument ``quantized``: the codes of the tokens and their scales.
        together: A function that prepares the weights of many layers at once, and takes ``(backend, *request)`` for
            each; None if each layer prepares its own.
        leaf: The tensor that takes the place of the latent weight in autograd; None for the weight itself.
        scale_leaf: The same for the learned scales.
    """

    seed: Tensor | None = None
    takes_pairs: bool = False
    takes_quantized: bool = False
    together: Callable[[Sequence[tuple[Any, ...]]], Iterable[Any]] | None = None
    leaf: Tensor | None = None
    scale_leaf: Tensor | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """``"reference"``, ``"int8"`` or ``"sparse"``."""

    @property
    def records(self) -> bool:
        """Whether a CUDA graph can record :meth:`prepare`."""
        return False

    @abstractmethod
    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        """Make the packed mask that keeps the ``keep`` largest magnitudes of each group of ``scores [out, in]``."""

    @abstractmethod
    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> Any:
        """Make the ternary weight. A layer calls this once after each change of its latent weight.

        Args:
            latent: The latent weight ``[out_features, in_features]``.
            mask_bits: The packed mask; None: a fresh one is made from the latent weight.
            keep: The number of weights that a fresh mask leaves in each group, or that the given mask leaves at most.
            sparsity: The options of the layer.

        Returns:
            The weight for ``linear``, with at least the attributes of :class:`TernaryWeight`.
        """

    @abstractmethod
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
        """Multiply, with gradients for ``x`` and ``latent``: ``[..., in_features]`` -> ``[..., out_features]``.

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

    def from_codes(
        self, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, keep: Keep, sparsity: SparsityConfig
    ) -> Any:
        """Make the same as :meth:`prepare`, from codes that are there already.

        Args:
            codes: int8 ``[out, in]``.
            row_scale: gamma of each row, float32 ``[out]``.
            mask_bits: The packed mask.
            keep: The most weights that the mask keeps in a group, for all rows or for each.
            sparsity: The options of the layer.
        """
        return TernaryWeight(codes, row_scale, mask_bits)

    def without_codes(self, prepared: Any) -> Any:
        """Return the prepared weight without its codes, if the products do not read them."""
        return prepared

    def with_codes(self, prepared: Any, in_features: int) -> Any:
        """Return the prepared weight with its codes, which :meth:`without_codes` may have dropped."""
        return prepared

    def rows(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight that :meth:`prepare` takes: all, or those of this rank if it is sharded."""
        return weight

    def whole_latent(self, weight: Tensor) -> Tensor:
        """Return a latent weight with the rows of all ranks."""
        return weight

    # A compiled block asks for what follows. The results are those of the layers one after the other.

    def several(
        self, x: Tensor, layers: Sequence[Operands], backends: Sequence[Any], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Compute layers that read the same tokens as one layer (:mod:`sbn_lightning.backends.joined`).

        Args:
            x: The tokens, ``[..., in]``.
            layers: The operands of each layer.
            backends: The backends of the layers, all of this class.
            dtype: The dtype of the results.

        Returns:
            The result of each layer, ``[..., out]``; nothing if the layers have to run one after the other.
        """
        return ()

    def joins_gated(self, backend: Any) -> bool:
        """Whether :meth:`gated` may serve a layer with this backend and a later one with ``backend``, of this class."""
        return False

    def gated(
        self, x: Tensor, first: Operands, last: Operands, backend: Any, dtype: torch.dtype,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Compute both layers around a SwiGLU: ``last(silu(gate) * up)`` with ``gate, up = first(x)``.

        The first layer has this backend (:mod:`sbn_lightning.backends.gated`).

        Args:
            x: The tokens, ``[..., in]``.
            first: The operands of the first layer.
            last: The operands of the last layer.
            backend: The backend of the last layer, of this class.
            dtype: The dtype of the results.
            quantized: The codes of ``x`` and their scales, if they exist already.

        Returns:
            ``[..., out]``; None if the two have to run one after the other.
        """
        return None

    def gated_pair(
        self, x: Tensor, layers: tuple[Operands, ...], backends: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor | None:
        """Compute three layers around a SwiGLU, the first two of them joined: ``last(silu(gate(x)) * up(x))``.

        Args:
            x: The tokens, ``[..., in]``.
            layers: The operands of gate, up and last.
            backends: The backends of the three layers, all of this class.
            dtype: The dtype of the results.

        Returns:
            ``[..., out]``; None if the layers have to run one after the other.
        """
        return None

    def gated_product(self, gate_up: Tensor) -> Tensor | None:
        """Return ``silu(gate) * up`` for a layer that is partly rounded; None if the layer computes the product.

        Args:
            gate_up: Gates and ups side by side, ``[..., 2 features]``.
        """
        return None

    def joins_norm(self, x: Tensor, bits: int, norm: nn.Module) -> bool:
        """Whether :meth:`norm_and_quantize` serves the norm before a layer, which has this backend.

        Args:
            x: The tokens before the norm.
            bits: The bits of a quantised token of the layer.
            norm: The norm, which has a weight and ``eps``.
        """
        return False

    def norm_and_quantize(
        self, x: Tensor, residual: Tensor | None, norm: nn.Module, bits: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Add the residual, and norm and quantise the sum.

        Args:
            x: The tokens, ``[..., features]``.
            residual: The residual to add to the tokens, ``[..., features]``; None adds nothing.
            norm: The norm.
            bits: The bits of a quantised token.

        Returns:
            The sum, ``[..., features]``; the normed tokens, for gradients, whose values nobody needs; and their codes,
            int8 ``[tokens, features]``, with scales, float32 ``[tokens]``.
        """
        raise NotImplementedError

    def turns_heads(self, x: Tensor, cos: Tensor) -> bool:
        """Whether :meth:`turned_heads` serves the result of a fused q, k, v layer, which has this backend.

        Args:
            x: The result of the layer.
            cos: The table of cosines.
        """
        return False

    def turned_heads(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, splits: tuple[int, int, int], size: int
    ) -> tuple[Tensor, ...]:
        """Split the result of a fused q, k, v layer into heads, and rotate queries and keys by position.

        Args:
            qkv: ``[batch, tokens, features]``.
            cos: float32 ``[tokens, size]``.
            sin: float32 ``[tokens, size]``, negated in the first half.
            splits: The features of queries, keys and values.
            size: The features of a head.

        Returns:
            Queries, keys and values, ``[batch, heads, tokens, size]``.
        """
        raise NotImplementedError
