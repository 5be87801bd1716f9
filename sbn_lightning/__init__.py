"""sbn_lightning: train transformers whose weights are ternary and N:M sparse, with PyTorch Lightning.

The public names are imported on first use, so that ``import sbn_lightning.pattern`` (or a command that prepares data)
does not pay for Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.callbacks import (
        DenseToSparseRamp,
        DurableCheckpoint,
        LossProgressBar,
        MaskedWeightDecay,
        MaskRefresh,
        NonFiniteGuard,
        SparseEMAWeightAveraging,
        SparseWeightAveraging,
        SparsityPatternLogger,
        TernarySparseConversion,
        TokenThroughput,
        TrainingReport,
        UnshardedAccumulation,
        WeightDecaySchedule,
    )
    from sbn_lightning.convert import convert_linears, revert_linears
    from sbn_lightning.data import TokenDataModule
    from sbn_lightning.layers import SparseBitLinear, SparseLinear
    from sbn_lightning.module import SparseBitNet
    from sbn_lightning.pattern import NMPattern
    from sbn_lightning.precision import SparseTernaryPrecision
    from sbn_lightning.rope import RopeScaling
    from sbn_lightning.transformer import TernaryTransformer, TransformerConfig

__version__ = "0.1.0"

_MODULE_OF = {
    "DenseToSparseRamp": "callbacks",
    "DurableCheckpoint": "callbacks",
    "LossProgressBar": "callbacks",
    "MaskRefresh": "callbacks",
    "MaskedWeightDecay": "callbacks",
    "NMPattern": "pattern",
    "NonFiniteGuard": "callbacks",
    "RopeScaling": "rope",
    "SparseBitLinear": "layers",
    "SparseBitNet": "module",
    "SparseEMAWeightAveraging": "callbacks",
    "SparseLinear": "layers",
    "SparseTernaryPrecision": "precision",
    "SparseWeightAveraging": "callbacks",
    "SparsityPatternLogger": "callbacks",
    "TernarySparseConversion": "callbacks",
    "TernaryTransformer": "transformer",
    "TokenDataModule": "data",
    "TokenThroughput": "callbacks",
    "TrainingReport": "callbacks",
    "TransformerConfig": "transformer",
    "UnshardedAccumulation": "callbacks",
    "WeightDecaySchedule": "callbacks",
    "convert_linears": "convert",
    "revert_linears": "convert",
}

__all__ = [
    "DenseToSparseRamp",
    "DurableCheckpoint",
    "LossProgressBar",
    "MaskRefresh",
    "MaskedWeightDecay",
    "NMPattern",
    "NonFiniteGuard",
    "RopeScaling",
    "SparseBitLinear",
    "SparseBitNet",
    "SparseEMAWeightAveraging",
    "SparseLinear",
    "SparseTernaryPrecision",
    "SparseWeightAveraging",
    "SparsityPatternLogger",
    "TernarySparseConversion",
    "TernaryTransformer",
    "TokenDataModule",
    "TokenThroughput",
    "TrainingReport",
    "TransformerConfig",
    "UnshardedAccumulation",
    "WeightDecaySchedule",
    "convert_linears",
    "revert_linears",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
