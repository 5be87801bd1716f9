"""Store ternary weights in close to as few bits as they carry.

A group of M weights of which at most N are non-zero has ``S = sum_k C(M, k) 2^k`` states (k = 0 .. N). The states of G
groups are the digits, base S, of one number, and the number is stored in B whole bytes. G and B are chosen for the
fewest bits a weight among ``S^G <= 256^B`` with B <= 7, so that a number fits an int64.

Two cases are familiar. Single weights (N = M = 1, S = 3) give five trits a byte, which is 1.6 bits a weight. 2:4
(S = 33) gives eleven groups in seven bytes, which is 1.273 bits a weight. Six bits for each 2:4 group would take 1.5
bits a weight, and the entropy bound is 1.261.

The mask is not stored: it is where the codes are not zero. Groups run along ``in_features``. The last number of a
tensor may be filled up with zero digits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from math import comb

import torch
from torch import Tensor

from sbn_lightning.sparsity.pattern import nonzeros_per_group

MAX_BYTES = 7
MAX_GROUP = 8  # Larger groups are stored as single weights: the table that finds a state has 3^M entries.


@dataclass(frozen=True)
class GroupCode:
    """How groups are stored.

    Attributes:
        n: The largest number of non-zero weights in a group.
        m: How many weights a group has.
        groups: How many groups one number holds.
        bytes: How many bytes one number takes.
    """

    n: int
    m: int
    groups: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, without the filling of a tensor's last number."""
        return 8 * self.bytes / (self.groups * self.m)


def states(n: int, m: int) -> int:
    """How many different groups there are."""
    return sum(comb(m, k) * 2**k for k in range(n + 1))


@cache
def best_code(n: int, m: int) -> GroupCode:
    """The code with the fewest bits a weight; of several such codes the one with the shortest numbers."""
    count = states(n, m)
    candidates = []
    for size in range(1, MAX_BYTES + 1):
        groups = 0
        while count ** (groups + 1) <= 256**size:
            groups += 1
        if groups:
            candidates.append(GroupCode(n, m, groups, size))
    return min(candidates, key=lambda code: (code.bits_per_weight, code.bytes))


def choose_code(codes: Tensor, m: int) -> GroupCode:
    """The code with the fewest bits that holds a weight exactly.

    Args:
        codes: The ternary codes, int8 ``[out_features, in_features]`` in {-1, 0, 1}.
        m: The group size of the pattern. N is counted and not taken from the pattern, because in the middle of a ramp
            a group has more non-zeros than the pattern's N.
    """
    single = best_code(1, 1)
    if m > MAX_GROUP or codes.shape[1] % m:
        return single
    # With n = 0 a weight of zeros would take no bits at all.
    grouped = best_code(max(1, int(nonzeros_per_group(codes, m).max())), m)
    return min(single, grouped, key=lambda code: code.bits_per_weight)


@cache
def _table(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Two tables: state -> weights, int8 ``[S, m]``, and weights as a number in base 3 -> state, int64 ``[3^m]``."""
    members = [group for group in itertools.product((0, 1, -1), repeat=m) if sum(map(abs, group)) <= n]
    table = torch.tensor(members, dtype=torch.int8)
    state_of = torch.full((3**m,), -1, dtype=torch.int64)
    state_of[_base3(table)] = torch.arange(len(members))
    return table, state_of


def _base3(groups: Tensor) -> Tensor:
    powers = 3 ** torch.arange(groups.shape[-1])
    return ((groups.to(torch.int64) + 1) * powers).sum(-1)


def encode(codes: Tensor, code: GroupCode) -> Tensor:
    """int8 ``[out_features, in_features]`` in {-1, 0, 1} -> uint8 ``[numbers * code.bytes]``, low byte first.

    Raises:
        ValueError: If a group has more non-zeros than the code can hold.
    """
    _, state_of = _table(code.n, code.m)
    digits = state_of[_base3(codes.reshape(-1, code.m))]
    if bool((digits < 0).any()):
        raise ValueError(f"a group of {code.m} weights has more than {code.n} non-zeros")
    digits = torch.nn.functional.pad(digits, (0, -len(digits) % code.groups)).view(-1, code.groups)
    powers = states(code.n, code.m) ** torch.arange(code.groups)
    numbers = (digits * powers).sum(-1)
    shifts = 8 * torch.arange(code.bytes)
    return ((numbers.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten()


def decode(data: Tensor, code: GroupCode, out_features: int, in_features: int) -> Tensor:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: If ``data`` has another length, or holds a number that no weights give.
    """
    table, _ = _table(code.n, code.m)
    count = out_features * in_features // code.m
    expected = -(-count // code.groups) * code.bytes
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes where {out_features} x {in_features} weights take {expected}")
    shifts = 8 * torch.arange(code.bytes)
    numbers = (data.view(-1, code.bytes).to(torch.int64) << shifts).sum(-1)
    if bool((numbers >= len(table) ** code.groups).any()):
        raise ValueError("a number is larger than any weights give")
    weights = torch.empty(len(numbers), code.groups, code.m, dtype=torch.int8)
    for group in range(code.groups):
        weights[:, group] = table[numbers % len(table)]
        numbers = numbers // len(table)
    return weights.view(-1, code.m)[:count].reshape(out_features, in_features)
