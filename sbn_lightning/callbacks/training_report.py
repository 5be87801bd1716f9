"""``TrainingReport``: the summary at the end of a run: quality, sparsity, and the places of logs and checkpoints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.callbacks.sparsity_logger import SparsityPatternLogger
from sbn_lightning.core.tables import format_table
from sbn_lightning.layers.statistics import by_kind

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class TrainingReport(RunCallback):
    """Print a summary when training ends.

    The summary has the validation loss and perplexity, zeros and flip rates by kind of layer, and the places of logs
    and checkpoints. Zeros and flip rates come from the last look of the run's :class:`SparsityPatternLogger`. A run
    that continues from a checkpoint at its end, or beyond it, trains nothing, and the summary says so.
    """

    _trained = False  # Whether a batch was trained in this fit.

    def on_fit_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Forget an earlier fit."""
        self._trained = False

    def on_train_batch_end(self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that this fit trains."""
        self._trained = True

    def on_fit_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Print the summary, on one process."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[union-attr]
            print(f"\n{self.text(trainer)}\n", file=sys.stdout, flush=True)

    def text(self, trainer: Run) -> str:
        """Return the summary as text."""
        blocks = [self._trained_steps(trainer)]
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
        if metrics:
            blocks.append(format_table(("validation", "value"), [(k, f"{v:.4f}") for k, v in sorted(metrics.items())]))
        for callback in trainer.callbacks:  # type: ignore[union-attr]
            if isinstance(callback, SparsityPatternLogger) and callback.counts:
                blocks.append(self._sparsity(callback))
        places = []
        loggers: list[Any] = [logger for logger in trainer.loggers if hasattr(logger, "log_dir")]
        places += [f"logs: {logger.log_dir}" for logger in loggers if logger.log_dir]
        if trainer.checkpoint_callback is not None:
            best, last = (getattr(trainer.checkpoint_callback, f"{k}_model_path", "") for k in ("best", "last"))
            places += [f"checkpoint ({kind}): {path}" for kind, path in (("best", best), ("last", last)) if path]
        if save_dir := getattr(trainer.logger, "save_dir", None):
            places.append(f"look at it: tensorboard --logdir {save_dir}")
        return "\n\n".join([*blocks, "\n".join(places)]).rstrip()

    def _trained_steps(self, trainer: Run) -> str:
        """Return the line about the steps."""
        step = trainer.global_step
        if self._trained or step == 0:
            return f"Trained {step} steps."
        place = f"the checkpoint is at step {step}" if trainer.ckpt_path else f"the run is at step {step} already"
        if 0 <= trainer.max_steps <= step:
            return f"Nothing to do: {place}, and max_steps is {trainer.max_steps}. A larger max_steps trains on."
        epochs = getattr(trainer, "max_epochs", None)
        if epochs is not None and 0 <= epochs <= getattr(trainer, "current_epoch", 0):
            return f"Nothing to do: {place}, and max_epochs is {epochs}. A larger max_epochs trains on."
        return f"Trained no step: {place}."

    @staticmethod
    def _sparsity(logger: SparsityPatternLogger) -> str:
        rows = []
        for kind, counts in (*by_kind(logger.counts).items(), ("all", logger.total())):
            shares = counts.shares()
            keys = ("zeros_natural", "zeros_enforced", "zeros", "flip_rate_mask", "flip_rate_code")
            rows.append((kind, f"{int(counts.weights):,}", *(f"{100 * shares[key]:.2f} %" for key in keys)))
        header = ("layers", "weights", "zeros natural", "enforced", "in all", "mask flips", "code flips")
        return format_table(header, rows)
