"""Training on Lightning Fabric: a loop that reads from top to bottom, for people who want to own it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.fabric.loop import check, clip_gradients, evaluate, train
    from sbn_lightning.fabric.run import FabricRun

_MODULE_OF = {
    "FabricRun": "run",
    "WORK_ON_FABRIC": "loop",
    "check": "loop",
    "clip_gradients": "loop",
    "evaluate": "loop",
    "train": "loop",
}

__all__ = ["WORK_ON_FABRIC", "FabricRun", "check", "clip_gradients", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
