"""Read a prompt as one CUDA graph, with one graph for each bucket of lengths.

A prompt of a few hundred tokens launches several hundred kernels, and the host needs longer to launch them than the GPU
to run them. A CUDA graph removes the launches, but a graph has one length. So a prompt is padded to the next length of
:func:`bucket_of`. The padding stands behind the prompt, where causal attention does not see it. The padding's keys and
values lie behind the row's tokens, where later steps overwrite them before they read them.

A graph costs the time of its capture. A process that reads one prompt must not pay for that, so the first prompt of a
bucket runs without a graph, and the second prompt captures the graph.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.inference.attention import RowAttention, StepAttention
from sbn_lightning.inference.prompt_pass import PromptPass
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


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy integers to a device, int64, without waiting for the device."""
    host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    if device.type != "cuda":
        return host.clone()
    # A copy from pinned memory does not wait. The allocator keeps the memory until the copy has run.
    return torch.empty_like(host, pin_memory=True).copy_(host).to(device, non_blocking=True)


class PromptGraphs:
    """The graphs of a decoder, one for each bucket that was needed twice.

    Args:
        model: The model.
        layers: The caches of the decoder's layers.
        lengths: The number of tokens of each row, int64 on the device; reading a prompt sets its row's.
        prompt_pass: What reads prompts; None reads with the model's blocks.
        cuda_graph: Whether to capture graphs at all. Without graphs a padded prompt runs in the plain way.
    """

    def __init__(
        self,
        model: TernaryTransformer,
        layers: Sequence[StepAttention],
        lengths: Tensor,
        prompt_pass: PromptPass | None,
        *,
        cuda_graph: bool,
    ) -> None:
        """Start without any graph."""
        self._model, self._lengths, self._pass, self._cuda_graph = model, lengths, prompt_pass, cuda_graph
        self._device = layers[0].keys.device
        self._caches = [(layer.keys, layer.values) for layer in layers]
        # The row, for the blocks of the model: a compiled block must see the same tensor in every graph.
        self._row = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._attend = [RowAttention(layer.keys, layer.values, self._row) for layer in layers]
        # For each bucket what its graph reads: the tokens, the position of the last one, the row, the row's new length.
        self._inputs: dict[int, Tensor] = {}
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
        count = len(tokens)
        given = to_device([*tokens, *[0] * (bucket - count), count - 1, row, count], self._device)
        seen = bucket in self._inputs
        if not seen:
            self._inputs[bucket] = given
        else:
            self._inputs[bucket].copy_(given)
        if not seen or not self._cuda_graph:
            return self._read(bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        graph, logits = self._graphs[bucket]
        graph.replay()
        # The graphs share one pool of memory, so another graph may overwrite these logits.
        return logits.clone()

    def _read(self, bucket: int) -> Tensor:
        inputs = self._inputs[bucket]
        tokens, (last, row, length) = inputs[:bucket].unsqueeze(0), inputs[bucket:].split(1)
        self._lengths.index_copy_(0, row, length)
        with trust_weights():  # The decoder has looked at the weights.
            if self._pass is not None:
                return self._pass(tokens, last, row, self._caches)
            self._row.copy_(row)
            hidden = self._model.hidden(tokens, attend=self._attend)
        logits: Tensor = self._model.lm_head(hidden.index_select(1, last)[:, 0])
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
