"""Cross-entropy from 8-bit logits, and its gradient rounded to int8 in both orders, without writing the gradient.

Three passes over the logits: the sum of exponentials, the maxima of tokens and of classes, and the rounding. Each pass
computes ``softmax - one-hot`` anew, in float32. :mod:`.reference` has the formulas; the rounding is that of
``quantize_gradient``, with the same draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES, check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.gradients.cross_entropy_device import (
    cross_entropy_maxima_kernel,
    cross_entropy_round_kernel,
    log_sum_kernel,
)
from sbn_kernels.gradients.device import gradient_scales_kernel
from sbn_kernels.gradients.reference import QuantizedGradient, check_seed
from sbn_kernels.gradients.triton import maxima_grid, outputs_for, zero_maxima
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("cross_entropy", least=(0, 0), interpreter=True)
_log_sum = Launcher(log_sum_kernel, enable_fp_fusion=True)
# The two kernels compute the gradient alike, so a maximum is never below a value that is rounded.
_maxima = Launcher(cross_entropy_maxima_kernel, enable_fp_fusion=False)
_scales = Launcher(gradient_scales_kernel, enable_fp_fusion=True)
# 128 registers: four programs of four warps fit a multiprocessor; with the 130 that the compiler would take, three
_round = Launcher(cross_entropy_round_kernel, enable_fp_fusion=False, maxnreg=128)


@kernel_op("cross_entropy_rounded")
def _cross_entropy_rounded(
    logits: Tensor, class_scale: Tensor, target: Tensor, factor: float, token_scale: Tensor, seed: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require(NEEDS, logits)
    logits = with_rows(logits)
    rows, classes = logits.shape
    a, sa, b, sb = outputs = outputs_for(logits, True, True)
    log_sum, loss = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows == 0:
        return loss, a, sa, b.zero_(), sb.zero_()
    factors = torch.full((1,), factor, dtype=torch.float32, device=logits.device)
    maxima, first_channel = zero_maxima(logits, True, True)
    of_tokens = (logits, class_scale, target, log_sum)
    stride = logits.stride(0)
    block = min(4096, next_power_of_2(classes))
    _log_sum((rows, 1, 1), (*of_tokens, loss), (classes, stride), (block,), min(4, max(1, block // 1024)))
    block_rows, block_columns = 8, 512
    strips, spans, span = maxima_grid(logits, block_rows, ceil_div(classes, block_columns))
    _maxima(
        (strips, spans, 1),
        (*of_tokens, token_scale, factors, maxima),
        (rows, classes, stride, first_channel, span),
        (block_rows, block_columns),
        8,
    )
    _scales((ceil_div(len(maxima), 1024), 1, 1), (maxima, sa, sb), (rows, classes, first_channel), (1024,))
    octets, block_columns = 8, 64
    _round(
        (ceil_div(rows, 8 * octets) * ceil_div(classes, block_columns), 1, 1),
        (*of_tokens, token_scale, factors, maxima, seed, a, b),
        (rows, classes, stride, a.stride(0), b.stride(0), first_channel, stream),
        (octets, block_columns, not interpreting()),
        4,
    )
    return loss, *outputs


@kernel_fake("cross_entropy_rounded")
def _(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        The losses, float32 ``[tokens]``, and the rounded gradient: by token, times the scales of the classes, and by
        class, times the scales of the tokens. The loss of a token whose target is no class is NaN.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(logits, class_scale, token_scale)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be floats [tokens, classes > 0], not {logits.dtype} {list(logits.shape)}")
    if target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        raise ValueError(f"target must be int64 [{len(logits)}], not {target.dtype} {list(target.shape)}")
    check_scale("class_scale", class_scale, logits.shape[1])
    check_scale("token_scale", token_scale, logits.shape[0])
    check_seed(seed, stream, logits.device)
    loss, *found = torch.ops.sbn_kernels.cross_entropy_rounded(
        logits, class_scale, target.contiguous(), factor, token_scale, seed, stream
    )
    return loss, QuantizedGradient(*found)
