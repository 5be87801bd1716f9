"""``GradientMean``: ranks that hold the same weights average their gradients while the backward runs.

torch's DDP copies each gradient into a buffer and sends the buffer. Gradients of earlier micro-batches lie outside of
the buffers, so with accumulation gradients take memory twice. Here a large gradient is averaged where it lies, and
small ones are copied and sent together. The order is the same on all ranks: from the last parameter of the model to the
first, which is about the order in which a backward computes gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.gradients import BackwardCollectives

ALONE = 2**24  # The bytes of a gradient that is sent by itself. Smaller ones are sent together.
COPIES = 2**28  # The bytes of copies that may be in memory at a time.


class _Group:
    """Gradients that are sent together.

    Attributes:
        names: The names of the parameters.
        gradients: What the backward has computed so far.
        was_sent: Whether this backward has sent the gradients.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gradients: dict[str, Tensor] = {}
        self.was_sent = False

    @property
    def is_ready(self) -> bool:
        return len(self.gradients) == len(self.names)


class _Sent(NamedTuple):
    """A collective that runs."""

    work: dist.Work
    tensor: Tensor  # What is sent, and then its mean.
    gradients: list[Tensor]  # Where the mean goes. Empty if the tensor is a gradient itself.


class GradientMean(BackwardCollectives):
    """Averages the gradients of a model over the ranks, in each backward in which ``hold`` is False.

    Each trained parameter must get one gradient in such a backward.

    Args:
        model: The model. Its frozen parameters are left out.
        group: The ranks.
        dtype: The dtype in which gradients travel. Gradients of another dtype are copied.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(group, dtype)
        self.group = group
        self._groups: list[_Group] = []
        self._next = 0  # The first group that is not sent yet.
        self._sent: deque[_Sent] = deque()
        # A hook keeps this object alive, so this object must not keep a parameter alive.
        self._handles = []
        small, size = _Group(), 0
        for name, parameter in reversed(list(model.named_parameters())):
            if not parameter.requires_grad:
                continue
            alone = parameter.nbytes >= ALONE
            group_of_it = _Group() if alone else small
            group_of_it.names.append(name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name, group_of_it)))
            size += 0 if alone else parameter.nbytes
            if alone or size >= ALONE:
                self._groups.append(group_of_it)
                small, size = (small, size) if alone else (_Group(), 0)
        if small.names:
            self._groups.append(small)

    def detach(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def reset(self) -> None:
        """Forget what a backward that has raised an error has left."""
        self._sent.clear()
        for group in self._groups:
            group.gradients.clear()
            group.was_sent = False
        self._next = 0
        self._end()

    def check(self) -> None:
        """Refuse a backward that has not reached all parameters.

        Raises:
            ConfigError: If a parameter got no gradient. The message names it.
        """
        if not any(group.was_sent or group.gradients for group in self._groups):
            return
        missing = [n for group in self._groups if not group.was_sent for n in group.names if n not in group.gradients]
        self.reset()
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ConfigError(
            f"{names} took no part in the loss: freeze parameters that are not used, or set "
            "find_unused_parameters=true in the strategy"
        )

    def _hook(self, name: str, group: _Group) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            if self.hold:
                return
            self._begin()
            if group.was_sent or name in group.gradients:
                self.reset()
                raise ConfigError(
                    f"{name} got a gradient again before all parameters had one: set find_unused_parameters=true or "
                    "static_graph=true in the strategy"
                )
            assert parameter.grad is not None
            group.gradients[name] = parameter.grad
            while self._next < len(self._groups) and self._groups[self._next].is_ready:
                self._send(self._groups[self._next])
                self._next += 1

        return ready

    def _send(self, group: _Group) -> None:
        gradients = [group.gradients[name] for name in group.names]
        group.gradients.clear()
        group.was_sent = True
        tensor = gradients[0]
        if len(gradients) > 1 or tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = torch.cat([gradient.to(self.dtype).reshape(-1) for gradient in gradients])
            self._wait(COPIES - tensor.nbytes)
        else:
            gradients = []
        work = dist.all_reduce(tensor, op=self._operation, group=self.group, async_op=True)
        assert work is not None
        self._sent.append(_Sent(work, tensor, gradients))

    def _wait(self, most: int) -> None:
        """Take over what has come, the oldest first, until no more bytes of copies travel than ``most``."""
        while self._sent and sum(sent.tensor.nbytes for sent in self._sent if sent.gradients) > most:
            work, tensor, gradients = self._sent.popleft()
            work.wait()  # On a GPU the stream waits here, not the host.
            self._divide(tensor, self.group.size())
            if gradients:
                parts = tensor.split([gradient.numel() for gradient in gradients])
                torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _finish(self) -> None:
        # A reentrant checkpoint has a backward of its own, with an end of its own.
        self._wait(-1)
        self._end()
        if self._next == len(self._groups):
            self.reset()
