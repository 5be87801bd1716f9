"""``GraphedLoss``: the forward and the backward of a micro-batch as two CUDA graphs, replayed for each micro-batch.

A small model launches kernels that run for microseconds each, so the host limits a step. A CUDA graph launches all of
them at once. The first micro-batches run without graphs: they compile kernels and choose them, which no graph can
record. Then one forward and one backward are recorded. A replay runs the same kernels on the same addresses.

What a graph reads must keep its address:

* The micro-batch is copied into a tensor of the graph.
* Codes and packed words are prepared outside of the graph, once in an optimiser step. The graph reads the tensors that
  were there at its recording. A recorded preparation (:mod:`sbn_lightning.layers.preparation`) writes to the same
  tensors, so the first graphs are made when it is recorded, in the third step. Other prepared weights are copied. Masks
  are buffers, which are written in place. The seeds of rounded gradients are copied.
* Gradients are added to tensors that stay. If somebody has set ``parameter.grad`` to None, they are zeroed first.

Clipping, the optimiser, the schedule of the learning rate and all callbacks stay outside. On several GPUs the graph of
a backward contains the collectives that ``sbn_ddp`` and ``sbn_fsdp2`` start in hooks of autograd. Under ``sbn_fsdp2``
the model has whole copies of the parameters that FSDP2 shards (:mod:`sbn_lightning.distributed.whole_parameters`).

A **state** is what only Python sees: the kernel of each layer, whether masked weights get gradients, the addresses of
parameters, and under ``sbn_ddp`` whether the micro-batch is the last of an optimiser step. The state is compared before
each replay, and each of the last few states has its own graphs. All graphs share their memory, and are replayed one
after the other.
"""

from __future__ import annotations

import atexit
import gc
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.gradient_mean import GradientMean, means_of
from sbn_lightning.distributed.whole_parameters import local, whole_parameters
from sbn_lightning.layers.mask_tracker import optimizer_steps, trust_weights
from sbn_lightning.layers.masked_linear import masked_layers, prepare_layers
from sbn_lightning.layers.preparation import is_settled, record
from sbn_lightning.training.graph_state import addresses, form, state_of, writable

PATIENCE = 32  # So many micro-batches of a state may run without graphs.
ONE_BACKWARD = (
    "cuda_graphs: a micro-batch has one backward, which must come before the forward of the next micro-batch; set "
    "model.cuda_graphs to false"
)


class GraphedLoss:
    """A loss whose forward and backward are replayed. Without gradients there is no graph.

    Args:
        warm_up: How many micro-batches run without graphs before each recording. The first recording also waits until
            the preparation of the weights is recorded. A state that does not outlive an optimiser step has no graphs.
        most: How many states have graphs at a time. A run whose masks are held for several steps has two states.
        numbers: How many numbers the loss returns, in one float32 vector, for example the parts of a sum. None if the
            loss returns a scalar.
    """

    def __init__(self, warm_up: int = 2, most: int = 4, numbers: int | None = None) -> None:
        self.warm_up = warm_up
        self.most = most
        self.numbers = numbers
        self._shared: _Shared | None = None
        self._graphs: dict[tuple[Any, ...], _Graphs | _Seen] = {}  # By state, the last one that was used at the end.
        self._warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedLoss:
        """Return a loss without graphs, because a copy of a model has other addresses."""
        return type(self)(self.warm_up, self.most, self.numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.warm_up, self.most, self.numbers)

    def __call__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return ``loss(batch)``, whose ``backward`` adds to the gradients of the model.

        Args:
            model: The model that the loss trains.
            loss: The loss of a micro-batch, without anything that the host has to wait for.
            batch: The micro-batch, on the GPU.

        Raises:
            ConfigError: If the loss cannot be recorded, or draws random numbers on the host.
        """
        if not torch.is_grad_enabled():
            return loss(batch)
        shared = self._shared
        if shared is not None:
            shared.reshard()
        if shared is None or shared.where != addresses(model):
            first = batch if shared is None else shared.batch.to(batch.device)  # The first batch has the usual shape.
            self._shared = shared = _Shared(model, first, () if self.numbers is None else (self.numbers,))
            self._graphs = {}
        shared.prepare(model)
        if (batch.shape, batch.dtype) != (shared.batch.shape, shared.batch.dtype):
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"cuda_graphs: a micro-batch of the shape {list(batch.shape)} runs without the graph, which was "
                    f"recorded for {list(shared.batch.shape)}"
                )
            return shared.without_graphs(loss, batch)
        state = state_of(model)
        found = self._graphs.pop(state, None) or _Seen(0, optimizer_steps())
        while len(self._graphs) >= self.most:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[state] = found
        if isinstance(found, _Seen) and self._waits(found, model):
            self._graphs[state] = _Seen(found.times + 1, found.step)
            return shared.without_graphs(loss, batch)
        shared.bring_up_to_date(hold=True)
        if isinstance(found, _Seen):
            means = [mean for mean in means_of(model) if not mean.hold]
            found = self._graphs[state] = _Graphs(shared, loss, means)
        return found(batch)

    def _waits(self, seen: _Seen, model: nn.Module) -> bool:
        """Whether a state runs without graphs once more. A state of one optimiser step, as in a ramp, has none."""
        if seen.times < self.warm_up:
            return True
        comes_again = self.warm_up == 0 or optimizer_steps() > seen.step
        return seen.times < PATIENCE and not (comes_again and is_settled(model))


class _Seen(NamedTuple):
    """A state without graphs: how many micro-batches had it, and the optimiser step of the first one."""

    times: int
    step: int


class _Shared:
    """The tensors that all graphs of a model read and write, and their memory."""

    def __init__(self, model: nn.Module, batch: Tensor, shape: tuple[int, ...]) -> None:
        self._whole = whole_parameters(model)
        self.where = addresses(model)
        self.batch = batch.clone()
        self.loss = torch.zeros(shape, dtype=torch.float32, device=batch.device)
        self.gradient = torch.ones_like(self.loss)
        self.anchor = torch.zeros((), device=batch.device, requires_grad=True)  # Autograd calls nobody without one.
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.layers = [layer for _, layer in masked_layers(model)]
        self.pool = torch.cuda.graph_pool_handle() if batch.is_cuda else None
        self.passes = 0
        # The number of a layer and the form of its prepared weight -> the prepared weight that graphs read.
        self._prepared: dict[tuple[int, Any], Any] = {}
        self._seeds: dict[int, Tensor] = {}

    def prepare(self, model: nn.Module) -> None:
        """Prepare the weights of the model."""
        if self._whole is None:
            prepare_layers(model)
        else:
            self._whole.prepare(model)

    def reshard(self) -> None:
        """Free the parameters that FSDP2 has gathered."""
        if self._whole is not None:
            self._whole.reshard()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards parameters of the model."""
        return self._whole is not None

    def recorded(self) -> AbstractContextManager[None]:
        """A context in which a backward is recorded. After an error no gradients are left that wait or travel."""
        return nullcontext() if self._whole is None else self._whole.recorded()

    def in_place(self) -> AbstractContextManager[None]:
        """A context in which a sharded model has the parameters that graphs read."""
        return nullcontext() if self._whole is None else self._whole.in_place()

    @cached_property
    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters, made for the first recording. Those of sharded parameters are sharded."""
        return [torch.zeros_like(parameter) for parameter in self.parameters]

    def without_graphs(self, loss: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return the loss of a micro-batch without graphs. The ranks start the same collectives as in a replay."""
        self.bring_up_to_date(hold=False)
        found: Tensor = _Plain.apply(self.anchor, self, loss, batch)
        return found

    @torch.no_grad()
    def bring_up_to_date(self, hold: bool) -> None:
        """Copy what the layers prepared, and the seeds that were drawn, into the tensors that graphs read.

        Args:
            hold: Whether a graph is about to be recorded, which will read the tensors that are there now.
        """
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # One launch copies tensors of one dtype.

        def copy(target: Tensor, source: Tensor) -> None:
            if target is not source:
                targets, sources = copies.setdefault(target.dtype, ([], []))
                targets.append(target)
                sources.append(source)

        for i, layer in enumerate(self.layers):
            now = getattr(layer, "_prepared", None)
            if isinstance(now, tuple):
                own: Any = self._prepared.get((i, form(now)))
                if own is None:
                    own = writable(now)
                    if hold:
                        self._prepared[i, form(now)] = own
                for target, source in zip(own, now, strict=True):
                    if isinstance(target, Tensor):
                        copy(target, source)
                layer._prepared = own  # type: ignore[assignment]
            drawn, seed = layer.backend.seed, self._seeds.get(i)
            if drawn is not None and seed is None and hold:
                seed = self._seeds[i] = drawn
            if drawn is not None and seed is not None:
                copy(seed, drawn)
                layer.backend.seed = seed  # type: ignore[attr-defined]
        for targets, sources in copies.values():
            torch._foreach_copy_(targets, sources)


class _Graphs:
    """The recorded forward and backward of one state.

    Args:
        shared: The tensors that all graphs of the model share.
        loss: The loss of a micro-batch.
        means: What averages the gradients over the ranks in this state.
    """

    def __init__(self, shared: _Shared, loss: Callable[[Tensor], Tensor], means: list[GradientMean]) -> None:
        self.means = means
        gc.collect()  # A graph of autograd that is still alive would tie its parameters to another stream.
        self.shared = shared
        pairs = list(zip(shared.parameters, shared.gradients, strict=True))
        before = [(parameter.grad, local(own)._version) for parameter, own in pairs]
        for parameter, own in pairs:
            parameter.grad = own
        live: list[Tensor] = []
        drawn = torch.get_rng_state()

        def forward() -> None:
            # Casts of parameters that autocast remembers would be those of an earlier step, and those made here belong
            # to the graph. (To turn the cache off would be another state for torch.compile, which cannot compile now.)
            torch.clear_autocast_cache()
            with shared.in_place(), trust_weights():  # The weights were prepared outside.
                live.append(loss(shared.batch))
            torch.clear_autocast_cache()
            shared.loss.copy_(live[0].detach())

        def backward() -> None:
            with shared.in_place():  # Activations that are computed again read parameters.
                torch.autograd.backward(live.pop(), shared.gradient)

        if means or shared.is_sharded:
            _free_at_exit(self)
        try:
            self._forward = record(forward, shared.pool)
            with ExitStack() as stack, shared.recorded():
                for mean in means:
                    stack.enter_context(mean.recorded())
                self._backward = record(backward, shared.pool)
        except RuntimeError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{str(error).strip().splitlines()[0]}; {Path(place.filename).name}, line {place.lineno}"
            raise ConfigError(
                f"the training step cannot be recorded as a CUDA graph ({reason}); set model.cuda_graphs to false"
            ) from error
        finally:
            # A parameter that the loss does not use has no gradient in a step without graphs, and no weight decay.
            self.used = [pair for pair, (_, old) in zip(pairs, before, strict=True) if local(pair[1])._version != old]
            for (parameter, _), (given, _) in zip(pairs, before, strict=True):
                parameter.grad = given
        if not torch.equal(torch.get_rng_state(), drawn):
            raise ConfigError(
                "the training step draws random numbers on the host, which a CUDA graph would repeat in each "
                "micro-batch (layerdrop of some models of transformers does so); set model.cuda_graphs to false"
            )

    def free(self) -> None:
        """Free the graphs. A replay is an error from now on."""
        self._forward = self._backward = _freed

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""
        self.shared.passes += 1
        self.shared.batch.copy_(batch)
        loss: Tensor = _Replayed.apply(self.shared.anchor, self, self.shared.passes)
        return loss

    def forward(self) -> Tensor:
        """Replay the forward, and return the loss."""
        self._forward()
        return self.shared.loss.clone()

    @torch.no_grad()
    def backward(self, gradient: Tensor, number: int) -> None:
        """Replay the backward.

        Args:
            gradient: The gradient of the loss.
            number: The number of the forward.

        Raises:
            ConfigError: If another forward came in between, or if this is the second backward of the forward.
        """
        if number != self.shared.passes:
            raise ConfigError(ONE_BACKWARD)
        self.shared.passes += 1  # A second backward would read activations that the first one has overwritten.
        fresh = [local(own) for parameter, own in self.used if parameter.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, own in self.used:
            if parameter.grad is not None and parameter.grad is not own:
                local(own).copy_(local(parameter.grad))
            parameter.grad = own
        self.shared.gradient.copy_(gradient)
        self._backward()
        for mean in self.means:
            mean.replayed()


class _Plain(torch.autograd.Function):
    """The loss of a micro-batch without graphs, whose own graph of autograd is gone after the backward.

    Autograd adds to a parameter's gradient on the stream of the oldest graph that is alive. A CUDA graph is recorded on
    another stream. If a loop still held the loss of an earlier micro-batch, and with the loss its graph, CUDA would
    refuse the recording.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shared: _Shared, loss: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Compute the loss."""
        ctx.shared = shared
        with torch.enable_grad(), shared.in_place(), trust_weights():
            ctx.live = [loss(batch)]
        found: Tensor = ctx.live[0].detach()
        return found.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        if not ctx.live:
            raise ConfigError(ONE_BACKWARD)
        with ctx.shared.in_place():
            torch.autograd.backward(ctx.live.pop(), grad_outputs[0])
        return None, None, None, None


class _Replayed(torch.autograd.Function):
    """The loss of :class:`_Graphs` as autograd sees it: a function of nothing, whose backward fills the gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphs: _Graphs, number: int) -> Tensor:
        """Replay the forward."""
        ctx.graphs, ctx.number = graphs, number
        return graphs.forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        ctx.graphs.backward(grad_outputs[0], ctx.number)
        return None, None, None


def _free_at_exit(graphs: _Graphs) -> None:
    """Free graphs that contain collectives before the process group ends. Its end waits for such graphs.

    The process group ends at the exit of the process, and what is registered last runs first.
    """
    atexit.unregister(_free)
    atexit.register(_free)  # Again: the process group may be a newer one than at the last call.
    _with_collectives.add(graphs)


_with_collectives: WeakSet[_Graphs] = WeakSet()


def _freed() -> None:
    raise RuntimeError("the process ends, and its CUDA graphs are gone")


def _free() -> None:
    for graphs in _with_collectives:
        graphs.free()
