"""Prepares the weights of many layers at once.

Layers whose backends share a function ``together`` are prepared with one call of this function. For each layer the
function takes the backend and the arguments of ``Backend.prepare``. It yields the prepared weights.

In training on a GPU, the preparation by kernels is recorded as one CUDA graph. Each layer prepares its weight with some
ten launches. In a model of a hundred layers the host needs longer for these launches than the GPU, which has nothing
else to do meanwhile. The first preparation of a state launches kernels as usual, and the next one is recorded if it
comes soon. The first step of a training has a state of its own, because its mask is there already. The graph is
therefore made in the third step. Masks that are refreshed in every second or third step make two states, and each has
a graph and prepared weights of its own.

A replay writes to the same tensors. Autograd therefore refuses a backward that still needs the codes of an earlier
step, as after any change in place. Only kernels are recorded. What Python knows of a mask or of a prepared weight is
brought up to date after each replay.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.backends.base import Keep
from sbn_lightning.sparsity.config import SparsityConfig


class Asked(NamedTuple):
    """The arguments of ``Backend.prepare`` for one weight; ``mask_bits`` is None if the mask must be made, too."""

    latent: Tensor
    mask_bits: Tensor | None
    keep: Keep
    sparsity: SparsityConfig


Due = list[tuple[Any, Asked]]
"""Layers whose weights must be prepared."""

Replay = Callable[[], None]

SOON = 3  # A state is recorded if one of the last three preparations had it. Its kernels are compiled then.
MOST_AT_A_TIME = 2  # A run whose masks are held for some steps has two states.
SETTLED = 3  # A model whose masks are refreshed in each step is recorded in its third preparation.
MOST = 8  # A run whose states keep changing is not worth more recordings.


def record(function: Callable[[], None], pool: Any) -> Replay:
    """Record what a function launches on the GPU.

    Args:
        function: The function, which has run before. It runs on the host once, and the GPU does nothing.
        pool: The memory that several graphs share, from ``torch.cuda.graph_pool_handle``; None for memory of its own.

    Returns:
        A function that launches the same work.

    Raises:
        RuntimeError: If CUDA cannot record what the function does. It is the error of the function itself.
    """
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    try:
        # Other threads, for example one that pins batches, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                function()
            except Exception as error:
                first = error
                raise
    except Exception:
        if first is not None:  # The end of a broken recording is another error, which does not say what broke it.
            raise first  # noqa: B904
        raise
    replay: Replay = graph.replay
    return replay


def can_record(layer: Any) -> bool:
    """Whether the preparation of a layer can be part of a recording now: in training, on a GPU, by kernels alone.

    A graph records the current GPU. Kernels for a weight on another GPU would run once, and no replay would repeat
    them. The ranks gather a sharded weight first, and only one whole weight at a time is to be in memory.
    """
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and weight.is_cuda
        and weight.requires_grad
        and not isinstance(weight, DTensor)
        and weight.get_device() == torch.cuda.current_device()
        and layer.backend.records
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


class RecordedPreparation:
    """The recordings of one model."""

    def __init__(self) -> None:
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._last: deque[tuple[Any, ...]] = deque(maxlen=SOON)
        self._made = 0
        self.count = 0  # How often weights were prepared.

    def prepare(self, due: Due) -> None:
        """Prepare the weights of layers, by a replay if this state has been recorded.

        Args:
            due: The layers, all of which :func:`can_record`.
        """
        state = tuple(_state_of(layer, request) for layer, request in due)
        recording = self._recordings.get(state)
        if recording is None and state in self._last and None not in state and self._made < MOST:
            recording = self._record(state, due)
        self._last.append(state)
        self.count += 1
        if recording is not None:
            recording.replay(due)
            return
        for layer, request in due:
            layer.take(request, layer.backend.prepare(*request))

    def forget(self, layer: Any) -> None:
        """Drop the recordings that prepare a layer."""
        left = {state: it for state, it in self._recordings.items() if all(one[0] != id(layer) for one in state)}
        self._made -= len(self._recordings) - len(left)
        self._recordings = left

    def _record(self, state: tuple[Any, ...], due: Due) -> _Recording | None:
        while len(self._recordings) >= MOST_AT_A_TIME:
            del self._recordings[next(iter(self._recordings))]
        self._made += 1
        try:
            self._recordings[state] = _Recording(due)
        except RuntimeError as error:
            self._made = MOST
            reason = str(error).strip().splitlines()[0]
            text = f"the weights are prepared without a CUDA graph, which could not be recorded: {reason}"
            warnings.warn(text, stacklevel=2)
        return self._recordings.get(state)


class _Recording:
    """One recorded preparation.

    The backends and options that the state names by ``id`` stay alive with it. Layers and their weights do not, so a
    model can be deleted or go to another device. The prepared weights hold the masks, and each layer has its own mask.
    So no other layer can have the state of a layer that is gone.
    """

    def __init__(self, due: Due) -> None:
        self._alive = [(layer.backend, request.sparsity) for layer, request in due]
        made: list[Any] = []

        def prepare() -> None:
            for layer, request in due:
                layer.take(request, layer.backend.prepare(*request))
                made.append(layer._prepared)

        self._replay = record(prepare, None)
        self._prepared = list(made)
        self._written = [value for prepared in made for value in prepared if isinstance(value, Tensor)]

    def replay(self, due: Due) -> None:
        """Prepare the weights of the layers that were recorded."""
        self._replay()
        torch.autograd.graph.increment_version(self._written)
        for (layer, request), prepared in zip(due, self._prepared, strict=True):
            layer.take_written(request, prepared)


def _state_of(layer: Any, request: Asked) -> tuple[Any, ...] | None:
    """What decides which kernels run on which addresses; None if a tensor is made anew for each preparation."""
    latent, mask_bits, keep, sparsity = request
    if not isinstance(keep, int) or latent.data_ptr() != layer.weight.data_ptr():
        return None
    masks = layer.mask_bits.data_ptr(), None if mask_bits is None else mask_bits.data_ptr()
    scale = layer.log_scale.data_ptr() if sparsity.learnable_scales else None
    state = id(layer), latent.data_ptr(), latent.dtype, *masks, keep, id(sparsity), id(layer.backend)
    return *state, layer.needs_codes, scale


_of_models: WeakKeyDictionary[nn.Module, RecordedPreparation] = WeakKeyDictionary()


def prepare_all(model: nn.Module, layers: list[Any]) -> None:
    """Prepare the weights of all layers of a model.

    Args:
        model: The model.
        layers: Its layers with a mask.
    """
    shared: dict[Callable[..., Iterable[Any]], list[Any]] = {}
    recorded: list[Any] = []
    for layer in layers:
        together = layer.backend.together
        if together is not None:
            shared.setdefault(together, []).append(layer)
        elif can_record(layer):
            recorded.append(layer)
        else:
            layer.prepare()
    with torch.inference_mode(False), torch.no_grad():  # As in the layers themselves.
        for together, group in shared.items():
            if due := _due(group):
                made = together([(layer.backend, *request) for layer, request in due])
                for (layer, request), prepared in zip(due, made, strict=True):
                    layer.take(request, prepared)
        if due := _due(recorded):
            _of_models.setdefault(model, RecordedPreparation()).prepare(due)


def is_settled(model: nn.Module) -> bool:
    """Whether the prepared weights of a model have the addresses that they will have: its first steps are over."""
    recorded = _of_models.get(model)
    return recorded is None or recorded.count >= SETTLED


def forget_recordings(layer: Any) -> None:
    """Give back the memory of the recordings that prepare a layer."""
    for recorded in _of_models.values():
        recorded.forget(layer)


def _due(layers: list[Any]) -> Due:
    return [(layer, request) for layer in layers if (request := layer.due()) is not None]
