"""Products of few tokens, bound by reading the weights."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "MAX_TOKENS": "triton",
    "decode_gemm": "triton",
    "int8_rows": "head",
}

__all__ = ["MAX_TOKENS", "decode_gemm", "int8_rows"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
