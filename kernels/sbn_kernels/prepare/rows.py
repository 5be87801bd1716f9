"""gamma of a weight whose rows lie on several GPUs: each GPU sums its rows, and every GPU adds the sums of all rows.

The sums and the order in which they are added are those of :func:`~sbn_kernels.prepare.triton.prepare_weight`. So gamma
has the same bits as on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_kernels.prepare.triton import NEEDS, sums_of_rows, write_gamma
from sbn_kernels.runtime.capability import require


def row_sums(weight: Tensor, mask_bits: Tensor | None = None, *, count: bool = False) -> tuple[Tensor, Tensor | None]:
    """Sums the magnitudes of each row.

    Args:
        weight: Latent weights ``[rows, in]``, float32, bfloat16 or float16. There may be no rows.
        mask_bits: uint8 ``[rows, ceil(in / 8)]``: masked weights count as zero.
        count: Whether to count the weights that the mask keeps.

    Returns:
        Sums, float32 ``[rows]``, and the counts, int32 ``[rows]``, or None.

    Raises:
        UnsupportedError: If there is no GPU.
    """
    require(NEEDS, weight)
    if len(weight) == 0:
        empty = torch.empty(0, dtype=torch.float32, device=weight.device)
        return empty, empty.int() if count else None
    return sums_of_rows(weight if weight.stride(1) == 1 else weight.contiguous(), mask_bits, count=count)


def gamma_of_rows(sums: Tensor, counts: Tensor | None, split_sizes: Sequence[int], columns: int) -> Tensor:
    """gamma of each part, from the sums of all rows.

    Args:
        sums: float32 ``[rows]``.
        counts: int32 ``[rows]``: gamma is the mean over that many weights; None: over all.
        split_sizes: The rows of each part.
        columns: The weights of a row.

    Returns:
        float32 ``[parts]``.
    """
    gamma = torch.empty(len(split_sizes), dtype=torch.float32, device=sums.device)
    write_gamma(sums, counts, split_sizes, columns, gamma, torch.empty_like(sums))
    return gamma
