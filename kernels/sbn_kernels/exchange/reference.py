"""Codes and masks at 2 bits a weight in plain PyTorch: what the kernels here are tested against. Needs no Triton.

A ternary weight with a mask has four states: 0, +1, -1 and masked. Two bits have four values, so codes and mask travel
together, four weights in a byte. A weight that the mask zeroes and a weight that rounds to zero by itself stay
different.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = 3  # The two-bit value of a masked weight. The values 0, 1 and 2 are the codes 0, +1 and -1.


def encode_reference(codes: Tensor, mask: Tensor) -> Tensor:
    """Packs codes and mask, four weights in each byte. The first weight takes the lowest bits.

    Args:
        codes: The codes in {-1, 0, 1}, int8 ``[rows, in]``; 0 wherever ``mask`` is False.
        mask: The mask, bool in the shape of ``codes``.

    Returns:
        The words, uint8 ``[rows, ceil(in / 4)]``. The bits behind the last weight of a row say "masked".
    """
    # The code -1 becomes 2. The value 3 is then free for masked weights.
    values = torch.where(mask, torch.where(codes < 0, 2, codes), MASKED).to(torch.uint8)
    values = F.pad(values, (0, -values.shape[-1] % 4), value=MASKED).unflatten(-1, (-1, 4))
    return values[..., 0] | values[..., 1] << 2 | values[..., 2] << 4 | values[..., 3] << 6


def decode_reference(words: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Unpacks codes and mask; the inverse of :func:`encode_reference`.

    Args:
        words: The words, uint8 ``[rows, ceil(in / 4)]``.
        columns: The number of weights in a row.

    Returns:
        The codes, int8 ``[rows, in]``, and the mask, bool ``[rows, in]``.
    """
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=words.device)
    values = (words.unsqueeze(-1) >> shifts & 3).flatten(-2)[..., :columns]
    mask = values != MASKED
    codes = torch.where(values == 2, -1, values.to(torch.int8)) * mask
    return codes.to(torch.int8), mask
