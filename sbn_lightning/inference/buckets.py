"""Read a prompt as one CUDA graph, with one graph for each bucket of lengths.

A prompt of a few hundred tokens launches several hundred kernels, and the host needs longer to launch them than the GPU
to run them. A CUDA graph removes the launches, but a graph has one length. So a prompt is padded to the next length of
:func:`bucket_of`. The padding stands behind the prompt, where causal attention does not see it. The padding's keys and
values lie behind the row's tokens, where later steps overwrite them before they read them.

A graph costs the time of its capture. A process that reads one prompt must not pay for that, so the first prompt of a
bucket runs without a graph, and the second prompt captures the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.inference.attention import RowAttention, StepAttention
from sbn_lightning.layers.mask_tracker import trust_weights
from sbn_lightning.models.transformer import TernaryTransformer

SHORTEST, LONGEST = 64, 2048
_IN_AN_OCTAVE = 4  # Padding then adds at most a quarter to a prompt of more than 64 tokens.


def bucket_of(length: int, slots: int) -> int | None:
    """The length that a prompt is padded to.

    The lengths are 64, and for each power of two from 64 on four lengths in even steps: 80, 96, 112, 128, 160 and so
    on to 2,048.

    Args:
        length: The number of tokens of the prompt.
        slots: The number of slots of a row of the cache.

    Returns:
        The length; None for a prompt that is too long for a bucket, or whose padding the row cannot hold.
    """
    if length > LONGEST:
        return None
    if length <= SHORTEST:
        bucket = SHORTEST
    else:
        step = (1 << (length - 1).bit_length() - 1) // _IN_AN_OCTAVE
        bucket = -(-length // step) * step
    return bucket if bucket <= slots else None


class PromptGraphs:
    """The graphs of a decoder, one for each bucket that was needed twice.

    Args:
        model: The model.
        layers: The caches of the decoder's layers.
        cuda_graph: Whether to capture graphs at all. Without graphs a padded prompt runs in the plain way.
    """

    def __init__(self, model: TernaryTransformer, layers: Sequence[StepAttention], *, cuda_graph: bool) -> None:
        """Start without any graph."""
        self._model, self._cuda_graph = model, cuda_graph
        self._device = layers[0].keys.device
        # The row and the position of the last token; all graphs read these two tensors.
        self._row = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._last = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._attend = [RowAttention(layer.keys, layer.values, self._row) for layer in layers]
        self._tokens: dict[int, Tensor] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # The handle of the pool of memory that all graphs share.

    def read(self, tokens: Sequence[int], row: int, bucket: int) -> Tensor:
        """Read a prompt into a row, from the row's first slot on.

        Args:
            tokens: The prompt, of at most ``bucket`` tokens.
            row: The row of the cache.
            bucket: The length to pad the prompt to; see :func:`bucket_of`.

        Returns:
            The logits of the token after the prompt, ``[1, vocab_size]``. They are a copy.
        """
        seen = bucket in self._tokens
        if not seen:
            self._tokens[bucket] = torch.zeros(1, bucket, dtype=torch.int64, device=self._device)
        padded = [*tokens, *[0] * (bucket - len(tokens))]
        self._tokens[bucket].copy_(torch.tensor([padded]))
        self._row.fill_(row)
        self._last.fill_(len(tokens) - 1)
        if not seen or not self._cuda_graph:
            return self._read(bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        graph, logits = self._graphs[bucket]
        graph.replay()
        # The graphs share one pool of memory, so another graph may overwrite these logits.
        return logits.clone()

    def _read(self, bucket: int) -> Tensor:
        with trust_weights():  # The decoder has looked at the weights.
            hidden = self._model.hidden(self._tokens[bucket], attend=self._attend)
        logits: Tensor = self._model.lm_head(hidden.index_select(1, self._last)[:, 0])
        return logits

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # The first prompt of this bucket has compiled and chosen kernels. This run on another stream gives workspaces
        # to that stream. Reading the prompt twice writes the same keys and values into the same slots.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._read(bucket)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            logits = self._read(bucket)
        return graph, logits
