"""What a ternary layer computes with: the interface, the reference, the integer kernels, and the function that chooses.

:mod:`.base` has the interface, :mod:`.reference` plain PyTorch, and :mod:`.integer` the kernels. :mod:`.selection` is
the only place of the project that chooses between them for training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.backends.base import Backend, Keep, TernaryWeight
    from sbn_lightning.backends.reference import REFERENCE, ReferenceBackend, WeightSpec
    from sbn_lightning.backends.selection import choose, describe

_MODULE_OF = {
    "Backend": "base",
    "Keep": "base",
    "REFERENCE": "reference",
    "ReferenceBackend": "reference",
    "TernaryWeight": "base",
    "WeightSpec": "reference",
    "choose": "selection",
    "describe": "selection",
}

__all__ = ["Backend", "Keep", "REFERENCE", "ReferenceBackend", "TernaryWeight", "WeightSpec", "choose", "describe"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
