"""How kernels become torch ops: ``torch.ops.sbn_kernels.NAME``, opaque to ``torch.compile``, with a shape function.

As ``torch.library.custom_op``, less what that does at each call: with torch 2.11 its checks for outputs that alias
inputs took 0.3 to 0.4 ms of the host's time, more than most kernels run, so that a training step waited for the host.
No op here returns or changes an argument. None has a gradient, so their functions refuse tensors that want one:
autograd is written where the ops are put together. A module that registers ops cannot be reloaded.

Integers on the host, too, are divided here: ``triton.cdiv`` is a compile-time function, and 5 microseconds a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sbn_kernels", "FRAGMENT")

F = TypeVar("F", bound=Callable[..., Any])


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, a positive number."""
    return 1 << (n - 1).bit_length()


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raises:
    ValueError: If a gradient would be lost without a word.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("kernels have no gradient: detach their arguments, or call them in an autograd.Function")


def contiguous(*vectors: Tensor) -> list[Tensor]:
    """Vectors as kernels read them: an expanded or strided one is copied."""
    return [vector.contiguous() for vector in vectors]


def kernel_op(name: str) -> Callable[[F], F]:
    """Registers what the op ``name`` does, on every device; its schema follows from the type hints."""

    def register(function: F) -> F:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(function)
        def on_its_device(first: Tensor, *rest: Any) -> Any:
            index = first.get_device()
            if index < 0 or index == torch.cuda.current_device():
                return function(first, *rest)
            with torch.cuda.device(index):  # Triton launches on the current device, not on the tensors'
                return function(first, *rest)

        _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
        return function

    return register


def kernel_fake(name: str) -> Callable[[F], F]:
    """Registers the shapes, dtypes and strides of what the op ``name`` returns."""

    def register(function: F) -> F:
        torch.library.register_fake(f"sbn_kernels::{name}", function, lib=_LIBRARY)
        return function

    return register
