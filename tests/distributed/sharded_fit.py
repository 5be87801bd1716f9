"""``fit``: a short training under the sharded strategy, which several jobs of the tests have in common."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback
from torch.distributed.checkpoint import FileSystemWriter

from sbn_lightning import DurableCheckpoint
from sbn_lightning.callbacks import DurableCheckpointIO
from sbn_lightning.checkpoints import io
from sbn_lightning.distributed.strategies import ShardedStrategy
from tests.helpers import quiet_trainer, small_module, token_loader

SEQUENCES = 12  # In a step of all ranks: 1, 2, 3 and 4 ranks divide them.


def full_disk(path: Any, *_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def fit(
    folder: Path,
    steps: int,
    checkpoint: str | None = None,
    callbacks: Any = (),
    full_at: int | None = None,
    batches: int = 8,
    keep: int = -1,
    every: int = 1,
    **strategy: Any,
) -> list[float]:
    """Train with the sharded strategy and save after some steps. Return the losses, averaged over the ranks."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
            if trainer.global_step + 1 == full_at:
                patches = [mock.patch.object(io, "atomic_stream", full_disk)]
                patches.append(mock.patch.object(FileSystemWriter, "write_data", full_disk))
                for patch in patches:
                    patch.start()

    saver = DurableCheckpoint(dirpath=str(folder), filename="{step}", every_n_train_steps=every, save_top_k=keep)
    trainer = quiet_trainer(
        [*callbacks, Losses(), saver],
        strategy=ShardedStrategy(**strategy),
        devices=ranks,
        max_steps=steps,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        plugins=[DurableCheckpointIO()],
    )
    loader = token_loader(batches=batches, batch_size=SEQUENCES // ranks, length=9, rank=rank, world=ranks)
    trainer.fit(small_module(pattern="4:8", n_layers=1), loader, ckpt_path=checkpoint)
    return losses
