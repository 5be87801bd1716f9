"""Checkpoint files that are whole or not there.

Lightning's ``TorchCheckpointIO`` writes to the system's temporary folder, does not sync, and moves the file; across
file systems that move is a copy, and a crash in it, or a full disk, leaves half a ``last.ckpt``. Here a checkpoint is
written next to its place, synced, and renamed: a name holds the old file or the new one at every moment.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sbn_lightning.core.errors import DataError
from sbn_lightning.core.files import sync


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint aside, syncs and renames it; URLs and reading are Lightning's own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``path`` as a whole, or leaves what is there.

        Raises:
            DataError: If it cannot be written: the disk is full, or the folder is not writable.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        aside = target.with_name(f"{target.name}.tmp")
        failure: OSError | None = None
        stream: _Stream | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                stream = _Stream(file)
                torch.save(checkpoint, cast(Any, stream))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
            sync(target.parent)
        except Exception as error:
            # torch may put an error of its own in the place of the one that `write` raised.
            failure = error if isinstance(error, OSError) else stream.error if stream else None
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            if failure is None:
                raise
            raise DataError(
                f"cannot write the checkpoint {path}: {failure.strerror or failure}; the one before it is intact: make "
                "room and continue with --ckpt_path last"
            ) from error


class _Stream:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


@rank_zero_only
def say(text: str) -> None:
    """Prints a line, once."""
    print(text, flush=True)
