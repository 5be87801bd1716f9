"""What tests of kernels in the interpreter share."""

import pytest
import torch


@pytest.fixture
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix the random data, and poison every buffer that is allocated without a value."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
