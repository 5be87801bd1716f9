"""Tokens per second, of training alone: validation and checkpoints do not count."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sbn_lightning.callbacks.base import RunCallback, show

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


def count_tokens(batch: Any) -> int:
    """Tokens that a batch trains on: ``[batch, sequence_length + 1]`` holds ``batch * sequence_length``.

    In a mapping the ``input_ids`` (or else the first tensor) are counted as they are.
    """
    if isinstance(batch, Tensor):
        return batch[..., 1:].numel()
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
        return ids.numel() if isinstance(ids, Tensor) else 0
    return count_tokens(batch[0]) if isinstance(batch, (list, tuple)) and batch else 0


class TokenThroughput(RunCallback):
    """Logs ``tokens_per_second`` over all processes, and shows it in the progress bar.

    Time is taken between the ends of batches, without synchronising with the device: over a window of many batches the
    device's time is what passes.

    Args:
        window: Batches that an average spans.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._batches, self._since = 0, 0, time.perf_counter()

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        self._restart()

    def on_validation_start(self, trainer: Run, pl_module: nn.Module) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Run, pl_module: nn.Module) -> None:
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += count_tokens(batch)
        self._batches += 1
        if self._batches == self.window:
            rate = self._tokens * trainer.world_size / (time.perf_counter() - self._since)
            show(trainer, pl_module, "tokens_per_second", rate)
            self._restart()
