"""Choose the next token of each row from its logits, on the device, without waiting for the host.

The choice is a function of the logits, of the row's settings and seed, and of the position of the new token. There is
no generator with a state, so rows do not influence each other, and a CUDA graph can record the choice.
:mod:`sbn_kernels.sampling.reference` has the formula. ``top_k`` and ``top_p`` only give the smallest logit that can be
drawn. So the order of equal logits does not matter: tokens as likely as the last one that stays can be drawn as well.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from typing import Literal

import torch
from sbn_kernels.sampling.reference import SETTINGS, choose_tokens_reference
from sbn_kernels.sampling.threshold_reference import lowest_logits_reference
from torch import Tensor

from sbn_lightning.core.errors import ConfigError

# What a choice needs: the largest logit alone, noise, or noise and the smallest logit that can be drawn.
Kind = Literal["greedy", "drawn", "limited"]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HIGHEST = 1e30  # A higher temperature changes nothing: all tokens are equally likely.
_MOST = 2**62  # No vocabulary has more tokens, and the device needs a number of 64 bits.


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: The number that divides the logits; 0 takes the most likely token.
        top_p: A probability. Tokens are drawn from the smallest set of most likely tokens whose probabilities sum to
            at least this value (nucleus sampling, arXiv 1904.09751). 1 draws from all tokens.
        top_k: The number of most likely tokens to draw from; None draws from all. Tokens as likely as the last one that
            ``top_p`` or ``top_k`` leaves can be drawn as well.

    Raises:
        ConfigError: If a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} is not a number from 0 (greedy) upwards")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is outside 0 (excluded) to 1; 1 draws from all tokens")
        if self.top_k is not None and not isinstance(self.top_k, Integral):
            raise ConfigError(f"top_k={self.top_k!r} is not an integer; leave it out to draw from all tokens")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} is below 1; leave it out to draw from all tokens")

    @property
    def kind(self) -> Kind:
        """What the choice needs."""
        if self.temperature == 0:
            return "greedy"
        return "drawn" if self.top_p == 1 and self.top_k is None else "limited"

    def __call__(self, logits_BV: Tensor, seed: int = 0, position: int = 0) -> Tensor:
        """Choose a token for each row.

        Args:
            logits_BV: The logits, ``[B, vocab_size]``.
            seed: The seed of the first row. The next row has the seed after it, and so on.
            position: The position of the new tokens in their texts. Equal seeds and positions draw alike.

        Returns:
            The token ids, int64 ``[B]``.

        Raises:
            ConfigError: If the seed is a ``torch.Generator``, as earlier versions took it.
        """
        if isinstance(seed, torch.Generator):
            raise ConfigError("a draw takes a seed, not a generator of torch: sampling(logits, seed=3, position=i)")
        sampler = Sampler(len(logits_BV), logits_BV.device)
        sampler.set_all(self, seed)
        return sampler.choose(logits_BV, torch.full((len(logits_BV),), position, device=logits_BV.device))


GREEDY = Sampling()


class Sampler:
    """The settings of the rows of a decoder, and the choice of their next tokens.

    The settings are on the device, where CUDA graphs read them. A change needs no new graph, unless it changes
    :attr:`kind`.

    Args:
        rows: The number of rows. They start as greedy ones.
        device: The device of the logits.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows: list[tuple[Sampling, int]] = [(GREEDY, 0)] * rows
        self._settings = torch.zeros(rows, SETTINGS, dtype=torch.int64, device=device)  # Zeros are greedy.
        self._changed = False
        self._kind: Kind | None = "greedy"  # None after a change

    def set_row(self, row: int, sampling: Sampling, seed: int) -> None:
        """Change how the next tokens of a row are chosen.

        Args:
            row: The number of the row.
            sampling: The settings.
            seed: The seed of the row's draws. Seeds that differ by a multiple of 2^64 draw alike.

        Raises:
            TypeError: If the seed is no integer.
        """
        seed = (operator.index(seed) + 2**63) % 2**64 - 2**63
        new = (sampling, seed) if sampling.temperature > 0 else (GREEDY, 0)
        if new != self._rows[row]:
            self._rows[row], self._changed, self._kind = new, True, None

    def set_all(self, sampling: Sampling, seed: int) -> None:
        """Give all rows the same settings. The first row has this seed, the next row the seed after it, and so on."""
        for row in range(len(self._rows)):
            self.set_row(row, sampling, seed + row)

    @property
    def kind(self) -> Kind:
        """What the choice of all rows together needs."""
        if self._kind is None:  # Each step asks.
            kinds = {sampling.kind for sampling, _ in self._rows}
            self._kind = "limited" if "limited" in kinds else "drawn" if "drawn" in kinds else "greedy"
        return self._kind

    def choose(self, logits_BV: Tensor, positions_B: Tensor, row: int | None = None) -> Tensor:
        """Choose a token for each row.

        Args:
            logits_BV: The logits, ``[B, vocab_size]``.
            positions_B: The position of each row's new token, which is the number of tokens before it, int64 ``[B]``.
            row: The number of the one row that the logits belong to; None for all rows.

        Returns:
            The token ids, int64 ``[B]``.
        """
        self.update_device()
        settings = self._settings if row is None else self._settings[row : row + 1]
        kind = self.kind if row is None else self._rows[row][0].kind
        return _choose(kind, logits_BV, settings, positions_B)

    def record(self, kind: Kind, logits_BV: Tensor, positions_B: Tensor) -> Tensor:
        """Choose as :meth:`choose` does, from the settings that the device has: for a CUDA graph to record."""
        return _choose(kind, logits_BV, self._settings, positions_B)

    def update_device(self) -> None:
        """Copy settings that have changed to the device, without waiting for the device."""
        if not self._changed:
            return
        numbers = [[min(sampling.temperature, _HIGHEST), sampling.top_p] for sampling, _ in self._rows]
        integers = [[min(sampling.top_k or 0, _MOST), seed] for sampling, seed in self._rows]
        bits = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
        host = torch.cat([bits, torch.tensor(integers, dtype=torch.int64)], dim=1)
        if self._settings.is_cuda:
            host = host.pin_memory()  # The allocator keeps the memory until the copy has run.
        self._settings.copy_(host, non_blocking=True)
        self._changed = False


def _kernels_run(logits_BV: Tensor) -> bool:
    if not logits_BV.is_cuda or logits_BV.dtype not in _KERNEL_DTYPES or find_spec("triton") is None:
        return False
    from sbn_kernels.sampling.triton import NEEDS

    return NEEDS.missing(logits_BV.device.index) is None


def _choose(kind: Kind, logits_BV: Tensor, settings: Tensor, positions_B: Tensor) -> Tensor:
    lowest = _lowest(logits_BV, settings) if kind == "limited" else None
    if _kernels_run(logits_BV):
        from sbn_kernels.sampling.triton import choose_tokens

        return choose_tokens(logits_BV, settings, positions_B, lowest)
    if kind == "greedy":  # What the formula gives without noise.
        return logits_BV.argmax(dim=-1)
    return choose_tokens_reference(logits_BV, settings, positions_B, lowest)


def _lowest(logits_BV: Tensor, settings: Tensor) -> Tensor:
    if logits_BV.dtype not in _KERNEL_DTYPES:
        logits_BV = logits_BV.float()
    if _kernels_run(logits_BV) and logits_BV.dtype != torch.float32:
        from sbn_kernels.sampling.threshold import lowest_logits

        return lowest_logits(logits_BV, settings)
    return lowest_logits_reference(logits_BV, settings)
