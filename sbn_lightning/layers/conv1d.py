"""Masked layers with the transposed weight ``[in_features, out_features]`` of GPT-2's ``Conv1D`` (``transformers``).

The parameter stays what it was, transposed storage and all, so optimisers, state dicts and ``save_pretrained`` notice
nothing. Only reading ``layer.weight`` differs: it gives the transposed view ``[out_features, in_features]`` that
everything which works on masked layers expects. Groups therefore run along the input, as in any other layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear


class _TransposedWeight(MaskedLinear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.t()


class SparseBitConv1D(_TransposedWeight, SparseBitLinear):
    """:class:`SparseBitLinear` in place of a ``Conv1D``. Made by conversion only."""


class SparseConv1D(_TransposedWeight, SparseLinear):
    """:class:`SparseLinear` in place of a ``Conv1D``. Made by conversion only."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is exactly a ``Conv1D`` of ``transformers``, told without importing that package."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
