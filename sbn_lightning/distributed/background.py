"""``BackgroundSaver``: sharded checkpoints that are written while training goes on.

A copy of the shards is made in the memory of the host, and training continues. A thread writes the copy. A checkpoint
counts as complete when its last file is there (:mod:`sbn_lightning.checkpoints.sharded`). Rank 0 puts this file in its
place when all ranks have written. Older checkpoints are deleted only then, so a crash at any moment leaves one that is
complete.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save

from sbn_lightning.checkpoints.sharded import REST
from sbn_lightning.core.files import atomic_stream
from sbn_lightning.distributed.shard_files import ShardWriter, cannot_write, failures_named


class BackgroundSaver:
    """Writes one checkpoint at a time. All ranks must construct it, and call :meth:`save`, together."""

    def __init__(self) -> None:
        # Threads of all ranks talk over this group, while their main threads train.
        self._group: Any = dist.new_group(backend="gloo")
        self._writing: _Writing | None = None

    def save(self, shards: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        """Begin to write a checkpoint. If the checkpoint before it is not written yet, wait for that one first.

        Args:
            shards: The sharded states of this rank.
            rest: Everything else; rank 0 writes it.
            path: The folder to write to.

        Raises:
            DataError: If the checkpoint before it could not be written, or if this one cannot be begun.
        """
        self.finish()
        with failures_named(path):
            path.mkdir(parents=True, exist_ok=True)
            if dist.get_rank() == 0:
                (path / REST).unlink(missing_ok=True)
                with atomic_stream(path / f"{REST}.part") as stream:
                    torch.save(rest, stream)
        self._writing = _Writing(path)
        shards_written = async_save(shards, storage_writer=ShardWriter(path), process_group=self._group)
        assert isinstance(shards_written, Future)
        shards_written.add_done_callback(self._writing.complete)

    def later(self, action: Callable[[], object]) -> None:
        """Call a function when the checkpoint is complete: at once, if none is being written; never after a failure."""
        if self._writing is None:
            action()
        else:
            self._writing.later(action)

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, if there is one. Does not wait."""
        if self._writing is not None and self._writing.done.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is written. On rank 0 it is then complete.

        Raises:
            DataError: If the checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        with failures_named(writing.path):
            try:
                writing.done.result()
            except RuntimeError as error:  # Another rank is gone.
                raise cannot_write(writing.path, error) from error


class _Writing:
    """A checkpoint that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: Future[None] = Future()
        self._postponed: list[Callable[[], object]] = []
        self._lock = Lock()

    def complete(self, shards_written: Future[Any]) -> None:
        """Make the checkpoint complete. The thread that has written the shards calls this."""
        with self._lock:
            try:
                shards_written.result()
                if dist.get_rank() == 0:
                    (self.path / f"{REST}.part").replace(self.path / REST)
                for action in self._postponed:
                    action()
            except BaseException as error:  # CheckpointException is no Exception.
                self.done.set_exception(error)
            else:
                self.done.set_result(None)

    def later(self, action: Callable[[], object]) -> None:
        with self._lock:
            if not self.done.done():
                self._postponed.append(action)
            elif self.done.exception() is None:
                action()
