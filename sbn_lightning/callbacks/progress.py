"""``LossProgressBar``: Lightning's bar with the loss, which Lightning could only show by waiting for the GPU.

What a module logs with ``prog_bar=True`` is fetched from the device after every batch, whether or not the bar is drawn
then, or is there at all. The host then never runs ahead of the GPU, and the GPU waits for launches: an H200 took 286 ms
for a step of half a billion parameters in a Trainer, 245 in a bare loop (a number logged as the learning rate, copied
to the device each time, had a part in it). So the module logs its loss for loggers only, and this bar fetches it when
it draws.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from sbn_lightning.callbacks.lightning_internals import batches_done_in_epoch


class LossProgressBar(TQDMProgressBar):
    """Lightning's one-line bar, with loss and perplexity of the batch after which it is drawn.

    Args:
        refresh_rate: Batches between drawings; each waits for the device.
        process_position: As in ``TQDMProgressBar``.
        leave: As in ``TQDMProgressBar``.
        names: Metrics, as the module logs them, to show besides those logged with ``prog_bar=True``.
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

    def get_metrics(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = trainer.callback_metrics
        shown = {name: float(metrics[name]) for name in self.names if name in metrics}
        return shown | super().get_metrics(trainer, pl_module)

    @property
    def total_train_batches(self) -> int | float:
        """The number of micro-batches at which the bar ends: that of the epoch, or less if ``max_steps`` comes first.

        Lightning takes the optimiser steps that are left for this number. After a resume that is fewer than the
        micro-batches that the epoch has seen, and the bar then has no total.
        """
        trainer = self.trainer
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, batches_done_in_epoch(trainer) + left)
