"""Counts the bytes that a rank receives from other ranks, by watching the collectives themselves.

Every collective of torch, from Python or from DDP's C++, goes through torch's dispatcher. :class:`Wire` is a mode of
the dispatcher. It reads the sizes of the tensors that each collective gets, so the count is of what was sent, not of
what should have been. Blocks that are compiled run uncompiled while the mode is on, so a step is timed without it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

SEND_NOTHING = ("wait", "_wrap")  # Operators of torch's functional collectives that begin so.


def size_of(tensors: Any) -> int:
    """The bytes of all tensors in a nested structure."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tensors)[0] if isinstance(leaf, Tensor))


class Wire(TorchDispatchMode):
    """Counts what this rank receives while the mode is on.

    A gather brings the parts of the other ranks. A reduce-scatter takes as much, and an all-reduce is a reduce-scatter
    and a gather. This is what the ring algorithms send; others may send more.

    Attributes:
        received: The bytes that this rank receives, by kind of collective.
        calls: The number of collectives, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.received.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # The collectives inside of the DTensor come here by themselves.
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(func._opname, args)
        elif func.namespace == "_c10d_functional" and not func._opname.startswith(SEND_NOTHING):
            self._count_functional(func._opname, args, result)
        return result

    def _count(self, name: str, args: Any) -> None:
        if "allgather" in name or "all_gather" in name:
            self._add("gather", abs(size_of(args[0]) - size_of(args[1])))
        elif "reduce_scatter" in name:
            self._add("reduce-scatter", abs(size_of(args[1]) - size_of(args[0])))
        elif "allreduce" in name:
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self._add("all-reduce", 2 * size_of(args[0]) * (ranks - 1) // ranks)
        elif "broadcast" in name:
            self._add("broadcast", size_of(args[0]))
        elif "barrier" not in name:
            raise AssertionError(f"no rule for the bytes of the collective {name}")

    def _count_functional(self, name: str, args: Any, result: Any) -> None:
        if "all_gather" in name:
            self._add("gather", size_of(result) - size_of(args[0]))
        elif "reduce_scatter" in name:
            self._add("reduce-scatter", size_of(args[0]) - size_of(result))
        elif "all_reduce" in name:
            ranks = dist.distributed_c10d._resolve_process_group(args[2]).size()
            self._add("all-reduce", 2 * size_of(args[0]) * (ranks - 1) // ranks)
        elif "broadcast" in name:
            self._add("broadcast", size_of(args[0]))
        else:
            raise AssertionError(f"no rule for the bytes of the collective {name}")

    def _add(self, kind: str, received: int) -> None:
        self.received[kind] += received
        self.calls[kind] += 1
