"""Weight preparation in plain PyTorch: what the kernels here are tested against. Needs no Triton.

Written as plainly as possible, by sorting, and on its own: ``sbn_lightning.sparsity`` is the reference that layers
train on, with ranks that serve a ramp and float64 throughout, and these few lines check both it and the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_reference(weight: Tensor, n: int, m: int, keep: Tensor | None = None) -> Tensor:
    """The N:M mask: the ``n`` largest magnitudes of each group of ``m``, the lower index first on a tie.

    Args:
        weight: ``[out, in]``, ``in`` a multiple of ``m``.
        n: Weights left in a group.
        m: Weights of a group.
        keep: int ``[out]``, the number left in each group of a row, instead of ``n``.

    Returns:
        bool ``[out, in]``.
    """
    order = weight.abs().unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(dim=-1).flatten(1)  # the inverse permutation: the place of each weight in its group
    return ranks < (n if keep is None else keep[:, None])


def mask_bits_reference(mask: Tensor) -> Tensor:
    """bool ``[out, in]`` -> uint8 ``[out, ceil(in / 8)]``, lowest bit first."""
    bits = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def codes_reference(weight: Tensor, row_scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """``clamp(round(W / gamma), -1, 1) * mask`` as int8 ``[out, in]``; ``row_scale`` is gamma of each row."""
    codes = (weight.float() / row_scale[:, None]).round().clamp(-1, 1)
    return (codes if mask is None else codes * mask).to(torch.int8)


def gamma_reference(
    weight: Tensor, mask: Tensor, split_sizes: Sequence[int] | None = None, gamma_over: str = "dense"
) -> Tensor:
    """gamma of each part of a weight: a mean of magnitudes, at least 1e-5, summed in float64.

    Args:
        weight: ``[out, in]``.
        mask: bool ``[out, in]``.
        split_sizes: Rows of each part; None: one part.
        gamma_over: ``"dense"``, ``"kept"``, ``"masked"`` or ``"nonzero"``, see
            :func:`~sbn_kernels.prepare.triton.prepare_weight`.

    Returns:
        float32 ``[parts]``.
    """
    sizes = list(split_sizes or [weight.shape[0]])
    magnitude = weight.double().abs()
    if gamma_over == "nonzero":
        first = gamma_reference(weight, mask, sizes)
        mask = codes_reference(weight, first.repeat_interleave(torch.tensor(sizes, device=weight.device)), mask) != 0
    counted = torch.ones_like(mask) if gamma_over == "dense" else mask
    sums = torch.stack([part.sum() for part in (magnitude * counted).split(sizes)])
    over = torch.ones_like(mask) if gamma_over == "masked" else counted
    counts = torch.stack([part.sum() for part in over.split(sizes)]).clamp(min=1)
    return (sums / counts).float().clamp(min=1e-5)
