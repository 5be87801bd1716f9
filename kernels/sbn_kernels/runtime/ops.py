"""How a kernel becomes a torch op: ``torch.ops.sbn_kernels.NAME``, opaque to ``torch.compile``, with a shape function.

This does what ``torch.library.custom_op`` does, without its checks at each call. With torch 2.11 the checks for outputs
that alias inputs took 0.3 to 0.4 ms of the host's time, more than most kernels run, so a training step waited for the
host. No op here returns an argument, and an op that changes one says so, so the checks have nothing to find. No op has
a gradient. Their public functions refuse tensors that want one, except where a result is a choice, as in ``sampling/``.
Autograd is written where the ops are put together.

Every op refuses tensors on several devices, at each call and when ``torch.compile`` traces the op. The check takes
about a tenth of a microsecond for each tensor. The replay of a CUDA graph runs no code of the host, so no check either.

A module that registers ops cannot be reloaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sbn_kernels.runtime.devices import check_one_device

_LIBRARY = torch.library.Library("sbn_kernels", "FRAGMENT")
_TYPES_OF_TENSORS = ("Tensor", "Optional[Tensor]")  # No op takes a list of tensors.

F = TypeVar("F", bound=Callable[..., Any])


def _tensors_of(name: str) -> dict[int, str]:
    """The places and names of the arguments of an op that are tensors, or tensors or None."""
    arguments = getattr(torch.ops.sbn_kernels, name).default._schema.arguments
    return {place: argument.name for place, argument in enumerate(arguments) if str(argument.type) in _TYPES_OF_TENSORS}


def _check_devices(name: str, tensors: dict[int, str], given: tuple[Any, ...]) -> None:
    check_one_device(name, list(tensors.values()), [given[place] for place in tensors])


def kernel_op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Registers the implementation of the op ``name`` for every device; the type hints give the schema.

    Args:
        name: The name of the op.
        mutates: The arguments that the op changes.
    """

    def register(function: F) -> F:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        tensors = _tensors_of(name)
        others = [place - 1 for place in tensors if place > 0]

        @functools.wraps(function)
        def on_its_device(first: Tensor, *rest: Any) -> Any:
            index = first.get_device()
            for place in others:  # No Python function is called here, because that would take more time than the check.
                other = rest[place]
                if other is not None and other.get_device() != index:
                    _check_devices(name, tensors, (first, *rest))
            if index < 0 or index == torch.cuda.current_device():
                return function(first, *rest)
            with torch.cuda.device(index):  # Triton launches on the current device, not on the device of the tensors
                return function(first, *rest)

        _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
        return function

    return register


def kernel_fake(name: str) -> Callable[[F], F]:
    """Registers the function that gives the shapes, dtypes and strides of what the op ``name`` returns.

    The function names the arguments of the op that it needs, and gets no others.
    """

    def register(function: F) -> F:
        schema = getattr(torch.ops.sbn_kernels, name).default._schema
        known = [argument.name for argument in schema.arguments]
        places = [known.index(argument) for argument in inspect.signature(function).parameters]
        tensors = _tensors_of(name)

        def of_all(*given: Any) -> Any:
            _check_devices(name, tensors, given)
            return function(*(given[place] for place in places))

        torch.library.register_fake(f"sbn_kernels::{name}", of_all, lib=_LIBRARY)
        return function

    return register
