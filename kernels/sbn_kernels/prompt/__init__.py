"""What a prompt needs beside its products: biases, rotary positions and the way into the cache, and attention."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "attend": "attention",
    "attend_reference": "reference",
    "rotate_and_store": "triton",
    "rotate_and_store_reference": "reference",
}

__all__ = ["attend", "attend_reference", "rotate_and_store", "rotate_and_store_reference"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
