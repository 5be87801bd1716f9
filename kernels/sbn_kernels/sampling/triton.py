"""Chooses a token for each row in two launches.

The first finds the best token of each part of the vocabulary, and the second the best of these tokens. A part has 1,024
tokens, so one row of 152,000 tokens keeps 149 programs busy. Both launches can be captured in a CUDA graph: settings
and positions are read from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.sampling.device import best_of_all_kernel, best_of_parts_kernel
from sbn_kernels.sampling.reference import CALLS, check_settings

NEEDS = Needs("choice of tokens", interpreter=True)

_parts = Launcher(best_of_parts_kernel, enable_fp_fusion=False)
_all = Launcher(best_of_all_kernel, enable_fp_fusion=False)


@kernel_op("choose_tokens")
def _choose_tokens(logits: Tensor, settings: Tensor, positions: Tensor, lowest: Tensor | None) -> Tensor:
    require(NEEDS, logits)
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    logits = with_rows(logits)
    parts = ceil_div(vocab, 4 * CALLS)
    best = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    limits = settings if lowest is None else lowest.contiguous()
    _parts(
        (parts, rows, 1), (logits, settings, positions, limits, best), (vocab, logits.stride(0)), (lowest is not None,)
    )
    _all((rows, 1, 1), (best, tokens), (parts,), (next_power_of_2(parts),))
    return tokens


@kernel_fake("choose_tokens")
def _(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


def choose_tokens(logits: Tensor, settings: Tensor, positions: Tensor, lowest: Tensor | None = None) -> Tensor:
    """Chooses a token for each row, as :func:`~sbn_kernels.sampling.reference.choose_tokens_reference` does.

    Args:
        logits: The logits, float32, bfloat16 or float16 ``[rows, vocab]``.
        settings: The numbers of each row, int64 ``[rows, 4]``: the bits of its temperature and of its top_p as float64,
            its top_k and its seed.
        positions: The position of the new token in each row, int64 ``[rows]``.
        lowest: The smallest logit of each row that can be chosen, float32 ``[rows]``. None excludes nothing.

    Returns:
        The token ids, int64 ``[rows]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU that can run the kernel.
    """
    check_settings(logits, settings, positions, lowest)
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16, not {logits.dtype}")
    if not settings.is_contiguous() or not positions.is_contiguous():
        raise ValueError("settings and positions must be contiguous")
    tokens: Tensor = torch.ops.sbn_kernels.choose_tokens(logits, settings, positions, lowest)
    return tokens
