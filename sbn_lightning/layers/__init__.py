"""Linear layers with an N:M mask, conversion of any model to them and back, and their statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.layers.conversion import ConversionReport, convert_linears, revert_linears
    from sbn_lightning.layers.masked_linear import Gradient, MaskedLinear, masked_layers, prepare_layers
    from sbn_lightning.layers.packed import PackedTernaryLinear, pack_layers
    from sbn_lightning.layers.sparse_linear import MaskSource, SparseBitLinear, SparseLinear, ternary_layers

_MODULE_OF = {
    "ConversionReport": "conversion",
    "Gradient": "masked_linear",
    "MaskSource": "sparse_linear",
    "MaskedLinear": "masked_linear",
    "PackedTernaryLinear": "packed",
    "SparseBitLinear": "sparse_linear",
    "SparseLinear": "sparse_linear",
    "convert_linears": "conversion",
    "masked_layers": "masked_linear",
    "pack_layers": "packed",
    "prepare_layers": "masked_linear",
    "revert_linears": "conversion",
    "ternary_layers": "sparse_linear",
}

__all__ = [
    "ConversionReport",
    "Gradient",
    "MaskSource",
    "MaskedLinear",
    "PackedTernaryLinear",
    "SparseBitLinear",
    "SparseLinear",
    "convert_linears",
    "masked_layers",
    "pack_layers",
    "prepare_layers",
    "revert_linears",
    "ternary_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
