"""What a ternary layer computes with: the protocol, the reference, the integer kernels, and the function that chooses.

:mod:`.reference` has the protocol and plain PyTorch. :mod:`.integer` has the kernels. :mod:`.selection` is the only
place of the project that chooses between them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.backends.reference import REFERENCE, Backend, Keep, ReferenceBackend, TernaryWeight, WeightSpec
    from sbn_lightning.backends.selection import choose, describe

_MODULE_OF = {
    "Backend": "reference",
    "Keep": "reference",
    "REFERENCE": "reference",
    "ReferenceBackend": "reference",
    "TernaryWeight": "reference",
    "WeightSpec": "reference",
    "choose": "selection",
    "describe": "selection",
}

__all__ = ["Backend", "Keep", "REFERENCE", "ReferenceBackend", "TernaryWeight", "WeightSpec", "choose", "describe"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
