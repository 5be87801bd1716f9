"""Checkpoint files that are whole or not there.

Lightning's ``TorchCheckpointIO`` writes to the system's temporary folder, does not sync, and moves the file; across
file systems that move is a copy, and a crash in it, or a full disk, leaves half a ``last.ckpt``. Here a checkpoint is
written next to its place, synced, and renamed: a name holds the old file or the new one at every moment.
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
    """Writes a local checkpoint aside, syncs and renames it; URLs and reading are Lightning's own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``path`` as a whole, or leaves what is there.

        Raises:
            DataError: If it cannot be written: the disk is full, or the folder is not writable.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            # One process of a run writes its checkpoints: what is left of an earlier write belongs to a killed one.
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
    """Prints a line, once."""
    print(text, flush=True)
