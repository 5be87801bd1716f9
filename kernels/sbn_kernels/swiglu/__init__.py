"""SwiGLU fused with the quantisation of its output, and its backward."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "MAX_FEATURES": "triton",
    "swiglu_backward": "triton",
    "swiglu_backward_of_codes": "rounded",
    "swiglu_backward_of_rounded": "rounded",
    "swiglu_quantize": "triton",
    "swiglu_quantize_and_save": "saved",
}

__all__ = [
    "MAX_FEATURES",
    "swiglu_backward",
    "swiglu_backward_of_codes",
    "swiglu_backward_of_rounded",
    "swiglu_quantize",
    "swiglu_quantize_and_save",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
