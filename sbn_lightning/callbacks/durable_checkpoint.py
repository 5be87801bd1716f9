"""Checkpoints that are whole or not there, and one more when the process is told to stop.

Lightning notes a SIGTERM and raises at the end of a micro-batch, which may be inside an accumulation window, where
gradients that no checkpoint has are lost, and exits with status 0. Here training goes on to the end of the optimiser
step, saves as it does after any step, and exits with status 143.

A sharded checkpoint is a folder whose files torch overwrites one by one: the folder of before gets another name first
(``last.before.ckpt``), and goes when the new one is complete.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sbn_lightning.checkpoints import sharded
from sbn_lightning.checkpoints.io import say

if TYPE_CHECKING:
    from torch import nn

    from sbn_lightning.callbacks.base import Run

SIGTERM_STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that a SIGTERM ended


class DurableCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that also saves when the process gets a SIGTERM, as a job that is preempted does.

    Training goes on to the end of the optimiser step, ``last.ckpt`` is saved, and ``SIGTERMException`` ends the
    process with status 143. A validation, which a scheduler may not wait for, is cut short at once, and the next start
    leaves it out, as after a crash in one; on several processes, which must agree, and inside an accumulation window,
    it is waited for. Takes the arguments of ``ModelCheckpoint``, and reads and writes its state.
    """

    _terminated = False
    _run: Run | None = None  # while in a validation that a signal may end
    _loops: dict[str, Any] | None = None
    _before: Any = None
    _listens = False
    _seen = 0
    _stepped = False  # whether the last micro-batch ended in an optimiser step

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        super().on_train_start(cast(Any, trainer), cast(Any, pl_module))
        self._seen = trainer.global_step
        self._terminated = getattr(trainer, "received_sigterm", False)  # Lightning listens from earlier on
        # Only the main thread may, and one such callback is enough.
        other = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if threading.current_thread() is threading.main_thread() and not isinstance(other, DurableCheckpoint):
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
            self._listens = True

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._terminated = True
        if self._run is not None:
            self._save_and_exit(self._run)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(cast(Any, trainer), cast(Any, pl_module), outputs, batch, batch_idx)
        self._stepped = trainer.global_step > self._seen
        if self._stepped:
            self._seen = trainer.global_step
            terminated = self._terminated
            if trainer.world_size > 1:
                # One process may get the signal a step before another.
                terminated = trainer.strategy.reduce_boolean_decision(terminated, all=False)
            if terminated:
                self._save_and_exit(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with folder_of_before_kept(cast(Any, trainer), filepath):
            super()._save_checkpoint(trainer, filepath)

    def on_validation_start(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        # Gradients of half a window are in no checkpoint, and processes must agree.
        if trainer.sanity_checking or not self._listens or not self._stepped or trainer.world_size > 1:
            return
        if isinstance(trainer, Trainer):
            self._loops = _before_validation(trainer)
        self._run = trainer
        if self._terminated:
            self._save_and_exit(trainer)

    def on_validation_end(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        self._run = self._loops = None
        super().on_validation_end(cast(Any, trainer), cast(Any, pl_module))

    def on_save_checkpoint(self, trainer: Run, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        self._stop_listening()
        super().on_train_end(cast(Any, trainer), cast(Any, pl_module))

    def on_exception(self, trainer: Run, pl_module: nn.Module, exception: BaseException) -> None:  # type: ignore[override]
        self._stop_listening()
        super().on_exception(cast(Any, trainer), cast(Any, pl_module), exception)

    def teardown(self, trainer: Run, pl_module: nn.Module, stage: str) -> None:  # type: ignore[override]
        self._stop_listening()

    def _stop_listening(self) -> None:
        self._run = self._loops = None
        if self._listens:
            self._listens = False
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _save_and_exit(self, trainer: Run) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut this short
        path = self.last_model_path
        is_saved = self._last_global_step_saved == trainer.global_step and self._last_checkpoint_saved == path
        if not is_saved or self.save_weights_only:
            path = self.format_checkpoint_name(self._monitor_candidates(cast(Any, trainer)), self.CHECKPOINT_NAME_LAST)
            self.last_model_path = path
            with folder_of_before_kept(trainer, path):
                trainer.save_checkpoint(path)  # never the weights alone: it is to be continued from
        say(f"SIGTERM: saved step {trainer.global_step} to {path}; --ckpt_path last continues from there")
        raise SIGTERMException(SIGTERM_STATUS)


@contextmanager
def folder_of_before_kept(trainer: Run, path: str) -> Iterator[None]:
    """Keeps a sharded checkpoint, as ``*.before.ckpt``, until the one that is saved in its place is whole.

    Does nothing for files.
    """
    folder = Path(path)
    before = folder.with_suffix(".before.ckpt")
    if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
        # One that is not complete, after a crash, is not worth the place of the one before it.
        if trainer.is_global_zero and folder.is_dir() and not sharded.what_is_missing(folder):
            shutil.rmtree(before, ignore_errors=True)
            folder.replace(before)
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero and before.is_dir():
        shutil.rmtree(before)


def _before_validation(trainer: Trainer) -> dict[str, Any]:
    """State of the fit loop as it was in ``on_train_batch_end``, before the validation that starts.

    A run that resumes from there goes on with the next batch, without that validation. From a state inside it
    Lightning would go on with the rest of it, from the first batches, and log the mean of those.
    """
    state = deepcopy(trainer.fit_loop.state_dict())
    progress = state["epoch_loop.batch_progress"]
    for count in ("total", "current"):
        progress[count]["completed"] -= 1
    # Lightning counts what is left out from zero.
    return {key: value for key, value in state.items() if "val_loop" not in key}
