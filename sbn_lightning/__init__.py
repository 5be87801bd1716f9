"""sbn_lightning: train transformers whose weights are ternary and N:M sparse, with PyTorch Lightning.

The public names are imported on first use, so that ``import sbn_lightning`` does not pay for Lightning or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbn_kernels._moved import install

from sbn_lightning._moved import MOVED

if TYPE_CHECKING:
    from sbn_lightning.callbacks import (
        DenseToSparseRamp,
        DurableCheckpoint,
        LossProgressBar,
        MaskedWeightDecay,
        MaskRefresh,
        NonFiniteGuard,
        RoundingWarmup,
        SparseEMAWeightAveraging,
        SparseWeightAveraging,
        SparsityPatternLogger,
        TernarySparseConversion,
        TokenThroughput,
        TrainingReport,
        UnshardedAccumulation,
        WeightDecaySchedule,
    )
    from sbn_lightning.data import TokenDataModule
    from sbn_lightning.integrations import convert, load_sparse, revert, save_sparse, use_kernels
    from sbn_lightning.layers.audit import audit
    from sbn_lightning.layers.conversion import convert_linears
    from sbn_lightning.layers.reversion import revert_linears
    from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
    from sbn_lightning.layers.ties import break_ties
    from sbn_lightning.models.config import TransformerConfig
    from sbn_lightning.models.rope_scaling import RopeScaling
    from sbn_lightning.models.transformer import TernaryTransformer
    from sbn_lightning.schedule import MaskedDecay, Ramp, Refresh, Rounding, SparsitySchedule
    from sbn_lightning.sparsity.config import SparsityConfig
    from sbn_lightning.sparsity.pattern import NMPattern
    from sbn_lightning.training.module import SparseBitNet
    from sbn_lightning.training.precision import SparseTernaryPrecision

__version__ = "0.2.0.dev0"

_MODULE_OF = {
    "DenseToSparseRamp": "callbacks",
    "DurableCheckpoint": "callbacks",
    "LossProgressBar": "callbacks",
    "MaskRefresh": "callbacks",
    "MaskedDecay": "schedule",
    "MaskedWeightDecay": "callbacks",
    "NMPattern": "sparsity.pattern",
    "NonFiniteGuard": "callbacks",
    "Ramp": "schedule",
    "Refresh": "schedule",
    "RopeScaling": "models.rope_scaling",
    "Rounding": "schedule",
    "RoundingWarmup": "callbacks",
    "SparseBitLinear": "layers",
    "SparseBitNet": "training.module",
    "SparseEMAWeightAveraging": "callbacks",
    "SparseLinear": "layers",
    "SparseTernaryPrecision": "training.precision",
    "SparseWeightAveraging": "callbacks",
    "SparsityConfig": "sparsity.config",
    "SparsityPatternLogger": "callbacks",
    "SparsitySchedule": "schedule",
    "TernarySparseConversion": "callbacks",
    "TernaryTransformer": "models.transformer",
    "TokenDataModule": "data",
    "TokenThroughput": "callbacks",
    "TrainingReport": "callbacks",
    "TransformerConfig": "models.config",
    "UnshardedAccumulation": "callbacks",
    "WeightDecaySchedule": "callbacks",
    "audit": "layers.audit",
    "break_ties": "layers.ties",
    "convert": "integrations",
    "convert_linears": "layers.conversion",
    "load_sparse": "integrations",
    "revert": "integrations",
    "revert_linears": "layers.reversion",
    "save_sparse": "integrations",
    "use_kernels": "integrations",
}

__all__ = [
    "DenseToSparseRamp",
    "DurableCheckpoint",
    "LossProgressBar",
    "MaskRefresh",
    "MaskedDecay",
    "MaskedWeightDecay",
    "NMPattern",
    "NonFiniteGuard",
    "Ramp",
    "Refresh",
    "RopeScaling",
    "Rounding",
    "RoundingWarmup",
    "SparseBitLinear",
    "SparseBitNet",
    "SparseEMAWeightAveraging",
    "SparseLinear",
    "SparseTernaryPrecision",
    "SparseWeightAveraging",
    "SparsityConfig",
    "SparsityPatternLogger",
    "SparsitySchedule",
    "TernarySparseConversion",
    "TernaryTransformer",
    "TokenDataModule",
    "TokenThroughput",
    "TrainingReport",
    "TransformerConfig",
    "UnshardedAccumulation",
    "WeightDecaySchedule",
    "audit",
    "break_ties",
    "convert",
    "convert_linears",
    "load_sparse",
    "revert",
    "revert_linears",
    "save_sparse",
    "use_kernels",
]


install(MOVED)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
