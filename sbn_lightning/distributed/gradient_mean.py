"""``GradientMean``: ranks that hold the same weights average their gradients while the backward runs.

torch's DDP copies each gradient into a buffer and sends the buffer. Gradients of earlier micro-batches lie outside of
the buffers, so with accumulation gradients take memory twice. Here a large gradient is averaged where it lies, and
small ones are copied and sent together. The order is the same on all ranks: from the last parameter of the model to the
first, which is about the order in which a backward computes gradients.

A CUDA graph of a backward (:mod:`sbn_lightning.training.graphs`) contains no collectives, and its replay calls no hooks
of autograd. Its gradients are averaged after the replay.
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
from sbn_lightning.layers.preparation import is_recording

ALONE = 2**24  # The bytes of a gradient that is sent by itself. Smaller ones are sent together.
COPIES = 2**28  # The bytes of copies that may be in memory at a time.


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
        self._groups: list[list[str]] = []  # The names of the parameters whose gradients are sent together.
        self._next = 0  # The first group that this backward has not sent. After the last one a new backward begins.
        self._gradients: dict[str, Tensor] = {}  # What this backward has computed and not sent.
        self._sent: deque[_Sent] = deque()
        # A hook keeps this object alive, so this object must not keep a parameter alive.
        self._handles = []
        small: list[str] = []
        size = 0
        for name, parameter in reversed(list(model.named_parameters())):
            if not parameter.requires_grad:
                continue
            if parameter.nbytes >= ALONE:
                self._groups.append([name])
            else:
                small.append(name)
                size += parameter.nbytes
                if size >= ALONE:
                    self._groups.append(small)
                    small, size = [], 0
        self._groups += [small] if small else []
        number_of = {name: i for i, names in enumerate(self._groups) for name in names}
        for name, parameter in model.named_parameters():
            if name in number_of:
                hook = self._hook(name, number_of[name])
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def reset(self) -> None:
        """Forget what a backward has left. One that has raised an error leaves gradients that wait or travel."""
        self._sent.clear()
        self._gradients.clear()
        self._next = 0
        self._end()

    def complete(self, model: nn.Module) -> None:
        """End a backward in which ``hold`` is False. If it has called no hooks, average the gradients that are there.

        Args:
            model: The model.

        Raises:
            ConfigError: If a parameter got no gradient. The message names it.
        """
        if self._next == 0 and not self._gradients:
            self._gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            self._send_ready()
            self._wait(-1)
        missing = [name for names in self._groups[self._next :] for name in names if name not in self._gradients]
        self.reset()
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ConfigError(
                f"{names} took no part in the loss: freeze parameters that are not used, or set "
                "find_unused_parameters=true in the strategy"
            )

    def _hook(self, name: str, number: int) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            if self.hold or is_recording():
                return
            if not self._runs and self._next == len(self._groups):
                self._next = 0
            self._begin()
            if number < self._next or name in self._gradients:
                self.reset()
                raise ConfigError(
                    f"{name} got a gradient again before all parameters had one: set find_unused_parameters=true or "
                    "static_graph=true in the strategy"
                )
            assert parameter.grad is not None
            self._gradients[name] = parameter.grad
            self._send_ready()

        return ready

    def _send_ready(self) -> None:
        """Send the groups whose gradients are there, in their order."""
        while self._next < len(self._groups) and all(name in self._gradients for name in self._groups[self._next]):
            self._send([self._gradients.pop(name) for name in self._groups[self._next]])
            self._next += 1

    def _send(self, gradients: list[Tensor]) -> None:
        tensor = gradients[0]
        if len(gradients) > 1 or tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = tensor.new_empty(sum(gradient.numel() for gradient in gradients), dtype=self.dtype)
            self._wait(COPIES - tensor.nbytes)
            torch._foreach_copy_(_parts(tensor, gradients), gradients)
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
                torch._foreach_copy_(gradients, _parts(tensor, gradients))

    def _finish(self) -> None:
        # A reentrant checkpoint has a backward of its own, with an end of its own.
        self._wait(-1)
        self._end()


def _parts(tensor: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Cut a copy of some gradients into parts of their shapes."""
    parts = tensor.split([gradient.numel() for gradient in gradients])
    return [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
