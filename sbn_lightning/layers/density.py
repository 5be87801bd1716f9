"""How many weights a group of each row keeps while a ramp makes a layer sparse."""

from __future__ import annotations

import torch

from sbn_lightning.backends.base import Keep
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.pattern import NMPattern

_GOLDEN_RATIO = (5**0.5 - 1) / 2


def check_density(pattern: NMPattern, keep_n: int, sparse_share: float) -> None:
    """Check the two numbers that say how much a mask keeps.

    Args:
        pattern: The pattern of the layer.
        keep_n: The number of weights that each group of a sparse row keeps.
        sparse_share: The share of rows that are sparse.

    Raises:
        ConfigError: If a value is out of range.
    """
    if not pattern.n <= keep_n <= pattern.m:
        raise ConfigError(f"keep_n={keep_n} is outside {pattern.n} to {pattern.m}, pattern {pattern}")
    if not 0.0 <= sparse_share <= 1.0:
        raise ConfigError(f"sparse_share={sparse_share} is outside 0..1")


def kept_in_rows(pattern: NMPattern, keep_n: int, sparse_share: float, out_features: int, device: torch.device) -> Keep:
    """Say how many weights a fresh mask keeps in a group.

    Rows become sparse in a fixed order that spreads evenly (multiples of the golden ratio). While the share grows, no
    row turns dense again.

    Args:
        pattern: The pattern of the layer.
        keep_n: The number of weights that each group of a sparse row keeps.
        sparse_share: The share of rows that are sparse.
        out_features: The number of rows.
        device: The device of the weight.

    Returns:
        One number if all rows keep the same, else an integer tensor with one number for each row.
    """
    if not 0 < sparse_share < 1:
        return keep_n if sparse_share > 0 else pattern.m
    where = "cpu" if device.type == "mps" else device  # MPS has no float64.
    rows = torch.arange(1, out_features + 1, dtype=torch.float64, device=where)
    sparse = ((rows * _GOLDEN_RATIO).frac() < sparse_share).to(device)
    return torch.where(sparse, keep_n, pattern.m)
