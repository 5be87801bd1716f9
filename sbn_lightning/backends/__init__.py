"""What a ternary layer computes with: the protocol, the reference, the integer kernels, and who chooses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.backends.reference import REFERENCE, Backend, Keep, ReferenceBackend, TernaryWeight, WeightSpec

_MODULE_OF = {
    "Backend": "reference",
    "Keep": "reference",
    "REFERENCE": "reference",
    "ReferenceBackend": "reference",
    "TernaryWeight": "reference",
    "WeightSpec": "reference",
}

__all__ = ["Backend", "Keep", "REFERENCE", "ReferenceBackend", "TernaryWeight", "WeightSpec"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
