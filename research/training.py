"""What the trainings of the studies share: the dtypes of a forward, and the state that a later process continues."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from sbn_lightning.core.files import atomic_file
from sbn_lightning.training.precision import SparseTernaryPrecision

STATE = "state.pt"


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward without kernels: bfloat16 on a GPU, and float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def forward_context(plugin: SparseTernaryPrecision | None, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward.

    Args:
        plugin: What gave kernels to the model; None if the model has none.
        device: The device of the model.
    """
    return autocast(device) if plugin is None else plugin.forward_context()


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a trial to its folder. The file is whole, or it is the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / STATE) as path:
        torch.save(state, path)


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the state of a trial that an earlier process saved; None if there is none."""
    file = folder / STATE
    if not file.is_file():
        return None
    state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    return state
