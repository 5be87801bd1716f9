"""Trains a small model under a strategy and records what it saw; started once for each process by torchrun.

``python worker.py STRATEGY OUTPUT STEPS [CHECKPOINT]`` with STRATEGY one of auto, ddp, fsdp2.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparsityPatternLogger
from sbn_lightning.layers import masked_layers
from tests.helpers import quiet_trainer, small_module, token_loader

GLOBAL_BATCH = 8


class Witness(Callback):
    def __init__(self):
        self.losses, self.masks, self.gammas, self.samples = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layers = dict(masked_layers(pl_module))
        self.masks.append({name: layer.packed_mask().clone() for name, layer in layers.items()})
        self.gammas.append({name: layer.ternary()[1].clone() for name, layer in layers.items()})
        self.samples.append(batch.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


def main(strategy, output, steps, checkpoint=None):
    make = {
        "auto": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp2": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
        "fsdp2-auto": ModelParallelStrategy,
    }[strategy]
    world = 1 if strategy == "auto" else 2
    options = {"strategy": make(), "devices": world, "use_distributed_sampler": False}
    witness = Witness()
    callbacks = [MaskRefresh(interval=2), DenseToSparseRamp("rows", end=0.5), SparsityPatternLogger(2), witness]
    trainer = quiet_trainer(callbacks, max_steps=steps, **options)
    module = small_module(pattern="4:8")
    rank = int(os.environ.get("RANK", 0))
    loader = token_loader(batches=8, batch_size=GLOBAL_BATCH // world, rank=rank, world=world)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    trainer.save_checkpoint(Path(output) / "checkpoint")
    record = {"losses": witness.losses, "masks": witness.masks, "gammas": witness.gammas, "samples": witness.samples}
    record["counts"] = {name: vars(counts) for name, counts in callbacks[2].counts.items()}
    record["ignored"] = sorted(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    torch.save(record, Path(output) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:])
