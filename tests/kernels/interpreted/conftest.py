"""What tests of kernels in the interpreter share."""

from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import quick_interpreter
from tests.kernels.interpreted.declarations import compared


@pytest.fixture(scope="session", autouse=True)
def _the_interpreter_is_quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(scope="session", autouse=True)
def _ops_do_what_they_declare() -> Iterator[None]:
    from tests.kernels.every_op import NAMES

    with compared(NAMES):
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
