"""A latent weight to mask, ternary codes and packed words, once an optimiser step."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "PreparedWeight": "triton",
    "prepare_weight": "triton",
}

__all__ = ["PreparedWeight", "prepare_weight"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
