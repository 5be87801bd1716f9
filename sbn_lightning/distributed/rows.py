"""The rows of a weight on several ranks: how they are cut, and how codes and masks travel at 2 bits for each weight.

Rows are cut as ``DTensor`` cuts them with ``Shard(0)``: every rank has ``ceil(rows / ranks)`` rows, and the last ranks
have fewer or none. Groups of M lie within a row, so no cut goes through a group.

A ternary weight with a mask has four states: 0, +1, -1 and masked. Two bits have four values, so codes and mask travel
together, in a quarter of a byte for each weight. A weight that the mask zeroes and a weight that rounds to zero by
itself stay different.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sbn_lightning.sparsity.pattern import pack_mask

# Newer versions of torch have the first name, and deprecate the second one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MASKED = 3  # The two-bit value of a masked weight. The values 0, 1 and 2 are the codes 0, +1 and -1.


@dataclass(frozen=True)
class RowCut:
    """The rows of one weight that each rank has.

    Attributes:
        rows: The number of rows of the whole weight.
        rank: The number of this process in the group that shares the rows.
        ranks: The number of processes in that group.
    """

    rows: int
    rank: int
    ranks: int

    @property
    def padded(self) -> int:
        """The number of rows that every rank sends, which is the number of rows of the first rank."""
        return -(-self.rows // self.ranks)

    @property
    def first(self) -> int:
        """The first row of this rank."""
        return min(self.rank * self.padded, self.rows)

    @property
    def count(self) -> int:
        """The number of rows of this rank, 0 or more."""
        return min(self.padded, self.rows - self.first)

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor ``[rows, ...]``, as a view."""
        return whole.narrow(0, self.first, self.count)

    def parts(self, split_sizes: tuple[int, ...] | None) -> list[tuple[int, int]]:
        """The parts of a fused weight of which this rank has rows, as pairs ``(index of the part, number of rows)``."""
        found, start = [], 0
        for part, size in enumerate(split_sizes or (self.rows,)):
            rows = min(start + size, self.first + self.count) - max(start, self.first)
            if rows > 0:
                found.append((part, rows))
            start += size
        return found

    def pad(self, mine: Tensor) -> Tensor:
        """Append rows of zeros to the rows of this rank, up to ``[padded, ...]``."""
        if self.count == self.padded:
            return mine.contiguous()
        whole = mine.new_zeros(self.padded, *mine.shape[1:])
        whole[: self.count] = mine
        return whole


def encode(codes: Tensor, mask: Tensor) -> Tensor:
    """Pack codes and mask, four weights in each byte. The first weight takes the lowest bits.

    Args:
        codes: The codes in {-1, 0, 1}, int8 ``[rows, in_features]``; 0 wherever ``mask`` is False.
        mask: The mask, bool in the shape of ``codes``.

    Returns:
        The packed values, uint8 ``[rows, ceil(in_features / 4)]``.
    """
    # The code -1 becomes 2. The value 3 is then free for masked weights.
    values = torch.where(mask, torch.where(codes < 0, 2, codes), MASKED).to(torch.uint8)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 4), value=MASKED).unflatten(-1, (-1, 4))
    return values[..., 0] | values[..., 1] << 2 | values[..., 2] << 4 | values[..., 3] << 6


def decode(words: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Unpack codes and mask; the inverse of :func:`encode`.

    Args:
        words: The packed values, uint8 ``[rows, ceil(in_features / 4)]``.
        in_features: The number of weights in a row.

    Returns:
        The codes, int8 ``[rows, in_features]``, and the packed mask, uint8 ``[rows, ceil(in_features / 8)]``.
    """
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=words.device)
    values = (words.unsqueeze(-1) >> shifts & 3).flatten(-2)[..., :in_features]
    mask = values != MASKED
    codes = torch.where(values == 2, -1, values.to(torch.int8)) * mask
    return codes.to(torch.int8), pack_mask(mask)


def gather_rows(mine: Tensor, cut: RowCut, group: dist.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, in order: ``[count, ...]`` on each rank -> ``[rows, ...]`` on every rank."""
    padded = cut.pad(mine)
    whole = padded.new_empty(cut.padded * cut.ranks, *padded.shape[1:])
    _all_gather(whole, padded, group=group)
    return whole[: cut.rows]
