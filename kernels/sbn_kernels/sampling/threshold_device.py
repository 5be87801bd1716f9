"""Device code of the smallest logit that can be drawn; ``threshold_reference.py`` has the rule."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.sampling import threshold_reference as reference
from sbn_kernels.sampling.reference import SETTINGS, TEMPERATURE, TOP_K, TOP_P

BINS = 65536  # One for each value of 16 bits. Bin 0 counts the largest value.
GROUP = 256  # Bins of a group, and groups of a row
ROW = BINS + 32  # The numbers of a row: its bins, then the first bin that has a token, inverted, and room.
PART = 1024  # Tokens of a program that counts
GROUPS_OF_PROGRAM = 16

_BINS, _GROUP, _ROW, _PART = tl.constexpr(BINS), tl.constexpr(GROUP), tl.constexpr(ROW), tl.constexpr(PART)
_GROUPS_OF_PROGRAM = tl.constexpr(GROUPS_OF_PROGRAM)
_SETTINGS, _TEMPERATURE = tl.constexpr(SETTINGS), tl.constexpr(TEMPERATURE)
_TOP_P, _TOP_K = tl.constexpr(TOP_P), tl.constexpr(TOP_K)
_ONE, _LOG2_E, _STEEPEST = tl.constexpr(reference.ONE), tl.constexpr(reference.LOG2_E), tl.constexpr(reference.STEEPEST)
_SHIFT, _NO_LIMIT = tl.constexpr(reference.SHIFT), tl.constexpr(reference.NO_LIMIT)
_C1, _C2, _C3 = tl.constexpr(reference.C1), tl.constexpr(reference.C2), tl.constexpr(reference.C3)
_C4, _C5 = tl.constexpr(reference.C4), tl.constexpr(reference.C5)


@triton.jit
def _number(settings_pointer, row, WHICH: tl.constexpr):
    """A float64 of a row's settings."""
    return tl.load(settings_pointer + row * _SETTINGS + WHICH).to(tl.float64, bitcast=True)


@triton.jit
def _limited(settings_pointer, row):
    """Whether some logits of the row cannot be drawn."""
    top_k = tl.load(settings_pointer + row * _SETTINGS + _TOP_K)
    limits = (top_k > 0) | (_number(settings_pointer, row, _TOP_P) < 1)
    return limits & (_number(settings_pointer, row, _TEMPERATURE) > 0)


@triton.jit
def _bin_of(logit, FINITE: tl.constexpr):
    """The bins of logits of 16 bits. ``FINITE`` has the bits of the largest finite number."""
    bits = logit.to(tl.int16, bitcast=True).to(tl.int32)
    size = tl.minimum(bits & 0x7FFF, FINITE)  # The bits of infinity and NaN are larger.
    return tl.where((bits < 0) | (logit != logit), size, -size) + 0x7FFF  # -0 has the bin of 0.


@triton.jit
def _value_of(place, DTYPE: tl.constexpr):
    """The logits of bins, float32."""
    signed = place - 0x7FFF
    bits = tl.where(signed > 0, signed | 0x8000, -signed)
    return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _weights(place, largest, temperature, DTYPE: tl.constexpr):
    """The integer weights of the logits of bins."""
    scale = tl.minimum(tl.full([], _LOG2_E, tl.float64) / temperature, _STEEPEST).to(tl.float32)
    halvings = (largest - _value_of(place, DTYPE)) * scale
    halvings = tl.maximum(tl.minimum(halvings, _SHIFT * 1.0), 0.0)  # No token has a bin before the largest.
    whole = halvings.to(tl.int32)
    x = halvings - whole.to(tl.float32)
    power = ((((x * _C5 + _C4) * x + _C3) * x + _C2) * x + _C1) * x + 1
    return (power * _ONE).to(tl.int64) >> whole.to(tl.int64)


@triton.jit
def count_values_kernel(logits_pointer, settings_pointer, bins_pointer, vocab, stride, FINITE: tl.constexpr):
    """Counts the tokens of each bin, and finds the first bin that has one: program (part, row)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if _limited(settings_pointer, row):
        token = part * _PART + tl.arange(0, _PART)
        inside = token < vocab
        place = _bin_of(tl.load(logits_pointer + row * stride + token, mask=inside, other=0.0), FINITE)
        bins_pointer += row * _ROW
        tl.atomic_add(bins_pointer + place, 1, mask=inside, sem="relaxed")
        tl.atomic_max(bins_pointer + _BINS, tl.max(tl.where(inside, place ^ 0xFFFF, 0), axis=0), sem="relaxed")


@triton.jit
def sum_groups_kernel(settings_pointer, bins_pointer, groups_pointer, DTYPE: tl.constexpr):
    """The tokens and the weight of each group of bins: program (16 groups, row)."""
    row = tl.program_id(1).to(tl.int64)
    if _limited(settings_pointer, row):
        group = tl.program_id(0) * _GROUPS_OF_PROGRAM + tl.arange(0, _GROUPS_OF_PROGRAM)
        place = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        bins_pointer += row * _ROW
        counts = tl.load(bins_pointer + place).to(tl.int64)
        largest = _value_of(tl.load(bins_pointer + _BINS) ^ 0xFFFF, DTYPE)
        weights = counts * _weights(place, largest, _number(settings_pointer, row, _TEMPERATURE), DTYPE)
        groups_pointer += row * 2 * _GROUP
        tl.store(groups_pointer + group, tl.sum(counts, axis=1))
        tl.store(groups_pointer + _GROUP + group, tl.sum(weights, axis=1))


@triton.jit
def _last(amounts, counts, limit):
    """The last place that has a token, and whose amounts in front of it sum to less than the limit."""
    before = tl.cumsum(amounts, axis=0) - amounts
    return tl.max(tl.where((counts > 0) & (before < limit), tl.arange(0, _GROUP), 0), axis=0)


@triton.jit
def lowest_logits_kernel(settings_pointer, bins_pointer, groups_pointer, lowest_pointer, DTYPE: tl.constexpr):
    """The smallest logit of a row that can be drawn. One row a program."""
    row = tl.program_id(0).to(tl.int64)
    result = float("-inf")
    if _limited(settings_pointer, row):
        top_k = tl.load(settings_pointer + row * _SETTINGS + _TOP_K)
        top_p, temperature = _number(settings_pointer, row, _TOP_P), _number(settings_pointer, row, _TEMPERATURE)
        bins_pointer += row * _ROW
        groups_pointer += row * 2 * _GROUP
        largest = _value_of(tl.load(bins_pointer + _BINS) ^ 0xFFFF, DTYPE)
        i = tl.arange(0, _GROUP)
        counts, weights = tl.load(groups_pointer + i), tl.load(groups_pointer + _GROUP + i)
        # The last bin that top_k leaves, and the weight up to there.
        top_k = tl.where(top_k > 0, top_k, _NO_LIMIT)
        group = _last(counts, counts, top_k)
        place = group * _GROUP + i
        in_group = tl.load(bins_pointer + place).to(tl.int64)
        of_top_k = group * _GROUP + _last(in_group, in_group, top_k - tl.sum(tl.where(i < group, counts, 0), axis=0))
        in_group = tl.where(place <= of_top_k, in_group * _weights(place, largest, temperature, DTYPE), 0)
        total = tl.sum(tl.where(i < group, weights, 0), axis=0) + tl.sum(in_group, axis=0)
        # The last of these bins that top_p leaves.
        bound = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
        bound = tl.where(top_p < 1, bound, _NO_LIMIT)
        group = _last(weights, tl.where(i <= group, counts, 0), bound)
        place = group * _GROUP + i
        in_group = tl.where(place <= of_top_k, tl.load(bins_pointer + place).to(tl.int64), 0)
        bound -= tl.sum(tl.where(i < group, weights, 0), axis=0)
        in_group_weights = in_group * _weights(place, largest, temperature, DTYPE)
        result = _value_of(group * _GROUP + _last(in_group_weights, in_group, bound), DTYPE)
    tl.store(lowest_pointer + row, result)
