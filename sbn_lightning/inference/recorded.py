"""A decode step and the choice of the next tokens behind it, as one CUDA graph.

What follows the step depends on the rows: a greedy choice, draws from all tokens, or draws from the most likely ones,
which have to be found. There is one graph for each of these kinds of choice that was needed. All of them read tokens,
lengths and settings from the device, and write the chosen tokens where the next step reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sbn_lightning.inference.sampling import Kind, Sampler

if TYPE_CHECKING:
    from sbn_kernels.decode.step import DecodeStep

_WARM_UP = 2  # How many steps run before a CUDA graph is captured.


class RecordedStep:
    """A way to compute a step, with its CUDA graphs.

    Args:
        compute: Adds a token of ``tokens`` to each row, counts ``lengths`` up, and returns the logits
            ``[B, vocab_size]``.
        tokens: The tokens that ``compute`` reads, int64 ``[B]``.
        lengths: The number of tokens of each row, int64 ``[B]``.
        sampler: Chooses tokens.
        use_graph: Whether to capture graphs.
        kernel: The persistent kernel, if it is what computes the step. The kernel writes its greedy choice into
            ``tokens`` itself.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        tokens: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        *,
        use_graph: bool,
        kernel: DecodeStep | None = None,
    ) -> None:
        self.tokens, self.kernel = tokens, kernel
        self._compute, self._lengths, self._sampler, self._use_graph = compute, lengths, sampler, use_graph
        self._graphs: dict[Kind | None, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens_B: Tensor, kind: Kind | None) -> Tensor:
        """Add a token to each row.

        Args:
            tokens_B: The token ids, int64 ``[B]``. Without a copy if they are :attr:`tokens`.
            kind: How the next tokens are chosen; they are then in :attr:`tokens`. None chooses none.

        Returns:
            The logits of the next tokens, ``[B, vocab_size]``. With a graph the next step overwrites them.
        """
        if self.kernel is not None and kind == "greedy":
            kind = None
        if tokens_B.data_ptr() != self.tokens.data_ptr():
            self.tokens.copy_(tokens_B)
        self._sampler.update_device()
        if not self._use_graph:
            return self._run(kind)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
        graph, logits = self._graphs[kind]
        graph.replay()
        return logits

    def forget(self) -> None:
        """Drop the graphs, because tensors that they read have been replaced."""
        self._graphs.clear()

    def _run(self, kind: Kind | None) -> Tensor:
        logits = self._compute()
        if kind is not None:
            self.tokens.copy_(self._sampler.record(kind, logits, self._lengths))
        return logits

    def _capture(self, kind: Kind | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # At their first call kernels are compiled, chosen and given workspaces, which a graph cannot record. Repeating
        # a step does no harm, because the step writes the same keys and values into the same slots.
        device = self.tokens.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            before = self.tokens.clone(), self._lengths.clone()
            for _ in range(_WARM_UP):
                self._run(kind)
                self.tokens.copy_(before[0])
                self._lengths.copy_(before[1])
        torch.cuda.current_stream(device).wait_stream(stream)
        # The graphs share memory. The pool of dropped graphs cannot be used again. PyTorch refuses a pool that has no
        # graph, if logits of the pool are still in use.
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            logits = self._run(kind)
        return graph, logits
