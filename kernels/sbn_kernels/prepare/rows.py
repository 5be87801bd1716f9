"""The sums of rows that gamma is computed from, for a weight whose rows lie on several GPUs.

Each GPU sums its own rows. :mod:`sbn_kernels.exchange.triton` adds the sums of all rows. Sums and order are those of
:func:`~sbn_kernels.prepare.triton.prepare_weight`, so gamma has the same bits as on one GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.prepare.triton import NEEDS, sums_of_rows
from sbn_kernels.runtime.capability import require


def row_sums(
    weight: Tensor, mask_bits: Tensor | None = None, row_scale: Tensor | None = None, *, count: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Sums the magnitudes of each row.

    Args:
        weight: Latent weights ``[rows, in]``, float32, bfloat16 or float16. There may be no rows.
        mask_bits: uint8 ``[rows, ceil(in / 8)]``: masked weights count as zero.
        row_scale: gamma of each row, float32 ``[rows]``: weights that round to zero with it count as zero.
        count: Whether to count the weights that are left.

    Returns:
        Sums, float32 ``[rows]``, and the counts, int32 ``[rows]``, or None.

    Raises:
        UnsupportedError: If there is no GPU.
    """
    require(NEEDS, weight)
    if len(weight) == 0:
        empty = torch.empty(0, dtype=torch.float32, device=weight.device)
        return empty, empty.int() if count else None
    return sums_of_rows(with_rows(weight), mask_bits, row_scale, count)
