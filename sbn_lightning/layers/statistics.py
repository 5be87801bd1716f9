"""Statistics of masked layers: how many weights are zero and why, and how much changed since the last look.

A zero is *natural* if the weight rounds to zero by itself (``|W| <= gamma / 2``). A zero is *enforced* if only the mask
makes the weight zero. A flip rate is the share of mask bits, or of ternary codes, that differ between two looks. Flip
rates vary far less between seeds than losses do, so they are the sharper test of an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.pattern import pack_mask, unpack_mask


class Snapshot(NamedTuple):
    """A layer's mask and codes, packed to one bit each, uint8 ``[out_features, ceil(in_features / 8)]``."""

    mask: Tensor
    nonzero: Tensor
    negative: Tensor

    @classmethod
    def of(cls, layer: MaskedLinear) -> Snapshot:
        """Take a snapshot of a layer."""
        values = layer.values()
        return cls(layer.packed_mask().clone(), pack_mask(values != 0), pack_mask(values < 0))


@dataclass
class Counts:
    """Counts of weights in one layer, or summed over layers.

    Attributes:
        weights: The number of all weights.
        kept: The number of weights that the mask keeps.
        natural: The number of weights that are zero by themselves.
        enforced: The number of weights that are zero only because of the mask.
        mask_flips: The number of mask bits that changed since the last look.
        code_flips: The number of ternary codes that changed since the last look; 0 in a layer that is not quantised.
    """

    weights: float = 0
    kept: float = 0
    natural: float = 0
    enforced: float = 0
    mask_flips: float = 0
    code_flips: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def shares(self) -> dict[str, float]:
        """Return the counts as shares of all weights, by metric name."""
        total = max(self.weights, 1)
        return {
            "zeros": (self.natural + self.enforced) / total,
            "zeros_natural": self.natural / total,
            "zeros_enforced": self.enforced / total,
            "mask_density": self.kept / total,
            "flip_rate_mask": self.mask_flips / total,
            "flip_rate_code": self.code_flips / total,
        }


@torch.no_grad()
def count(
    layers: dict[str, MaskedLinear], before: dict[str, Snapshot]
) -> tuple[dict[str, Counts], dict[str, Snapshot]]:
    """Look at every layer, and count its zeros and what changed since the last look.

    Args:
        layers: The layers by name.
        before: The snapshots of the last look, by layer. A layer without a snapshot counts no flips.

    Returns:
        The counts by layer, and the snapshots for the next look. All counts leave the device in one transfer.
    """
    rows, after = [], {}
    for name, layer in layers.items():
        now = after[name] = Snapshot.of(layer)
        mask, free = unpack_mask(now.mask, layer.in_features), layer.values(masked=False) != 0
        zero = torch.zeros((), dtype=torch.int64, device=mask.device)
        mask_flips = code_flips = zero
        if name in before:
            old = Snapshot(*(part.to(mask.device) for part in before[name]))
            mask_flips = unpack_mask(now.mask ^ old.mask, layer.in_features).sum()
            if isinstance(layer, SparseBitLinear):
                changed = (now.nonzero ^ old.nonzero) | (now.negative ^ old.negative)
                code_flips = unpack_mask(changed, layer.in_features).sum()
        rows.append(torch.stack([mask.sum(), (~free).sum(), (free & ~mask).sum(), mask_flips, code_flips]))
    # With a device_map over several GPUs, each GPU has the counts of its layers.
    table = torch.stack([row.to(rows[0].device) for row in rows]).tolist() if rows else []
    weights = [layer.weight.numel() for layer in layers.values()]
    return {name: Counts(total, *row) for name, total, row in zip(layers, weights, table, strict=True)}, after


def kind_of(name: str) -> str:
    """The kind of a layer: the last part of its name that is not a number, ``blocks.3.mlp.down`` -> ``down``."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def by_kind(counts: dict[str, Counts]) -> dict[str, Counts]:
    """Sum the counts of all layers of the same kind; see :func:`kind_of`."""
    kinds: dict[str, Counts] = {}
    for name, item in counts.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), Counts()) + item
    return kinds
