"""A decode step with the layers of the model: the next token of each row, on caches that a decoder has filled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_lightning.inference.attention import Slots, StepAttention
from sbn_lightning.layers.mask_tracker import trust_weights
from sbn_lightning.models.attention import in_window
from sbn_lightning.models.transformer import TernaryTransformer


class LayersStep:
    """Adds a token to each row, and counts the rows up. Nothing depends on the host, so a CUDA graph can record it.

    Args:
        model: The model.
        layers: The caches of the model's layers; the list may be filled later.
        shared: What the layers share.
        slots: The number of slots of the cache.
        max_length: The number of tokens that a row can have. A row that has them does not grow.
        tokens: The tokens to add, int64 ``[B]``.
        lengths: The number of tokens of each row, int64 ``[B]``.
        growing: 1 for each row that a step makes longer and 0 for the others, int64 ``[B]``.
    """

    def __init__(
        self,
        model: TernaryTransformer,
        layers: Sequence[StepAttention],
        shared: Slots,
        slots: int,
        max_length: int,
        tokens: Tensor,
        lengths: Tensor,
        growing: Tensor,
    ) -> None:
        self._model, self._layers, self._shared, self._max_length = model, layers, shared, max_length
        self._tokens, self._lengths, self._growing = tokens, lengths, growing
        self._windows = {model.config.window(block) for block in range(model.config.n_layers)}
        self._index = torch.arange(slots, device=tokens.device)

    def __call__(self) -> Tensor:
        """Compute the logits of the tokens after these, ``[B, vocab_size]``."""
        shared, dtype = self._shared, self._layers[0].keys.dtype
        shared.now = self._lengths.clamp(max=self._max_length - 1)
        shared.bias = {}
        for window in self._windows:
            seen = in_window(shared.now.unsqueeze(1), self._index, window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            shared.bias[window] = bias[:, None, None]
        with trust_weights():
            hidden = self._model.hidden(self._tokens.unsqueeze(1), shared.now.unsqueeze(1), self._layers)
        logits: Tensor = self._model.lm_head(hidden[:, 0])
        self._lengths.add_(self._growing).clamp_(max=self._max_length)
        return logits
