"""Linear layers with an N:M mask, conversion of any model to them and back, and their statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.layers.audit import Audit
    from sbn_lightning.layers.conversion import ConversionReport, convert_linears
    from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers, prepare_layers
    from sbn_lightning.layers.matching import convert_to_match
    from sbn_lightning.layers.packed import PackedTernaryLinear, pack_layers
    from sbn_lightning.layers.reversion import revert_linears
    from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
    from sbn_lightning.layers.sparse_linear import SparseLinear
    from sbn_lightning.layers.ties import break_ties
    from sbn_lightning.sparsity.config import Gradient, MaskSource, SparsityConfig

_MODULE_OF = {
    "Audit": "layers.audit",
    "ConversionReport": "layers.conversion",
    "Gradient": "sparsity.config",
    "MaskSource": "sparsity.config",
    "MaskedLinear": "layers.masked_linear",
    "PackedTernaryLinear": "layers.packed",
    "SparseBitLinear": "layers.sparse_bit_linear",
    "SparseLinear": "layers.sparse_linear",
    "SparsityConfig": "sparsity.config",
    "break_ties": "layers.ties",
    "convert_linears": "layers.conversion",
    "convert_to_match": "layers.matching",
    "masked_layers": "layers.masked_linear",
    "pack_layers": "layers.packed",
    "prepare_layers": "layers.masked_linear",
    "revert_linears": "layers.reversion",
    "ternary_layers": "layers.sparse_bit_linear",
}

__all__ = [
    "Audit",
    "ConversionReport",
    "Gradient",
    "MaskSource",
    "MaskedLinear",
    "PackedTernaryLinear",
    "SparseBitLinear",
    "SparseLinear",
    "SparsityConfig",
    "break_ties",
    "convert_linears",
    "convert_to_match",
    "masked_layers",
    "pack_layers",
    "prepare_layers",
    "revert_linears",
    "ternary_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sbn_lightning.{_MODULE_OF[name]}"), name)
