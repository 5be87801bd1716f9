"""Finds the smallest logit of each row that can be drawn, without sorting, for logits of 16 bits.

Equal logits have equal weights, so it is enough to know how many tokens have each of the 65,536 values. The first
launch counts them, the second sums groups of 256 values, and the third looks for the last group and the last value that
stay. All sums are of integers, so the order of the additions does not matter. All launches can be captured in a CUDA
graph: the settings are read from the device. A row that leaves all tokens is not read.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.sampling.reference import check_settings
from sbn_kernels.sampling.threshold_device import (
    GROUP,
    GROUPS_OF_PROGRAM,
    PART,
    ROW,
    count_values_kernel,
    lowest_logits_kernel,
    sum_groups_kernel,
)

NEEDS = Needs("smallest logit that can be drawn", interpreter=True)
DTYPES = (torch.bfloat16, torch.float16)

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FINITE = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}  # The bits of the largest finite number

_count = Launcher(count_values_kernel, enable_fp_fusion=False)
_sum = Launcher(sum_groups_kernel, enable_fp_fusion=False)
_lowest = Launcher(lowest_logits_kernel, enable_fp_fusion=False)


@kernel_op("lowest_logits")
def _lowest_logits(logits: Tensor, settings: Tensor) -> Tensor:
    require(NEEDS, logits)
    rows, vocab = logits.shape
    lowest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return lowest
    logits, dtype = with_rows(logits), _TRITON_DTYPES[logits.dtype]
    bins = torch.zeros((rows, ROW), dtype=torch.int32, device=logits.device)
    groups = torch.empty((rows, 2, GROUP), dtype=torch.int64, device=logits.device)
    numbers = (vocab, logits.stride(0))
    _count((ceil_div(vocab, PART), rows, 1), (logits, settings, bins), numbers, (_FINITE[logits.dtype],))
    _sum((GROUP // GROUPS_OF_PROGRAM, rows, 1), (settings, bins, groups), (), (dtype,))
    _lowest((rows, 1, 1), (settings, bins, groups, lowest), (), (dtype,))
    return lowest


@kernel_fake("lowest_logits")
def _(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


def lowest_logits(logits: Tensor, settings: Tensor) -> Tensor:
    """Finds the smallest logit of each row that top_k and top_p leave.

    The result equals that of :func:`~sbn_kernels.sampling.threshold_reference.lowest_logits_reference`.

    Args:
        logits: The logits, bfloat16 or float16 ``[rows, vocab]``.
        settings: The numbers of each row, int64 ``[rows, 4]``, as ``choose_tokens`` takes them.

    Returns:
        float32 ``[rows]``; minus infinity for a row that leaves all tokens.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU that can run the kernel.
    """
    check_settings(logits, settings)
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be bfloat16 or float16, not {logits.dtype}")
    if not settings.is_contiguous():
        raise ValueError("settings must be contiguous")
    lowest: Tensor = torch.ops.sbn_kernels.lowest_logits(logits, settings)
    return lowest
