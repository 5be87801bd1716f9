"""Device code of the choice of tokens; ``reference.py`` has the formula, ``triton.py`` the launches."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.sampling.reference import CALLS, LARGEST, ROUNDS, SEED, SETTINGS, SMALL, TEMPERATURE

_CALLS = tl.constexpr(CALLS)
_ROUNDS = tl.constexpr(ROUNDS)
_SETTINGS, _TEMPERATURE, _SEED = tl.constexpr(SETTINGS), tl.constexpr(TEMPERATURE), tl.constexpr(SEED)
_SMALL, _LARGEST = tl.constexpr(SMALL), tl.constexpr(LARGEST)
_LAST = tl.constexpr(2**31 - 1)
_WORST = tl.constexpr(-(2**63))  # Below the key of every token.


@triton.jit
def _noise(word):
    """Random words as numbers of the standard Gumbel distribution."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, _LARGEST)
    polynomial = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    return -tl.log(tl.where(v < _SMALL, polynomial, -tl.log(1 - v)))


@triton.jit
def _keys(values, token):
    """Values and token ids as integers of 64 bits: the larger value wins, and of equal values the smaller id."""
    values = tl.where(values == 0.0, 0.0, values)  # -0 equals 0.
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(values != values, _LAST, bits ^ ((bits >> 31) & _LAST))  # A NaN is the largest.
    return (ordered.to(tl.int64) << 32) | (token ^ _LAST).to(tl.int64)  # The second part is _LAST - token.


@triton.jit
def best_of_parts_kernel(
    logits_pointer, settings_pointer, positions_pointer, lowest_pointer, best_pointer, vocab, stride,
    LIMITED: tl.constexpr,
):  # fmt: skip
    """The best key of 4 * CALLS tokens of a row: program (part, row)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(settings_pointer + row * _SETTINGS + _TEMPERATURE)
    temperature = temperature.to(tl.float64, bitcast=True).to(tl.float32)
    call = tl.arange(0, _CALLS)
    n0, n1 = tl.zeros([_CALLS], tl.float32), tl.zeros([_CALLS], tl.float32)
    n2, n3 = tl.zeros([_CALLS], tl.float32), tl.zeros([_CALLS], tl.float32)
    if temperature > 0:
        seed = tl.load(settings_pointer + row * _SETTINGS + _SEED)
        position = tl.load(positions_pointer + row)
        count = (part * _CALLS + call).to(tl.uint32)
        zero = tl.zeros([_CALLS], tl.uint32)
        low, high = position.to(tl.uint32) + zero, (position >> 32).to(tl.uint32) + zero
        w0, w1, w2, w3 = tl.philox(seed, count, low, high, zero, _ROUNDS)
        n0, n1, n2, n3 = _noise(w0), _noise(w1), _noise(w2), _noise(w3)
    noises = (n0, n1, n2, n3)
    best = tl.full([_CALLS], _WORST, tl.int64)
    for j in tl.static_range(4):
        token = (part * 4 + j) * _CALLS + call
        logit = tl.load(logits_pointer + row * stride + token, mask=token < vocab, other=0.0).to(tl.float32)
        value = logit + temperature * noises[j]
        if LIMITED:
            value = tl.where(logit < tl.load(lowest_pointer + row), float("-inf"), value)
        best = tl.maximum(best, tl.where(token < vocab, _keys(value, token), _WORST))
    tl.store(best_pointer + row * tl.num_programs(0) + part, tl.max(best, axis=0))


@triton.jit
def best_of_all_kernel(best_pointer, tokens_pointer, parts, BLOCK: tl.constexpr):
    """The token of the best key of a row. One row a program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    best = tl.max(tl.load(best_pointer + row * parts + part, mask=part < parts, other=_WORST), axis=0)
    tl.store(tokens_pointer + row, (best & 0xFFFFFFFF) ^ _LAST)
