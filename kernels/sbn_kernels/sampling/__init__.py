"""The choice of the next token of each row from its logits."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "choose_tokens": "triton",
    "choose_tokens_reference": "reference",
    "lowest_logits": "threshold",
    "lowest_logits_reference": "threshold_reference",
}

__all__ = ["choose_tokens", "choose_tokens_reference", "lowest_logits", "lowest_logits_reference"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
