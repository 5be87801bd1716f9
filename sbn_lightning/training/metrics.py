"""Metrics of a language model, made from losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """The exponential of the mean cross-entropy per token.

    The metric takes losses and not logits, because logits over a vocabulary of 150,000 tokens are never made as a
    whole.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int) -> None:
        """Add the loss of some tokens.

        Args:
            loss: The mean cross-entropy of the tokens in nats, a scalar.
            tokens: The number of tokens.
        """
        self.total += loss.detach().double() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the perplexity over all tokens so far, on all processes; a float64 scalar."""
        return (self.total / self.tokens).exp()
