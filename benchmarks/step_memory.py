"""The memory of a training step by part, for ``training_step.py --memory``.

Parameters, gradients, the states of the optimiser and buffers are counted from their tensors. What autograd saves for
the backward is recorded by hooks in one forward, each storage once, and sorted by dtype and by the size of the last
dimension: ``int8 x 2048`` are quantised tokens of 2,048 features. The rest of the peak are temporaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage by its address; a tensor that shares a storage adds nothing."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimiser's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def held_by_layers(model: nn.Module) -> Iterator[Tensor]:
    """Buffers, and the prepared weights of ternary layers."""
    yield from model.buffers()
    for module in model.modules():
        prepared = getattr(module, "_prepared", None)
        if isinstance(prepared, tuple):
            yield from (value for value in prepared if isinstance(value, Tensor))


@contextmanager
def recorded(known: dict[int, int]) -> Iterator[dict[str, float]]:
    """Records what autograd saves for the backward inside the context: kind -> bytes. No backward can follow.

    Args:
        known: Storages that are counted elsewhere, such as those of parameters.
    """
    kinds: dict[str, float] = {}
    seen = dict(known)
    alive = []  # The address of a storage that is gone could be that of the next one.

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            alive.append(storage)
            seen[storage.data_ptr()] = storage.nbytes()
            width = tensor.shape[-1] if tensor.ndim > 1 else 1
            kind = f"{str(tensor.dtype).removeprefix('torch.')} x {width}"
            kinds[kind] = kinds.get(kind, 0.0) + storage.nbytes()
        # Nothing is kept for a backward. A node that saves its own output would hold it for ever if it came from here.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        yield kinds


def memory_by_part(
    model: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[], Tensor], peak: float, most_kinds: int = 8
) -> dict[str, float]:
    """The bytes of each part of a step.

    Args:
        model: The model, after at least one step.
        optimizer: The optimiser of the model.
        forward: Computes the loss of one micro-batch, with gradients.
        peak: The peak of a whole step in bytes.
        most_kinds: The number of kinds of saved tensors that get rows of their own; the others share one.

    Returns:
        Part -> bytes. The parts sum to ``peak``.
    """
    parameters = list(model.parameters())
    parts = {"parameters": float(sum(storages(parameters).values()))}
    parts["gradients"] = float(sum(p.nelement() * p.element_size() for p in parameters if p.requires_grad))
    states, held = storages(states_of(optimizer)), storages(held_by_layers(model))
    parts["optimiser states"] = float(sum(states.values()))
    parts["buffers and prepared weights"] = float(sum(held.values()))
    with recorded(storages(parameters) | held) as kinds:
        loss = forward()
    del loss
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    parts |= {f"saved {kind}": size for kind, size in ordered[:most_kinds]}
    if len(ordered) > most_kinds:
        parts["saved, other"] = sum(size for _, size in ordered[most_kinds:])
    parts["temporaries"] = peak - sum(parts.values())
    return parts
