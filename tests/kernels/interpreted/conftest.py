"""What tests of kernels in the interpreter share."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton import language
from triton.runtime import interpreter


@pytest.fixture(scope="session", autouse=True)
def _builtins_are_looked_up_once() -> Iterator[None]:
    """Remember which functions the interpreter replaces.

    Triton's own function searches the whole language again in each call of a device function. That takes a third of the
    time of these tests.
    """
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def replace(package: Any, builder: object, scope: object) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(name, member) for name, member in members if language.core.is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:  # not replaced yet
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace)
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
