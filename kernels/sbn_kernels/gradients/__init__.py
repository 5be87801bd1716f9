"""Gradients on int8 tensor cores: quantised output gradients, both products, transposes."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "QuantizedGradient": "reference",
    "cross_entropy_rounded": "cross_entropy",
    "dequantize_tokens": "transpose",
    "gradient_draws": "reference",
    "input_gradient_gemm": "input_gradient",
    "pack_transposed": "transpose",
    "quantize_gradient": "triton",
    "transpose_tokens": "transpose",
    "weight_gradient_gemm": "weight_gradient",
}

__all__ = [
    "QuantizedGradient",
    "cross_entropy_rounded",
    "dequantize_tokens",
    "gradient_draws",
    "input_gradient_gemm",
    "pack_transposed",
    "quantize_gradient",
    "transpose_tokens",
    "weight_gradient_gemm",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
