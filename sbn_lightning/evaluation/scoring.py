"""Compute log-probabilities of given tokens, a part of the positions at a time.

With a vocabulary of 150,000 tokens the logits of one sequence of 2,048 tokens take 1.2 GB in float32. Only the
positions that are scored go through the head, and never more than :data:`LOGITS` logits exist at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_lightning.models.transformer import TernaryTransformer

LOGITS = 1 << 27


@torch.no_grad()
def score(model: TernaryTransformer, tokens_BT: Tensor, first: int = 1) -> tuple[Tensor, Tensor]:
    """Score tokens given all tokens before them.

    Args:
        model: The model, on the device of the tokens.
        tokens_BT: The token ids, int64 ``[B, T]``.
        first: The first position that is scored, 1 to T - 1. Position 0 has no token before it.

    Returns:
        The natural log-probability of each token from ``first`` on, float32 (float64 for a float64 model)
        ``[B, T - first]``; and whether the token is the most likely one, bool, the same shape.
    """
    hidden = model.hidden(tokens_BT[:, :-1])[:, first - 1 :]
    log_probabilities, greedy = _compare(model, hidden.flatten(0, 1), tokens_BT[:, first:].flatten())
    shape = (tokens_BT.shape[0], -1)
    return log_probabilities.view(shape), greedy.view(shape)


@torch.no_grad()
def score_ends(
    model: TernaryTransformer, rows: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[tuple[float, bool]]:
    """Score the ends of sequences of different lengths, as one batch.

    Args:
        model: The model, on the device to use.
        rows: The token ids of each sequence, 2 or more.
        counts: How many tokens at the end of each sequence are scored, from 1 to its length minus one.

    Returns:
        For each sequence the sum of the log-probabilities, and whether all scored tokens are the most likely ones.
    """
    device = model.embed.weight.device
    # The padding is on the right, where causal attention does not see it.
    padded = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row) - 1] = torch.tensor(row[:-1])
    hidden = model.hidden(padded.to(device))
    pairs = list(zip(rows, counts, strict=True))
    ends = torch.cat([hidden[i, len(row) - 1 - n : len(row) - 1] for i, (row, n) in enumerate(pairs)])
    wanted = torch.tensor([token for row, n in pairs for token in row[-n:]], device=device)
    log_probabilities, greedy = _compare(model, ends, wanted)
    sums = zip(log_probabilities.double().split(list(counts)), greedy.split(list(counts)), strict=True)
    return [(float(values.sum()), bool(best.all())) for values, best in sums]


def _compare(model: TernaryTransformer, hidden_ND: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each wanted token after its hidden state, and whether it is the most likely."""
    size = max(1, LOGITS // model.config.vocab_size)
    log_probabilities, greedy = [], []
    for part, wanted in zip(hidden_ND.split(size), wanted_N.split(size), strict=True):
        logits = model.lm_head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
        log_probabilities.append(chosen - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(log_probabilities), torch.cat(greedy)
