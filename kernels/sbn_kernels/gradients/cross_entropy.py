"""Cross-entropy from 8-bit logits, and its gradient rounded to int8 in both orders, without writing the gradient.

Three passes over the logits: the sum of exponentials, the maxima of tokens and of classes, and the rounding. Each pass
computes ``softmax - one-hot`` anew, in float32. :mod:`.reference` has the formulas; the rounding is that of
``quantize_gradient``, with the same draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.checks import FLOAT_DTYPES, check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.maxima import larger, magnitude
from sbn_kernels.gradients.device import codes_of, gradient_scales_kernel, philox, rounded, word_of
from sbn_kernels.gradients.reference import ROUNDS, QuantizedGradient
from sbn_kernels.gradients.triton import maxima_grid, outputs_for, zero_maxima
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("cross_entropy", least=(0, 0), interpreter=True)
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def log_sum_kernel(
    x_pointer, class_scale_pointer, target_pointer, log_sum_pointer, loss_pointer, classes, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: log sum exp of its logits, and its loss."""
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
    at_target = tl.load(x_pointer + row * x_stride + target).to(tl.float32) * tl.load(class_scale_pointer + target)
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
        target = tl.load(target_pointer + row, mask=row < rows, other=-1)[:, None]
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
        target = tl.load(target_pointer + row, mask=row < rows, other=-1)
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


_log_sum = Launcher(log_sum_kernel, enable_fp_fusion=True)
# The two kernels compute the gradient alike, so a maximum is never below a value that is rounded.
_maxima = Launcher(cross_entropy_maxima_kernel, enable_fp_fusion=False)
_scales = Launcher(gradient_scales_kernel, enable_fp_fusion=True)
_round = Launcher(cross_entropy_round_kernel, enable_fp_fusion=False, maxnreg=168)


@kernel_op("cross_entropy_rounded")
def _cross_entropy_rounded(
    logits: Tensor, class_scale: Tensor, target: Tensor, factor: float, token_scale: Tensor, seed: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require(NEEDS, logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, classes = logits.shape
    a, sa, b, sb = outputs = outputs_for(logits, True, True)
    log_sum, loss = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows == 0:
        return loss, *(tensor.zero_() for tensor in outputs)
    factors = torch.full((1,), factor, dtype=torch.float32, device=logits.device)
    maxima, first_channel = zero_maxima(logits, True, True)
    of_tokens = (logits, class_scale, target, log_sum)
    stride = logits.stride(0)
    block = min(4096, next_power_of_2(classes))
    _log_sum((rows, 1, 1), (*of_tokens, loss), (classes, stride), (block,), min(8, max(1, block // 512)))
    block_rows, block_columns = 8, 256
    strips, spans, span = maxima_grid(logits, block_rows, ceil_div(classes, block_columns))
    _maxima(
        (strips, spans, 1),
        (*of_tokens, token_scale, factors, maxima),
        (rows, classes, stride, first_channel, span),
        (block_rows, block_columns),
    )
    _scales((ceil_div(len(maxima), 1024), 1, 1), (maxima, sa, sb), (rows, classes, first_channel), (1024,))
    octets, block_columns = 16, 64
    _round(
        (ceil_div(rows, 8 * octets) * ceil_div(classes, block_columns), 1, 1),
        (*of_tokens, token_scale, factors, maxima, seed, a, b),
        (rows, classes, stride, a.stride(0), b.stride(0), first_channel, stream),
        (octets, block_columns, not interpreting()),
        8,
    )
    return loss, *outputs


@kernel_fake("cross_entropy_rounded")
def _(
    logits: Tensor, class_scale: Tensor, target: Tensor, factor: float, token_scale: Tensor, seed: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return loss, *outputs_for(logits, True, True)


def cross_entropy_rounded(
    logits: Tensor,
    class_scale: Tensor,
    target: Tensor,
    factor: float,
    token_scale: Tensor,
    seed: Tensor,
    stream: int = 0,
) -> tuple[Tensor, QuantizedGradient]:
    """Computes the cross-entropy of each token, and the rounded gradient of the logits.

    Args:
        logits: The logits without the scales of the classes, bfloat16, float16 or float32 ``[tokens, classes]``.
        class_scale: The scale of each class, float32 ``[classes]``.
        target: The classes to predict, int64 ``[tokens]``.
        factor: The factor of the gradient ``factor * (softmax - one-hot)``, above 0.
        token_scale: The scale of each token, float32 ``[tokens]``.
        seed: One int64 on the device.
        stream: A number that sets apart parts that share a seed.

    Returns:
        The losses, float32 ``[tokens]``, and the gradient: a token with the scales of the classes folded in, a class
        with those of the tokens folded in.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(logits, class_scale, token_scale)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be floats [tokens, classes > 0], not {logits.dtype} {list(logits.shape)}")
    if target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        raise ValueError(f"target must be int64 [{len(logits)}], not {target.dtype} {list(target.shape)}")
    check_scale("class_scale", class_scale, logits.shape[1])
    check_scale("token_scale", token_scale, logits.shape[0])
    loss, *found = torch.ops.sbn_kernels.cross_entropy_rounded(
        logits, class_scale, target.contiguous(), factor, token_scale, seed, stream
    )
    return loss, QuantizedGradient(*found)
