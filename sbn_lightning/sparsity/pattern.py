"""N:M patterns and masks.

A pattern "N:M" keeps at most N of every M consecutive weights along ``in_features``. Such M weights are a group.

A mask is made from ranks, not from a threshold. The rank of a weight in its group is 0 for the largest magnitude and
M - 1 for the smallest. On a tie the lower index comes first. A rank does not depend on N, so one ranking is enough for
rows that have different N, as in the middle of a ramp.

A mask is stored with one bit for each weight, least significant bit first. Each row is padded to whole bytes. Two rows
never share a byte, so a mask can be sharded along ``out_features``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError

MAX_GROUP = 32


@dataclass(frozen=True)
class NMPattern:
    """At most ``n`` non-zeros in every ``m`` consecutive weights of a row; ``m:m`` is dense.

    Args:
        n: The number of weights that a group keeps, ``1 <= n <= m``.
        m: The number of weights in a group, ``1 <= m <= 32``.

    Raises:
        ConfigError: If ``n`` or ``m`` is not an integer in its range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for value in (self.n, self.m):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"pattern {self.n!r}:{self.m!r}: N and M must be integers")
        if not 1 <= self.n <= self.m <= MAX_GROUP:
            raise ConfigError(f'pattern "{self.n}:{self.m}": N:M needs 1 <= N <= M <= {MAX_GROUP}')

    @classmethod
    def parse(cls, value: NMPattern | str) -> NMPattern:
        """Read ``"N:M"``.

        Raises:
            ConfigError: If the value is neither a pattern nor such a string. YAML 1.1 reads an unquoted ``6:8`` as the
                number 368, in base 60. For a number the message therefore says to quote the pattern.
        """
        if isinstance(value, NMPattern):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            n, m = divmod(value, 60)
            raise ConfigError(
                f'pattern: YAML reads an unquoted {n}:{m} as a number (in base 60): quote it, pattern: "{n}:{m}"'
            )
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
        if match is None:
            raise ConfigError(f'pattern {value!r} is not of the form "N:M", for example "6:8"')
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is masked."""
        return self.n == self.m

    @property
    def density(self) -> float:
        """The share of weights that the mask keeps, ``n / m``."""
        return self.n / self.m

    def check_divides(self, in_features: int, layer: str) -> None:
        """Check that rows of ``in_features`` weights split into whole groups.

        Args:
            in_features: The number of weights in a row.
            layer: The name of the layer, for the message.

        Raises:
            ConfigError: If M does not divide ``in_features``. The message names the layer.
        """
        if in_features % self.m:
            raise ConfigError(
                f"{layer}: in_features={in_features} is not a multiple of M={self.m} of the pattern {self}; "
                f"{pattern_for(in_features)}, or exclude the layer"
            )


def pattern_for(*widths: int) -> str:
    """Say which patterns split rows of these widths into whole groups: the way out, for the message of an error.

    Args:
        *widths: The numbers of weights in a row. If no M divides all of them, the first one with such an M counts.
    """
    for group in (sorted(set(widths)), *([width] for width in widths)):
        common = math.gcd(*group)
        m = next((m for m in (4, *range(2, MAX_GROUP + 1)) if common % m == 0), None)
        if m is not None:
            numbers = f"{', '.join(map(str, group[:4]))}{' and so on' if len(group) > 4 else ''}"
            return f"choose a pattern whose M divides {numbers}, for example {2 if m == 4 else m - 1}:{m}"
    return f"no M from 2 to {MAX_GROUP} divides {widths[0]}: give the layer another in_features"


def group_ranks(weight: Tensor, m: int) -> Tensor:
    """Rank each weight's magnitude within its group of ``m``.

    Args:
        weight: The weights, ``[..., in_features]``; ``in_features`` is a multiple of ``m``.
        m: The size of a group.

    Returns:
        The ranks, uint8 in the shape of ``weight``: 0 for the largest magnitude of a group, ``m - 1`` for the smallest.
        Equal magnitudes rank in the order of their indices.
    """
    groups = weight.detach().abs().unflatten(-1, (-1, m))
    if m <= 8 and groups.is_cuda:
        return _ranks_at_once(groups).flatten(-2)
    if m <= 8:
        return _ranks_by_pairs(groups.movedim(-1, 0)).movedim(0, -1).flatten(-2)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(m, dtype=torch.uint8, device=weight.device).expand_as(order)
    return torch.empty_like(positions, memory_format=torch.contiguous_format).scatter_(-1, order, positions).flatten(-2)


def _ranks_by_pairs(members: Tensor) -> Tensor:
    """Rank groups ``[m, ...]`` by comparing every pair, which is 2 to 4 times faster than sorting small groups."""
    members = members.contiguous()
    ranks = torch.zeros_like(members, dtype=torch.uint8)
    for i in range(len(members)):
        for j in range(i + 1, len(members)):
            later_wins = members[j] > members[i]
            ranks[i] += later_wins
            ranks[j] += ~later_wins
    return ranks


def _ranks_at_once(groups: Tensor) -> Tensor:
    """Rank groups ``[..., m]`` in five operations that use ``m`` times the memory.

    On a GPU this is faster than a loop over pairs, because each operation costs a launch.
    """
    mine, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
    earlier = torch.ones(groups.shape[-1], groups.shape[-1], dtype=torch.bool, device=groups.device).tril(-1)
    return torch.where(earlier, ~(mine > other), other > mine).sum(-1, dtype=torch.uint8)


def top_n_mask(weight: Tensor, pattern: NMPattern, keep: Tensor | int | None = None) -> Tensor:
    """The mask that keeps the ``n`` largest magnitudes of each group.

    Args:
        weight: The weights, ``[out_features, in_features]``.
        pattern: The pattern. Its ``m`` is the size of a group.
        keep: The number of weights that a group keeps; None for ``pattern.n``. An integer tensor ``[out_features]`` has
            one number for each row, for a ramp in which only some rows are sparse so far.

    Returns:
        The mask, bool in the shape of ``weight``. On a tie the mask keeps the lower index.
    """
    if keep is None:
        keep = pattern.n
    if isinstance(keep, int) and keep >= pattern.m:
        return torch.ones_like(weight, dtype=torch.bool)
    limit = keep.unsqueeze(-1) if isinstance(keep, Tensor) else keep
    return group_ranks(weight, pattern.m) < limit


def nonzeros_per_group(values: Tensor, m: int) -> Tensor:
    """Count the values that are not zero in each group: ``[..., in_features]`` -> int64 ``[..., in_features / m]``."""
    return values.unflatten(-1, (-1, m)).count_nonzero(dim=-1)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask, bool ``[..., in_features]``, into uint8 ``[..., ceil(in_features / 8)]``, lowest bit first."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    # Eight bytes of 0 or 1 are read as one integer, lowest byte first. Multiplying by the factor moves byte i to bit
    # 56 + i, and moves nothing else to the top eight bits.
    return (padded.contiguous().view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of :func:`pack_mask`: uint8 ``[..., ceil(in_features / 8)]`` -> bool ``[..., in_features]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :in_features].bool()
