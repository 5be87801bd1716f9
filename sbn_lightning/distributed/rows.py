"""The rows of a weight on several ranks: how they are cut, and how many tensors travel in one collective.

Rows are cut as ``DTensor`` cuts them with ``Shard(0)``: every rank has ``ceil(rows / ranks)`` rows, and the last ranks
have fewer or none. Groups of M lie within a row, so no cut goes through a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Newer versions of torch have the first name, and deprecate the second one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALIGNED = 16  # Kernels read most tensors in pieces of 16 bytes.


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

    def pad(self, mine: Tensor) -> Tensor:
        """Append rows of zeros to the rows of this rank, up to ``[padded, ...]``."""
        if self.count == self.padded:
            return mine.contiguous()
        whole = mine.new_zeros(self.padded, *mine.shape[1:])
        whole[: self.count] = mine
        return whole


def gather_rows(mine: Tensor, cut: RowCut, group: dist.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, in order: ``[count, ...]`` on each rank -> ``[rows, ...]`` on every rank."""
    padded = cut.pad(mine)
    whole = padded.new_empty(cut.padded * cut.ranks, *padded.shape[1:])
    all_gather(whole, padded, group=group)
    return whole[: cut.rows]


class FlatGather:
    """Gathers the rows of many tensors from all ranks with one collective.

    The collective starts in the constructor and runs beside what this rank computes until :meth:`wait`.

    Args:
        tensors: This rank's rows of each tensor, ``[count, ...]``.
        cuts: The cut of each tensor.
        group: The ranks that share the rows.
    """

    def __init__(self, tensors: Sequence[Tensor], cuts: Sequence[RowCut], group: dist.ProcessGroup) -> None:
        self._places: list[tuple[int, int, int, Tensor]] = []
        pieces, end, device = [], 0, tensors[0].device
        for mine, cut in zip(tensors, cuts, strict=True):
            size = cut.padded * mine.shape[1:].numel() * mine.element_size()
            pieces.append(mine.contiguous().view(-1).view(torch.uint8))
            self._places.append((end, size, cut.padded, mine))
            end = -(-(end + size) // ALIGNED) * ALIGNED
            if (rest := end - self._places[-1][0] - len(pieces[-1])) > 0:
                pieces.append(torch.zeros(rest, dtype=torch.uint8, device=device))
        self._sent = torch.cat(pieces)
        self.buffer = torch.empty(cuts[0].ranks * end, dtype=torch.uint8, device=device)
        self._work = all_gather(self.buffer, self._sent, group=group, async_op=True)
        self.buffer = self.buffer.view(-1, end)

    def wait(self) -> list[Tensor]:
        """Wait for the collective. On a GPU the stream waits, and not the host.

        Returns:
            The rows of all ranks, ``[ranks, padded, ...]`` for each tensor: views of :attr:`buffer`. Rows that no rank
            has are arbitrary.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [
            self.buffer[:, start : start + size].view(mine.dtype).unflatten(1, (padded, *mine.shape[1:]))
            for start, size, padded, mine in self._places
        ]
