"""Philox-4x32 in plain PyTorch: random words that are a function of a key and a counter.

The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). ``tl.philox`` gives the
same words. Unsigned 32-bit integers are held in int64, so the words are the same on every device.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor, rounds: int) -> tuple[Tensor, ...]:
    """Makes four random words for each counter.

    Args:
        counter: The four words of the counters, int64 in 0 .. 2^32 - 1, of shapes that broadcast with ``key``.
        key: The keys, int64; all 64 bits count.
        rounds: The number of rounds. From 7 on the words pass BigCrush; 10 is the usual number.

    Returns:
        Four tensors of words, int64 in 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(rounds):
        (high_a, low_a), (high_b, low_b) = _high_and_low(0xD2511F53, c0), _high_and_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _high_and_low(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower 32 bits of the product of two unsigned 32-bit integers, held in int64."""
    upper = multiplier * (value >> 16) + (multiplier * (value & 0xFFFF) >> 16)
    return upper >> 16, multiplier * value & WORD
