"""How a :class:`~sbn_lightning.inference.decoder.Decoder` reads prompts into its cache.

There are three ways. The fastest is a CUDA graph of a bucket of lengths (:mod:`sbn_lightning.inference.buckets`). Then
comes the pass of fused kernels (:mod:`sbn_lightning.inference.prompt_pass`). The blocks of the model read any tokens of
any model. A graph holds the pass or the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_lightning.inference.attention import (
    ChunkAttention,
    PromptAttention,
    Slots,
    StepAttention,
    has_kernel,
    room_like,
)
from sbn_lightning.inference.buckets import PromptGraphs, bucket_of, inputs_of
from sbn_lightning.inference.prompt_pass import PromptPass, make_pass
from sbn_lightning.layers.mask_tracker import trust_weights
from sbn_lightning.models.transformer import TernaryTransformer


class PromptReader:
    """Reads prompts, and allocates the cache with the first one.

    Args:
        model: The model. Its weights must be prepared before each call.
        shared: What the layers of the cache share in a step.
        slots: The number of slots of a row of the cache.
        use_graph: Whether to capture CUDA graphs.

    Attributes:
        layers: The cache of each layer; empty before the first prompt.
        prompt_pass: The pass of fused kernels; None for a model without one, and before :meth:`forget`.
        graphs: The graphs; None before the first prompt that could use one.
    """

    def __init__(self, model: TernaryTransformer, shared: Slots, slots: int, *, use_graph: bool) -> None:
        """Start without a cache."""
        self._model, self._shared, self._slots = model, shared, slots
        self._device = shared.rows.device
        self.use_graph = use_graph
        self.layers: list[StepAttention] = []
        self.prompt_pass: PromptPass | None = None
        self.graphs: PromptGraphs | None = None

    def forget(self) -> None:
        """Drop the graphs, and look at the model again: layers or prepared weights have been replaced."""
        self.graphs = None
        self.prompt_pass = make_pass(self._model)

    def read_all(self, tokens_BT: Tensor, lengths_B: Tensor, chunk: int | None) -> Tensor:
        """Read a prompt into each row of the cache.

        Args:
            tokens_BT: The prompts, padded at their ends with any token, int64 ``[B, T]``.
            lengths_B: The lengths of the prompts, int64 ``[B]``.
            chunk: The largest number of tokens of a prompt to read at a time; None reads prompts at once.

        Returns:
            The logits of each prompt's next token, ``[B, vocab_size]``.
        """
        length, rows = tokens_BT.shape[1], self._shared.rows
        prompt_pass = self._start()
        if chunk is None or chunk >= length:
            chunk = length
            bucket = bucket_of(length, self._slots, len(rows)) if self.use_graph else None
            if bucket is not None and self.layers:
                return self._graphs(prompt_pass).read_all(tokens_BT, lengths_B, bucket)
        logits: Tensor | None = None
        for start in range(0, length, chunk):
            part = tokens_BT[:, start : start + chunk]
            # Where a prompt ends in another part, the clamped position is of no use, and the row is not taken.
            ends = lengths_B - 1 - start
            last = ends.clamp(0, part.shape[1] - 1)
            if prompt_pass is not None:
                found = prompt_pass(part, last, rows, torch.full_like(rows, start), self._caches(), start)
            else:
                found = self._model.lm_head(self._read(slice(None), part, start)[rows, last])
            logits = found if logits is None else torch.where((ends >= 0).unsqueeze(1), found, logits)
        assert logits is not None  # A prompt has a token.
        return logits

    def read_row(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read tokens into one row, behind ``start`` tokens that the row holds already.

        Returns:
            The logits of the token after these, ``[1, vocab_size]``.
        """
        count = len(tokens)
        prompt_pass = self._start()
        bucket = bucket_of(count, self._slots - start) if self.use_graph else None
        if bucket is not None and self.layers and (start == 0 or self._goes_on_in_graphs()):
            return self._graphs(prompt_pass).read(tokens, row, bucket, start)
        if prompt_pass is not None:
            given = inputs_of(tokens, row, start, self._device)
            return prompt_pass(given.tokens, given.last, given.rows, given.before, self._caches(), start)
        # The first prompt under autocast is padded like later ones, so its products have their shapes.
        padded = [*tokens, *[0] * ((bucket or count) - count)]
        hidden = self._read(slice(row, row + 1), torch.tensor([padded], device=self._device), start)
        logits: Tensor = self._model.lm_head(hidden[:, count - 1])
        return logits

    def _goes_on_in_graphs(self) -> bool:
        """Whether a graph can read tokens behind others, whose number the device knows."""
        config = self._model.config
        windows = any(config.window(block) is not None for block in range(config.n_layers))
        return has_kernel(self.layers[0].keys) and not windows

    def _caches(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.layers]

    def _graphs(self, prompt_pass: PromptPass | None) -> PromptGraphs:
        if self.graphs is None:
            self.graphs = PromptGraphs(self._model, self.layers, prompt_pass, cuda_graph=True)
        return self.graphs

    def _start(self) -> PromptPass | None:
        """Allocate the cache, and return the pass of fused kernels; None without one.

        Under autocast the dtype of keys is not known before the first prompt. That prompt then makes the cache.
        """
        if torch.is_autocast_enabled(self._device.type):
            return None
        if not self.layers:
            config = self._model.config
            like = self._model.embed.weight.new_empty(1, config.n_kv_heads, 1, config.head_size)
            for _ in self._model.blocks:
                self._add_layer(like, like)
        return self.prompt_pass

    def _add_layer(self, keys_like: Tensor, values_like: Tensor) -> None:
        keys, values = (room_like(like, len(self._shared.rows), self._slots) for like in (keys_like, values_like))
        self.layers.append(StepAttention(keys, values, self._shared))

    def _read(self, rows: slice, tokens_RT: Tensor, start: int) -> Tensor:
        """Compute the hidden states of tokens that stand behind ``start`` tokens; write their keys and values.

        Args:
            rows: The R rows of the cache to write to.
            tokens_RT: The tokens, int64 ``[R, T]``.
            start: The number of tokens before them in each row.

        Returns:
            The hidden states, ``[R, T, D]``.
        """
        end = start + tokens_RT.shape[1]
        if start:
            chunks = [ChunkAttention(layer.keys[rows, :, :end], layer.values[rows, :, :end]) for layer in self.layers]
            positions = torch.arange(start, end, device=self._device).expand(tokens_RT.shape)
            with trust_weights():
                return self._model.hidden(tokens_RT, positions, chunks)
        attend = [PromptAttention() for _ in self._model.blocks]
        with trust_weights():
            hidden = self._model.hidden(tokens_RT, attend=attend)
        if not self.layers:
            for layer in attend:
                self._add_layer(layer.keys, layer.values)
        for cache, layer in zip(self.layers, attend, strict=True):
            cache.keys[rows, :, :end] = layer.keys
            cache.values[rows, :, :end] = layer.values
        return hidden
