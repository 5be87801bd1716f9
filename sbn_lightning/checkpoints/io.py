"""``DurableCheckpointIO``: checkpoint files that are whole or not there.

Lightning's ``TorchCheckpointIO`` writes to the system's temporary folder, does not sync, and then moves the file.
Across file systems that move is a copy, and a crash or a full disk in the middle of the copy leaves half a
``last.ckpt``. Here a checkpoint is written next to its place, synced, and renamed, so a name has the old file or the
new one at every moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sbn_lightning.core.errors import DataError
from sbn_lightning.core.files import atomic_stream, remove_leftovers


class DurableCheckpointIO(TorchCheckpointIO):
    """Write local checkpoints so that they are whole or not there. URLs, and reading, are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint as a whole, or leave what is there.

        Args:
            checkpoint: The contents.
            path: The file, or a URL.
            storage_options: The options of a remote file system, or None.

        Raises:
            DataError: If the file cannot be written, for example because the disk is full.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            # Only one process of a run writes checkpoints. So a temporary file here was left by a killed process.
            remove_leftovers(path)
            with atomic_stream(path) as stream:
                torch.save(checkpoint, stream)
        except OSError as error:
            raise DataError(
                f"cannot write the checkpoint {path}: {error.strerror or error}; the one before it is intact: make "
                "room and continue with --ckpt_path last"
            ) from error


@rank_zero_only
def say(text: str) -> None:
    """Print a line. Only one process of a distributed run prints."""
    print(text, flush=True)
