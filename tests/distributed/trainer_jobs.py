"""Jobs of :mod:`tests.distributed.forked` that train with a Trainer: signals, validations, averages, and savers."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback

from sbn_lightning import DurableCheckpoint
from sbn_lightning.distributed.strategies import ShardedStrategy
from tests.distributed.sharded_fit import fit, full_disk
from tests.helpers import quiet_trainer, small_module, token_loader


def stopped(folder: Path, rank: int) -> None:
    """Send a SIGTERM to one rank in its third micro-batch, and write down where this rank stops."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from sbn_lightning.distributed.strategies import ReplicatedStrategy

    here, batches, ended = int(os.environ["RANK"]), [], "nothing"

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch_idx)
            if here == rank and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    strategy = ReplicatedStrategy(max_ctas=8)  # Only NCCL knows what that is.
    trainer = quiet_trainer([Stop()], strategy=strategy, devices=2, max_steps=8)
    loader = token_loader(batches=8, batch_size=2, length=9, rank=here, world=2)
    try:
        trainer.fit(small_module(pattern="4:8", n_layers=1), loader)
    except SIGTERMException as error:
        ended = type(error).__name__
    (folder / f"rank{here}.json").write_text(json.dumps({"batches": batches, "ended": ended}))


def validated(folder: Path) -> None:
    """Validate in inference mode and then train, in one program. Losses are those of training alone."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = {"length": 9, "rank": rank, "world": ranks, "batch_size": 2}

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["loss"].item())

    for gather in ("packed_step", "latent"):
        found = []
        for first in (False, True):
            seen: list[float] = []
            torch.manual_seed(0)
            module = small_module(pattern="4:8", n_layers=1)
            trainer = quiet_trainer(
                [Losses()], strategy=ShardedStrategy(gather=gather, max_ctas=8), devices=ranks, max_steps=3
            )
            if first:
                # With gloo Lightning does not use the inference mode, as it does with NCCL.
                with mock.patch("lightning.pytorch.loops.utilities._distributed_is_initialized", return_value=False):
                    trainer.validate(module, token_loader(batches=1, **data), verbose=False)
            trainer.fit(module, token_loader(batches=3, **data))
            found.append(seen)
        assert len(found[0]) == 3
        assert found[1] == found[0], (gather, found)


def background(folder: Path) -> None:
    """Write checkpoints in the background: slowly, so that training overtakes them, and then onto a full disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    from sbn_lightning.checkpoints.sharded import what_is_missing
    from sbn_lightning.core.errors import DataError

    rank, may_write, write = int(os.environ["RANK"]), threading.Event(), FileSystemWriter.write_data
    seen: list[dict[str, str]] = []

    def slow(*args: Any) -> Any:
        may_write.wait(60)
        return write(*args)

    def full(*args: Any) -> Any:
        return full_disk("shard") if rank == 1 else write(*args)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            may_write.clear()  # The callback that saves comes later.

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append({path.name: what_is_missing(path) for path in sorted(folder.glob("*.ckpt"))})
            trainer.strategy.barrier()  # Both ranks have looked.
            may_write.set()

        def on_train_end(self, *args: Any) -> None:
            may_write.set()

    options = {"save_distributed_checkpoint": True, "save_in_background": True}
    with mock.patch.object(FileSystemWriter, "write_data", slow):
        fit(folder, 3, callbacks=[Watch()], keep=1, **options)
    assert [set(one) for one in seen] == [set(), {"step=1.ckpt"}, {"step=1.ckpt", "step=2.ckpt"}]
    assert [bool(one[name]) for one in seen[1:] for name in sorted(one)] == [True, False, True]  # What is not whole.
    if rank == 0:  # It writes the last file.
        assert [(path.name, what_is_missing(path)) for path in folder.glob("*.ckpt")] == [("step=3.ckpt", "")]
    with (
        mock.patch.object(FileSystemWriter, "write_data", full),
        pytest.raises(DataError, match=r"cannot write the checkpoint .*step=1.ckpt: rank 1: .*No space left on device"),
    ):
        fit(folder / "full", 3, **options)


def averaged(folder: Path, first: str | None = None) -> None:
    """Train with averaged weights under the sharded strategy, or alone, and write down what a validation saw.

    Args:
        folder: The folder to write to.
        first: The folder of the run to continue from its third step; None for a new run.
    """
    from sbn_lightning import MaskRefresh
    from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging
    from sbn_lightning.layers import masked_layers

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen: dict[str, list[Any]] = {"losses": [], "validations": [], "masks": []}

    class Witness(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen["losses"].append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen["masks"].append([layer.packed_mask().clone() for _, layer in masked_layers(pl_module)])

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen["validations"].append(trainer.callback_metrics["val/loss"].item())

    saver = DurableCheckpoint(dirpath=str(folder), filename="{step}", every_n_train_steps=3, save_top_k=-1)
    average = SparseEMAWeightAveraging(decay=0.6)
    strategy: Any = "auto" if ranks == 1 else ShardedStrategy()
    trainer = quiet_trainer(
        [MaskRefresh(interval=2), average, Witness(), saver],
        strategy=strategy,
        devices=ranks,
        max_steps=6,
        limit_val_batches=1,
        enable_checkpointing=True,
        use_distributed_sampler=False,
    )
    data = {"length": 9, "rank": rank, "world": ranks, "batch_size": 4 // ranks}
    checkpoint = None if first is None else str(Path(first) / "step=3.ckpt")
    module = small_module(pattern="4:8", n_layers=1)
    trainer.fit(module, token_loader(batches=3, **data), token_loader(batches=1, **data), ckpt_path=checkpoint)
    torch.save(seen, folder / f"rank{rank}.pt")
    trainer.save_checkpoint(folder / "end.ckpt")
