"""``FabricRun``: a run on Fabric that callbacks take for a ``Trainer``."""

from __future__ import annotations

from pathlib import Path

from sbn_lightning.checkpoints.io import DurableCheckpointIO
from sbn_lightning.core.files import atomic_file
from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
from sbn_lightning.fabric.checkpoint import dump
from sbn_lightning.fabric.state import RunState


class FabricRun(RunState):
    """Settings and progress of a run on Fabric, under the names that a ``Trainer`` has for them.

    The callbacks of this package accept a ``FabricRun`` in place of a ``Trainer``. So does ``ModelCheckpoint``.

    Args:
        fabric: The Fabric, with its callbacks and loggers.
        max_steps: The number of optimiser steps of the run. -1 means no limit.
        max_epochs: The number of epochs of the run. -1 means no limit.
        accumulate_grad_batches: The number of micro-batches in an optimiser step.
        gradient_clip_val: The limit of the gradient's norm, or of its values. None does not clip.
        gradient_clip_algorithm: Whether the norm or each value is limited.
        limit_train_batches: The micro-batches in an epoch: a number, a share, or None for all.
        limit_val_batches: The batches in a validation: a number, a share, or None for all.
        val_check_interval: The number of micro-batches between validations, or a share of an epoch.
        check_val_every_n_epoch: The number of epochs between epochs with validations. None counts micro-batches across
            epochs.
        num_sanity_val_steps: The number of batches to validate on before a new run begins.
        log_every_n_steps: The number of optimiser steps between entries in the logs.
        enable_progress_bar: Whether to show a progress bar.
        enable_autolog_hparams: Whether to log the module's hyperparameters.
        default_root_dir: The folder for checkpoints of a run without a logger.
        module: The module that is trained. Callbacks get it as ``pl_module``.
        optimizers: The optimisers, as they are before ``fabric.setup``.

    Attributes:
        global_step: The number of optimiser steps done.
        current_epoch: The number of the epoch, from 0.
        batches_done: The number of micro-batches of this epoch, including the one under way.
        total_batches: The number of micro-batches of all epochs, including the one under way.
        callback_metrics: The last value of each metric.
        in_bar: The values that callbacks show in the progress bar.
        to_log: The values that callbacks put in the next entry of the logs.
    """

    def save_checkpoint(self, path: str | Path, weights_only: bool | None = False) -> None:
        """Write a checkpoint that a Trainer, or this loop, can continue from.

        Args:
            path: The file, or a URL. A file is there as a whole or not at all.
            weights_only: Whether to leave out what training needs besides the weights.
        """
        sharded = isinstance(self.fabric.strategy, FabricShardedStrategy)
        # With sharded weights every rank takes part in making the checkpoint whole.
        checkpoint = dump(self, bool(weights_only)) if sharded or self.fabric.is_global_zero else {}
        if self.fabric.is_global_zero:
            storage = self.fabric.strategy.checkpoint_io
            write = storage.save_checkpoint
            if "://" in str(path) or isinstance(storage, DurableCheckpointIO):  # A URL has no file to rename.
                write(checkpoint, path)
            else:
                with atomic_file(path) as aside:
                    write(checkpoint, aside)
        self.fabric.barrier()
