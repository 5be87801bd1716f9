"""Callbacks: everything that has to do with time. Each works alone, in any order, on any LightningModule.

:data:`RECIPE_GROUPS` is where a callback is registered for recipes: its key in a recipe, and the class. The command
line reads the table, and nothing else has to know of a new callback.
"""

from lightning.pytorch import Callback

from sbn_lightning.callbacks.accumulation import UnshardedAccumulation
from sbn_lightning.callbacks.conversion import TernarySparseConversion
from sbn_lightning.callbacks.durable_checkpoint import DurableCheckpoint
from sbn_lightning.callbacks.mask_refresh import MaskRefresh
from sbn_lightning.callbacks.masked_decay import MaskedWeightDecay
from sbn_lightning.callbacks.non_finite import NonFiniteGuard
from sbn_lightning.callbacks.progress import LossProgressBar
from sbn_lightning.callbacks.ramp import DenseToSparseRamp
from sbn_lightning.callbacks.rank_watch import RankWatch
from sbn_lightning.callbacks.rounding_warmup import RoundingWarmup
from sbn_lightning.callbacks.sparsity_logger import SparsityPatternLogger
from sbn_lightning.callbacks.throughput import TokenThroughput
from sbn_lightning.callbacks.training_report import TrainingReport
from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging, SparseWeightAveraging
from sbn_lightning.callbacks.weight_decay import WeightDecaySchedule
from sbn_lightning.checkpoints.io import DurableCheckpointIO

# The callbacks that every training command makes, by their key in a recipe.
RECIPE_GROUPS: dict[str, type[Callback]] = {
    "mask_refresh": MaskRefresh,
    "ramp": DenseToSparseRamp,
    "rounding": RoundingWarmup,
    "weight_decay": WeightDecaySchedule,
    "masked_decay": MaskedWeightDecay,
    "sparsity_logger": SparsityPatternLogger,
    "throughput": TokenThroughput,
    "non_finite_guard": NonFiniteGuard,
    "rank_watch": RankWatch,
    "checkpoint": DurableCheckpoint,
}

__all__ = [
    "RECIPE_GROUPS",
    "DenseToSparseRamp",
    "DurableCheckpoint",
    "DurableCheckpointIO",
    "LossProgressBar",
    "MaskRefresh",
    "MaskedWeightDecay",
    "NonFiniteGuard",
    "RankWatch",
    "RoundingWarmup",
    "SparseEMAWeightAveraging",
    "SparseWeightAveraging",
    "SparsityPatternLogger",
    "TernarySparseConversion",
    "TokenThroughput",
    "TrainingReport",
    "UnshardedAccumulation",
    "WeightDecaySchedule",
]
