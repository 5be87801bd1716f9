"""Formats of models: one function reads any of them, and each of them has a writer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.formats.load import load_model
    from sbn_lightning.formats.loaded import LoadedModel

_MODULE_OF = {
    "LoadedModel": "loaded",
    "load_model": "load",
}

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
