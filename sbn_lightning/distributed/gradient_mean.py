"""``GradientMean``: ranks that hold the same weights average their gradients while the backward runs.

torch's DDP copies each gradient into a buffer and sends the buffer. Gradients of earlier micro-batches lie outside of
the buffers, so with accumulation gradients take memory twice. Here a large gradient is averaged where it lies, and
small ones are copied and sent together. The order is the same on all ranks: from the last parameter of the model to the
first, which is about the order in which a backward computes gradients.

A CUDA graph of a backward (:mod:`sbn_lightning.training.graphs`) contains these collectives. A replay calls no hooks of
autograd, so the hooks send nothing a second time, and nothing is checked.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.utils import _verify_param_shape_across_processes

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.first_rank import send_from_first_rank
from sbn_lightning.distributed.gradients import BackwardCollectives, split_like

ALONE = 2**24  # The bytes of a gradient that is sent by itself. Smaller ones are sent together.
COPIES = 2**28  # The bytes of copies that may be in memory at a time.


class _Sent(NamedTuple):
    """A collective that runs."""

    work: dist.Work
    tensor: Tensor  # What is sent, and then its mean.
    gradients: list[Tensor]  # Where the mean goes. Empty if the tensor is a gradient itself.


class GradientMean(BackwardCollectives):
    """Averages the gradients of a model over the ranks, in each backward in which ``hold`` is False.

    Each trained parameter must get one gradient in such a backward. Parameters may be frozen, unfrozen or replaced
    between two of them, on all ranks alike.

    Args:
        model: The model. Its frozen parameters are left out.
        group: The ranks.
        dtype: The dtype in which gradients travel. Gradients of another dtype are copied. With float32, wider gradients
            travel as they are.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(group, dtype)
        self.group = group
        self._next = 0  # The first group that this backward has not sent. After the last one a new backward begins.
        self._gradients: dict[str, Tensor] = {}  # What this backward has computed and not sent.
        self._sent: deque[_Sent] = deque()
        self._copied = 0  # The bytes of the copies in _sent.
        self._failed = self._replayed = False
        self._attach(_trained(model))

    def replayed(self) -> None:
        """Note that a CUDA graph has run this backward with its collectives."""
        self._replayed = True

    def detach(self) -> None:
        """Leave the parameters alone from now on."""
        _attached.discard(self)
        for handle in self._handles:
            handle.remove()
        self._known.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let gradients stay as they are in the backwards in this context. The next one adds its own, and sends all."""
        self.hold = True
        try:
            yield
        finally:
            self.hold = False

    @contextmanager
    def backward(self, model: nn.Module) -> Iterator[None]:
        """Average the gradients of the backward that runs in this context, unless ``hold`` is True.

        Args:
            model: The model.

        Raises:
            ConfigError: If a parameter gets no gradient, or more than one. The message names the parameter. Also if an
                earlier backward has raised an error.
        """
        if self.hold:
            yield
            return
        if self._failed:
            raise ConfigError(
                "an earlier backward raised an error, and the other ranks may be waiting for its gradients: end the "
                "run, and continue from its last checkpoint"
            )
        trained = _trained(model)
        if len(trained) != len(self._known) or any(
            known() is not parameter for known, parameter in zip(self._known, trained.values(), strict=True)
        ):
            self.detach()
            self._attach(trained)
        try:
            with self.recorded():
                yield
        except BaseException:
            self._failed = True
            raise

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Check that all parameters take part in the backward of this context, which is recorded as a CUDA graph.

        Raises:
            ConfigError: If a parameter gets no gradient. The message names the parameter.
        """
        try:
            yield
            self._complete()
        except BaseException:
            self._forget()
            raise

    def _attach(self, trained: dict[str, nn.Parameter]) -> None:
        """Sort parameters into the groups that are sent together, and wait for their gradients."""
        _attached.add(self)
        self._groups: list[list[str]] = []  # The names of the parameters of each group.
        small: list[str] = []
        size = 0
        for name, parameter in reversed(trained.items()):
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
        # A hook keeps this object alive, so this object must not keep a parameter alive.
        self._known = [weakref.ref(parameter) for parameter in trained.values()]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name, number_of[name]))
            for name, parameter in trained.items()
        ]

    def _forget(self) -> None:
        """Forget what a backward has left. One that has raised an error leaves gradients that wait or travel."""
        self._sent.clear()
        self._gradients.clear()
        self._next = self._copied = 0
        self._replayed = False
        self._end()

    def _complete(self) -> None:
        """End a backward, and check that all parameters took part."""
        if self._replayed:
            self._forget()
            return
        missing = [name for names in self._groups[self._next :] for name in names if name not in self._gradients]
        self._forget()
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ConfigError(
                f"{names} took no part in the loss: freeze parameters that are not used, or set "
                "find_unused_parameters=true in the strategy"
            )

    def _hook(self, name: str, number: int) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            if self.hold:
                return
            if not self._runs and self._next == len(self._groups):
                self._next = 0
            self._begin()
            if number < self._next or name in self._gradients:
                raise ConfigError(
                    f"{name} got a gradient again before all parameters had one: set find_unused_parameters=true or "
                    "static_graph=true in the strategy"
                )
            assert parameter.grad is not None
            if parameter.grad.layout != torch.strided:
                raise ConfigError(
                    f"{name} has a sparse gradient, which sbn_ddp cannot average: make its layer with sparse=False"
                )
            self._gradients[name] = parameter.grad
            self._send_ready()

        return ready

    def _send_ready(self) -> None:
        """Send the groups whose gradients are there, in their order."""
        while self._next < len(self._groups) and all(name in self._gradients for name in self._groups[self._next]):
            self._send([self._gradients.pop(name) for name in self._groups[self._next]])
            self._next += 1

    def _send(self, gradients: list[Tensor]) -> None:
        tensor, dtype = gradients[0], self.dtype
        if dtype == torch.float32:
            dtype = reduce(torch.promote_types, (gradient.dtype for gradient in gradients), dtype)
        if len(gradients) > 1 or tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.new_empty(sum(gradient.numel() for gradient in gradients), dtype=dtype)
            self._wait(COPIES - tensor.nbytes)
            self._copied += tensor.nbytes
            torch._foreach_copy_(split_like(tensor, gradients), gradients)
        else:
            gradients = []
        work = dist.all_reduce(tensor, op=self._operation, group=self.group, async_op=True)
        assert work is not None
        self._sent.append(_Sent(work, tensor, gradients))

    def _wait(self, most: int) -> None:
        """Take over what has come, the oldest first, until no more bytes of copies travel than ``most``."""
        while self._sent and self._copied > most:
            work, tensor, gradients = self._sent.popleft()
            work.wait()  # On a GPU the stream waits here, not the host.
            self._divide(tensor, self.group.size())
            if gradients:
                self._copied -= tensor.nbytes
                torch._foreach_copy_(gradients, split_like(tensor, gradients))

    def _finish(self) -> None:
        # A reentrant checkpoint has a backward of its own, with an end of its own.
        self._wait(-1)
        self._end()


_attached: WeakSet[GradientMean] = WeakSet()


def means_of(model: nn.Module) -> list[GradientMean]:
    """Return the objects that average the gradients of a model at present, in any order."""
    own = set(map(id, model.parameters()))  # All: a mean does not know a parameter that was frozen a moment ago.
    return [mean for mean in _attached if any(id(known()) in own for known in mean._known)]


def replicate(model: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype) -> GradientMean:
    """Give all ranks the weights and buffers of the first one, and average gradients from now on.

    Args:
        model: The model, on the device of this rank.
        group: The ranks.
        dtype: The dtype in which gradients travel.

    Raises:
        RuntimeError: If the ranks train other parameters. The message of torch names the first one.
    """
    trained: list[Tensor] = list(_trained(model).values())
    if trained:  # torch crashes if there are none.
        _verify_param_shape_across_processes(group, trained)
    kept = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    send_from_first_rank(model, [group], kept.device.type, _ignored(model))
    return GradientMean(model, group, dtype)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are averaged, by name."""
    ignored = _ignored(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in ignored}


def _ignored(model: nn.Module) -> Collection[str]:
    """The names of parameters and buffers that ranks do not send each other. torch's DDP ignores the same ones."""
    return getattr(model, "_ddp_params_and_buffers_to_ignore", ())
