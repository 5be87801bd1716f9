"""``MaskTracker``: how a mask follows its weight. Each layer owns a tracker and asks it two questions.

This file knows when a weight has changed. It does not compute masks: the layer computes a mask when the tracker says
that the present one is stale.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.latent_dtype import note_latent, warn_of_lost_updates

Density = tuple[int, float]
"""How much a mask keeps: weights in each group of a sparse row, and the share of rows that are sparse."""

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskTracker:
    """Knows whether a mask still belongs to its weight.

    A mask is computed from a weight, and weights change. The tracker answers two questions.

    *Has the weight changed since I last looked?* (:meth:`look`) Four signs say so, from the cheapest to the dearest:

    1. The layer has another parameter, the parameter has another dtype, or its version counter moved. In-place
       operations move the counter.
    2. An optimiser that owns the weight took a step. Fused optimisers do not move the counter.
    3. Some optimiser with sharded weights took a step. Under FSDP2 a forward sees another tensor than the one that the
       optimiser owns, so there is no telling whose step it was.
    4. The :func:`fingerprint` of the weight has changed. This finds what the first three miss: code that writes through
       ``weight.data`` (averages of weights, momentum teachers, hand-written optimisers, initialisation loops).

    Computing the fingerprint reads the weight twice, and on a GPU the host waits for a comparison. On a CPU the
    fingerprints are always compared. On a GPU the comparison is left out if the weight belongs to an optimiser, a
    gradient is wanted, and the layer is in the same mode and memory as at the last look. A training loop therefore
    never waits. It computes no fingerprint either: after the step of an optimiser the tracker has none, and the first
    look that would compare (in an evaluation, for example) counts a change instead and takes one. In exchange the
    tracker misses one change on a GPU: a write through ``.data`` between two micro-batches of one step. Call
    ``layer.refresh_mask()`` after such a write.

    *Is the mask stale?* (:meth:`is_stale`) The answer depends on how the mask came about:

    * A mask that was **computed** is stale once the weight has changed, or once another density is asked for.
    * A mask that was **loaded** or copied may be older than its weight, or come from the middle of a ramp. Such a mask
      stays until an optimiser that owns the weight takes a step, or the weight changes in another way.
    * A mask that is **held** stays until someone refreshes it. ``MaskRefresh`` holds masks between its refreshes. Only
      another density makes a held mask stale.

    Attributes:
        hold: Whether the mask is held.
        loaded: Whether the mask was loaded or copied and stays for now.
        fingerprint: The fingerprint of the weight at the last look; None if the weight can have none, or if none was
            taken.
        changes: How many changes of the weight the tracker has seen. Values that were derived from the weight are valid
            as long as this number stays the same.
    """

    def __init__(self) -> None:
        self.hold = False
        self.loaded = False
        self.fingerprint: Tensor | None = None
        self.changes = 0
        self._weight: tuple[Any, ...] | None = None  # The number, version and dtype at the last look.
        self._steps = 0
        self._circumstances: tuple[Any, ...] | None = None
        self._mask_of: tuple[int, Density] | None = None  # The values of `changes` and of density that the mask is for.
        self._loaded_sharded = False

    def look(self, weight: Tensor, training: bool) -> int:
        """Look whether the weight has changed, and return :attr:`changes`.

        Args:
            weight: The parameter of the layer.
            training: The mode of the layer.
        """
        changed = self._changed(weight, training)
        if changed is None:
            changed = not torch.equal(self.expected(weight), fingerprint(weight))
        self._remember(weight, training, changed)
        return self.changes

    def weight_is_new(self, weight: Tensor, training: bool) -> None:
        """Count a change of the weight without comparing anything, so the host does not wait.

        Args:
            weight: The parameter of the layer.
            training: The mode of the layer.
        """
        self._remember(weight, training, True)

    def is_stale(self, weight: Tensor, training: bool, density: Density) -> bool:
        """Whether the layer must compute the mask anew before it uses the mask.

        Args:
            weight: The parameter of the layer.
            training: The mode of the layer.
            density: How much the mask is to keep.
        """
        changes = self.look(weight, training)
        if self._mask_of is None or density != self._mask_of[1]:
            return True
        if self.hold or (self.loaded and self._loaded_sharded):
            return False
        return changes != self._mask_of[0]

    def mask_is_fresh(self, density: Density) -> None:
        """Note that the mask was computed from the weight of the last look."""
        self._mask_of = (self.changes, density)
        self.let_go()

    def mask_has(self, density: Density) -> None:
        """Note that the present mask has this density already, as in a run that resumes in the middle of a ramp."""
        self._mask_of = (self.changes, density)

    def mask_is_loaded(self, weight: Tensor, training: bool, density: Density) -> None:
        """Note that the present mask was loaded or copied with the present weight."""
        self._mask_of = (self.look(weight, training), density)
        if self.fingerprint is None and _has_fingerprint(weight):
            self.fingerprint = fingerprint(weight)  # A compiled graph compares it as long as the mask stays.
        self.loaded, self._loaded_sharded = True, isinstance(weight, DTensor)
        _loaded_masks.add(self)

    def let_go(self) -> None:
        """Let a loaded mask follow its weight again."""
        self.loaded = False
        _loaded_masks.discard(self)

    def weight_moved(self, weight: Tensor, training: bool) -> None:
        """Note that the weight went to another device or dtype. A loaded mask goes with the weight and stays."""
        if self.loaded and self._mask_of is not None:
            self.mask_is_loaded(weight, training, self._mask_of[1])

    def _changed(self, weight: Tensor, training: bool) -> bool | None:
        """Whether the weight has changed, as far as the cheap signs tell; None if only the fingerprint tells."""
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            raise ConfigError(
                "torch.func.grad and vmap do not work on layers with a mask, because their gradient is a "
                "straight-through estimator: use backward(); torch.func.functional_call alone works"
            )
        if _is_capturing(weight) and not _trusting.depth:
            return True  # A replay repeats only what the graph recorded, so the graph must record the derivation.
        if _identity(weight) != self._weight:
            return True
        if weight.requires_grad and _steps_of_owners(weight) != self._steps:
            return True
        if _trusting.depth or not _has_fingerprint(weight):
            return False
        if _is_unwatched(weight) and _circumstances(weight, training) == self._circumstances:
            return False
        return True if self.fingerprint is None else None  # Without a fingerprint there is nothing to compare with.

    def expected(self, weight: Tensor) -> Tensor:
        """The fingerprint at the last look, on the device of the weight."""
        assert self.fingerprint is not None
        return self.fingerprint.to(weight.device)

    def _remember(self, weight: Tensor, training: bool, changed: bool) -> None:
        if changed:
            note_latent(weight)
            self.changes += 1
            taken = _has_fingerprint(weight) and not _is_unwatched(weight)
            self.fingerprint = fingerprint(weight) if taken else None
            # Values that a graph computes must not be used by the next forward outside of the graph.
            self._weight = None if _is_capturing(weight) else _identity(weight)
        self._steps = _steps_of_owners(weight)
        if changed or not _trusting.depth:  # A look that trusts the weight compares nothing, so it vouches for no mode.
            self._circumstances = _circumstances(weight, training)

    def _owner_stepped(self, stepped: set[int], sharded: bool) -> bool:
        return sharded if self._loaded_sharded else self._weight is None or self._weight[0] in stepped


def look_at_all(weights: Iterable[tuple[MaskTracker, Tensor, bool]]) -> None:
    """Call :meth:`MaskTracker.look` for many layers at once. On a GPU the host waits once for all of them.

    Args:
        weights: For each layer its tracker, and the arguments of ``look``: the weight and the mode.
    """
    waiting: dict[torch.device, list[tuple[MaskTracker, Tensor, bool]]] = {}
    for tracker, weight, training in weights:
        if _is_capturing(weight):
            continue  # The host cannot wait for a graph that is being captured.
        if tracker._changed(weight, training) is None and weight.device.type != "cpu":
            waiting.setdefault(weight.device, []).append((tracker, weight, training))
        else:
            tracker.look(weight, training)
    for asked in waiting.values():
        differ = torch.stack([(tracker.expected(weight) != fingerprint(weight)).any() for tracker, weight, _ in asked])
        for (tracker, weight, training), changed in zip(asked, differ.tolist(), strict=True):
            tracker._remember(weight, training, changed)


def seem_unchanged(weights: Iterable[tuple[MaskTracker, Tensor, bool]]) -> bool:
    """Whether no weight has changed since the last look, without comparing fingerprints: the host never waits.

    Args:
        weights: As for :func:`look_at_all`.
    """
    with trust_weights():
        return not any(tracker._changed(weight, training) for tracker, weight, training in weights)


def fingerprint(weight: Tensor) -> Tensor:
    """Read the bits of a weight as integers, and sum them along each row and along each column: int64.

    The integers have 8 bytes if a row divides into 8 bytes, and otherwise the size of one weight. The sums are exact,
    so a change of a single bit shows. Sums along the rows alone would miss columns that changed places, as in a search
    for the permutation of channels that suits a pattern best. Computing the sums takes as long as reading the weight
    twice.

    Args:
        weight: A weight. Its last dimension is a row.

    Returns:
        The sums of all rows, followed by the sums of all columns.
    """
    weight = torch.atleast_2d(weight.detach().contiguous())
    size = weight.element_size()
    if weight.shape[-1] * size % 8:
        integers = weight.view(_INTEGER_OF_SIZE[size])
    else:
        # A view with wider elements must begin at a multiple of their size. A compiler cannot ask where a tensor
        # begins.
        if torch.compiler.is_compiling() or weight.storage_offset() * size % 8:
            weight = weight.clone()
        integers = weight.view(torch.int64)
    integers = integers.flatten(0, -2)
    return torch.cat([integers.sum(1), integers.sum(0)])


def optimizer_steps() -> int:
    """How many steps the optimisers of this process have taken."""
    return _steps.taken


def version(tensor: Tensor) -> int:
    """The version counter of a tensor; 0 for a tensor of inference mode, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def trust_weights() -> Iterator[None]:
    """A context in which no layer compares fingerprints. The caller has looked before, and changes no weight inside."""
    _trusting.depth += 1
    try:
        yield
    finally:
        _trusting.depth -= 1


def weights_are_trusted() -> bool:
    """Whether this thread is in a context of :func:`trust_weights`."""
    return _trusting.depth > 0


class _Trusting(threading.local):
    depth = 0


class _Steps:
    """Optimiser steps of this process.

    Attributes:
        taken: How many steps optimisers took.
        sharded: Whether one of the optimisers has sharded weights (FSDP2).
    """

    taken = 0
    sharded = False


class _OwnSteps:
    """Steps of one optimiser.

    Attributes:
        taken: How many steps the optimiser took.
        weights: How many weights it had at its last step.
    """

    taken = 0
    weights = 0


def _steps_of_owners(weight: Tensor) -> int:
    """How many steps the optimisers that own a weight took; with sharded weights, all optimisers of the process."""
    return _steps.taken if _steps.sharded else sum(own.taken for own in _owned.get(weight, ()))


_trusting = _Trusting()
_steps = _Steps()
# Optimisers that have taken a step -> the steps of each.
_optimizers: WeakKeyDictionary[Optimizer, _OwnSteps] = WeakKeyDictionary()
# Weight -> the steps of each of these optimisers that owns the weight.
_owned = WeakIdKeyDictionary()
# The trackers whose masks were loaded or copied.
_loaded_masks: WeakSet[MaskTracker] = WeakSet()
# Weight -> number. id() is not enough: Python reuses the id of a deleted object.
_numbers = WeakIdKeyDictionary()
_next_number = count(1)


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _steps.taken += 1
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    own = _optimizers.setdefault(optimizer, _OwnSteps())
    own.taken += 1
    if own.weights != len(weights):
        own.weights = len(weights)
        for weight in weights:
            owners = _owned.setdefault(weight, [])
            if own not in owners:
                owners.append(own)
        warn_of_lost_updates(weights)
        _steps.sharded |= any(isinstance(weight, DTensor) for weight in weights)
    if _loaded_masks:
        stepped = {_number(weight) for weight in weights}
        sharded = any(isinstance(weight, DTensor) for weight in weights)
        for tracker in list(_loaded_masks):
            if tracker._owner_stepped(stepped, sharded):
                tracker.let_go()


register_optimizer_step_post_hook(_count_step)


def _number(weight: Tensor) -> int:
    number: int = _numbers.get(weight, 0) or _numbers.setdefault(weight, next(_next_number))
    return number


def _identity(weight: Tensor) -> tuple[Any, ...]:
    return _number(weight), version(weight), weight.dtype


def _circumstances(weight: Tensor, training: bool) -> tuple[Any, ...]:
    return training, torch.is_grad_enabled(), weight.data_ptr() if _has_fingerprint(weight) else 0


def _is_unwatched(weight: Tensor) -> bool:
    """Whether no look compares the fingerprint of a weight as long as the circumstances stay: in training on a GPU."""
    return weight.device.type != "cpu" and torch.is_grad_enabled() and (weight in _owned or _steps.sharded)


def _has_fingerprint(weight: Tensor) -> bool:
    # Shards differ between ranks, and all ranks must decide alike: making a mask from shards is a collective operation.
    return not weight.is_meta and not isinstance(weight, DTensor)


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
