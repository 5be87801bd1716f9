"""``DurableCheckpoint``: saves when the process is told to stop, and never loses the last complete folder of shards.

After a SIGTERM, Lightning raises at the end of the present micro-batch. After Ctrl-C it raises at once. Both may happen
inside an accumulation window, whose gradients are in no checkpoint. Here training goes on to the end of the optimiser
step, and saves as after any step. Then the process ends with the status that a shell reports for the signal: 143 or
130.

A sharded checkpoint is a folder whose files torch overwrites one by one. So the old folder first gets another name
(``last.before.ckpt``), and is deleted when the new one is complete.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sbn_lightning.callbacks.lightning_internals import fit_loop_before_validation, last_saved, writes_shards
from sbn_lightning.checkpoints import sharded
from sbn_lightning.checkpoints.io import say
from sbn_lightning.distributed.stopping import Agreement

if TYPE_CHECKING:
    from torch import nn

    from sbn_lightning.callbacks.base import Run

# The exit statuses that a shell reports for processes that these signals ended.
SIGTERM_STATUS = 128 + signal.SIGTERM
SIGINT_STATUS = 128 + signal.SIGINT
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class DurableCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that also saves when the process is told to stop, by SIGTERM or by Ctrl-C.

    Training goes on to the end of the optimiser step, saves ``last.ckpt``, and ends the process with status 143
    (SIGTERM) or 130 (Ctrl-C). A second Ctrl-C stops at once, without saving.

    A validation may last longer than a scheduler waits, so a signal cuts it short at once. The next start leaves out
    this validation, as after a crash in a validation. With several processes, and inside an accumulation window, the
    validation runs to its end first.

    The arguments and the saved state are those of ``ModelCheckpoint``.
    """

    _signal: signal.Signals | None = None  # The signal that told the process to stop.
    _when = "to another process"  # The moment at which the signal came, for the message.
    _run: Run | None = None  # The run, while a validation may be cut short; otherwise None.
    _loops: dict[str, Any] | None = None  # The state of the fit loop from before the validation.
    _before: dict[signal.Signals, Any] | None = None  # The handlers that this callback has replaced.
    _seen = 0  # The last optimiser step that this callback has seen.
    _agreement: Agreement | None = None  # With other ranks, on whether to stop.
    _stepped = False  # Whether the last micro-batch ended with an optimiser step.

    @property
    def state_key(self) -> str:
        """The key of ``ModelCheckpoint``, so that each of the two classes can read the state of the other."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        """Start to listen for signals."""
        super().on_train_start(cast(Any, trainer), cast(Any, pl_module))
        self._seen, self._agreement = trainer.global_step, None
        # Lightning begins to listen earlier, and may have noted a SIGTERM by now.
        self._signal = signal.SIGTERM if getattr(trainer, "received_sigterm", False) else None
        self._when = "before training began" if self._signal else "to another process"
        # Only the main thread may listen, and one such callback is enough.
        other = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if threading.current_thread() is threading.main_thread() and not isinstance(other, DurableCheckpoint):
            self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_signal)}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # A program may ignore Ctrl-C.
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        self._when = f"in the validation after step {self._seen}" if self._run else f"during step {self._seen + 1}"
        if self._run is not None:
            self._save_and_exit(self._run)
        if number == signal.SIGINT:
            # print() is not safe here: the signal may have interrupted another print().
            os.write(2, b"\nCtrl-C: saving when the step is done; once more stops at once, without saving\n")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, and end the process, if a signal has come and the optimiser has taken a step."""
        super().on_train_batch_end(cast(Any, trainer), cast(Any, pl_module), outputs, batch, batch_idx)
        self._stepped = trainer.global_step > self._seen
        if self._stepped:
            self._seen = trainer.global_step
            stop = self._signal is not None
            if trainer.world_size > 1:
                # One process may get the signal one step before another.
                stop = self._agree(stop)
            if stop:
                self._save_and_exit(trainer)

    def _agree(self, stop: bool) -> bool:
        """Whether a rank has a signal. No GPU is asked, because the host would wait for it in every step."""
        if self._agreement is None:
            self._agreement = Agreement()
        return self._agreement.decide(stop)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with folder_of_before_kept(cast(Any, trainer), filepath):
            super()._save_checkpoint(trainer, filepath)

    def on_validation_start(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        """Let a signal cut the validation short, if that loses nothing."""
        # Inside a window the gradients would be lost, because no checkpoint has them. Several processes would have to
        # agree.
        if trainer.sanity_checking or not self._before or not self._stepped or trainer.world_size > 1:
            return
        if isinstance(trainer, Trainer):
            self._loops = fit_loop_before_validation(trainer)
        self._run = trainer
        if self._signal is not None:
            self._save_and_exit(trainer)

    def on_validation_end(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        """Let a signal wait for the end of a step again."""
        self._run = self._loops = None
        super().on_validation_end(cast(Any, trainer), cast(Any, pl_module))

    def on_save_checkpoint(self, trainer: Run, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Give a checkpoint that is saved within a validation the progress from before the validation."""
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:  # type: ignore[override]
        """Restore the signal handlers from before training."""
        self._stop_listening()
        if self._agreement is not None:
            self._agreement.end()
            self._agreement = None
        super().on_train_end(cast(Any, trainer), cast(Any, pl_module))

    def on_exception(self, trainer: Run, pl_module: nn.Module, exception: BaseException) -> None:  # type: ignore[override]
        """Restore the signal handlers from before training."""
        self._stop_listening()
        super().on_exception(cast(Any, trainer), cast(Any, pl_module), exception)

    def teardown(self, trainer: Run, pl_module: nn.Module, stage: str) -> None:  # type: ignore[override]
        """Restore the signal handlers from before training."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        self._run = self._loops = None
        before, self._before = self._before or {}, None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _save_and_exit(self, trainer: Run) -> None:
        for number in self._before or {}:
            signal.signal(number, signal.SIG_IGN)  # A second signal must not interrupt the saving.
        path = self.last_model_path
        is_saved = self._last_global_step_saved == trainer.global_step and last_saved(self) == path
        if not is_saved or self.save_weights_only:
            path = self.format_checkpoint_name(self._monitor_candidates(cast(Any, trainer)), self.CHECKPOINT_NAME_LAST)
            self.last_model_path = path
            with folder_of_before_kept(trainer, path):
                trainer.save_checkpoint(path)  # Never the weights alone, because training continues from this file.
        getattr(trainer.strategy, "finish_checkpoint", _nothing)()
        number = self._signal or signal.SIGTERM
        say(
            f"{NAMES[number]}: saved step {trainer.global_step} to {path}; --ckpt_path last continues from there "
            f"(the signal came {self._when})"
        )
        raise SIGTERMException(SIGTERM_STATUS if number == signal.SIGTERM else SIGINT_STATUS)


@contextmanager
def folder_of_before_kept(trainer: Run, path: str) -> Iterator[None]:
    """Keep the old sharded checkpoint as ``*.before.ckpt`` until the new one in its place is complete.

    Checkpoints that are single files need no such care, so nothing happens for them.

    Args:
        trainer: The run that saves.
        path: The path of the checkpoint.
    """
    folder = Path(path)
    before = folder.with_suffix(".before.ckpt")
    # A strategy may write in the background. A strategy that does not is done already.
    getattr(trainer.strategy, "finish_checkpoint", _nothing)()
    if writes_shards(trainer.strategy):
        # After a crash the folder may be incomplete. Then it must not replace the complete one from before.
        if trainer.is_global_zero and folder.is_dir() and not sharded.what_is_missing(folder):
            shutil.rmtree(before, ignore_errors=True)
            folder.replace(before)
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero and before.is_dir():
        getattr(trainer.strategy, "after_checkpoint", _at_once)(partial(shutil.rmtree, before))


def _nothing() -> None: ...


def _at_once(action: Callable[[], object]) -> None:
    action()
