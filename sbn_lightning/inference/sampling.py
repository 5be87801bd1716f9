"""Choose the next token from logits, on the device, without waiting for the host.

A draw is a race of exponential clocks: with ``e`` drawn from Exp(1) for each token, ``argmax(p / e)`` is a token with a
probability proportional to its ``p``. The sum of ``p`` does not matter, so probabilities need not be normalised again
after top-k and top-p have removed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbn_lightning.core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: The number that divides the logits; 0 takes the most likely token.
        top_p: A probability. Tokens are drawn from the smallest set of most likely tokens whose probabilities sum to
            at least this value (nucleus sampling, arXiv 1904.09751). 1 draws from all tokens.
        top_k: The number of most likely tokens to draw from; None draws from all.

    Raises:
        ConfigError: If a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} is not a number from 0 (greedy) upwards")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is outside 0 (excluded) to 1; 1 draws from all tokens")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} is below 1; leave it out to draw from all tokens")

    @property
    def sorts(self) -> bool:
        """Whether tokens are sorted for a draw. The order of equal logits may then depend on the number of rows."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k is not None)

    def __call__(
        self, logits_BV: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Choose a token for each row.

        Args:
            logits_BV: The logits, ``[B, vocab_size]``.
            generator: The source of randomness, on the device of the logits. A sequence has one source for each row. A
                greedy choice needs none.

        Returns:
            The token ids, int64 ``[B]``.
        """
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        logits = logits_BV.float()
        # The largest logit is subtracted first: a small temperature would make it infinite.
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
        order = None
        if self.top_k is not None:
            probabilities, order = probabilities.topk(min(self.top_k, probabilities.shape[-1]), dim=-1)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        elif self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True)
        if self.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            # The most likely token always stays. The sum before it should be 0, and is so only up to rounding.
            outside = (before >= self.top_p).index_fill_(
                -1, torch.zeros(1, dtype=torch.int64, device=before.device), False
            )
            probabilities = probabilities.masked_fill(outside, 0.0)
        clocks = torch.empty_like(probabilities)
        if isinstance(generator, Sequence):
            for row, own in zip(clocks.split(1), generator, strict=True):
                row.exponential_(generator=own)
        else:
            clocks.exponential_(generator=generator)
        drawn = (probabilities / clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)).argmax(dim=-1)
        return drawn if order is None else order.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
