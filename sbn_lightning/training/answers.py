"""A loss on the answers of conversations alone, for fine-tuning on prepared text in the format of a chat template.

The prepared tokens need no labels: the markers of the template say where an answer starts and ends. The markers of the
question's side are context, and only the tokens of an answer and the marker that ends the answer are predicted. This is
the loss of InstructGPT's supervised fine-tuning as the field uses it (``assistant_only_loss`` in TRL).

An answer whose start lies before the row is not seen as one, and an answer that the row cuts is predicted up to there.
Several conversations may lie in one row; that is how ``prepare`` packs documents. The divergence from a teacher
is over the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.transformer import TernaryTransformer


@dataclass(frozen=True)
class Answers:
    """The markers around an answer.

    Args:
        start: The text right before an answer. The default is ChatML's text, which SmolLM2 and Qwen2.5 use.
        end: The text that ends an answer.

    Raises:
        ConfigError: If a marker is empty.
    """

    start: str = "<|im_start|>assistant\n"
    end: str = "<|im_end|>"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not getattr(self, name):
                raise ConfigError(f"answers.{name} is empty; give the text of the chat template there")

    def ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Return the token ids of both markers.

        Args:
            tokenizer: The tokenizer of the data.

        Raises:
            ConfigError: If the tokenizer cannot write a marker.
        """
        found = []
        for name in ("start", "end"):
            text = getattr(self, name)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if not ids or tokenizer.decode(ids, skip_special_tokens=False) != text:
                raise ConfigError(f"answers.{name}={text!r} is no text of the data's tokenizer")
            found.append(ids)
        return found[0], found[1]


class AnswerLoss:
    """The mean cross-entropy of the tokens of answers.

    Args:
        start: The token ids of the marker before an answer.
        end: The token ids of the marker that ends an answer.
    """

    def __init__(self, start: list[int], end: list[int]) -> None:
        self.start, self.end = start, end

    def __call__(self, model: TernaryTransformer, batch: Tensor) -> tuple[Tensor, int]:
        """Return the loss of a batch, a float32 scalar, and the number of tokens that it is a mean over.

        The number is read on the host, so a GPU is waited for once a call. Without any answer the loss is 0.

        Args:
            model: The model.
            batch: The token ids, int64 ``[B, T + 1]``.
        """
        places = self.target_places(batch)
        hidden = model.hidden(batch[:, :-1]).flatten(0, 1)
        targets = batch[:, 1:].flatten()[places]
        head, config = model.lm_head.weight, model.config
        return linear_cross_entropy(hidden[places], head, targets, config.loss, config.head_precision), len(places)

    def target_places(self, batch: Tensor) -> Tensor:
        """Return which of the flattened targets belong to answers, their indices, int64 ``[answer tokens]``.

        Args:
            batch: The token ids, int64 ``[B, T + 1]``. The last T of each row are the targets.
        """
        return self.places(batch)[:, 1:].flatten().nonzero().flatten()

    def places(self, tokens: Tensor) -> Tensor:
        """Return which tokens belong to answers, or to the markers that end them, bool ``[B, T]``.

        Args:
            tokens: The token ids, int64 ``[B, T]``.
        """
        # The place after the last marker of each kind that ends before a token; 0 where there is none.
        start, end = (_last_end(tokens, marker) for marker in (self.start, self.end))
        return start > end


def _last_end(tokens: Tensor, marker: list[int]) -> Tensor:
    """Return for each token the place right after the last whole marker before the token, int64 ``[B, T]``."""
    length, count = tokens.shape[1], len(marker)
    ends = torch.zeros(tokens.shape[0], length + 1, dtype=torch.int64, device=tokens.device)
    if count <= length:
        pattern = torch.tensor(marker, device=tokens.device)
        found = (tokens.unfold(1, count, 1) == pattern).all(-1)
        ends[:, count:] = found * torch.arange(count, length + 1, device=tokens.device)
    return ends.cummax(1).values[:, :length]
