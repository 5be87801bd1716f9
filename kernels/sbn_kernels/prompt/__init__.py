"""Biases and rotary positions of a prompt's queries, keys and values, and their way into the cache."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "rotate_and_store": "triton",
    "rotate_and_store_reference": "reference",
}

__all__ = ["rotate_and_store", "rotate_and_store_reference"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
