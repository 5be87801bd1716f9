"""Gradients of sharded weights: every rank computes the whole gradient, and keeps its own rows.

The backward of a layer needs the codes and not the latent weight. So autograd accumulates a layer's gradient into a
leaf tensor without storage (:func:`stand_in`). As soon as a gradient is there, a hook starts a reduce-scatter, which
runs while autograd computes the backward of the earlier layers. When it has ended, the rows of this rank are added to
``weight.grad``. Small gradients are sent together, in collectives that give each rank at least 16 MiB or hold 128 MiB
in all.

Learned scales, a few numbers a layer, are whole on every rank. Their gradients are averaged together at the end of the
backward.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from sbn_kernels.runtime.sharing import begin_collectives, end_collectives
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.rows import RowCut

# Newer versions of torch have the first name, and deprecate the second one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

IN_FLIGHT = 2**28  # The bytes of whole gradients that may be in memory at a time, each in its reduce-scatter.
# A collective sends at least these bytes to each rank. In small models the host is the limit, and starting a collective
# takes the host as long as several kernels.
PIECE = 2**24


def group_for_gradients(group: dist.ProcessGroup, max_ctas: int | None) -> dist.ProcessGroup:
    """Make a group of the same ranks whose collectives leave most multiprocessors to the backward.

    All ranks of the group must call this together.

    Args:
        group: The ranks.
        max_ctas: The most multiprocessors that a collective takes. None leaves that to NCCL, and no group is made.

    Raises:
        ConfigError: If the number is below 1.
    """
    if max_ctas is not None and max_ctas < 1:
        raise ConfigError(f"max_ctas={max_ctas} is below 1")
    if max_ctas is None or dist.get_backend(group) != "nccl":
        return group
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = max_ctas
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)


def stand_in(rows: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a leaf of autograd in the shape of a weight. The leaf takes no memory, only its gradient does."""
    return torch.empty((), dtype=dtype, device=device).expand(rows, in_features).requires_grad_()


class _Gradient(NamedTuple):
    """A whole gradient, and where its rows go."""

    whole: Tensor
    weight: nn.Parameter
    cut: RowCut

    @property
    def size(self) -> int:
        """The elements that each rank gets. The last rows of some ranks may be padding."""
        return self.cut.padded * self.whole.shape[1:].numel()

    def pieces(self) -> Tensor:
        """What each rank gets, ``[ranks, size]``."""
        whole, cut = self.whole, self.cut
        if cut.rows != cut.padded * cut.ranks:
            whole = torch.cat([whole, whole.new_zeros(cut.padded * cut.ranks - cut.rows, *whole.shape[1:])])
        return whole.contiguous().view(cut.ranks, -1)


@dataclass(eq=False)
class _Sent:
    """Gradients that travel in one collective."""

    places: list[tuple[nn.Parameter, RowCut, int]]  # Weight, rows, and elements of each gradient.
    work: dist.Work | None
    whole: Tensor | None  # The gradients must stay alive until the collective has read them.
    mine: Tensor


class BackwardCollectives:
    """Collectives that start in hooks of autograd, and end with the backward.

    Args:
        group: The ranks.
        dtype: The dtype in which gradients travel.

    Attributes:
        hold: Whether gradients stay as they are for the next micro-batch, whose own are added to them.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self.dtype, self.hold = dtype, False
        # NCCL divides while it sums. gloo does not know how.
        self._operation = dist.ReduceOp.AVG if dist.get_backend(group) == "nccl" else dist.ReduceOp.SUM
        self._runs = False

    def _begin(self) -> None:
        """Ask autograd, once in a backward, to call :meth:`_finish` at its end."""
        if not self._runs:
            self._runs = True
            begin_collectives()  # Kernels of the backward make room for the collectives.
            Variable._execution_engine.queue_callback(self._finish)

    def _end(self) -> None:
        """Say that the kernels of the backward have started, or that it has raised an error."""
        if self._runs:
            self._runs = False
            end_collectives()

    def _divide(self, total: Tensor, ranks: int) -> None:
        """Make the mean of a sum, if the collective has not."""
        if self._operation != dist.ReduceOp.AVG:
            total.div_(ranks)

    def _finish(self) -> None:
        raise NotImplementedError


class GradientScatter(BackwardCollectives):
    """Sends gradients of whole weights to the ranks that own their rows.

    Args:
        shard_group: The ranks that share the rows of a weight.
        replicate_group: The ranks that hold the same rows, in hybrid sharding. None means that there are none.
        average: The number of ranks that a gradient is averaged over.
        dtype: The dtype in which gradients travel.
    """

    def __init__(
        self,
        shard_group: dist.ProcessGroup,
        replicate_group: dist.ProcessGroup | None,
        average: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shard_group, dtype)
        self.shard_group, self.replicate_group, self.average = shard_group, replicate_group, average
        # The hook of a leaf holds this object. A cycle through a hook would never be collected.
        self._leaves: list[weakref.ref[Tensor]] = []
        self._sent: deque[_Sent] = deque()
        self._gathered: list[_Gradient] = []  # Small gradients that wait for each other.
        self._replicated: list[tuple[Tensor, nn.Parameter]] = []  # Gradients of parameters that every rank has whole.
        self._most_alone = min(PIECE * dist.get_world_size(shard_group), IN_FLIGHT // 2)

    def attach(self, leaf: Tensor, weight: nn.Parameter, cut: RowCut) -> None:
        """Make the gradient of ``leaf`` go to ``weight.grad``, by rows.

        Args:
            leaf: The tensor that takes the place of the weight in autograd.
            weight: The sharded weight.
            cut: The rows of the weight that each rank has.
        """

        def send(leaf: Tensor) -> None:
            if self.hold:
                return
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            self._collect(_Gradient(gradient.to(self.dtype), weight, cut))

        leaf.register_post_accumulate_grad_hook(send)
        self._leaves.append(weakref.ref(leaf))

    def attach_replicated(self, leaf: Tensor, parameter: nn.Parameter) -> None:
        """Make the gradient of ``leaf`` go to ``parameter.grad``, averaged over all ranks.

        Args:
            leaf: The tensor that takes the place of the parameter in autograd.
            parameter: A parameter that every rank has whole, a ``DTensor``.
        """

        def send(leaf: Tensor) -> None:
            if self.hold:
                return
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            self._begin()
            self._replicated.append((gradient, parameter))

        leaf.register_post_accumulate_grad_hook(send)
        self._leaves.append(weakref.ref(leaf))

    def recover(self) -> None:
        """Throw away what an earlier backward has left, if it has raised an error."""
        if self._runs and torch._C._current_graph_task_id() == -1:
            self.reset()

    def reset(self, recorded: bool = False) -> None:
        """Throw away what a backward that has raised an error has left: gradients that wait or travel.

        Args:
            recorded: Whether the backward was being recorded as a CUDA graph. Then nothing travels.
        """
        for sent in self._sent:
            if sent.work is not None and not recorded:
                sent.work.wait()
        self._sent.clear()
        self._gathered.clear()
        self._replicated.clear()
        for reference in self._leaves:
            if (leaf := reference()) is not None:
                leaf.grad = None
        self._end()

    def _collect(self, gradient: _Gradient) -> None:
        self._begin()
        if gradient.whole.nbytes >= self._most_alone:
            self._send([gradient])
            return
        self._gathered.append(gradient)
        if sum(one.whole.nbytes for one in self._gathered) >= self._most_alone:
            self._send_gathered()

    def _send_gathered(self) -> None:
        """Send the small gradients together, if there are any."""
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._send(gathered)

    def _send(self, gradients: list[_Gradient]) -> None:
        pieces = [one.pieces() for one in gradients]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        travelling = [sent for sent in self._sent if sent.whole is not None]
        size = sum(sent.whole.nbytes for sent in travelling if sent.whole is not None)
        for sent in travelling:
            if size + whole.nbytes <= IN_FLIGHT:
                break
            assert sent.whole is not None
            size -= sent.whole.nbytes
            self._wait(sent)
        mine = whole.new_empty(whole.shape[1])
        work = _reduce_scatter(mine, whole.view(-1), op=self._operation, group=self.shard_group, async_op=True)
        self._sent.append(_Sent([(one.weight, one.cut, one.size) for one in gradients], work, whole, mine))

    def _wait(self, sent: _Sent) -> None:
        """Take over what has come. In hybrid sharding, start the sum over the ranks that hold the same rows."""
        assert sent.work is not None
        sent.work.wait()  # On a GPU the stream waits here, not the host.
        sent.work = sent.whole = None
        if self.replicate_group is None:
            self._sent.remove(sent)
            self._take(sent)
        else:
            sent.work = dist.all_reduce(sent.mine, op=self._operation, group=self.replicate_group, async_op=True)

    def _finish(self) -> None:
        self._send_gathered()
        self._end()
        for sent in list(self._sent):
            if sent.whole is not None:
                self._wait(sent)
        while self._sent:
            sent = self._sent.popleft()
            assert sent.work is not None
            sent.work.wait()
            self._take(sent)
        self._average_replicated()

    def _average_replicated(self) -> None:
        replicated, self._replicated = self._replicated, []
        if not replicated:
            return
        whole = torch.cat([gradient.flatten() for gradient, _ in replicated])
        for group in (self.shard_group, self.replicate_group):
            if group is not None:
                dist.all_reduce(whole, op=self._operation, group=group)
        self._divide(whole, self.average)
        parameters = [parameter for _, parameter in replicated]
        for parameter, mine in zip(parameters, split_like(whole, parameters), strict=True):
            _accumulate(parameter, mine)

    def _take(self, sent: _Sent) -> None:
        self._divide(sent.mine, self.average)
        parts = sent.mine.split([size for _, _, size in sent.places])
        for (weight, cut, _), mine in zip(sent.places, parts, strict=True):
            _accumulate(weight, mine.view(cut.padded, *weight.shape[1:])[: cut.count])


def _accumulate(weight: nn.Parameter, mine: Tensor) -> None:
    """Add what this rank has of a gradient to ``weight.grad``, in the weight's dtype."""
    assert isinstance(weight, DTensor)
    if weight.grad is None:
        # As FSDP2 does. DTensor.from_local would describe the sharding anew, which takes the host ten times as long.
        weight.grad = DTensor(mine.to(weight.dtype), weight._spec, requires_grad=False)
    else:
        cast(DTensor, weight.grad)._local_tensor.add_(mine)


def split_like(whole: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into views of the shapes of other tensors, one after the other."""
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
