"""Masked layers with the transposed weight ``[in_features, out_features]`` of GPT-2's ``Conv1D`` (``transformers``).

The parameter stays as it was and keeps its transposed storage, so optimisers, state dicts and ``save_pretrained``
notice nothing. Only the attribute ``layer.weight`` differs: it is a transposed view ``[out_features, in_features]``,
the shape that all code for masked layers expects. Groups therefore run along the input, as in any other masked layer.
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
    """A :class:`SparseBitLinear` that was a ``Conv1D``. Only a conversion makes one."""


class SparseConv1D(_TransposedWeight, SparseLinear):
    """A :class:`SparseLinear` that was a ``Conv1D``. Only a conversion makes one."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is exactly a ``Conv1D`` of ``transformers``. The check does not import that package."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
