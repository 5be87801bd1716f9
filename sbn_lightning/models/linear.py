"""The linear layers of a block: ternary, masked or dense, as the configuration says."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.models.config import TransformerConfig


def make_linear(
    config: TransformerConfig, in_features: int, splits: tuple[int, ...], *, bias: bool = False
) -> nn.Linear:
    """Make a linear layer of the kind ``config.linear``.

    Args:
        config: The configuration of the model.
        in_features: The width of the tokens.
        splits: The rows of each part of a fused layer. A ternary layer has one gamma for each part.
        bias: Whether the layer has a bias.
    """
    if config.linear == "dense":
        return nn.Linear(in_features, sum(splits), bias)
    sparsity = replace(config.sparsity, split_sizes=splits if len(splits) > 1 else None)
    layer = SparseLinear if config.linear == "masked" else SparseBitLinear
    return layer(in_features, sum(splits), bias, sparsity=sparsity)
