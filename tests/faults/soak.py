"""Train a tiny model for 2,000 steps with every callback, and print the memory before and after.

python tests/faults/soak.py --loop fabric
"""

import argparse
import gc
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import TensorBoardLogger

sys.path.insert(0, str(Path(__file__).parents[2]))

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    SparseBitNet,
    SparsityPatternLogger,
    TokenDataModule,
    TokenThroughput,
    TrainingReport,
    WeightDecaySchedule,
)
from sbn_lightning.callbacks import DurableCheckpoint, DurableCheckpointIO, NonFiniteGuard
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.data import prepare
from sbn_lightning.fabric.loop import FabricRun, train
from tests.helpers import quiet_trainer, small_config


def resident():
    """The resident memory of this process, in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Memory(RunCallback):
    """Records memory and the number of tensors at the given steps."""

    def __init__(self, steps):
        self.steps, self.seen = steps, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps and trainer.global_step not in self.seen:
            memory = resident()
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            self.seen[trainer.global_step] = memory, tensors
            print(f"step {trainer.global_step:5d}: {memory:7.1f} MiB, {tensors} tensors", flush=True)


def soak(folder, steps=2000, loop="fit", workers=0):
    """Train, and return memory (MiB) and the number of live tensors, by step."""
    torch.manual_seed(1)
    prepare(input="stdlib", output=f"{folder}/tokens", tokenizer="byte", max_bytes=200_000, num_workers=1)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    module = SparseBitNet(small_config(pattern="4:8", n_layers=1), optimizer=optimizer, warmup_steps=10)
    data = TokenDataModule(f"{folder}/tokens", batch_size=4, sequence_length=32, num_workers=workers)
    memory = Memory({steps // 10, *range(steps // 4, steps + 1, steps // 4)})
    callbacks = [
        MaskRefresh(interval=2),
        DenseToSparseRamp("walk", end=0.5),
        WeightDecaySchedule(),
        SparsityPatternLogger(interval=10),
        TokenThroughput(),
        TrainingReport(),
        NonFiniteGuard(),
        DurableCheckpoint(f"{folder}/checkpoints", every_n_train_steps=20, save_last=True),
        memory,
    ]
    options = {
        "max_steps": steps,
        "val_check_interval": 50,
        "limit_val_batches": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 5,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
    }
    logger = TensorBoardLogger(folder, "logs")
    if loop == "fit":
        trainer = quiet_trainer(
            callbacks, **options, logger=logger, enable_checkpointing=True, plugins=[DurableCheckpointIO()]
        )
        trainer.fit(module, data)
    else:
        fabric = Fabric(
            accelerator="cpu", devices=1, callbacks=callbacks, loggers=logger, plugins=[DurableCheckpointIO()]
        )
        train(FabricRun(fabric, **options), module, data)
    return memory.seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--loop", choices=["fit", "fabric"], default="fit")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(folder, arguments.steps, arguments.loop, arguments.workers)
    (first, _), (last, _) = seen[min(seen)], seen[max(seen)]
    print(f"{first:.1f} MiB after warm-up, {last:.1f} MiB at the end: {last - first:+.1f} MiB")


if __name__ == "__main__":
    main()
