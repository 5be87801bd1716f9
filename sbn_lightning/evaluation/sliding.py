r"""Compute perplexity with sliding windows, as the field reports it.

.. math:: PPL = \exp\Big(-\frac1n \sum_i \log p(t_i \mid t_{a(i)}, \dots, t_{i-1})\Big)

A model sees at most ``window`` tokens. Windows start every ``stride`` tokens. A window scores the tokens that no
earlier window scored: the first window scores all its tokens, and each later one its last ``stride`` tokens, which have
``window - stride`` or more tokens before them. With ``stride < window`` each token but the very first, which has
nothing before it, is scored once. With ``stride = window`` the windows do not overlap, and the first token of each is
left out.

This is the procedure of the guide "Perplexity of fixed-length models" in the documentation of Hugging Face
transformers, whose usual setting is ``stride = window / 2``. There is one difference. The guide multiplies the mean of
a window by the number of its labels minus one, for the label that a model's shift loses. With ``stride < window`` only
the first window loses one, so the guide gives the tokens of the first window a slightly larger weight. Here each token
counts the same, as in the formula. Over many windows the difference is far below what one reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.evaluation.scoring import score
from sbn_lightning.models.transformer import TernaryTransformer


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: The number of tokens in the text.
        scored: The number of tokens that were scored.
        total: The sum of their negative log-probabilities, in nats.
        window: The number of tokens in a window.
        stride: The number of tokens between the starts of two windows.
    """

    tokens: int
    scored: int
    total: float
    window: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats for each scored token."""
        return self.total / self.scored

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where the value is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits for each byte of the text; the value compares between tokenizers.

        ``loss / ln 2`` is the cost of a token in bits. Tokens that were not scored count with the mean.

        Args:
            text_bytes: The length of the text in UTF-8.
        """
        return self.loss / math.log(2) * self.tokens / text_bytes


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows over a text.

    Args:
        tokens: The number of tokens in the text.
        window: The number of tokens in a window.
        stride: The number of tokens between the starts of two windows.

    Yields:
        The start and the end of a window, and the first position that it scores.
    """
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        yield start, end, max(scored, start + 1)
        scored = end
        if end == tokens:
            return


def perplexity(
    model: TernaryTransformer,
    tokens: np.ndarray,
    *,
    window: int,
    stride: int,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Compute the perplexity of a model on a text.

    Args:
        model: The model, on the device to use.
        tokens: The token ids of the text, integers ``[tokens]``.
        window: The number of tokens that the model sees at a time, 2 to its ``max_sequence_length``.
        stride: The number of tokens between the starts of two windows, 1 to ``window``.
        batch_size: The number of windows at a time.
        progress: Whether to show a bar on stderr.

    Raises:
        ConfigError: If ``window`` or ``stride`` is out of range.
        DataError: If there are fewer than 2 tokens, an id is beyond the model's vocabulary, or the model computes NaN.
    """
    limit = model.config.max_sequence_length
    if not 2 <= window <= limit:
        raise ConfigError(f"window={window} is outside 2 to the model's max_sequence_length={limit}")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride={stride} is outside 1 to window={window}: tokens in between would not be scored")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is below 1")
    if len(tokens) < 2:
        raise DataError(f"the text has {len(tokens)} tokens; perplexity needs 2 or more")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise DataError(
            f"the text has token ids from {tokens.min()} to {tokens.max()}, the model's vocab_size is "
            f"{model.config.vocab_size}: it was made with another tokenizer"
        )
    device = model.embed.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    scored = 0
    places = [place for place in windows(len(tokens), window, stride) if place[2] < place[1]]
    with tqdm(total=len(places), desc="perplexity", unit="window", disable=not progress) as bar:
        # The windows of a batch have one length and score the same positions. Only the first and the last differ.
        for (_, first), group in groupby(places, key=lambda place: (place[1] - place[0], place[2] - place[0])):
            alike = list(group)
            for i in range(0, len(alike), batch_size):
                batch = np.stack([tokens[start:end] for start, end, _ in alike[i : i + batch_size]])
                log_probabilities, _ = score(model, torch.from_numpy(batch.astype(np.int64)).to(device), first)
                total -= log_probabilities.double().sum()
                scored += log_probabilities.numel()
                bar.update(len(batch))
    if math.isnan(float(total)):
        raise DataError("the model's log-probabilities are not numbers: its weights, or their dtype, are broken")
    return Perplexity(len(tokens), scored, float(total), window, stride)
