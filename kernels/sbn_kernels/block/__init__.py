"""What surrounds the layers of a block in training: RMSNorm with quantisation and its backward, rotary positions."""

from importlib import import_module
from typing import Any

_MODULE_OF = {"norm_backward": "norm", "norm_quantize": "norm", "norm_quantize_sums": "norm", "rope_backward": "rope"}

__all__ = ["norm_backward", "norm_quantize", "norm_quantize_sums", "rope_backward"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
