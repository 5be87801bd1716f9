"""What tests of kernels in the interpreter share."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sbn_kernels.common.maxima import larger
from triton import language
from triton.runtime import interpreter


@pytest.fixture(scope="session", autouse=True)
def _two_slow_parts_of_the_interpreter_are_replaced() -> Iterator[None]:
    """Compute the same in half the time.

    In each call of a device function, Triton's interpreter searches the whole language for the functions that it
    replaces. And it does not know our maximum that lets a NaN through, so it reduces one element after the other.
    """
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def replace(package: Any, builder: object, scope: object) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(name, member) for name, member in members if language.core.is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:  # not replaced yet
                interpreter._patch_attr(package, name, member, builder, scope)

    reduce_any = interpreter.ReduceOps.apply_impl

    def reduce(self: Any, operands: Any) -> Any:
        if self.combine_fn is larger:
            return self.min_max(operands[0], np.max)  # np.max lets a NaN through, too.
        return reduce_any(self, operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace)
        patch.setattr(interpreter.ReduceOps, "apply_impl", reduce)
        yield


@pytest.fixture
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the random data, and poison every buffer that is allocated without a value."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
