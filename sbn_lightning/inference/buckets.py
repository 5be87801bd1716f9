"""Read prompts as one CUDA graph, with one graph for each number of prompts and each bucket of lengths.

A prompt of a few hundred tokens launches several hundred kernels, and the host needs longer to launch them than the GPU
to run them. A CUDA graph removes the launches, but a graph has one length. So a prompt is padded to the next length of
:func:`bucket_of`. The padding stands behind the prompt, where causal attention does not see it. The padding's keys and
values lie behind the row's tokens, where later steps overwrite them before they read them.

A part of a prompt behind tokens in the cache has a graph of its own, which serves all numbers of tokens before. That
needs a kernel that reads this number on the device (:func:`~sbn_lightning.inference.attention.has_kernel`).

A graph costs the time of its capture. A process that reads one prompt must not pay for that, so the first prompt of a
bucket runs without a graph, and the second prompt captures the graph. The same holds for parts and for batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbn_lightning.inference.attention import RowAttention, StepAttention
from sbn_lightning.inference.prompt_pass import PromptPass
from sbn_lightning.layers.mask_tracker import trust_weights
from sbn_lightning.models.transformer import TernaryTransformer

SHORTEST, LONGEST = 64, 2048
MOST_TOKENS = 16384  # With more tokens the GPU takes longer than the host, and a graph would hold gigabytes.
_IN_AN_OCTAVE = 4  # Padding then adds at most a quarter to a prompt of more than 64 tokens.


def bucket_of(length: int, slots: int, prompts: int = 1) -> int | None:
    """The length that a prompt is padded to.

    The lengths are 64, and for each power of two from 64 on four lengths in even steps: 80, 96, 112, 128, 160 and so
    on to 2,048.

    Args:
        length: The number of tokens of the prompt.
        slots: The number of slots of a row of the cache.
        prompts: The number of prompts that are read together.

    Returns:
        The length; None for a prompt that is too long for a bucket, for prompts of too many tokens together, and for a
        prompt whose padding the row cannot hold.
    """
    if length > LONGEST or prompts * length > MOST_TOKENS:
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
        return host.to(device)
    # A copy from pinned memory does not wait. The allocator keeps the memory until the copy has run.
    return torch.empty_like(host, pin_memory=True).copy_(host).to(device, non_blocking=True)


class Kind(NamedTuple):
    """What a graph serves.

    Attributes:
        prompts: The number of prompts.
        bucket: Their length, with padding.
        behind: Whether they stand behind tokens that the cache holds already.
    """

    prompts: int
    bucket: int
    behind: bool


class PromptGraphs:
    """The graphs of a decoder, one for each :class:`Kind` of call that was needed twice.

    Args:
        model: The model.
        layers: The caches of the decoder's layers.
        prompt_pass: What reads prompts; None reads with the model's blocks.
        cuda_graph: Whether to capture graphs at all. Without graphs padded prompts run in the plain way.
    """

    def __init__(
        self,
        model: TernaryTransformer,
        layers: Sequence[StepAttention],
        prompt_pass: PromptPass | None,
        *,
        cuda_graph: bool,
    ) -> None:
        """Start without any graph."""
        self._model, self._pass, self._cuda_graph = model, prompt_pass, cuda_graph
        self._device = layers[0].keys.device
        self._caches = [(layer.keys, layer.values) for layer in layers]
        # Number of prompts, whether they stand behind others -> attention of each block. A compiled block must see the
        # same tensors in every graph.
        self._attend: dict[tuple[int, bool], list[RowAttention]] = {}
        self._inputs: dict[Kind, Inputs] = {}
        self._graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # The handle of the pool of memory that all graphs share.

    def read(self, tokens: Sequence[int], row: int, bucket: int, start: int = 0) -> Tensor:
        """Read a prompt, or a part of it, into a row.

        Args:
            tokens: The prompt, of at most ``bucket`` tokens.
            row: The row of the cache.
            bucket: The length to pad the prompt to; see :func:`bucket_of`.
            start: The number of tokens that the row keeps; these tokens stand behind them.

        Returns:
            The logits of the token after the prompt, ``[1, vocab_size]``. They are a copy.
        """
        kind = Kind(1, bucket, start > 0)
        given = inputs_of(tokens, row, start, self._device, bucket)
        if kind not in self._inputs:
            self._inputs[kind] = given
            return self._read(kind)
        self._inputs[kind].all.copy_(given.all)
        return self._replay(kind)

    def read_all(self, tokens_BT: Tensor, lengths_B: Tensor, bucket: int) -> Tensor:
        """Read a prompt into each row of the cache, from the first slots on.

        Args:
            tokens_BT: The prompts on the device, padded at their ends with any token, int64 ``[B, T]``.
            lengths_B: The lengths of the prompts, int64 ``[B]``.
            bucket: The length to pad the prompts to, at least T.

        Returns:
            The logits of the token after each prompt, ``[B, vocab_size]``. They are a copy.
        """
        count, length = tokens_BT.shape
        kind = Kind(count, bucket, False)
        first = kind not in self._inputs
        if first:
            self._inputs[kind] = Inputs(tokens_BT.new_zeros(3 * _even(count) + count * bucket), count)
        inputs = self._inputs[kind]
        torch.arange(count, out=inputs.rows)
        inputs.tokens[:, :length] = tokens_BT
        torch.sub(lengths_B, 1, out=inputs.last)
        return self._read(kind) if first else self._replay(kind)

    def _replay(self, kind: Kind) -> Tensor:
        if not self._cuda_graph:
            return self._read(kind)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
        graph, logits = self._graphs[kind]
        graph.replay()
        # The graphs share one pool of memory, so another graph may overwrite these logits.
        return logits.clone()

    def _read(self, kind: Kind) -> Tensor:
        inputs = self._inputs[kind]
        with trust_weights():  # The decoder has looked at the weights.
            if self._pass is not None:
                start = None if kind.behind else 0
                return self._pass(inputs.tokens, inputs.last, inputs.rows, inputs.before, self._caches, start)
            attend = self._attend_of(kind)
            attend[0].rows.copy_(inputs.rows)
            attend[0].before.copy_(inputs.before)
            positions = attend[0].before[:, None] + torch.arange(kind.bucket, device=self._device)
            hidden = self._model.hidden(inputs.tokens, positions if kind.behind else None, attend)
        ends = inputs.last + torch.arange(kind.prompts, device=self._device) * kind.bucket
        logits: Tensor = self._model.lm_head(hidden.flatten(0, 1).index_select(0, ends))
        return logits

    def _attend_of(self, kind: Kind) -> list[RowAttention]:
        """The attention of each block; they share the tensors of rows and numbers of tokens."""
        key = kind.prompts, kind.behind
        if key not in self._attend:
            rows, before = torch.zeros(2, kind.prompts, dtype=torch.int64, device=self._device)
            self._attend[key] = [RowAttention(*cache, rows, before, kind.behind) for cache in self._caches]
        return self._attend[key]

    def _capture(self, kind: Kind) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # A graph cannot record what kernels do at their first call, so the first run is no graph. It is on another
        # stream, because workspaces belong to a stream. Reading a prompt twice writes the same keys and values into the
        # same slots.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._read(kind)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            logits = self._read(kind)
        return graph, logits


class Inputs:
    """What a pass over prompts reads: views of one tensor, which a prompt on the host fills with one copy.

    Args:
        all: Room for three numbers of each prompt (the position of the last token, the row, and the number of tokens
            that the row holds already), and then for the tokens of each prompt. If ``count`` is odd, one number after
            each kind of number is unused.
        count: The number of prompts.
    """

    def __init__(self, all: Tensor, count: int) -> None:
        self.all = all
        # All views begin at multiples of 16 bytes. Other pointers cost a kernel a compilation and a slower launch.
        numbers, tokens = all.split([3 * _even(count), len(all) - 3 * _even(count)])
        self.last, self.rows, self.before = numbers.view(3, -1)[:, :count]
        self.tokens = tokens.view(count, -1)


def inputs_of(tokens: Sequence[int], row: int, start: int, device: torch.device, length: int = 0) -> Inputs:
    """Copy one prompt, or a part of one, to the device.

    Args:
        tokens: The prompt.
        row: The row of the cache.
        start: The number of tokens that the row keeps; these tokens stand behind them.
        device: The device.
        length: The length to pad the prompt to.
    """
    padding = [0] * (length - len(tokens))
    return Inputs(to_device([len(tokens) - 1, 0, row, 0, start, 0, *tokens, *padding], device), 1)


def _even(count: int) -> int:
    return count + count % 2
