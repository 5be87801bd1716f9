"""Callbacks: everything that has to do with time. Each works alone, in any order, on any LightningModule."""

from sbn_lightning.callbacks.accumulation import UnshardedAccumulation
from sbn_lightning.callbacks.conversion import TernarySparseConversion
from sbn_lightning.callbacks.durable_checkpoint import DurableCheckpoint
from sbn_lightning.callbacks.mask_refresh import MaskRefresh
from sbn_lightning.callbacks.masked_decay import MaskedWeightDecay
from sbn_lightning.callbacks.non_finite import NonFiniteGuard
from sbn_lightning.callbacks.progress import LossProgressBar
from sbn_lightning.callbacks.ramp import DenseToSparseRamp
from sbn_lightning.callbacks.sparsity_logger import SparsityPatternLogger
from sbn_lightning.callbacks.throughput import TokenThroughput
from sbn_lightning.callbacks.training_report import TrainingReport
from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging, SparseWeightAveraging
from sbn_lightning.callbacks.weight_decay import WeightDecaySchedule
from sbn_lightning.checkpoints.io import DurableCheckpointIO

__all__ = [
    "DenseToSparseRamp",
    "DurableCheckpoint",
    "DurableCheckpointIO",
    "LossProgressBar",
    "MaskRefresh",
    "MaskedWeightDecay",
    "NonFiniteGuard",
    "SparseEMAWeightAveraging",
    "SparseWeightAveraging",
    "SparsityPatternLogger",
    "TernarySparseConversion",
    "TokenThroughput",
    "TrainingReport",
    "UnshardedAccumulation",
    "WeightDecaySchedule",
]
