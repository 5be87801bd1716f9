r"""Perplexity with sliding windows, as the field reports it.

.. math:: PPL = \exp\Big(-\frac1n \sum_i \log p(t_i \mid t_{a(i)}, \dots, t_{i-1})\Big)

A model sees ``window`` tokens at most. Windows start every ``stride`` tokens, and of each only the tokens count that no
earlier window scored: everything in the first, the last ``stride`` in those after it, which thus have
``window - stride`` tokens of context or more. With ``stride < window`` each token but the very first, which has nothing
before it, is scored once. With ``stride = window`` the windows are disjoint and the first token of each is left out.

This is the procedure of the guide "Perplexity of fixed-length models" in the documentation of Hugging Face
transformers; its usual setting is ``stride = window / 2``. One difference: the guide multiplies each window's mean by
the number of its labels less one, for the label that a model's shift loses. A window after the first loses none when
``stride < window``, so there the guide gives the first window's tokens a slightly larger weight. Here each token counts
the same, as in the formula; over many windows the difference is far below what one reports.
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
    """What a text costs a model.

    Attributes:
        tokens: Tokens of the text.
        scored: Those that were scored.
        total: Sum of their negative log-probabilities, nats.
        window: Tokens a window.
        stride: Tokens between the starts of windows.
    """

    tokens: int
    scored: int
    total: float
    window: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats a scored token."""
        return self.total / self.scored

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits for a byte of the text: comparable between tokenizers.

        ``loss / ln 2`` is the cost of a token in bits. Tokens that were not scored are taken to cost the mean.
        """
        return self.loss / math.log(2) * self.tokens / text_bytes


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of each window over a text of ``tokens`` tokens, and the first position that it scores."""
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
    """Perplexity of a model on a text.

    Args:
        model: On the device to use.
        tokens: Token ids of the text, integers ``[tokens]``.
        window: Tokens the model sees at a time, 2 to its ``max_sequence_length``.
        stride: Tokens between the starts of windows, 1 to ``window``.
        batch_size: Windows at a time.
        progress: Show a bar on stderr.

    Raises:
        ConfigError: If window or stride are out of range.
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
        # Windows of a batch have one length and score the same positions: all do but the first and the last.
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
