"""``LossProgressBar``: Lightning's progress bar with the loss, without a wait for the GPU after every batch.

Lightning fetches a value that is logged with ``prog_bar=True`` from the device after every batch, whether or not the
bar is drawn. The host then never runs ahead of the GPU, and the GPU waits for launches. On an H200 a step of a model
with half a billion parameters took 286 ms in a Trainer and 245 ms in a bare loop. (A part of the difference came from
the learning rate, a number that was copied to the device at every step.) So the module logs its loss for loggers only,
and this bar fetches the loss when it is drawn.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf

from sbn_lightning.callbacks.lightning_internals import batches_done_at_epoch_start, batches_done_in_epoch


class LossProgressBar(TQDMProgressBar):
    """Lightning's one-line bar, with the loss and the perplexity of the batch after which it is drawn.

    Args:
        refresh_rate: The number of batches between two drawings. Each drawing waits for the device.
        process_position: The line of the bar; see ``TQDMProgressBar``.
        leave: Whether the bar of each epoch stays on the screen; see ``TQDMProgressBar``.
        names: The metrics to show besides those that are logged with ``prog_bar=True``, by their logged names.
    """

    def __init__(
        self,
        refresh_rate: int = 10,
        process_position: int = 0,
        leave: bool = False,
        names: tuple[str, ...] = ("train/loss", "train/perplexity"),
    ) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self.names = names

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        """Open the bar. After a resume inside an epoch the bar starts where the epoch stood.

        Lightning gives the bar its total and its name when an epoch starts, and does not start this epoch again.
        """
        super().on_train_start(trainer, pl_module)
        if done := batches_done_in_epoch(trainer):
            bar = self.train_progress_bar
            bar.reset()
            bar.total = convert_inf(self.total_train_batches)
            bar.initial = bar.n = done  # The rate counts from `initial`.
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Give the bar the number of batches of the epoch that starts."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.total = convert_inf(self._total(batches_done_at_epoch_start(trainer)))

    def get_metrics(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows."""
        metrics = trainer.callback_metrics
        shown = {name: float(metrics[name]) for name in self.names if name in metrics}
        return shown | super().get_metrics(trainer, pl_module) | _version_number(trainer)

    @property
    def total_train_batches(self) -> int | float:
        """The number of micro-batches at which the bar ends: those of the epoch, or fewer if ``max_steps`` comes first.

        Lightning uses the number of remaining optimiser steps here. After a resume this may be less than the number of
        micro-batches that the epoch has already seen, and the bar then has no total.
        """
        return self._total(batches_done_in_epoch(self.trainer))

    def _total(self, done: int) -> int | float:
        """The number of micro-batches at which the bar ends if ``done`` of them lie behind."""
        trainer = self.trainer
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)


def _version_number(trainer: Trainer) -> dict[str, int | str | float | dict[str, float]]:
    """The number of a version such as ``version_12``, of which Lightning would show the last four letters, ``n_12``."""
    versions = {str(logger.version) for logger in trainer.loggers}
    number = versions.pop().removeprefix("version_") if len(versions) == 1 else ""
    return {"v_num": int(number)} if number.isdecimal() else {}
