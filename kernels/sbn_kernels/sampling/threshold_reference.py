"""The smallest logit that top_k and top_p leave, in plain PyTorch: what the kernel is tested against.

``top_k`` leaves the logits that have fewer than ``top_k`` larger ones. Of these, ``top_p`` leaves those whose larger
ones have less than ``top_p`` of the probability. So a logit stays or goes by its value, and equal logits stay or go
together.

Probabilities are integers here. The most likely token has the weight 2^40, and a token below 2^-40 of its probability
has none. So sums are exact, and do not depend on the order of the tokens or on how many rows there are. A weight is
made of sums, products and shifts alone, and one division, which every device rounds alike. So the kernel equals its
twin, bit for bit.

A NaN and minus infinity count as the smallest finite number of the dtype, and infinity as the largest. The choice
itself sees the logits as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbn_kernels.sampling.reference import TEMPERATURE, TOP_K, TOP_P, check_settings

ONE = 2.0**40  # The weight of the most likely token
LOG2_E = math.log2(math.e)
STEEPEST = 1e38  # The largest number that a difference of logits is multiplied with
SHIFT = 63  # A weight shifted by this many bits is 0.
NO_LIMIT = 2**62
# 2^-x = 1 + C1 x + C2 x^2 + ... for x from 0 to 1, within 4e-7 as float32 computes it
C1, C2, C3, C4, C5 = -0.69314409, 0.24018328, -0.05530559, 0.00921418, -0.00094778


def weights(values: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Makes the integer weights of logits.

    Args:
        values: Finite logits, float32 ``[rows, n]``.
        largest: The largest logit of each row, float32 ``[rows, 1]``.
        temperature: float64 ``[rows, 1]``.

    Returns:
        ``2^40 * exp((values - largest) / temperature)`` as int64 ``[rows, n]``.
    """
    # A number divided by a tensor would be the product with the reciprocal, which rounds twice.
    scale = (torch.full_like(temperature, LOG2_E) / temperature).clamp(max=STEEPEST).float()
    halvings = ((largest - values) * scale).clamp(max=SHIFT)
    whole = halvings.int()
    x = halvings - whole.float()
    power = ((((x * C5 + C4) * x + C3) * x + C2) * x + C1) * x + 1
    return (power * ONE).long() >> whole.long()


def lowest_logits_reference(logits: Tensor, settings: Tensor) -> Tensor:
    """Finds the smallest logit of each row that top_k and top_p leave; the module's documentation has the rule.

    Args:
        logits: The logits, ``[rows, vocab]``.
        settings: The numbers of each row, int64 ``[rows, 4]``, as ``choose_tokens_reference`` takes them. A temperature
            of 0, and a top_p of 1 with a top_k of 0, leave all tokens.

    Returns:
        float32 ``[rows]``; minus infinity for a row that leaves all tokens.

    Raises:
        ValueError: If an argument does not fit.
    """
    check_settings(logits, settings)
    temperature, top_p = settings.view(torch.float64)[:, TEMPERATURE : TOP_P + 1].split(1, dim=1)
    vocab, top_k = logits.shape[1], settings[:, TOP_K : TOP_K + 1]
    values = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).sort(dim=-1, descending=True).values.float()
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab) - 1
    of_top_k = values.gather(-1, last)
    amounts = weights(values, values[:, :1], temperature).masked_fill(values < of_top_k, 0)
    sums = amounts.cumsum(dim=-1)
    # The most likely token has no weight before it, so it stays even if top_p is 0.
    bound = (top_p * sums[:, -1:].double()).ceil().long().clamp(min=1).masked_fill(top_p >= 1, NO_LIMIT)
    inside = (sums - amounts < bound).sum(dim=-1, keepdim=True)
    lowest = torch.maximum(of_top_k, values.gather(-1, inside - 1))
    without = (temperature <= 0) | ((top_k <= 0) & (top_p >= 1))
    return lowest.masked_fill(without, -math.inf).squeeze(-1)
