"""How the ranks of a run agree to stop, without their GPUs.

A SIGTERM reaches ranks at different moments, or only one of them. All ranks must stop at the same micro-batch, or some
wait for ever in a collective. Lightning therefore broadcasts a number from GPU to GPU before each micro-batch, and
reads the number. Reading waits until the GPU has finished all earlier work. The GPU then stands still while the host
prepares the next kernels. In a run of one process Lightning does not ask.

Here the ranks agree through the key-value store of the process group. No GPU takes part, so the hosts stay ahead.
"""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import _get_default_store

_made = count()  # All ranks count alike, so the number makes keys unique.
_LOOK = 0.01  # Seconds between two looks into the store.
_KEPT = 1000  # Decisions that stay in the store. A rank may be this far behind rank 0.


class Agreement:
    """Lets ranks decide together, again and again, whether to stop. Construct it on all ranks."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._store: Any = _get_default_store().clone()  # Waiting on one connection must not block other users of it.
        self._prefix = f"sbn_lightning/stop/{next(_made)}"
        self._decided = 0

    def decide(self, asked: bool) -> bool:
        """Decide whether to stop. All ranks must call this equally often, and get the same answer.

        If one rank asks, the ranks stop at this decision or at the next one.

        Args:
            asked: Whether this rank asks to stop.
        """
        if asked:
            self._store.set(f"{self._prefix}/asked", "")
        number, self._decided = self._decided, self._decided + 1
        if self.rank != 0:
            return bool(self._store.get(f"{self._prefix}/{number}") == b"stop")  # Waits until rank 0 has decided.
        stop = bool(self._store.check([f"{self._prefix}/asked"]))
        self._store.set(f"{self._prefix}/{number}", "stop" if stop else "go")
        if number >= _KEPT:
            self._store.delete_key(f"{self._prefix}/{number - _KEPT}")
        return stop

    def end(self) -> None:
        """Say that this rank decides no more. Rank 0 waits for the others, because its process may hold the store."""
        key = f"{self._prefix}/ended"
        if self.rank != 0:
            self._store.add(key, 1)
            return
        end = time.monotonic() + self._store.timeout.total_seconds()
        while self._store.add(key, 0) < dist.get_world_size() - 1 and time.monotonic() < end:
            time.sleep(_LOOK)


class _Signals:
    """Takes the place of two methods of Lightning: one hears a SIGTERM, and one broadcasts whether a rank has.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._agreement = Agreement()
        self._heard = False

    def hear(self, number: int, frame: Any) -> None:
        """Note a SIGTERM, and pass it on to the processes that Lightning has started."""
        if not self._heard and (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(number)  # type: ignore[arg-type]
        self._heard = True

    def stop_if_agreed(self) -> None:
        """Stop this rank at the micro-batch at which all ranks stop.

        Raises:
            SIGTERMException: If a rank has heard a SIGTERM.
        """
        if self._agreement.decide(asked=self._heard):
            self._trainer._signal_connector.received_sigterm = True
            with suppress(RuntimeError):
                dist.barrier()
            raise SIGTERMException


def stop_together(trainer: Any) -> None:
    """Make the ranks of a Trainer agree on a SIGTERM through the store. All ranks must call this, before training.

    Nothing happens in a run of one process, for a run that has no Trainer, and at a second call.

    Args:
        trainer: The Trainer. Its process group must be there, and Lightning must not listen for signals yet.
    """
    if not isinstance(trainer, Trainer) or trainer.world_size == 1 or not dist.is_initialized():
        return
    loop: Any = trainer.fit_loop.epoch_loop
    listener: Any = trainer._signal_connector
    if hasattr(loop, "_broadcast_sigterm_tensor") and "_broadcast_sigterm_tensor" not in vars(loop):
        signals = _Signals(trainer)
        loop._broadcast_sigterm_tensor = signals.stop_if_agreed
        listener._sigterm_notifier_fn = signals.hear
