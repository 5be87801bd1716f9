"""Gradients of weights that every rank computes whole and keeps by rows.

The backward of a layer needs no latent weight, only codes. So a layer's gradient is accumulated into a leaf tensor
without storage (:func:`stand_in`), and a hook sends each gradient on its way as soon as autograd has it: a
reduce-scatter that runs beside the backward of the layers before. When the backward has ended, the rows of this rank
are added to ``weight.grad``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from sbn_lightning.distributed.rows import RowCut

# The name of the collective in newer versions of torch, and the one that they deprecate.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

IN_FLIGHT = 2  # gradients of whole weights that wait for their reduce-scatter at a time


def stand_in(rows: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A leaf of autograd in the shape of a weight that takes no memory; only its gradient does."""
    return torch.empty((), dtype=dtype, device=device).expand(rows, in_features).requires_grad_()


@dataclass
class _Sent:
    weight: nn.Parameter
    work: dist.Work | None
    whole: Tensor | None  # alive until the collective has read it
    mine: Tensor
    cut: RowCut


class GradientScatter:
    """Sends gradients of whole weights to the ranks that own their rows.

    Args:
        shard_group: The ranks that share the rows of a weight.
        replicate_group: The ranks that hold the same rows, in hybrid sharding; None: there are none.
        average: The number of ranks that a gradient is averaged over.
    """

    def __init__(self, shard_group: dist.ProcessGroup, replicate_group: dist.ProcessGroup | None, average: int) -> None:
        self.shard_group, self.replicate_group, self.average = shard_group, replicate_group, average
        self._sent: deque[_Sent] = deque()
        self._waits_for_end = False

    def attach(self, leaf: Tensor, weight: nn.Parameter, cut: RowCut) -> None:
        """From now on the gradient of ``leaf`` goes to ``weight.grad``, by rows."""

        def send(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            self._send(gradient, weight, cut)

        leaf.register_post_accumulate_grad_hook(send)

    def _send(self, gradient: Tensor, weight: nn.Parameter, cut: RowCut) -> None:
        if not self._waits_for_end:
            self._waits_for_end = True
            Variable._execution_engine.queue_callback(self._finish)
        while sum(sent.whole is not None for sent in self._sent) >= IN_FLIGHT:
            self._wait(next(sent for sent in self._sent if sent.whole is not None))
        if cut.rows != cut.padded * cut.ranks:
            gradient = torch.cat([gradient, gradient.new_zeros(cut.padded * cut.ranks - cut.rows, gradient.shape[1])])
        gradient = gradient.contiguous()
        mine = gradient.new_empty(cut.padded, gradient.shape[1])
        work = _reduce_scatter(mine, gradient, group=self.shard_group, async_op=True)
        self._sent.append(_Sent(weight, work, gradient, mine, cut))

    def _wait(self, sent: _Sent) -> None:
        assert sent.work is not None
        sent.work.wait()  # on a GPU: the stream waits, not the host
        sent.work = sent.whole = None
        if self.replicate_group is not None:
            sent.work = dist.all_reduce(sent.mine, group=self.replicate_group, async_op=True)

    def _finish(self) -> None:
        self._waits_for_end = False
        while self._sent:
            sent = self._sent.popleft()
            if sent.whole is not None:
                self._wait(sent)
            if sent.work is not None:
                sent.work.wait()
            _accumulate(sent.weight, sent.mine[: sent.cut.count].div_(self.average))


def _accumulate(weight: nn.Parameter, mine: Tensor) -> None:
    """Adds rows to the gradient of a sharded weight, in the weight's dtype."""
    assert isinstance(weight, DTensor)
    rows = mine.to(weight.dtype)
    if weight.grad is None:
        weight.grad = DTensor.from_local(
            rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    else:
        weight.grad.to_local().add_(rows)  # type: ignore[attr-defined]
