"""``FabricRun``: a run on Fabric that callbacks take for a ``Trainer``."""

from __future__ import annotations

from pathlib import Path

from sbn_lightning.checkpoints.io import DurableCheckpointIO
from sbn_lightning.core.files import atomic_file
from sbn_lightning.fabric.checkpoint import dump
from sbn_lightning.fabric.state import RunState


class FabricRun(RunState):
    """Settings and progress of a run on Fabric, under the names that a ``Trainer`` has for them.

    This package's callbacks take it in place of a ``Trainer``; so does ``ModelCheckpoint``.

    Args:
        fabric: Fabric, with its callbacks and loggers.
        max_steps: Optimiser steps of the run; -1 for no limit.
        max_epochs: Epochs of the run; -1 for no limit.
        accumulate_grad_batches: Micro-batches in an optimiser step.
        gradient_clip_val: Limit of the gradient's norm, or of its values; None does not clip.
        gradient_clip_algorithm: Which of the two.
        limit_train_batches: Micro-batches in an epoch: a number, a share, or None for all.
        limit_val_batches: Batches in a validation, likewise.
        val_check_interval: Micro-batches between validations, or a share of an epoch.
        check_val_every_n_epoch: Validate in every n-th epoch; None counts micro-batches across epochs.
        num_sanity_val_steps: Batches to validate on before a new run begins.
        log_every_n_steps: Optimiser steps between entries in the logs.
        enable_progress_bar: Whether to show one.
        enable_autolog_hparams: Whether to log the module's hyperparameters.
        default_root_dir: Where checkpoints go without a logger.
        module: What is trained; callbacks get it as ``pl_module``.
        optimizers: As made, before ``fabric.setup``.

    Attributes:
        global_step: Optimiser steps done.
        current_epoch: Number of the epoch, from 0.
        batches_done: Micro-batches of this epoch, with the one under way.
        total_batches: Micro-batches of all epochs, with the one under way.
        callback_metrics: The last value of each metric.
        in_bar: What callbacks show in the progress bar.
        to_log: What callbacks want in the next entry of the logs.
    """

    def save_checkpoint(self, path: str | Path, weights_only: bool | None = False) -> None:
        """Writes a checkpoint that a Trainer, or this loop, continues from.

        Args:
            path: The file, or a URL; written aside and renamed, so that it is there as a whole or not at all.
            weights_only: Leave out what training needs besides the weights.
        """
        if self.fabric.is_global_zero:
            storage, checkpoint = self.fabric.strategy.checkpoint_io, dump(self, bool(weights_only))
            write = storage.save_checkpoint
            if "://" in str(path) or isinstance(storage, DurableCheckpointIO):  # which writes aside itself
                write(checkpoint, path)
            else:
                with atomic_file(path) as aside:
                    write(checkpoint, aside)
        self.fabric.barrier()
