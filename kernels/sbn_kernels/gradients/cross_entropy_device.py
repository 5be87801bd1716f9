"""Device code of ``cross_entropy.py``: sums of exponentials, maxima, and rounding of the gradient of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.common.maxima import larger, magnitude
from sbn_kernels.gradients.device import codes_of, philox, rounded, word_of
from sbn_kernels.gradients.reference import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def log_sum_kernel(
    x_pointer, class_scale_pointer, target_pointer, log_sum_pointer, loss_pointer, classes, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: log sum exp of its logits, and its loss, which is NaN if the target is no class."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        x = tl.load(x_pointer + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.load(class_scale_pointer + column, mask=inside, other=0.0)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(highest, tl.max(x, axis=0, keep_dims=True))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), axis=0, keep_dims=True)
        highest = new
    log_sum = highest + tl.log(total)
    target = tl.load(target_pointer + row + tl.arange(0, 1))
    known = (target >= 0) & (target < classes)
    at_target = tl.load(x_pointer + row * x_stride + target, mask=known, other=0.0).to(tl.float32)
    at_target *= tl.load(class_scale_pointer + target, mask=known, other=float("nan"))
    tl.store(log_sum_pointer + row + tl.arange(0, 1), log_sum)
    tl.store(loss_pointer + row + tl.arange(0, 1), log_sum - at_target)


@triton.jit
def _gradient(x, class_scale, log_sum, hit, factor):
    """factor * (softmax - one-hot)."""
    return (tl.exp(x.to(tl.float32) * class_scale - log_sum) - tl.where(hit, 1.0, 0.0)) * factor


# Not specialised: numbers that vary from call to call and that no vector of loads depends on.
@triton.jit(do_not_specialize=["rows", "span"])
def cross_entropy_maxima_kernel(
    x_pointer, class_scale_pointer, target_pointer, log_sum_pointer, token_scale_pointer, factor_pointer, max_pointer,
    rows, classes, x_stride, first_channel, span, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Maxima as ``gradient_maxima_kernel`` makes them, of C classes and ``span`` tokens a program."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1) * span
    there = column < classes
    largest = tl.zeros([R, C], tl.float32)
    class_scale = tl.load(class_scale_pointer + column, mask=there, other=0.0)[None, :]
    factor = tl.load(factor_pointer)
    for start in range(first, tl.minimum(first + span, rows), R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & there[None, :]
        x = tl.load(x_pointer + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        log_sum = tl.load(log_sum_pointer + row, mask=row < rows, other=0.0)[:, None]
        target = tl.load(target_pointer + row, mask=row < rows, other=-1).to(tl.int32)[:, None]
        token_scale = tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)[:, None]
        g = _gradient(x, class_scale, log_sum, target == column[None, :], factor)
        g = tl.where(inside, tl.abs(g), 0.0)
        largest = larger(largest, g * token_scale)
        eights = tl.reshape(g * class_scale, [R, C // 8, 8])
        of_token = tl.max(magnitude(tl.reduce(eights, 2, larger)), axis=1)
        tl.atomic_max(max_pointer + row, of_token, mask=row < rows, sem="relaxed")
    where = max_pointer + first_channel + column
    tl.atomic_max(where, tl.max(magnitude(largest), axis=0), mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "stream"])
def cross_entropy_round_kernel(
    x_pointer, class_scale_pointer, target_pointer, log_sum_pointer, token_scale_pointer, factor_pointer,
    inverse_pointer, seed_pointer, a_pointer, b_pointer,
    rows, classes, x_stride, a_stride, b_stride, first_channel, stream,
    R: tl.constexpr, C: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rounds one tile of 8 R tokens and C classes twice, as ``quantize_gradient_kernel``."""
    tiles = tl.cdiv(classes, C)
    octet = tl.program_id(0) // tiles * R + tl.arange(0, R)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    there = column < classes
    logits = ()
    of_tokens = ()
    for j in tl.static_range(8):
        row = octet * 8 + j
        inside = (row < rows)[:, None] & there[None, :]
        where = x_pointer + row.to(tl.int64)[:, None] * x_stride + column[None, :]
        logits += (tl.load(where, mask=inside, other=0.0),)
        log_sum = tl.load(log_sum_pointer + row, mask=row < rows, other=0.0)
        target = tl.load(target_pointer + row, mask=row < rows, other=-1).to(tl.int32)
        inverse = tl.load(inverse_pointer + row, mask=row < rows, other=0).to(tl.float32, bitcast=True)
        token_scale = tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)
        of_tokens += ((log_sum[:, None], target[:, None], inverse[:, None], token_scale[:, None]),)
    class_scale = tl.load(class_scale_pointer + column, mask=there, other=0.0)[None, :]
    class_inverse = tl.load(inverse_pointer + first_channel + column, mask=there, other=0)
    class_inverse = class_inverse.to(tl.float32, bitcast=True)[None, :]
    factor = tl.load(factor_pointer)
    random = philox(tl.load(seed_pointer), column[None, :], octet[:, None], stream, _ROUNDS, PTX)
    for_classes = ()
    for j in tl.static_range(8):
        row = octet * 8 + j
        log_sum, target, inverse, token_scale = of_tokens[j]
        inside = (row < rows)[:, None] & there[None, :]
        g = _gradient(logits[j], class_scale, log_sum, target == column[None, :], factor)
        g = tl.where(inside, g, 0.0)
        draw = random[j // 2] >> 16 if j % 2 else (random[j // 2] << 1) & 0xFFFF
        a = codes_of(rounded(g * class_scale * inverse, draw), PTX)
        tl.store(a_pointer + row.to(tl.int64)[:, None] * a_stride + column[None, :], a, mask=inside)
        for_classes += (rounded(g * token_scale * class_inverse, draw),)
    b_words = b_pointer.to(tl.pointer_type(tl.uint64), bitcast=True)
    where = b_words + column.to(tl.int64)[:, None] * (b_stride // 8) + octet[None, :]
    low = word_of(for_classes[0], for_classes[1], for_classes[2], for_classes[3], PTX)
    high = word_of(for_classes[4], for_classes[5], for_classes[6], for_classes[7], PTX)
    words = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    tl.store(where, tl.trans(words), mask=there[:, None] & (octet * 8 < rows)[None, :])
